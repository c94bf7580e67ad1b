"""Counts what a model has to train, to store and to hold in memory, without its weights."""

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import Parser, UsageError, add_flags, check_least, refuse_idle
from ..lora.kinds import KINDS, METHODS, parse_targets, what_learns
from ..mistakes import wrong_folder
from ..model.config import LLAMA_2, PRECISIONS, LlamaConfig, read_config
from ..model.free_memory import GIB
from ..paper.printed import TABLE8
from ..runs.settings import Settings
from ..text_table import aligned, legend, used, wrapped
from ..training.cards import CARDS, NETWORK, REPORTED, USABLE

if TYPE_CHECKING:
    from ..model.llama import Llama

LEARNING = ("method", "targets", "rank", "dora")  # flags that say what learns
EXAMPLES = """
--rank 128
--memory --rank 128 --gpus 4 --gpu-memory 16GB
--time --rank 128 --gpus 4 --gpu H100
"""

PLANNED = ("parallel", "micro_tokens", "items", "capacity", "evaluation", "rows", "largest_micro_tokens", "total",
           "evaluation_total", "peak", "usable", "spare", "fits")  # fmt: skip


def main(argv: list[str]) -> None:
    parser = Parser("audit", EXAMPLES, usage="%(prog)s [FLAG ...]", description=__doc__)
    parser.add_argument("--model", default="llama-2-7b", metavar="MODEL", help=f"{', '.join(LLAMA_2)}, or a folder")
    parser.add_argument("--targets", default="all", help=f"all, or a comma list of {','.join(KINDS)}")
    parser.add_argument("--rank", type=int, default=8, help="of the updates (default: 8)")
    parser.add_argument("--method", default="lora", choices=tuple(METHODS))
    parser.add_argument("--dora", action="store_true", help="updates with magnitudes")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table7", action="store_true", help="trainable parameters of the paper's targets and ranks")
    what.add_argument("--table8", action="store_true", help="trainable parameters and storage of both methods")
    what.add_argument("--memory", action="store_true", help="GPU memory of a training step, item by item")
    what.add_argument("--hardware", action="store_true", help="which cards train which Llama-2, as Markdown")
    what.add_argument("--time", action="store_true", help="hours of training, and decoding, planned for known GPUs")
    planned = parser.add_argument_group("for --memory and --time")
    planned.add_argument("--gpus", type=int, default=4, help="processes, one on each; of each node (default: 4)")
    planned.add_argument("--precision", choices=PRECISIONS,
                         help="of the products (default: fp16; for --time the GPU's half precision)")  # fmt: skip
    planned = parser.add_argument_group("for --memory")
    planned.add_argument("--gpu-memory", default="16GB", metavar="SIZE",
                         help="16GB for a card of that name, 15.77GiB for what it reports (default: 16GB)")  # fmt: skip
    add_flags(planned, Settings, ("micro_tokens", "activation_checkpointing"))
    timed = parser.add_argument_group("for --time")
    timed.add_argument("--gpu", default="V100-16", choices=tuple(CARDS), metavar="GPU",
                       help=f"any of {', '.join(CARDS)} (default: V100-16)")  # fmt: skip
    timed.add_argument("--nodes", type=int, default=1, help="machines with so many GPUs each (default: 1)")
    add_flags(timed, Settings, ("batch_tokens",))
    timed.add_argument("--data", help="corpus folder, read with the tokenizer of --model (default: as long as BC5CDR)")
    timed.add_argument("--link", type=float, metavar="GB/S",
                       help="between GPUs of a node, each direction (default: its NVLink; PCIe 3: 12)")  # fmt: skip
    timed.add_argument("--network", type=float, metavar="GB/S", default=NETWORK,
                       help=f"between nodes, each direction (default: {NETWORK})")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")
    arguments = parser.parse_args(argv)
    table = next((name for name in ("table7", "table8", "hardware") if getattr(arguments, name)), None)
    planned, method = arguments.memory or arguments.time, METHODS[arguments.method]
    refuse_idle(arguments, {
        "model": arguments.hardware and "with --hardware, which is about every Llama-2",
        "targets rank method dora": table and f"with --{table}",
        "targets": not method.targeted and f"with --method {arguments.method}",
        "rank dora": not method.adapts and f"with --method {arguments.method}",
        "gpus precision": not planned and "without --memory or --time",
        "gpu_memory micro_tokens activation_checkpointing": not arguments.memory and (
            "with --time, where the plan decides" if arguments.time else "without --memory"
        ),
        "gpu nodes batch_tokens data link network": not arguments.time and "without --time",
        "link": arguments.gpus == 1 and "on one GPU of a node",
        "network": arguments.nodes == 1 and "on one node",
    })  # fmt: skip
    check_least(arguments, rank=1, gpus=1, micro_tokens=1, activation_checkpointing=0, nodes=1, batch_tokens=1)
    capacity = parse_capacity(arguments.gpu_memory)
    config = read_shape(arguments.model)

    from ..lora import counts
    from ..lora.inject import make_trainable
    from ..model.checkpoint import skeleton
    from ..paper.costs import show_table7, show_table8, table7, table8
    from ..training import hardware

    result: Any
    show: Callable[[Any], str]
    if arguments.hardware:
        result, show = hardware.table(), hardware.show
    elif arguments.table7:
        result, show = table7(config), show_table7
    elif arguments.table8:
        result, show = table8(config), show_table8
    else:
        try:
            targets = ",".join(parse_targets(arguments.targets))
        except ValueError as error:
            raise UsageError(f"--targets: {error}") from None
        model = make_trainable(skeleton(config), arguments.method, targets, arguments.rank, dora=arguments.dora)
        result = {"model": arguments.model, "tied": config.tie_word_embeddings, "method": arguments.method}
        result |= {"trained": what_learns(arguments.method, targets, arguments.rank, arguments.dora)}
        result |= {"targets": targets} if method.targeted else {}
        result |= {"rank": arguments.rank, "dora": arguments.dora} if method.adapts else {}
        if arguments.time:
            result, show = result | time_plan(arguments, model), show_time
        elif arguments.memory:
            result, show = result | memory_plans(arguments, model, capacity), show_memory
        else:
            result, show = result | asdict(counts.audit(model)), show_counts
    print(json.dumps(result, indent=2) if arguments.json else show(result))


