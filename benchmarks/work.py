"""What the benchmarks share: the arithmetic that a training token takes, and batches as the peer pads them."""

import argparse
import math
import random
import time
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import NormalDist, median

import torch
from torch import Tensor
from torch.nn import functional as F

from llamalora.model.llama import Llama
from llamalora.training.arithmetic import Batch, model_flops
from llamalora.training.batch import Example
from llamalora.training.memory import LENGTHS


def need_peer(parser: argparse.ArgumentParser) -> None:
    """Ends with what to install, if the peer is not."""
    if missing := [name for name in ("transformers", "peft") if find_spec(name) is None]:
        parser.error(f"compares with {' and '.join(missing)}, not installed here: pip install -e '.[test]'")


def drawn_lengths(tokens: int, seed: int) -> list[int]:
    """Lengths of as many examples as have so many tokens, distributed as those of BC5CDR's training examples are
    (`LENGTHS`): log-normal, with their median and highest decile, up to the longest."""
    drawn = random.Random(seed)
    longest, high, median = LENGTHS[0], LENGTHS[1], LENGTHS[5]
    spread = math.log(high / median) / NormalDist().inv_cdf(0.9)
    lengths: list[int] = []
    while (room := tokens - sum(lengths)) > 0:
        length = max(8, round(drawn.lognormvariate(math.log(median), spread)))
        lengths.append(min(longest, room, length))
    return lengths


def flops_per_token(model: Llama, examples: Sequence[Example]) -> float:
    """As MFU counts them (`arithmetic.model_flops`)."""
    lengths = [len(example) for example in examples]
    supervised = sum(example.supervised for example in examples) / sum(lengths)
    return model_flops(model, Batch.of(lengths, supervised)) / sum(lengths)


@torch.no_grad()
def product_rate(weights: Sequence[Tensor], rows: int, rounds: int = 12) -> float:
    """FLOP/s of plain matrix products: so many rows by each of these weights, (out, in), one after the other."""
    operands = [(torch.randn(rows, w.shape[1], device=w.device).to(w.dtype), w) for w in weights]
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for x, weight in operands:
            F.linear(x, weight)
        if weight.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * rows * sum(weight.numel() for weight in weights) / median(seconds)


def padded(examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """The arguments of transformers' models, each (batch, longest): padded on the right, prompts not supervised."""
    shape = (len(examples), max(len(example.ids) for example in examples))
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        labels[row, example.prompt : length] = ids[row, example.prompt : length]
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
