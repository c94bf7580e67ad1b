#!/usr/bin/env python3
"""Decoding: ours against transformers' `generate`, its prompt-lookup decoding, and CTranslate2 (on CPUs, where it is
installed: pip install -e '.[test,benchmarks]'), on the same merged weights.

    python benchmarks/vs_generate.py --model weights/smollm2-135m --adapter RUN/best --data data/bc5cdr

All answer the same sentences of the development split, greedily, with one number of threads, in turns, several times;
the peers at several batch sizes, of which the best counts. Medians, ratios with their spread, what share of the time
plain matrix products would take, and every output that differs, with how far apart the two choices stood where it
begins. Beside ours in bf16 CTranslate2 computes in every type that it has, int8 among them, which is less exact.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from peers import CTranslate2, Questions, Transformers, compute_types, convert
from torch import nn
from work import need_peer, product_rate

from llamalora.corpus.read import find_splits, read_documents
from llamalora.distributed.world import World, join_world
from llamalora.evaluation.answer import Speed, answer_sentences
from llamalora.evaluation.answered import select_sentences
from llamalora.evaluation.systems import System, load_run, load_system
from llamalora.model.precision import DTYPES
from llamalora.paper.origin import origin
from llamalora.runs.settings import Settings

OURS = "llamalora"
ROWS = (64, 256)  # of the plain products: about what a pass has with few sentences side by side, and with many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="run folder of train.py")
    parser.add_argument("--model", help="Hugging Face folder, instead of --run")
    parser.add_argument("--adapter", help="PEFT adapter folder for --model")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--sentences", type=int, default=32, help="of the development split (default: 32)")
    parser.add_argument("--repeats", type=int, default=3, help="of each contestant, in turns (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--precision", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--batch", type=int, default=32, help="ours: sentences side by side (default: 32)")
    parser.add_argument("--peer-batches", default="1,8,32", help="generate's (default: 1,8,32)")
    parser.add_argument("--engine-batches", default="32,64", help="CTranslate2's (default: 32,64)")
    parser.add_argument("--lookup", type=int, default=10, help="generate's prompt_lookup_num_tokens (default: 10)")
    parser.add_argument("--out", help="write the JSON there as well")
    arguments = parser.parse_args()
    need_peer(parser)
    if bool(arguments.run) == bool(arguments.model):
        parser.error("give either --run, or --model with or without --adapter")
    torch.set_num_threads(arguments.threads)
    with join_world() as world, tempfile.TemporaryDirectory() as work:
        result = compare(arguments, world, Path(work))
    print(table(result))
    print(json.dumps(result))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n")


def compare(arguments: argparse.Namespace, world: World, work: Path) -> dict:
    system = load(arguments, world)
    documents = read_documents(find_splits(arguments.data)["dev"])
    _, asked = select_sentences(documents, arguments.sentences)
    questions = Questions(system, asked)
    theirs = Transformers(system, questions)
    speeds: list[Speed] = []

    def ours(constrain: bool = False) -> list[str]:
        answers, speed = answer_sentences(
            system.model, system.tokenizer, system.task, asked, world, arguments.batch, quiet=True,
            constrain=constrain, known=system.known,
        )  # fmt: skip
        speeds.append(speed)
        return [item.output for item in answers]

    contestants: dict[str, Callable[[], list[str]]] = {OURS: ours, f"{OURS}, --constrain": lambda: ours(constrain=True)}
    for batch in map(int, arguments.peer_batches.split(",")):
        contestants[f"generate, batch {batch}"] = lambda batch=batch: theirs.answer(batch)
    contestants["prompt lookup, batch 1"] = lambda: theirs.answer(1, prompt_lookup_num_tokens=arguments.lookup)
    kinds = compute_types(arguments.precision, world.device)
    folder = convert(system, work) if kinds else work
    for kind in kinds:
        engine = CTranslate2(folder, kind, arguments.threads, questions)
        for batch in map(int, arguments.engine_batches.split(",")):
            contestants[f"CTranslate2 {kind}, batch {batch}"] = lambda engine=engine, batch=batch: engine.answer(batch)

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    outputs: dict[str, list[str]] = {}
    weights = [layer.weight for layer in theirs.model.modules() if isinstance(layer, nn.Linear)]
    rates: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(arguments.repeats):
        for name, answer in contestants.items():
            started, worked = time.perf_counter(), time.process_time()
            outputs[name] = answer()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - worked)
            print(f"{name}: {seconds[name][-1]:.1f} s, {cpu[name][-1]:.1f} of all cores", flush=True)
        for rows in ROWS:
            rates[rows].append(product_rate(weights, rows, rounds=5))
            print(f"products of {rows} rows: {rates[rows][-1] / 1e9:.0f} GFLOP/s", flush=True)

    rivals = [name for name in contestants if not name.startswith(OURS)]
    slowest_first = sorted(rivals, key=lambda name: -statistics.median(seconds[name]))
    best = {name.partition(", batch")[0]: name for name in slowest_first}  # of each kind of peer
    speed = speeds[0].to_dict()
    needed = flops(theirs.model, sum(map(len, questions.prompts)), speed["tokens"], len(asked))
    products = {rows: statistics.median(measured) for rows, measured in rates.items()}
    packages = ("torch", "transformers", *["ctranslate2"] * bool(kinds))
    return {
        "made_by": origin(world) | {"packages": {name: version(name) for name in packages}},
        "sentences": len(asked),
        "precision": arguments.precision,
        "threads": arguments.threads,
        "seconds": seconds,
        "cpu_seconds": cpu,  # on a busy machine the better measure
        "sentences_per_second": {name: len(asked) / statistics.median(times) for name, times in seconds.items()},
        "best": best,
        "ratios": {name: ratio(seconds[name], seconds[OURS]) for name in best.values()},
        "cpu_ratios": {name: ratio(cpu[name], cpu[OURS]) for name in best.values()},
        "products_flops": products,
        "flops_per_sentence": needed / len(asked),
        "of_products": {
            name: needed / max(products.values()) / statistics.median(times) for name, times in seconds.items()
        },
        "differing_outputs": {name: theirs.differences(outputs[OURS], outputs[name]) for name in rivals},
        "tokens_per_row_pass": speed["tokens_per_row_pass"],
        "tokens_per_pass": speed["tokens_per_pass"],
    }


def load(arguments: argparse.Namespace, world: World) -> System:
    if arguments.run:
        return load_run(Path(arguments.run), "best", arguments.precision, world)
    settings = Settings(model=arguments.model, data=arguments.data)
    return load_system(settings, arguments.adapter, arguments.precision, world)


def flops(model: nn.Module, prompts: int, answers: int, sentences: int) -> int:
    """Of the matrix products that greedy decoding cannot do without: each token once through all blocks, and through
    the head where a token of an answer is chosen. Attention is left out.

    Args:
        prompts, answers: tokens in all, of answers with their ends, which are chosen, but not read.
    """
    head = model.lm_head.weight.numel()
    blocks = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)) - head
    return 2 * blocks * (prompts + answers - sentences) + 2 * head * answers


def ratio(theirs: list[float], ours: list[float]) -> dict:
    """How many times faster: the ratio of the medians, and the smallest and largest of any repeat."""
    each = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(theirs) / statistics.median(ours), "low": min(each), "high": max(each)}


def table(result: dict) -> str:
    made_by, products = result["made_by"], result["products_flops"].items()
    lines = [
        ", ".join([made_by["machine"]["device"], *(f"{name} {its}" for name, its in made_by["packages"].items())]),
        f"{result['sentences']} sentences, {result['precision']}, threads: {result['threads']}; ours "
        f"{result['tokens_per_row_pass']:.1f} tokens a forward pass and sentence, "
        f"{result['tokens_per_pass']:.0f} a forward pass",
        f"plain {result['precision']} products: " + ", ".join(f"{r} rows {rate / 1e9:.0f}" for r, rate in products)
        + f" GFLOP/s; a sentence needs {result['flops_per_sentence'] / 1e9:.1f} GFLOP",
        "",
        "| | sentences/s | of the products' speed | ours is faster | in processor time | other outputs | largest gap |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, rate in result["sentences_per_second"].items():
        faster = " | ".join(
            f"{times['median']:.2f} x ({times['low']:.2f} to {times['high']:.2f})" if times else ""
            for times in (result["ratios"].get(name), result["cpu_ratios"].get(name))
        )
        others = result["differing_outputs"].get(name)
        gaps = [abs(other["logit_gap"]) for other in others or ()]
        share, gap = result["of_products"][name], f"{max(gaps):.2g}" if gaps else ""
        lines.append(
            f"| {name} | {rate:.2f} | {share:.0%} | {faster} | {'' if others is None else len(gaps)} | {gap} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