def read_shape(model: str) -> LlamaConfig:
    """The configuration of a Llama-2 by name, or of a model folder."""
    if model in LLAMA_2:
        return LLAMA_2[model]
    if not Path(model).exists():
        raise UsageError(f"--model: {wrong_folder(model, 'model folder', '')}; by name there are {', '.join(LLAMA_2)}")
    return read_config(model)


def memory_plans(arguments: argparse.Namespace, model: "Llama", capacity: int) -> dict:
    """What `train` would plan with ddp and with fsdp, on examples as long as BC5CDR's, and which it would take."""
    import torch

    from ..runs.resolve import step_tokens
    from ..training.memory import LENGTHS
    from ..training.placement import check_parallel, fit

    names = (*LEARNING, "micro_tokens", "activation_checkpointing")
    precision = arguments.precision or "fp16"
    gpus = arguments.gpus
    step = step_tokens(torch.device("cuda"), gpus)
    chosen = {name: getattr(arguments, name) for name in names}
    settings = Settings(precision=precision, batch_tokens=step, **chosen)
    result = {"gpus": gpus, "capacity": capacity, "precision": precision, "batch_tokens": step}
    auto = fit(model, settings, LENGTHS, gpus, capacity)
    for parallel in ("ddp", "fsdp"):
        placement = auto
        if parallel != auto.parallel:
            placement = fit(model, replace(settings, parallel=parallel), LENGTHS, gpus, capacity)
        assert (plan := placement.plan) is not None
        result[parallel] = {name: getattr(plan, name) for name in PLANNED} | {
            "activation_checkpointing": placement.recompute
        }
    refused = ""
    try:
        check_parallel(auto, settings)
    except UsageError as error:
        refused = str(error)
    return result | {"auto": {"parallel": auto.parallel, "why": auto.why, "refused": refused}}


def time_plan(arguments: argparse.Namespace, model: "Llama") -> dict:
    """How long a run takes on the GPUs of the flags, and in the paper."""
    import torch

    from ..runs.resolve import step_tokens
    from ..training import timetable
    from ..training.duration import Links
    from ..training.timetable import Corpus

    card = CARDS[arguments.gpu]
    for name in ("link", "network"):
        if (rate := getattr(arguments, name)) is not None and not 0 < rate < math.inf:
            raise UsageError(f"--{name} is {rate:g}; it must be above 0, in GB/s")
    if arguments.data and arguments.model in LLAMA_2:
        raise UsageError(f"--data: --model {arguments.model} is a name without a tokenizer; give a model folder")
    corpus = Corpus.read(arguments.data, arguments.model) if arguments.data else Corpus.bc5cdr()
    links = Links(arguments.gpus, arguments.nodes, arguments.link or card.link, arguments.network)
    step = arguments.batch_tokens or step_tokens(torch.device("cuda"), links.size)
    learning = {name: getattr(arguments, name) for name in LEARNING}
    settings = Settings(precision=arguments.precision or card.half, batch_tokens=step, **learning)
    return timetable.table(model, settings, corpus, arguments.gpu, links) | {"paper": TABLE8}


