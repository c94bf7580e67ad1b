"""The hours of a run on GPUs, planned from its examples, its placement and data sheets: what `audit --time` prints, and
a line at a run's start."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..cli import UsageError
from ..corpus.documents import CorpusError, all_sentences
from ..corpus.read import read_splits
from ..distributed.world import World
from ..model.attention import attention_kernel
from ..model.free_memory import GIB
from ..model.llama import Llama
from ..model.precision import DTYPES
from ..runs.resolve import resolve
from ..runs.settings import Settings
from ..runs.setup import choose_compiled, make_task, read_base
from ..text_table import aligned, wrapped
from . import duration
from .arithmetic import FORMS, Form, Work, micro_batches
from .batch import encode_all, plan_epoch
from .cards import CARDS, NETWORK, REPORTED, recognise
from .duration import Links, Machine
from .job import Job, default_epochs
from .placement import check_parallel, fit

# tokens of the training examples of BC5CDR (tagging, all labels, Llama-2's tokenizer): percentile -> length
PERCENTILES = {0: 12, 1: 24, 5: 40, 10: 50, 20: 64, 30: 75, 40: 86, 50: 97, 60: 108, 70: 123, 80: 144, 90: 175, 95: 208,
               98: 247, 99: 285, 99.5: 329, 100: 698}  # fmt: skip
MOST_GPUS = 1024
SAMPLE = 100  # steps by which a run that starts is judged


@dataclass(frozen=True)
class Corpus:
    """What of a corpus takes time.

    Attributes:
        lengths: tokens of each training example.
        prompt, answer: tokens of the mean one.
        evaluated: sentences of the development split.
    """

    name: str
    lengths: Sequence[int]
    prompt: float
    answer: float
    evaluated: int

    @property
    def supervised(self) -> float:
        """Share of the tokens: the answer and the token that ends it."""
        return self.answer / (self.prompt + self.answer - 1)

    @staticmethod
    def bc5cdr() -> "Corpus":
        """As long as the paper's, by percentiles: the corpus itself may not be handed on."""
        return Corpus("BC5CDR with Llama-2's tokenizer", _between(PERCENTILES, 4579), 45.4, 62.5, 4589)

    @staticmethod
    def read(data: str, model: str) -> "Corpus":
        """That of a folder, with the tokenizer of a model folder.

        Raises:
            InputError: either cannot be read, or has no training split.
        """
        splits = read_splits(data)
        settings, _ = resolve(Settings(model=model, data=data), torch.device("cpu"))
        if "train" not in splits:
            raise CorpusError(f"{data}: has no training split")
        task, (config, tokenizer) = make_task(settings, splits), read_base(settings)
        sentences = all_sentences(splits["train"])
        examples, _ = encode_all(task, tokenizer, sentences, config.max_position_embeddings, "skip")
        if not examples:
            raise CorpusError(f"{data}: the training split holds no sentence that can be learnt from")
        prompt, answer = (
            sum(lengths) / len(examples)
            for lengths in ([example.prompt for example in examples], [example.supervised for example in examples])
        )
        evaluated = len(all_sentences(splits["dev"])) if "dev" in splits else 0
        return Corpus(data, [len(example) for example in examples], prompt, answer, evaluated)


def _between(percentiles: dict[float, int], count: int) -> list[int]:
    """So many lengths, spread evenly between percentiles."""
    lengths = []
    for (low, shortest), (high, longest) in pairwise(percentiles.items()):
        number = round(high * count / 100) - round(low * count / 100)
        lengths += [round(shortest + (longest - shortest) * (i + 0.5) / number) for i in range(number)]
    return lengths


