#!/usr/bin/env python3
"""Does the cost grow as it should? Time a token of training and of decoding, against length and number of sequences.

    python benchmarks/scaling.py --model weights/smollm2-135m --out docs/results

Matrix products cost the same for every token; attention adds a part that grows with the length. A curve that bends
up earlier, or with the number of sequences, would betray padding or copies.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from llamalora.evaluation.generate import generate
from llamalora.lora.inject import inject_lora, merge
from llamalora.model.checkpoint import load_model
from llamalora.model.precision import DTYPES, choose_precision, prepare_gpu
from llamalora.training.batch import Example, MicroBatch
from llamalora.training.step import backward

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)  # tokens of a sequence; 2,048 tokens in all
COUNTS = (1, 2, 4, 8, 16, 32)  # sequences of 64 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="folder for scaling.json and scaling.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        prepare_gpu(device)
    precision, _ = choose_precision("auto", device)
    model = inject_lora(load_model(arguments.model, DTYPES[precision], device), "q,k,v,o,up,down,gate", rank=8)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def train(lengths: list[int]) -> float:
        ids = torch.randint(10, model.config.vocab_size, (max(lengths) + 1,)).tolist()
        examples = [Example(tuple(ids[: length + 1]), prompt=length // 2 + 1) for length in lengths]
        batch = MicroBatch.of(examples, device)
        supervised = sum(example.supervised for example in examples)
        return timed(lambda: backward(model, batch, supervised, scaler, precision), sum(lengths), arguments.repeats)

    def decode(prompts: int, length: int, new: int = 16) -> float:
        ids = torch.randint(10, model.config.vocab_size, (prompts, length)).tolist()
        tokens = prompts * (length + new)
        return timed(lambda: generate(model, ids, -1, new, prompts), tokens, arguments.repeats)

    result = {"device": str(device), "threads": arguments.threads, "precision": precision, "microseconds_a_token": {}}
    figures = result["microseconds_a_token"]
    figures["training, by length"] = {length: train([length] * (2048 // length)) for length in LENGTHS}
    figures["training, by number of sequences"] = {count: train([64] * count) for count in COUNTS}
    merge(model)
    figures["decoding, by length of the prompt"] = {length: decode(8, length) for length in LENGTHS[:-1]}
    figures["decoding, by number of sequences"] = {count: decode(count, 64) for count in COUNTS}
    for name, values in figures.items():
        print(f"{name}\n" + "\n".join(f"  {x:>6} {value:>10.0f} µs a token" for x, value in values.items()))
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scaling.json").write_text(json.dumps(result, indent=2) + "\n")
        plot(figures, folder / "scaling.png")


def timed(work, tokens: int, repeats: int) -> float:
    """Microseconds a token: the median of several runs after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds[1:]) / tokens


def plot(figures: dict[str, dict[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("length", "number of sequences"), strict=True):
        for name, values in figures.items():
            work, _, by = name.partition(", by ")
            if by.startswith(what):
                axes.plot(list(values), list(values.values()), marker="o", markersize=3, label=work)
        axes.set(xscale="log", yscale="log", xlabel=f"{what}" + (" (tokens)" if what == "length" else ""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        axes.set_ylabel("µs a token")
    figure.savefig(path)


if __name__ == "__main__":
    main()
