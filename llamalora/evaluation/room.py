"""The memory that decoding takes beside the model, and how many sentences side by side that allows.

Dimensions: D hidden, F feed-forward, V vocabulary; a slot is a token's keys and values in all layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import torch

from ..errors import RunError
from ..model.config import LlamaConfig
from ..model.free_memory import GIB, SHARE, free_memory
from ..model.packing import KVCache

GRAIN = 64  # slots by which the cache grows
FRAGMENTS = (
    "where much is reserved and not held, the environment variable PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)
WIDEST = 3  # the cache is not to be wider than as many times what a row needs on average


class NoRoom(Exception):
    """The cache cannot grow as far as a pass needs."""


class OutOfMemory(RunError):
    """The memory did not suffice; the message says what was planned and what helps."""


def slot_bytes(config: LlamaConfig, width: int) -> int:
    """Bytes of a token's keys and values, each of `width` bytes."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width


def pass_bytes(config: LlamaConfig, width: int, tokens: int, choices: int, stream: int = 0) -> int:
    """The most that a forward pass holds for a moment: at the feed-forward network the residual stream, its norm, gate,
    up, their product and what that is computed from; at attention the same again or less; then the logits.

    Args:
        tokens: that go through.
        choices: places at which a token is chosen.
        stream: bytes of a value of the residual stream, if other than `width`.
    """
    block = tokens * (3 * config.hidden_size * (stream or width) + 4 * config.intermediate_size * width)
    return max(block, width * (2 * tokens * config.hidden_size + 2 * choices * config.vocab_size))


def expected(prompt: int, limit: int) -> int:
    """Slots that a row will probably need: an answer that repeats its sentence with tags is seldom half as long again
    as the prompt."""
    return prompt + min(limit, prompt + prompt // 2)


class Room:
    """How many rows of the cache are used side by side, and how long they are.

    Long sentences come first, and all rows of the cache are as long as the longest of those in it. So fewer stand side
    by side at first, and more the shorter they get: as many as the memory holds, and no more than have `WIDEST` times
    the slots that rows of average length would need.

    Args:
        most: rows side by side at most.
        needs: the `expected` slots of all prompts.
    """

    def __init__(
        self, config: LlamaConfig, cache: KVCache, most: int, needs: Sequence[int], tell: Callable[[str], None]
    ):
        self.config, self.cache, self.most, self.tell = config, cache, most, tell
        self.width, self.device = cache.keys[0].itemsize, cache.keys[0].device
        self.slot = slot_bytes(config, self.width)
        self.area = WIDEST * most * sum(needs) // max(1, len(needs))  # slots
        self.told = False

    def entering(self, inside: Sequence[int], waiting: Iterable[tuple[int, int]]) -> int:
        """How many of those that wait come in: none until there is room for a quarter of all, for they enter in a pass
        of their own, which is longer than a step.

        Args:
            inside: slots that each row in the cache will need.
            waiting: of each that waits its tokens, and the slots that it will need.
        """
        candidates = list(islice(waiting, self.most - len(inside)))
        room = self._room(inside, candidates, self.area)
        if not room:
            return 0
        there = SHARE * (free_memory(self.device) + self.cache.nbytes)
        there -= pass_bytes(self.config, self.width, sum(tokens for tokens, _ in candidates[:room]), room)
        possible = self._room(inside, candidates, int(there) // self.slot)
        if possible < room:
            self._say(f"the memory that is free suffices for {len(inside) + possible}")
        return min(room, possible, len(candidates))

    def _room(self, inside: Sequence[int], candidates: Sequence[tuple[int, int]], area: int) -> int:
        room, longest = self.most - len(inside), max(inside, default=0)
        for count, (_, need) in enumerate(candidates):
            longest = max(longest, need)
            if (inside or count) and (len(inside) + count + 1) * longest > area:
                room = count
                break
        return room if 4 * room >= len(inside) + room else 0

    def make(self, rows: int, slots: int, tokens: int, choices: int, alone: bool) -> None:
        """Sees to it that the cache has so many rows and slots.

        Args:
            tokens, choices: of the pass that is to come, as in `pass_bytes`.
            alone: there is but one row to decode, so whatever is free must do.

        Raises:
            NoRoom
        """
        if rows <= self.cache.rows and slots <= self.cache.slots:
            return
        slots = -(-slots // GRAIN) * GRAIN
        more = self.slot * rows * slots * (1 + 0.5 / self.config.num_hidden_layers) - self.cache.nbytes
        needed = max(0, more) + pass_bytes(self.config, self.width, tokens, choices)
        if not alone and needed > SHARE * free_memory(self.device):
            raise NoRoom
        try:
            self.cache.resize(rows, slots)
        except torch.OutOfMemoryError:
            if alone:
                raise
            raise NoRoom from None

    def halve(self, needs: Sequence[int]) -> None:
        """After it turned out that so many rows are too many: half of them."""
        self.cache.resize(0, 0)
        half = len(needs) // 2
        self.area = half * max(needs)
        self._say(f"the memory does not suffice for {len(needs)}, but perhaps for {half}")

    def _say(self, what: str) -> None:
        if not self.told:
            self.told = True
            self.tell(f"decoding up to {self.most} sentences side by side: {what}; it goes on with fewer, slower")


@contextmanager
def explained(doing: str, planned: Callable[[], Mapping[str, int]], device: torch.device) -> Iterator[None]:
    """Turns torch's error into one that says what was planned, what was measured and what helps.

    Args:
        doing: what was going on.
        planned: bytes by item.

    Raises:
        OutOfMemory
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        items = dict(planned())
        lines = items | {"total": sum(items.values())}
        width = max(map(len, lines))
        table = "\n".join(f"{name:{width}}  {size / GIB:6.2f}" for name, size in lines.items())
        raise OutOfMemory(
            f"{doing}: the GPU's memory does not suffice. {error}\n\nplanned, in GiB:\n{table}\n\n{measured(device)}"
            f"\n\nwhat helps: a GPU with more memory, or without other programs on it; --precision fp16 or bf16; a "
            f"prompt with fewer --shots; in training --parallel fsdp with several processes; {FRAGMENTS}"
        ) from error


def decoding_items(config: LlamaConfig, width: int, held: int, longest: int) -> dict[str, int]:
    """Bytes by item of decoding one sentence at a time, the longest of which has so many slots."""
    return {
        "held before (the model, and in training the optimizer)": held,
        "cache of a sentence": slot_bytes(config, width) * longest,
        "its pass": pass_bytes(config, width, longest, 1),
    }


def measured(device: torch.device) -> str:
    """What tensors and torch's allocator have held of a GPU at the most, in words."""
    held, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return (
        f"measured: {held / GIB:.2f} GiB held by tensors at the peak, {reserved / GIB:.2f} by the allocator "
        "(CUDA itself and other programs take the rest)"
    )
