#!/usr/bin/env python3
"""A run from end to end at the exact shape of Llama-2-7B, with random weights, on the CPU: the memory that each step
takes, and its time.

Writes the model (13.5 GB, three shards) into a scratch folder and walks: train a few steps, kill, resume to the end
with an evaluation, `eval.py`, merge, inspect. It needs 20 GiB of memory and 45 GB of disk; `--layers 2` tries it small:

    python benchmarks/full_size.py --scratch /scratch/full --layers 2

Prints a table as Markdown and a line of JSON. Ends with 1 where a step fails or takes more memory than `--most`. The
vocabulary is filled up with pieces that no text contains, since Llama-2's is not free. Linux only.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from llamalora.cli import Parser, UsageError, check_least, run_command
from llamalora.commands.audit import parse_capacity
from llamalora.files import why_not_new
from llamalora.model.checkpoint import SHARD_BYTES, skeleton
from llamalora.model.config import LLAMA_2, LlamaConfig
from llamalora.model.free_memory import GIB, free_memory
from llamalora.model.precision import DTYPES, choose_precision
from llamalora.model.tensors import write_tensors
from llamalora.task.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
EVERY = 0.1  # seconds between two looks at a step's memory


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--scratch", required=True, metavar="FOLDER", help="for model, run, merged model; removed")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model (default: 32, all)")
    parser.add_argument("--rank", type=int, default=128, help="of the updates, on all kinds of layer (default: 128)")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--sentences", type=int, default=2, help="that are trained on and decoded (default: 2)")
    parser.add_argument("--most", default="20GiB", metavar="SIZE", help="memory that a step may take (default: 20GiB)")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder as it is in the end")
    arguments = parser.parse_args(argv)
    check_least(arguments, layers=1, rank=1, sentences=1)
    scratch, most = Path(arguments.scratch), parse_capacity(arguments.most)
    if why := why_not_new(scratch):
        raise UsageError(f"--scratch {scratch}: {why}")
    config = replace(LLAMA_2["llama-2-7b"], num_hidden_layers=arguments.layers)
    precision, _ = choose_precision(arguments.precision, CPU)
    parameters = sum(parameter.numel() for parameter in skeleton(config).parameters())
    needed = int(1.5 * parameters * DTYPES[precision].itemsize)
    if needed > free_memory(CPU):
        raise UsageError(f"{free_memory(CPU) / GIB:.1f} GiB of memory are free; --layers {arguments.layers} needs "
                         f"about {needed / GIB:.1f}")  # fmt: skip
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        result = walk(config, scratch, arguments.rank, precision, arguments.sentences)
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch)
    result |= {"layers": arguments.layers, "rank": arguments.rank, "precision": precision, "parameters": parameters}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(show(result), flush=True)
    print(json.dumps(result))
    bad = [step["step"] for step in result["steps"] if not step["ended_well"] or step["peak"] > most]
    if bad:
        sys.exit(f"failed, or took more than {arguments.most}: {', '.join(bad)}")


def walk(config: LlamaConfig, scratch: Path, rank: int, precision: str, sentences: int) -> dict:
    """The steps, one after the other, each a process of its own; after one that fails no other is begun."""
    model, run, merged = (scratch / name for name in ("model", "run", "merged"))
    started = time.perf_counter()
    shards = make_model(config, model, DTYPES[precision])
    result: dict = {"model_bytes": sum(map(os.path.getsize, shards)), "shards": len(shards), "steps": []}
    result["making_it_took"] = time.perf_counter() - started
    few = str(sentences)
    train = [
        "train.py",
        "--model",
        str(model),
        "--data",
        str(ROOT / "data/sample"),
        "--out",
        str(run),
        "--rank",
        str(rank),
    ]
    train += ["--precision", precision, "--limit-train", few, "--batch-sentences", "1", "--epochs", "3", "--keep", "1"]
    train += ["--save-every", "1", "--eval-limit", few, "--eval-every", str(3 * sentences)]
    evaluate = ["eval.py", "--run", str(run), "--split", "test", "--limit", few, "--precision", precision]
    merge = ["-m", "llamalora", "merge", "--run", str(run), "--out", str(merged)]
    inspect = ["-m", "llamalora", "inspect", str(run), "--json"]
    second = run / "checkpoints" / "step-000002"
    for name, command, until in (
        ("train, until killed after 2 steps", train, second.exists),
        ("resume, to the end, and evaluate", ["train.py", "--resume", str(run)], None),
        ("eval.py", evaluate, None),
        ("merge", merge, None),
        ("inspect", inspect, None),
    ):
        print(f"{name} ...", file=sys.stderr, flush=True)
        result["steps"].append({"step": name} | measured(command, scratch / "log", until))
        if not result["steps"][-1]["ended_well"]:
            sys.stderr.write((scratch / "log").read_text()[-3000:])
            break
    files = {"adapter": run / "best", "checkpoint": second.parent, "merged model": merged}
    result["written"] = {name: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                         for name, folder in files.items()}  # fmt: skip
    return result


def make_model(config: LlamaConfig, folder: Path, dtype: torch.dtype) -> list[Path]:
    """A Hugging Face folder with random weights, written tensor by tensor; its shards."""
    folder.mkdir()
    stored = config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(stored))
    write_tokenizer(folder, config.vocab_size)
    shards: list[dict] = [{}]
    used = 0
    for name, parameter in skeleton(config).named_parameters():
        size = parameter.numel() * dtype.itemsize
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = (dtype, tuple(parameter.shape))
        used += size
    generator = torch.Generator().manual_seed(0)
    paths, weight_map = [], {}
    for number, entries in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"

        def values(name: str, entries: dict = entries) -> torch.Tensor:
            shape = entries[name][1]
            return torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.empty(shape, dtype=dtype).normal_(
                0, 0.02, generator=generator)  # fmt: skip

        write_tensors(path, entries, values)
        paths.append(path)
        weight_map |= dict.fromkeys(entries, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


def write_tokenizer(folder: Path, size: int) -> None:
    """The built-in model's, filled up to so many pieces."""
    tiny = ROOT / "weights/tiny"
    missing = range(load_tokenizer(tiny).vocab_size, size)
    (folder / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes() + b"".join(map(unused, missing)))


