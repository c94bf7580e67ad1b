"""How long training and decoding take on GPUs that are known by their data sheets: what is counted (`arithmetic`) over
rates, of which those below were found on one H200. A plan, no measurement; reading and saving files are not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..distributed.gradients import STRETCH_BYTES
from ..evaluation.graphed import most_tokens, padded
from .arithmetic import DECODING, DECODING_ENDS, Batch, Part, Work, model_flops
from .cards import Card

# found on an H200 and its host (docs/hardware.md, 2026-11-26)
PRODUCTS, ATTENTION = 0.75, 0.05  # shares of peak that large products reach, and attention's of a hundred tokens
MEMORY, FEW_ROWS = 0.85, 0.76  # shares of the memory's bandwidth, the second of products with few rows
KERNEL = 3e-6  # seconds that the kernels of a graph take on average that read next to nothing
LAUNCH, TRAINING_LAUNCH = 25e-6, 35e-6  # seconds of the host for a kernel, in decoding and in training
UPDATE = 24e-6  # seconds of the host for a tensor that is updated

# assumed
LINKS, COLLECTIVE = 0.80, 25e-6  # share of a link's bandwidth, and seconds that a collective waits
BACKWARD = 0.5  # share of a micro-batch's time, in which ddp sums gradients already
WRITTEN, REJECTED = 11, 0.28  # tokens that a sentence gains in a pass with drafts; how many of the drafted are wrong


@dataclass(frozen=True)
class Links:
    """Several GPUs, and what they exchange over.

    Attributes:
        gpus: of each node.
        inside: GB/s in each direction of a GPU to the others of its node.
        network: GB/s in each direction of a node to the others.
    """

    gpus: int = 1
    nodes: int = 1
    inside: float = 0.0
    network: float = 0.0

    @property
    def size(self) -> int:
        return self.gpus * self.nodes

    def seconds(self, size: float, collectives: int) -> float:
        """Of gathering or scattering so many bytes, in a ring through all GPUs."""
        if self.size == 1:
            return 0.0
        slowest = self.inside if self.nodes == 1 else self.network if self.gpus == 1 else min(self.inside, self.network)
        return size * (1 - 1 / self.size) / (LINKS * slowest * 1e9) + collectives * COLLECTIVE


@dataclass(frozen=True)
class Training:
    """How long some steps take.

    Attributes:
        parts: seconds on the slowest GPU of each step, by what takes them.
        mfu: share of the peak of all GPUs that `model_flops` come to.
    """

    seconds: float
    parts: dict[str, float]
    steps: int
    mfu: float


@dataclass(frozen=True)
class Machine:
    """What the work is done on.

    Attributes:
        sharded: the model is spread over all GPUs (fsdp), or on each (ddp).
        whole: if it is spread, blocks of which each GPU keeps the frozen weights.
    """

    card: Card
    links: Links = Links()
    sharded: bool = False
    whole: int = 0

    def seconds(self, part: Part, precision: str) -> float:
        """The longest of its arithmetic, its bytes, and its kernels' shortest times."""
        peak = (ATTENTION if part.small else PRODUCTS) * self.card.teraflops[precision] * 1e12
        share = FEW_ROWS if part.few_rows else MEMORY
        return max(part.flops / peak, part.bytes / (share * self.card.bandwidth * 1e9), part.kernels * KERNEL)

    def micro_batch(self, work: Work, batch: Batch) -> dict[str, float]:
        """Seconds of each part of a micro-batch, and those that it waits beyond: for a host that is later with its
        launches than the GPU with the work, and for links where parameters are gathered and gradients scattered."""
        shards = self.links.size if self.sharded else 1
        taken = {name: self.seconds(part, work.precision) for name, part in work.parts(batch, shards).items()}
        taken["host"] = max(0.0, work.launches * TRAINING_LAUNCH - sum(taken.values()))
        taken["links"] = 0.0
        if self.sharded:
            gathered = 2 * work.width * (work.size - self.whole * work.frozen_of_a_block)
            passes = 3 * (work.model.config.num_hidden_layers + 1)
            taken["links"] = max(0.0, self.links.seconds(gathered + 4 * work.trainable, passes) - sum(taken.values()))
        return taken

    def update(self, work: Work) -> dict[str, float]:
        """Seconds of what follows the micro-batches of a step."""
        shards = self.links.size if self.sharded else 1
        count = (40 + 8 * (work.precision == "fp16")) * work.trainable / shards  # norm, clipping, AdamW; unscaling
        host = UPDATE * len(work.learning)
        taken = {"optimizer": max(host, self.seconds(Part(bytes=count), work.precision))}
        # gradients are summed stretch by stretch: scattered, and gathered again
        size = 4 * work.trainable
        return taken | {"links": 0.0 if self.sharded else self.links.seconds(2 * size, ceil(size / STRETCH_BYTES))}

    def training(self, work: Work, steps: Sequence[Sequence[Sequence[Batch]]]) -> Training:
        """Of steps that `micro_batches` has shared out."""
        total: dict[str, float] = {}
        update = self.update(work)
        for step in steps:
            shares = [[self.micro_batch(work, batch) for batch in share] for share in step]
            slowest = max(shares, key=lambda share: sum(sum(parts.values()) for parts in share))
            hidden = BACKWARD * sum(slowest[-1].values())  # sums go on beside the last backward pass
            total = _sum(total, *slowest, update | {"links": max(0.0, update["links"] - hidden)})
        batches = [batch for step in steps for share in step for batch in share]
        tokens, supervised, squares = (
            sum(getattr(batch, name) for batch in batches) for name in ("tokens", "supervised", "squares")
        )
        peak = self.links.size * self.card.teraflops[work.precision] * 1e12
        flops = model_flops(work.model, Batch(tokens, supervised, squares))
        seconds = sum(total.values())
        return Training(seconds, total, len(steps), flops / seconds / peak)

    def decoding(self, work: Work, rows: int, tokens: int, reach: float, graphed: bool = False) -> float:
        """Seconds of a pass, as in `Work.decoding`."""
        parts = work.decoding(rows, tokens, reach, graphed).values()
        seconds = sum(self.seconds(part, work.precision) for part in parts)
        if not graphed:
            seconds = max(seconds, (work.model.config.num_hidden_layers * DECODING + DECODING_ENDS) * LAUNCH)
        if not self.sharded:
            return seconds
        passes = work.model.config.num_hidden_layers + 1
        return max(seconds, self.links.seconds(work.width * work.size, passes))

    def sentences_a_second(self, work: Work, rows: int, prompt: float, answer: float) -> float:
        """On one GPU, with verified drafts: a pass over the prompts, then as many as write the answers.

        Args:
            prompt, answer: tokens of a sentence.
        """
        tokens = round(WRITTEN / (1 - REJECTED))
        graphed = not self.sharded and rows * padded(tokens) <= most_tokens(
            work.model, work.width, self.card.capability
        )
        read = self.decoding(work, rows, round(prompt), prompt / 2)
        written = self.decoding(work, rows, padded(tokens) if graphed else tokens, prompt + answer / 2, graphed)
        return rows / (read + max(1.0, answer / WRITTEN) * written)


def _sum(*parts: dict[str, float]) -> dict[str, float]:
    names = dict.fromkeys(name for each in parts for name in each)
    return {name: sum(each.get(name, 0.0) for each in parts) for name in names}