def table(model: Llama, settings: Settings, corpus: Corpus, card: str, links: Links) -> dict:
    """Everything about the time of a run.

    Args:
        model: on the meta device, set up for training.
        settings: of which precision, the tokens of a step and what learns matter.

    Raises:
        UsageError: `train` would refuse it, the card has not got the precision, or there are too many of it.
    """
    if links.size > MOST_GPUS:
        raise UsageError(f"--gpus {links.gpus}, --nodes {links.nodes}: at most {MOST_GPUS:,} GPUs are planned for")
    assert settings.batch_tokens is not None, "a step has a size"
    gpu = CARDS[card]
    if settings.precision not in gpu.teraflops:
        raise UsageError(f"--precision {settings.precision}: a {card} has {' and '.join(gpu.teraflops)}")
    capacity = int(gpu.memory * GIB * REPORTED)
    placement = fit(model, settings, corpus.lengths, links.size, capacity)
    check_parallel(placement, settings)
    steps = plan_epoch(corpus.lengths, settings.batch_tokens, seed=0, epoch=0)
    epochs = default_epochs(len(steps))
    machine = Machine(gpu, links, placement.parallel == "fsdp", placement.whole)
    alone = Machine(gpu)
    dealt = micro_batches(corpus.lengths, corpus.supervised, steps, links.size, placement.micro_tokens)
    forms, tokens = {}, sum(corpus.lengths)
    for title, form in FORMS.items():
        work = Work(model, settings.precision, placement.recompute, form)
        planned = machine.training(work, dealt)
        evaluation = _evaluation(machine, work, corpus.prompt, corpus.answer, corpus.evaluated, settings.eval_batch)
        forms[title] = {
            "parts": planned.parts,
            "seconds_an_epoch": planned.seconds,
            "hours_an_epoch": planned.seconds / 3600,
            "tokens_per_second": tokens / planned.seconds,
            "mfu": planned.mfu,
            "seconds_an_evaluation": evaluation,
            "hours_a_run": epochs * (planned.seconds + evaluation) / 3600,
        }
    work = Work(model, settings.precision)
    reach = corpus.prompt + corpus.answer / 2
    passes = {
        title: alone.decoding(work, 1, 1, reach, title == "graphed")
        for title in ("a launch for each kernel", "graphed")
    }
    least = work.decoding(1, 1, reach)["weights"].bytes / (gpu.bandwidth * 1e9)
    return {
        "card": card,
        "gpus": links.gpus,
        "nodes": links.nodes,
        "precision": settings.precision,
        "placement": str(placement),
        "corpus": {"name": corpus.name, "sentences": len(corpus.lengths), "tokens": tokens},
        "batch_tokens": settings.batch_tokens,
        "steps": len(steps),
        "epochs": epochs,
        "training": forms,
        "decoding": {
            "tokens_per_second": {title: 1 / seconds for title, seconds in passes.items()},
            "of_bandwidth": {title: least / seconds for title, seconds in passes.items()},
            "sentences_per_second": {
                rows: alone.sentences_a_second(work, rows, corpus.prompt, corpus.answer)
                for rows in (1, settings.eval_batch)
            },
        },
        "assumptions": assumptions(card, settings.precision, machine),
    }


def _evaluation(machine: Machine, work: Work, prompt: float, answer: float, sentences: int, rows: int) -> float:
    """Seconds in which all GPUs decode so many sentences."""
    return sentences / (machine.links.size * machine.sentences_a_second(work, rows, prompt, answer))


FOUND = "found on an H200"


def assumptions(card: str, precision: str, machine: Machine) -> list[tuple[str, str, str]]:
    """Each with its value and where that comes from."""
    gpu, links = CARDS[card], machine.links
    rows = [
        (f"peak in {precision}", f"{gpu.teraflops[precision]:g} TFLOP/s", gpu.sheet),
        ("reached by large products", f"{duration.PRODUCTS:.0%}", FOUND),
        ("reached by attention's", f"{duration.ATTENTION:.0%}", FOUND),
        ("memory", f"{gpu.bandwidth:,g} GB/s", gpu.sheet),
        ("reached of it", f"{duration.MEMORY:.0%}", FOUND),
        ("by products with few rows", f"{duration.FEW_ROWS:.0%}", FOUND),
        ("a kernel of a graph", f"{duration.KERNEL * 1e6:g} us", FOUND),
        ("a launch in training", f"{duration.TRAINING_LAUNCH * 1e6:g} us", f"{FOUND}, of its host"),
        ("a launch in decoding", f"{duration.LAUNCH * 1e6:g} us", f"{FOUND}, of its host"),
        ("an update of a tensor", f"{duration.UPDATE * 1e6:g} us", f"{FOUND}, of its host"),
        ("tokens a pass with drafts", f"{duration.WRITTEN}", "docs/performance.md, SmolLM2-135M"),
        ("drafted tokens that are wrong", f"{duration.REJECTED:.0%}", "docs/performance.md, SmolLM2-135M"),
    ]
    if links.gpus > 1:
        sheet = gpu.sheet if links.inside == gpu.link else "--link"
        rows.append(("link of a GPU, each direction", f"{links.inside:,g} GB/s", sheet))
    if links.nodes > 1:
        rows.append(("network of a node, each direction", f"{links.network:,g} GB/s", "assumed; --network"))
    if links.size > 1 and not machine.sharded:
        rows.append(("of a micro-batch, beside which ddp sums", f"{duration.BACKWARD:.0%}", "assumed"))
    if links.size > 1:
        rows.append(("reached of links", f"{duration.LINKS:.0%}", "assumed"))
        rows.append(("a collective waits", f"{duration.COLLECTIVE * 1e6:g} us", "assumed"))
    return rows


