#!/usr/bin/env python3
"""Training speed and memory beside transformers + peft: same model, sentences, steps, initial adapter and threads.

    python benchmarks/vs_peft.py --model weights/smollm2-135m --data data/bc5cdr

The peer is measured in the forms in which its users write it - batches of 8 in random order, padded to the longest,
in fp32 and under bf16 autocast - and as we would tune it: batches of 16 of similar length, base model in bf16. Ours
stands beside the former as it is by default, in steps of 8, and beside the latter in steps of 16 with `--compile on`.
All sides run in processes of their own on the CPU, in turn, several times; a ratio is the median of those of single
rounds, its spread from the least to the most.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from work import flops_per_token, need_peer, padded, product_rate

from llamalora.corpus.documents import sentences_of
from llamalora.corpus.read import read_splits
from llamalora.distributed.world import World
from llamalora.lora.adapter import save_adapter
from llamalora.lora.inject import lora_layers, make_trainable
from llamalora.model.checkpoint import read_config, skeleton
from llamalora.runs.settings import Settings
from llamalora.runs.setup import build_model, make_task, read_base
from llamalora.training.batch import Example, encode_all, plan_epoch

HOME = Path(__file__).resolve().parents[1]
KINDS = "q,k,v,o,up,down,gate"
WARM = 2  # steps that are not counted
OURS = {"usual": "ours", "tuned": "ours-tuned"}  # what stands beside each form of the peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--sentences", type=int, default=96, help="training sentences of a repeat (default: 96)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sides", default="ours,ours-tuned,usual-fp32,usual-bf16,tuned-bf16", help="comma list")
    parser.add_argument("--out", help="write the figures there as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a peer's process
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    need_peer(parser)
    if arguments.sentences < 64:
        parser.error("--sentences: at least 64, or too few steps are left to count")
    if arguments.side:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(peer(arguments)))
        return
    sides = arguments.sides.split(",")
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as work:
        examples = prepare(arguments, Path(work))
        for repeat in range(arguments.repeats):
            for side in sides:
                measure = ours if side in OURS.values() else in_process
                runs[side].append(measure(arguments, side, Path(work) / f"{side}-{repeat}"))
                print(f"{side:<12} {runs[side][-1]['tokens_per_second']:.0f} tokens/s", flush=True)
    result = summary(arguments, runs, examples)
    print(f"\n{show(result)}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n")


def prepare(arguments: argparse.Namespace, work: Path) -> list[Example]:
    """The examples; they, our steps and our initial adapter are kept for the peer to start from."""
    settings = Settings(
        model=arguments.model, data=arguments.data, targets=KINDS, rank=arguments.rank, precision="fp32"
    )
    splits = read_splits(arguments.data)
    sentences = [s for document in splits["train"] for s in sentences_of(document)][: arguments.sentences]
    _, tokenizer = read_base(settings)
    model = build_model(settings, World(), "ddp")
    found, _ = encode_all(make_task(settings, splits), tokenizer, sentences, 10**9, "error")
    save_adapter(model, work / "adapter", base_model=arguments.model)
    steps = plan_epoch([1] * len(found), 8, seed=0, epoch=0)
    (work / "examples.json").write_text(json.dumps({"examples": [asdict(one) for one in found], "steps": steps}))
    return found


def on_cpu(arguments: argparse.Namespace) -> dict[str, str]:
    """The environment of a side: no side sees a GPU."""
    return os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "CUDA_VISIBLE_DEVICES": ""}


# ---- ours: train.py itself ----


def ours(arguments: argparse.Namespace, side: str, out: Path) -> dict:
    command = [
        sys.executable, str(HOME / "train.py"), "--model", arguments.model, "--data", arguments.data, "--out", str(out),
        "--targets", KINDS, "--rank", str(arguments.rank), "--lr", str(arguments.lr), "--schedule", "constant",
        "--warmup", "0", "--epochs", "1", "--limit-train", str(arguments.sentences), "--eval-limit", "1",
        *(("--batch-sentences", "16", "--compile", "on") if side == OURS["tuned"] else ("--batch-sentences", "8")),
    ]  # fmt: skip
    subprocess.run(command, check=True, env=on_cpu(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "tokens_per_second": sum(s["tokens"] for s in steps[WARM:]) / sum(s["seconds"] for s in steps[WARM:]),
        "peak_bytes": steps[-1]["peak_memory_bytes"],
        "losses": [step["loss"] for step in steps],
        "padding": sum(s["padding"] * s["tokens"] for s in steps) / sum(s["tokens"] for s in steps),
    }


# ---- the peer ----


def in_process(arguments: argparse.Namespace, side: str, out: Path) -> dict:
    command = [
        sys.executable, __file__, "--side", side, "--work", str(out.parent), "--model", arguments.model,
        "--data", arguments.data, "--threads", str(arguments.threads), "--lr", str(arguments.lr),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, env=on_cpu(arguments), capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peer(arguments: argparse.Namespace) -> dict:
    """transformers + peft on the examples that were prepared."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    form, _, precision = arguments.side.partition("-")
    half = precision == "bf16"
    kept = json.loads((Path(arguments.work) / "examples.json").read_text())
    examples, steps = [Example(**example) for example in kept["examples"]], kept["steps"]
    if form == "tuned":
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
        buckets = [order[start : start + 16] for start in range(0, len(order), 16)]
        steps = [buckets[place] for place in torch.randperm(len(buckets), generator=torch.Generator().manual_seed(0))]
    base = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16 if form == "tuned" else torch.float32
    )
    model = PeftModel.from_pretrained(base, str(Path(arguments.work) / "adapter"), is_trainable=True).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=arguments.lr, weight_decay=0.0, fused=True
    )
    losses, speeds, padding = [], [], []
    for step in steps:
        started = time.perf_counter()
        rows = [examples[index] for index in step]
        batch = padded(rows, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens = sum(map(len, rows))  # as ours counts: the end token is never read
        speeds.append((tokens, time.perf_counter() - started))
        padding.append(1 - tokens / batch["input_ids"].numel())
    counted = speeds[WARM:]
    return {
        "tokens_per_second": sum(tokens for tokens, _ in counted) / sum(seconds for _, seconds in counted),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
        "padding": statistics.mean(padding),
    }


# ---- what it comes to ----


def summary(arguments: argparse.Namespace, runs: dict[str, list[dict]], examples: list[Example]) -> dict:
    torch.set_num_threads(arguments.threads)
    model = make_trainable(skeleton(read_config(arguments.model)), targets=KINDS, rank=arguments.rank)
    flops, layers = flops_per_token(model, examples), lora_layers(model)
    shapes = [layer.weight.shape for name, layer in layers.items() if ".layers.0." in name]
    peak = product_rate([torch.randn(shape).bfloat16() for shape in shapes], 1024)
    sides = {}
    for side, those in runs.items():
        speeds = [run["tokens_per_second"] for run in those]
        sides[side] = {
            "tokens_per_second": statistics.median(speeds),
            "repeats": speeds,
            "of_matmul": statistics.median(speeds) * flops / peak,
            "peak_bytes": max(run["peak_bytes"] for run in those),
            "padding": those[0]["padding"],
            "losses": those[0]["losses"],
        }
        if beside := runs.get(OURS.get(side.partition("-")[0], "")):
            pairs = zip(beside, those, strict=True)
            ratios = [our["tokens_per_second"] / run["tokens_per_second"] for our, run in pairs]
            spread = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            sides[side]["ours_is_faster_by"] = spread
    return {"threads": arguments.threads, "flops_per_token": flops, "bf16_matmul_flops": peak, "sides": sides}


def show(result: dict) -> str:
    lines = [
        f"{result['threads']} threads; {result['flops_per_token'] / 1e9:.3f} GFLOP a token, bf16 products of these "
        f"shapes {result['bf16_matmul_flops'] / 1e9:.0f} GFLOP/s",
        f"{'':<12} {'tokens/s':>9} {'of matmul':>10} {'peak GiB':>9} {'padding':>8} {'last losses':>12}"
        "   ours is faster by",
    ]
    for side, found in result["sides"].items():
        last = statistics.mean(found["losses"][-4:])
        faster = found.get("ours_is_faster_by")
        ratio = f"{faster['median']:.2f} ({faster['least']:.2f} to {faster['most']:.2f})" if faster else ""
        lines.append(
            f"{side:<12} {found['tokens_per_second']:>9.0f} {100 * found['of_matmul']:>9.0f}% "
            f"{found['peak_bytes'] / 2**30:>9.2f} {100 * found['padding']:>7.1f}% {last:>12.4f}   {ratio}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