def parse_capacity(text: str) -> int:
    """`16GB`, the name of a card, or `15.77GiB`, what it reports -> bytes that it reports."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?) ?(GB|GiB)", text.strip())
    if not match or not float(match[1]):
        raise UsageError(f"--gpu-memory {text}: write 16GB (the card's name) or 15.77GiB (what it reports)")
    return int(float(match[1]) * GIB * (REPORTED if match[2] == "GB" else 1))


# ---- for people ----

USABLE_ROW = f"{USABLE:.0%} of what it reports"
WORDS = {
    "buckets or gathered layers": "layers that fsdp has whole while they compute",
    "activations": "what the forward pass keeps for the backward one",
    "logits": "scores of the vocabulary, a part at a time",
    "backward": "what the backward pass needs beyond these",
    "overhead": "what CUDA itself takes",
    USABLE_ROW: "what is counted on; the allocator wastes some",
}


def _setup(result: dict) -> str:
    return f"{result['model']}, {result['trained']}"


def show_counts(result: dict) -> str:
    from ..paper.costs import show_bytes

    kinds = result["kinds"]
    rows = [["", "layers", "shape", "parameters each", "parameters"]]
    for name, kind in kinds.items():
        shape = " x ".join(map(str, kind["shape"]))
        rows.append([name, str(kind["layers"]), shape, f"{kind['parameters_each']:,}", f"{kind['parameters']:,}"])
    layers = sum(kind["layers"] for kind in kinds.values())
    rows.append(["trainable", str(layers), "", "", f"{result['trainable']:,}"])
    rows.append(["base", "", "", "", f"{result['base']:,}"])
    saved, size = "adapter", result["adapter_bytes"]
    if size is None:
        saved, size = "model", result["model_bytes"]
    files = [
        ["share", f"{result['percent']:.4g} %", "of the base is trained"],
        [saved, f"{size:,}", f"bytes = {show_bytes(size)}"],
        ["run state", f"{result['state_bytes']:,}", f"bytes = {show_bytes(result['state_bytes'])}"],
    ]
    tied = "\nembed and head are one matrix (tied), counted once in the base" if result["tied"] else ""
    return f"{_setup(result)}\n\n{aligned(rows)}{tied}\n\n{aligned(files, 'lrl')}"


def show_memory(result: dict) -> str:
    plans = {parallel: result[parallel] for parallel in ("ddp", "fsdp")}
    recomputed = (plan["activation_checkpointing"] for plan in plans.values())
    rows = [["", *plans], ["tokens of a micro-batch", *(f"{plan['micro_tokens']:,}" for plan in plans.values())]]
    rows.append(["blocks recomputed", *({0: "none", 1: "all"}.get(every, f"1 in {every}") for every in recomputed)])
    rows.append(["GiB on each GPU", *[""] * len(plans)])
    for name in plans["ddp"]["items"]:
        rows.append([name, *(f"{plan['items'][name] / GIB:.2f}" for plan in plans.values())])
    rows.append(["total of a step", *(f"{plan['total'] / GIB:.2f}" for plan in plans.values())])
    rows.append(["in an evaluation", *("" for _ in plans)])
    for name in plans["ddp"]["evaluation"]:
        rows.append([f"  {name}", *(f"{plan['evaluation'][name] / GIB:.2f}" for plan in plans.values())])
    rows.append(["total of an evaluation", *(f"{plan['evaluation_total'] / GIB:.2f}" for plan in plans.values())])
    usable = [f"{plan['usable'] / GIB:.2f}" for plan in plans.values()]
    rows.append([USABLE_ROW, *usable])
    verdicts = []
    for parallel, plan in plans.items():
        largest, spare = plan["largest_micro_tokens"], abs(plan["spare"]) / GIB
        verdict = f"fits, {spare:.2f} GiB to spare" if plan["fits"] else f"does not fit, by {spare:.2f} GiB"
        room = f"micro-batches of up to {largest:,} tokens fit" if largest else "no micro-batch fits"
        beside = f"{plan['rows']:,} of the longest sentences side by side in an evaluation"
        verdicts.append(wrapped(f"{parallel:<4}  {verdict}; {room}, and {beside}", indent=6))
    gpus = "1 GPU" if result["gpus"] == 1 else f"{result['gpus']} GPUs"
    gpus += f" of {result['capacity'] / GIB:.2f} GiB"
    step = f"{gpus}, {result['precision']}, steps of {result['batch_tokens']:,} tokens"
    taken = "train --parallel auto takes {parallel}: {why}"
    if result["auto"]["refused"]:
        taken = "train --parallel auto would take {parallel}, but refuses it: {refused}"
    words = legend(used(WORDS, str(rows)))
    found = "\n".join([*verdicts, wrapped(taken.format(**result["auto"]))])
    return f"{_setup(result)}\n{step}\n\n{aligned(rows)}\n\n{found}\n\n{words}"


def show_time(result: dict) -> str:
    from ..training import timetable

    lora, full = (result["paper"][method] for method in ("lora", "full"))
    paper = wrapped(
        f"The paper (Table 8) gives {lora['hours_per_epoch']} hours an epoch of LoRA on all, r=128, on "
        f"{lora['gpus']}, and {full['hours_per_epoch']} of full fine-tuning on {full['gpus']}; it does not say in what "
        "steps."
    )
    return f"{_setup(result)}\n{timetable.show(result)}\n\n{paper}"