def show(result: dict) -> str:
    """The table for a person."""
    corpus, forms, decoding = result["corpus"], result["training"], result["decoding"]
    gpus = f"{result['gpus']} x {result['card']}" + (
        f" in each of {result['nodes']} nodes" if result["nodes"] > 1 else ""
    )
    lines = [
        wrapped(f"{gpus}, {result['precision']}, {result['placement']}"),
        wrapped(
            f"{corpus['name']}: {corpus['sentences']:,} sentences, {corpus['tokens']:,} tokens, "
            f"{result['steps']:,} steps of up to {result['batch_tokens']:,} tokens an epoch"
        ),
        "",
    ]
    rows = [["planned, not measured", *forms]]
    for part in next(iter(forms.values()))["parts"]:
        seconds = [form["parts"][part] for form in forms.values()]
        if any(seconds):
            waiting = "waiting for " if part in ("host", "links") else ""
            rows.append([f"  {waiting}{part}", *(f"{one:.1f}" for one in seconds)])
    rows.append(["seconds an epoch", *(f"{form['seconds_an_epoch']:.1f}" for form in forms.values())])
    rows.append(["hours an epoch", *(f"{form['hours_an_epoch']:.3f}" for form in forms.values())])
    rows.append(["tokens/s, all GPUs", *(f"{form['tokens_per_second']:,.0f}" for form in forms.values())])
    rows.append(["MFU", *(f"{form['mfu']:.1%}" for form in forms.values())])
    rows.append(["seconds an evaluation", *(f"{form['seconds_an_evaluation']:.1f}" for form in forms.values())])
    rows.append([f"hours of {result['epochs']} epochs", *(f"{form['hours_a_run']:.3f}" for form in forms.values())])
    lines += [aligned(rows), ""]
    rows = [["decoding on one GPU", *decoding["tokens_per_second"]]]
    rows.append(["tokens/s, one at a time", *(f"{speed:.0f}" for speed in decoding["tokens_per_second"].values())])
    rows.append(["of the memory's bandwidth", *(f"{share:.0%}" for share in decoding["of_bandwidth"].values())])
    for count, speed in decoding["sentences_per_second"].items():
        rows.append([f"sentences/s with drafts, {count} side by side", f"{speed:.1f}", ""])
    lines += [aligned(rows), "", "assumptions"]
    lines += [wrapped(f"  {name}: {value} ({source})", indent=4) for name, value, source in result["assumptions"]]
    return "\n".join(lines)


def expected(job: Job, model: Llama, world: World) -> str | None:
    """How long an epoch of a run takes as planned, in words; None on a machine without known GPUs."""
    if world.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(world.device)
    card = recognise(properties.name, properties.total_memory)
    if card is None or job.settings.precision not in CARDS[card].teraflops:
        return None
    here = min(world.size, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))  # of this run
    links = Links(here, world.size // here, CARDS[card].link, NETWORK)
    machine = Machine(CARDS[card], links, job.placement.parallel == "fsdp", job.placement.whole)
    epoch = [indices for number, indices in job.steps if number == 0]
    supervised = sum(example.supervised for example in job.examples) / sum(job.lengths)
    kernel = attention_kernel(model.config.head_dim, DTYPES[job.settings.precision], world.device)
    form = Form(kernel == "rectangles", choose_compiled(job.settings.compile, world.device)[0])
    work = Work(model, job.settings.precision, job.placement.recompute, form)
    dealt = micro_batches(job.lengths, supervised, epoch[:SAMPLE], world.size, job.placement.micro_tokens)
    planned = machine.training(work, dealt)
    seconds = planned.seconds / planned.steps * len(epoch)
    return f"{_long(seconds)} an epoch, as planned for {world.size} x {card} at {planned.mfu:.0%} of its peak"


def _long(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