def unused(number: int) -> bytes:
    """A further piece of a sentencepiece model (its protocol buffer may be written on): unused, so that no text has
    it."""
    text = f"<unused {number}>".encode()
    piece = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x05"
    return bytes([0x0A, len(piece)]) + piece


def measured(command: list[str], log: Path, until: Callable[[], bool] | None) -> dict:
    """Runs a step, or until something is so and it is killed: its seconds, and its peaks of memory in bytes, all that
    is resident and what is no file's."""
    started, peak, own = time.perf_counter(), 0, 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output, env=environment)
        killed = False
        while process.poll() is None:
            resident, anonymous = memory_of(process.pid)
            peak, own = max(peak, resident), max(own, anonymous)
            if until is not None and until() and not killed:
                process.send_signal(signal.SIGKILL)
                killed = True
            time.sleep(EVERY)
    well = killed if until is not None else process.returncode == 0
    return {"ended_well": well, "seconds": time.perf_counter() - started, "peak": peak, "anonymous": own}


def memory_of(process: int) -> tuple[int, int]:
    """Bytes that a process and its children hold: at the most so far, and of that what is no file's now."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0, 0
    fields = {line.split()[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}
    resident, anonymous = fields.get("VmHWM:", 0), fields.get("RssAnon:", 0) + fields.get("RssShmem:", 0)
    for child in children:
        more = memory_of(int(child))
        resident, anonymous = resident + more[0], anonymous + more[1]
    return resident, anonymous


def show(result: dict) -> str:
    lines = [
        f"Llama-2-7B's shape, {result['layers']} layers: {result['parameters']:,} parameters, "
        f"{result['model_bytes']:,} bytes in {result['shards']} shards; rank {result['rank']} on all, "
        f"{result['precision']}, {result['threads']} threads, torch {result['torch']}",
        "",
        "| step | peak, GiB | of that no file's | seconds |",
        "|---|---|---|---|",
    ]
    for step in result["steps"]:
        name = step["step"] if step["ended_well"] else f"{step['step']}: FAILED"
        lines.append(f"| {name} | {step['peak'] / GIB:.2f} | {step['anonymous'] / GIB:.2f} | {step['seconds']:.0f} |")
    written = ", ".join(f"{name} {size:,} bytes" for name, size in result["written"].items())
    return "\n".join([*lines, "", f"written: {written}"])


if __name__ == "__main__":
    run_command(main)
