"""Examples -> steps -> micro-batches: what is supervised, what is computed together, and by which process.

Dimensions: N tokens of a packed micro-batch, M supervised tokens of it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..model.packing import Packing, moved
from ..task.definition import Task
from ..task.prompt import render_answer, render_prompt
from ..task.tokenizer import Tokenizer

ROWS_AT_ONCE = 16  # of a matrix that processors multiply: with one more or less they take up to 8 % longer


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; the loss counts `ids[prompt:]`, which ends with the end token."""

    ids: tuple[int, ...]
    prompt: int

    def __len__(self) -> int:
        return len(self.ids) - 1  # the end token is predicted, never read

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.prompt


class OverlongError(InputError):
    """An example longer than the model's context."""


def encode(task: Task, tokenizer: Tokenizer, text: str, spans: Sequence) -> Example:
    """The training example of a sentence. Prompt and answer are tokenised apart and their ids joined, so
    that no token straddles the boundary and generation meets the very prompt ids of training."""
    prompt = tokenizer.encode(render_prompt(task, text))
    answer = tokenizer.encode_continuation(" " + render_answer(task, text, spans))
    return Example((*prompt, *answer, tokenizer.eos_id), len(prompt))


def encode_all(
    task: Task, tokenizer: Tokenizer, sentences: Sequence, context: int, overlong: str
) -> tuple[list[Example], int]:
    """Examples of all sentences, and how many were skipped as longer than `context` tokens.

    Args:
        overlong: `skip` leaves such examples out, `error` refuses them; none is ever cut.

    Raises:
        OverlongError: `overlong` is `error` and an example does not fit.
    """
    examples = [encode(task, tokenizer, sentence.text, sentence.spans) for sentence in sentences]
    fitting = [example for example in examples if len(example) <= context]
    skipped = len(examples) - len(fitting)
    if skipped and overlong == "error":
        index = next(i for i, example in enumerate(examples) if len(example) > context)
        raise OverlongError(
            f"the example of document {sentences[index].document} at character {sentences[index].start} has "
            f"{len(examples[index])} tokens, the model's context {context} ({skipped} such examples); "
            "--overlong skip leaves them out"
        )
    return fitting, skipped


def plan_epoch(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The optimizer steps of an epoch: example indices, shuffled, each step up to `batch_tokens` tokens (or
    that many examples, where each is given the length 1).

    It depends on nothing else, so every process and every resumed run sees the same order.
    """
    order = list(range(len(lengths)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    steps: list[list[int]] = []
    room = 0
    for index in order:
        if lengths[index] > room or not steps:
            steps.append([])
            room = batch_tokens
        steps[-1].append(index)
        room -= lengths[index]
    return steps


def deal(indices: Sequence[int], lengths: Sequence[int], ranks: int, micro_tokens: int) -> list[list[list[int]]]:
    """Shares out a step: for each process the same number of micro-batches, each of at most
    `micro_tokens` tokens (or one longer example), as even as longest-first greedy filling makes them."""
    by_length = sorted(indices, key=lambda i: -lengths[i])
    capacity = max(micro_tokens, lengths[by_length[0]])
    total = sum(lengths[i] for i in indices)
    rounds = -(-total // (capacity * ranks))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * ranks)]
        loads = [0] * len(bins)
        for index in by_length:
            lightest = loads.index(min(loads))
            bins[lightest].append(index)
            loads[lightest] += lengths[index]
        if max(loads) <= capacity:
            return [bins[rank::ranks] for rank in range(ranks)]
        rounds += 1


@dataclass(frozen=True)
class MicroBatch:
    """Several examples packed into one row."""

    ids: Tensor  # (1, N)
    packing: Packing
    predictors: Tensor  # (M,) places in the row whose next token is supervised
    targets: Tensor  # (M,) those next tokens

    @staticmethod
    def of(examples: Sequence[Example], device: torch.device) -> "MicroBatch":
        """The row is filled up to a multiple of `ROWS_AT_ONCE`, behind the last example, where no token sees it."""
        ids: list[int] = []
        predictors: list[int] = []
        targets: list[int] = []
        for example in examples:
            first = len(ids) + example.prompt - 1
            predictors.extend(range(first, first + example.supervised))
            targets.extend(example.ids[example.prompt :])
            ids.extend(example.ids[:-1])
        lengths = filled_up([len(example) for example in examples])
        ids += [0] * (sum(lengths) - len(ids))
        row, *supervised = moved(device, *map(torch.tensor, (ids, predictors, targets)))
        return MicroBatch(row[None], Packing(lengths, device), *supervised)


def filled_up(lengths: Sequence[int]) -> list[int]:
    """The lengths of a row's examples, the last one's with what fills the row up."""
    *others, last = lengths
    return [*others, last + -sum(lengths) % ROWS_AT_ONCE]


def show(example: Example, tokenizer: Tokenizer) -> str:
    """An example decoded, the supervised part marked: what the loss really counts."""
    prompt, answer = example.ids[: example.prompt], example.ids[example.prompt : -1]
    return f"{tokenizer.decode(list(prompt))}⟦{tokenizer.decode(list(answer))}<end>⟧"
