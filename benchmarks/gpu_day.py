#!/usr/bin/env python3
"""All that a GPU must show, in order of worth: what benchmarks/gpu_day.sh runs, a part at a time.

    python benchmarks/gpu_day.py run training decoding     # parts by name; without one, all
    python benchmarks/gpu_day.py run --dry                 # tiny shapes on any machine: nothing is measured
    python benchmarks/gpu_day.py render                    # writes the figures into docs/hardware.md

Each part starts from nothing, takes less than ten minutes on an H100, and adds what it found to one JSON file (--out),
so that a day which ends early has shown what matters most. Llama-2-7B's exact shape, with random weights made here.
"""

import argparse
import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from full_size import write_tokenizer
from gpu import NEW, REACH, decode, peer, random_model, seconds_of
from work import product_rate

from llamalora.cli import UsageError, run_command
from llamalora.distributed.world import World
from llamalora.lora.inject import cast_factors, inject_lora, make_trainable, merge, trainable_parameters
from llamalora.model import attention
from llamalora.model.checkpoint import save_model, skeleton
from llamalora.model.config import LLAMA_2, LlamaConfig
from llamalora.model.elementwise import compile_formulas
from llamalora.model.llama import Llama
from llamalora.model.precision import DTYPES, choose_precision, prepare_gpu
from llamalora.runs.setup import choose_compiled
from llamalora.training.arithmetic import FORMS, Batch, Work, micro_batches, model_flops
from llamalora.training.batch import Example, MicroBatch, plan_epoch
from llamalora.training.cards import CARDS, recognise
from llamalora.training.duration import MEMORY, PRODUCTS, Machine
from llamalora.training.step import Optimizer, backward
from llamalora.training.timetable import Corpus

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/hardware.md"
MARKS = ("<!-- gpu_day: written by benchmarks/gpu_day.py render -->", "<!-- gpu_day: end -->")
SEVEN = LLAMA_2["llama-2-7b"]
KERNELS = 1000  # launched in a row to time one
TINY = replace(SEVEN, num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2,
               num_key_value_heads=2, head_dim=32, vocab_size=512)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Something measured.

    Attributes:
        unit: behind the number; `%` is of a share.
        planned: what the plan says, in the same unit.
        least, most: the target, if there is one.
    """

    name: str
    measured: float
    unit: str
    planned: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.least is None and self.most is None:
            return None
        return (self.least or -math.inf) <= self.measured <= (math.inf if self.most is None else self.most)


@dataclass(frozen=True)
class Day:
    """The machine, and how large a part is."""

    device: torch.device
    card: str | None
    precision: str
    dry: bool

    @staticmethod
    def today(dry: bool) -> "Day":
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cpu" and not dry:
            raise UsageError("no GPU here; --dry tries the script without one")
        if device.type == "cuda":
            prepare_gpu(device)
        return Day(device, _card(device), choose_precision("auto", device)[0], dry)

    @property
    def config(self) -> LlamaConfig:
        return TINY if self.dry else SEVEN

    @property
    def repeats(self) -> int:
        return 1 if self.dry else 5

    @property
    def machine(self) -> Machine | None:
        """By which time is planned."""
        return Machine(CARDS[self.card]) if self.card else None


def _card(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    return recognise(properties.name, properties.total_memory)


# ---- the parts ----


def tests(day: Day) -> list[Figure]:
    """The tests that need a CUDA device, on this one: answers and losses beside the CPU's."""
    home = ROOT / "tests/emulated_cuda"
    which = [str(home), "-k", "test_device"] if day.dry else ["-p", "actual", "-n", "4", str(home / "inside")]
    *_, last = _run([sys.executable, "-m", "pytest", "-rs", *which], home)
    counted = {what: int(number) for number, what in re.findall(r"(\d+) (passed|skipped)", last)}
    return [Figure(what, counted.get(what, 0), "") for what in ("passed", "skipped")]


