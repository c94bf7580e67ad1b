"""`python -m llamalora audit`: what a model has to train, to store and to hold in memory, without its weights."""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cli import Parser, UsageError, check_least, refuse_idle
from ..lora import counts
from ..lora.inject import KINDS, METHODS, make_trainable, parse_targets, what_learns
from ..mistakes import wrong_folder
from ..model.checkpoint import read_config, skeleton
from ..model.config import LLAMA_2, LlamaConfig
from ..model.free_memory import GIB
from ..model.llama import Llama
from ..model.precision import DTYPES
from ..paper.costs import show_bytes, show_table7, show_table8, table7, table8
from ..text_table import aligned
from ..training import hardware
from ..training.memory import REPORTED, USABLE, plan_memory


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m llamalora audit", description=__doc__)
    parser.add_argument("--model", default="llama-2-7b", metavar="MODEL", help=f"{', '.join(LLAMA_2)}, or a folder")
    parser.add_argument("--targets", default="all", help=f"all, or a comma list of {','.join(KINDS)}")
    parser.add_argument("--rank", type=int, default=8, help="of the updates (default: 8)")
    parser.add_argument("--method", default="lora", choices=tuple(METHODS))
    parser.add_argument("--dora", action="store_true", help="updates with magnitudes")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table7", action="store_true", help="trainable parameters of the paper's targets and ranks")
    what.add_argument("--table8", action="store_true", help="trainable parameters and storage of both methods")
    what.add_argument("--memory", action="store_true", help="GPU memory of a training step, item by item")
    what.add_argument("--hardware", action="store_true", help="which cards train which Llama-2, as Markdown (a minute)")
    planned = parser.add_argument_group("for --memory")
    planned.add_argument("--gpus", type=int, default=4, help="processes, one on each (default: 4)")
    planned.add_argument("--gpu-memory", default="16GB", metavar="SIZE",
                         help="16GB for a card of that name, 15.77GiB for what it reports (default: 16GB)")  # fmt: skip
    planned.add_argument("--precision", default="fp16", choices=tuple(DTYPES), help="of the products (default: fp16)")
    planned.add_argument("--micro-tokens", type=int, default=2048, help="tokens of a forward pass (default: 2048)")
    planned.add_argument("--activation-checkpointing", nargs="?", type=int, default=0, const=1, metavar="K",
                         help="recompute every K-th block in the backward pass (1: all; default: 0, none)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")
    arguments = parser.parse_args(argv)
    table = next((name for name in ("table7", "table8", "hardware") if getattr(arguments, name)), None)
    method = METHODS[arguments.method]
    refuse_idle(arguments, {
        "model": arguments.hardware and "with --hardware, which is about every Llama-2",
        "targets rank method dora": table and f"with --{table}",
        "targets": not method.targeted and f"with --method {arguments.method}",
        "rank dora": not method.adapts and f"with --method {arguments.method}",
        "gpus gpu_memory precision micro_tokens activation_checkpointing": not arguments.memory and "without --memory",
    })  # fmt: skip
    check_least(arguments, rank=1, gpus=1, micro_tokens=1, activation_checkpointing=0)
    capacity = parse_capacity(arguments.gpu_memory)
    config = read_shape(arguments.model)
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
        result |= memory_plans(arguments, model, capacity) if arguments.memory else asdict(counts.audit(model))
        show = show_memory if arguments.memory else show_counts
    print(json.dumps(result, indent=2) if arguments.json else show(result))


def read_shape(model: str) -> LlamaConfig:
    """The configuration of a Llama-2 by name, or of a model folder."""
    if model in LLAMA_2:
        return LLAMA_2[model]
    if not Path(model).exists():
        raise UsageError(f"--model: {wrong_folder(model, 'model folder', '')}; by name there are {', '.join(LLAMA_2)}")
    return read_config(model)


def memory_plans(arguments: argparse.Namespace, model: Llama, capacity: int) -> dict:
    """The plans for ddp and fsdp, and what they are for."""
    gpus, precision, recompute = arguments.gpus, arguments.precision, arguments.activation_checkpointing
    result = {"gpus": gpus, "capacity": capacity, "precision": precision, "activation_checkpointing": recompute}
    for parallel in ("ddp", "fsdp"):
        plan = plan_memory(model, parallel, gpus, capacity, precision, arguments.micro_tokens, recompute)
        sums = {name: getattr(plan, name) for name in ("total", "evaluation_total", "peak", "usable", "spare", "fits")}
        result[parallel] = asdict(plan) | sums
    return result


def parse_capacity(text: str) -> int:
    """`16GB`, the name of a card, or `15.77GiB`, what it reports -> bytes that it reports."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?) ?(GB|GiB)", text.strip())
    if not match or not float(match[1]):
        raise UsageError(f"--gpu-memory {text}: write 16GB (the card's name) or 15.77GiB (what it reports)")
    return int(float(match[1]) * GIB * (REPORTED if match[2] == "GB" else 1))


# ---- for people ----


def _setup(result: dict) -> str:
    return f"{result['model']}, {result['trained']}"


def show_counts(result: dict) -> str:
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
    rows = [["GiB on each GPU", *plans]]
    for name in plans["ddp"]["items"]:
        rows.append([name, *(f"{plan['items'][name] / GIB:.2f}" for plan in plans.values())])
    rows.append(["total of a step", *(f"{plan['total'] / GIB:.2f}" for plan in plans.values())])
    rows.append(["in an evaluation", *("" for _ in plans)])
    for name in plans["ddp"]["evaluation"]:
        rows.append([f"  {name}", *(f"{plan['evaluation'][name] / GIB:.2f}" for plan in plans.values())])
    rows.append(["total of an evaluation", *(f"{plan['evaluation_total'] / GIB:.2f}" for plan in plans.values())])
    usable = [f"{plan['usable'] / GIB:.2f}" for plan in plans.values()]
    rows.append([f"{USABLE:.0%} of what it reports", *usable])
    verdicts = []
    for parallel, plan in plans.items():
        largest, spare = plan["largest_micro_tokens"], abs(plan["spare"]) / GIB
        verdict = f"fits, {spare:.2f} GiB to spare" if plan["fits"] else f"does not fit, by {spare:.2f} GiB"
        room = f"micro-batches of up to {largest:,} tokens fit" if largest else "no micro-batch fits"
        beside = f"{plan['rows']:,} of the longest sentences side by side in an evaluation"
        verdicts.append([parallel, f"{verdict}; {room}, and {beside}"])
    tokens = plans["ddp"]["micro_tokens"]
    every = result["activation_checkpointing"]
    recompute = {0: "", 1: ", recomputing every block"}.get(every, f", recomputing one block in {every}")
    gpus = "1 GPU" if result["gpus"] == 1 else f"{result['gpus']} GPUs"
    step = f"{gpus}, {result['precision']}, micro-batches of {tokens:,} tokens{recompute}"
    return f"{_setup(result)}\n{step}\n\n{aligned(rows)}\n\n{aligned(verdicts, 'll')}"