def rates(day: Day) -> list[Figure]:
    """Beside what plans of time assume of a GPU: its shares of peak and of bandwidth, and what a short kernel takes."""
    model = random_model(replace(day.config, num_hidden_layers=1), DTYPES[day.precision], day.device)
    weights = [one for one in model.model.layers.parameters() if one.dim() > 1]
    products = product_rate(weights, 64 if day.dry else 4096)
    whole = torch.empty((1 << 20) if day.dry else (1 << 30), dtype=torch.bfloat16, device=day.device).normal_()
    other, few = torch.empty_like(whole), torch.zeros(64, device=day.device)
    copying = statistics.median(seconds_of(lambda _: other.copy_(whole), day.repeats))

    def launch(_: int = 0) -> None:
        for _ in range(KERNELS):
            few.add_(1)

    launched = statistics.median(seconds_of(launch, day.repeats)) / KERNELS
    figures = [Figure("launching a kernel", 1e6 * launched, "us")]
    if day.machine:
        card, graph = day.machine.card, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graphed = statistics.median(seconds_of(lambda _: graph.replay(), day.repeats)) / KERNELS
        figures += [
            Figure("a short kernel in a graph", 1e6 * graphed, "us"),
            Figure("products of 4,096 rows, of peak", products / card.teraflops[day.precision] / 1e12, "%", PRODUCTS),
            Figure("copying, of the bandwidth", 2 * whole.nbytes / copying / card.bandwidth / 1e9, "%", MEMORY),
        ]
    return figures


def memory(day: Day) -> list[Figure]:
    """Peak against plan: four emulated V100 of 16 GB, and one process on the whole GPU."""
    if day.dry:
        runs = {"one process": ["--model", "tiny", "--steps", "1"]}
    else:
        large = ["--precision", day.precision, "--rank", "128", "--batch-tokens", "4096"]
        share = ["--share", "15.41GiB", "--precision", "fp16", "--rank", "128", "--steps", "2"]
        runs = {"four cards of 16 GB": share, "one process": large,
                "one process, every block recomputed": [*large, "--activation-checkpointing", "1"]}  # fmt: skip
    figures = []
    for name, flags in runs.items():
        processes = 4 if name.startswith("four") else 1
        result = json.loads(_run([*_launcher(processes), str(ROOT / "benchmarks/memory.py"), *flags])[-1])
        peak, planned = (max(each["peak"] for each in result["measured"]), result["plan"]["tensors"])
        figures.append(Figure(f"{name}: peak", peak / 2**30, "GiB", planned / 2**30))
        figures.append(Figure(f"{name}: peak of plan", result["measured_of_planned"], "%", None, 0.9, 1.1))
    return figures


def headline(day: Day) -> list[Figure]:
    """The headline command to its end: loading, steps, evaluation, saving; then eval.py."""
    with _folder() as folder:
        model, config = f"{folder}/model", replace(day.config, vocab_size=SEVEN.vocab_size)
        save_model(random_model(config, torch.float16, day.device).cpu(), model)
        write_tokenizer(Path(model), config.vocab_size)
        if day.device.type == "cuda":
            torch.cuda.empty_cache()
        limits = ["--limit-train", "8" if day.dry else "256", "--epochs", "1", "--eval-limit", "2" if day.dry else "32"]
        train = ["train.py", "--model", model, "--data", str(ROOT / "data/sample"), "--out", f"{folder}/run", *limits]
        started = time.perf_counter()
        _run([sys.executable, *train, "--targets", "all", "--rank", "8" if day.dry else "128"])
        trained = time.perf_counter()
        _run([sys.executable, "eval.py", "--run", f"{folder}/run", "--limit", "2" if day.dry else "32"])
        return [
            Figure("train.py, from loading to the last evaluation", trained - started, "s"),
            Figure("eval.py of its result", time.perf_counter() - trained, "s"),
        ]


def training(day: Day) -> list[Figure]:
    """LoRA of rank 128 on all layers, micro-batches of BC5CDR's lengths, each another: its share of peak, with
    attention over a padded rectangle and over sequences as they are, and with norms, rotary embedding and SwiGLU
    compiled; the last with fewer and with more tokens, too."""
    model = inject_lora(random_model(day.config, DTYPES[day.precision], day.device), "all", 8 if day.dry else 128)
    usual = 200 if day.dry else 2048 if day.card == "V100-16" else 4096
    corpus, figures = Corpus.bc5cdr(), []
    *forms, (last, compiled) = FORMS.items()
    for name, form, tokens in [*((name, form, usual) for name, form in forms),
                               *((last, compiled, n) for n in (usual // 2, usual, 2 * usual))]:  # fmt: skip
        if form.compiled:
            compile_formulas(model)
        steps = plan_epoch(corpus.lengths, tokens, seed=0, epoch=0)[: day.repeats + 1]
        lengths = [[corpus.lengths[index] for index in step] for step in steps]
        with patch.object(attention, "attention_kernel", lambda *_: "rectangles") if form.padded else _folder():
            seconds = _steps(model, lengths, corpus.supervised, day)
        done = list(zip(lengths[1:], seconds, strict=True))
        speed = statistics.median(sum(of_step) / taken for of_step, taken in done)
        title = f"{name}, {tokens:,} tokens"
        planned, planned_speed = None, None
        if day.machine:
            dealt = micro_batches(corpus.lengths, corpus.supervised, steps[1:], 1, tokens)
            planned = day.machine.training(Work(model, day.precision, form=form), dealt)
            planned_speed = sum(map(sum, lengths[1:])) / planned.seconds
            flops = statistics.median(
                model_flops(model, Batch.of(of_step, corpus.supervised)) / taken for of_step, taken in done
            )
            share = flops / day.machine.card.teraflops[day.precision] / 1e12
            least = 0.57 if form.compiled and tokens == usual else None
            figures.append(Figure(f"{title}: MFU", share, "%", planned.mfu, least))
        figures.append(Figure(f"{title}: speed", speed, "tokens/s", planned_speed))
    return figures


def _steps(model: Llama, lengths: Sequence[Sequence[int]], supervised: float, day: Day) -> list[float]:
    """Seconds of each of several steps but the first."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for of_step in lengths:
        ids = (torch.randint(3, model.config.vocab_size, (n + 1,), generator=generator).tolist() for n in of_step)
        batches.append([Example(tuple(one), max(1, round((1 - supervised) * (len(one) - 1)))) for one in ids])
    optimizer = Optimizer(model.train(), day.precision, day.device, weight_decay=0.0, clip=1.0)

    def step(number: int) -> None:
        examples = batches[number]
        with cast_factors(model, DTYPES[day.precision]):
            counted = sum(example.supervised for example in examples)
            backward(model, MicroBatch.of(examples, day.device), counted, optimizer.scaler, day.precision)
        optimizer.step(1e-4, World(device=day.device))

    return seconds_of(step, day.repeats)


def decoding(day: Day) -> list[Figure]:
    """One sentence at a time, base and merged: tokens/s against what the memory's bandwidth allows."""
    model = random_model(day.config, DTYPES[day.precision], day.device).eval()
    if choose_compiled("auto", day.device)[0]:
        compile_formulas(model)
    bandwidth = day.machine.card.bandwidth if day.machine else math.inf
    arguments = argparse.Namespace(repeats=day.repeats, bandwidth=bandwidth)
    base = decode(model, arguments)
    work = Work(make_trainable(skeleton(day.config)), day.precision)
    merge(inject_lora(model, "all", rank=8 if day.dry else 128))
    merged = decode(model, arguments)
    ratio = merged["tokens_per_second"] / base["tokens_per_second"]
    planned = 1 / day.machine.decoding(work, 1, 1, REACH, graphed=True) if day.machine else None
    figures = [
        Figure("base", base["tokens_per_second"], "tokens/s", planned),
        Figure("merged", merged["tokens_per_second"], "tokens/s", planned),
        Figure("merged by base", ratio, "", 1.0, 0.97, 1.03),
        Figure(f"merged, a whole answer of {NEW} tokens", merged["whole_answer_tokens_per_second"], "tokens/s"),
    ]
    if day.machine:
        figures.append(Figure("merged, of the memory's bandwidth", merged["of_bandwidth"], "%", None, 0.70))
    return figures


def peers(day: Day) -> list[Figure]:
    """transformers + peft on the same sequences, where they are installed."""
    if missing := [name for name in ("transformers", "peft") if find_spec(name) is None]:
        print(f"left out: {' and '.join(missing)} not installed")
        return []
    corpus = Corpus.bc5cdr()
    step = plan_epoch(corpus.lengths, 200 if day.dry else 4096, seed=0, epoch=0)[0]
    examples = [
        Example(tuple(range(3, 4 + length)), max(1, length // 2)) for length in map(corpus.lengths.__getitem__, step)
    ]
    batches = [examples] * (day.repeats + 1)  # the first warms up
    theirs = peer(day.config, batches, day.precision, day.device, argparse.Namespace(repeats=day.repeats))
    names = {"tokens_per_second": "training", "decoding_tokens_per_second": "decoding, merged"}
    return [Figure(f"transformers + peft: {title}", theirs[name], "tokens/s") for name, title in names.items()]


def overflow(day: Day) -> list[Figure]:
    """fp16 from a loss scale far too large: steps are skipped until it fits, and then the model learns."""
    larger = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = replace(TINY, head_dim=64, **larger) if not day.dry else TINY
    model = inject_lora(random_model(config, torch.float16, day.device), "all", rank=8)
    optimizer = Optimizer(model, "fp16", day.device, weight_decay=0.0, clip=1.0)
    optimizer.scaler = torch.amp.GradScaler(day.device.type, init_scale=2.0**30)
    example = Example(tuple(range(3, 67)), 20)
    batch, losses, skipped = MicroBatch.of([example], day.device), [], 0
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    for _ in range(20 if day.dry else 40):
        losses.append(backward(model, batch, example.supervised, optimizer.scaler, "fp16").item())
        update = optimizer.step(1e-2, World(device=day.device))
        skipped += update.skipped
        if update.skipped and skipped == len(losses):
            assert all(torch.equal(before[name], one) for name, one in trainable_parameters(model).items()), "it moved"
    figures = [Figure("steps skipped at first", skipped, "", None, 1)]
    return [
        *figures,
        Figure("last loss of the first", losses[-1] / losses[0], "", None, None, None if day.dry else 0.9),
    ]


def resume(day: Day) -> list[Figure]:
    """A run that is killed and resumed, beside one that was let alone: the difference of their last losses."""
    flags = ["--model", "weights/tiny", "--data", "data/sample", "--epochs", "1", "--save-every", "2",
             "--limit-train", "24" if day.dry else "400", "--batch-tokens", "256", "--eval-limit", "2"]  # fmt: skip
    with _folder() as folder:
        alone, killed = f"{folder}/alone", f"{folder}/killed"
        _run([sys.executable, "train.py", *flags, "--out", alone])
        with open(f"{folder}/log", "w") as log:
            command = [sys.executable, "train.py", *flags, "--out", killed]
            process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=log)
            while process.poll() is None and len(list(Path(killed).glob("checkpoints/step-*"))) < 1:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        _run([sys.executable, "train.py", "--resume", killed])
        first, second = (_losses(run) for run in (alone, killed))
    assert first.keys() == second.keys(), "not the same steps"
    apart = max(abs(first[step] - second[step]) / first[step] for step in first)
    return [Figure("largest relative difference of a step's loss", apart, "", 0.0, None, 0.02)]


def _losses(run: str) -> dict[int, float]:
    """Of each step the last that was recorded."""
    lines = (json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def reproduction(day: Day) -> list[Figure]:
    """Cells of the paper's Table 2 with SmolLM2-135M, or the built-in model where that is not there."""
    small = ROOT / "weights/smollm2-135m"
    model = str(small if small.is_dir() and not day.dry else ROOT / "weights/tiny")
    data = ROOT / "data/bc5cdr"
    data = data if data.is_dir() and not day.dry else ROOT / "data/sample"
    limits = ["--limit-train", "8", "--limit-eval", "2"] if day.dry else ["--limit-eval", "512"]
    out = ROOT / "runs/gpu_day" if not day.dry else None
    with _folder() as folder:
        flags = ["--model", model, "--data", str(data), "--epochs", "1", *limits, "--out", str(out or folder)]
        _run([sys.executable, "-m", "llamalora", "tables", "2", *flags])
        rows = json.loads(Path(out or folder, "tables.json").read_text())["tables"]["2"]["rows"]
    return [Figure(f"{Path(model).name}, {', '.join(row['title'])}: F1", 100 * row["f1"], "") for row in rows]


PARTS = {part.__name__: part for part in (
    tests, memory, headline, training, decoding, rates, overflow, resume, peers, reproduction)}  # fmt: skip
PRECISIONS = {"memory": "fp16 in four processes, {} in one", "overflow": "fp16"}  # of parts that have one of their own


# ---- what they share ----


def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="gpu_day")


def _launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]


def _environment(*modules: Path) -> dict[str, str]:
    path = [str(ROOT), *map(str, modules), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def _run(command: list[str], *modules: Path) -> list[str]:
    """The lines that a command printed; its errors are ours.

    Args:
        modules: further folders of its Python path.
    """
    print("$", " ".join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, env=_environment(*modules), stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    done.check_returncode()
    return done.stdout.splitlines()


# ---- the day, and its page ----


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "render", "parts"), help="run parts, write the page, or list the parts")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU, too: the figures mean nothing")
    parser.add_argument("--out", default=str(ROOT / "runs/gpu_day.json"), help="file that parts add their figures to")
    arguments = parser.parse_args(argv)
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    if arguments.what == "parts":
        print("\n".join(PARTS))
        return
    path = Path(arguments.out)
    found = json.loads(path.read_text()) if path.exists() else {}
    if arguments.what == "render":
        if not found:
            raise UsageError(f"--out {path}: no figures there yet; run some parts first")
        if any(part["dry"] for part in found.values()):
            raise UsageError(f"--out {path}: figures of a dry run belong on no page")
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        return
    day = Day.today(arguments.dry)
    for name in arguments.parts or PARTS:
        print(f"== {name}: {PARTS[name].__doc__}", flush=True)
        started = time.perf_counter()
        figures = PARTS[name](day)
        gc.collect()
        found[name] = {
            "about": " ".join(PARTS[name].__doc__.split()),
            "device": torch.cuda.get_device_name(day.device) if day.device.type == "cuda" else "CPU",
            "card": day.card,
            "precision": PRECISIONS.get(name, "{}").format(day.precision),
            "torch": torch.__version__,
            "date": str(date.today()),
            "seconds": round(time.perf_counter() - started, 1),
            "dry": day.dry,
            "figures": [asdict(figure) for figure in figures],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(table(found[name]), flush=True)


def rendered(page: str, found: dict) -> str:
    """The page with the figures between its marks."""
    sections = [f"**{name}**: {part['about']} {part['device']}, {part['precision']}, torch {part['torch']}, "
                f"{part['date']}.\n\n{table(part)}" for name, part in found.items()]  # fmt: skip
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    if not after:
        raise UsageError(f"{PAGE}: has no marks {MARKS[0]} and {MARKS[1]}")
    return before + "\n\n".join([MARKS[0], *sections, MARKS[1]]) + after


def table(part: dict) -> str:
    """Its figures as Markdown."""
    lines = ["| | measured | planned | target | met |", "|---|---|---|---|---|"]
    for values in part["figures"]:
        figure = Figure(**values)
        unit = figure.unit
        bounds = [
            (word, bound) for word, bound in (("at least", figure.least), ("at most", figure.most)) if bound is not None
        ]
        target = " and ".join(f"{word} {_shown(bound, unit)}" for word, bound in bounds)
        planned = "" if figure.planned is None else _shown(figure.planned, unit)
        met = {None: "", True: "yes", False: "NO"}[figure.met]
        lines.append(f"| {figure.name} | {_shown(figure.measured, unit)} | {planned} | {target} | {met} |")
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.1%}"
    return re.sub(r"\.00$", "", f"{value:,.2f}") + (f" {unit}" if unit else "")


if __name__ == "__main__":
    run_command(main)
