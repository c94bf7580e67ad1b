"""How much GPU memory training and its evaluations take, item by item, known before it is run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..evaluation.room import FRAGMENTS, OutOfMemory, measured, pass_bytes, slot_bytes
from ..lora.inject import lora_layers, trainable_parameters
from ..lora.layers import LoRALinear
from ..model.free_memory import GIB
from ..model.llama import Llama
from ..model.packing import Packing
from ..model.precision import DTYPES
from .batch import filled_up
from .cards import USABLE
from .saved import Step, parameter_count

CONTEXT_BYTES = int(0.36 * GIB)  # CUDA's own: of the 15.77 GiB that a V100 reports, 15.41 are left to tensors

MERGING = "frozen weights that wait while updates are merged"  # which they are only if there is room

# tokens of the training examples of BC5CDR (tagging, all labels, Llama-2's tokenizer): the longest, and the deciles
LENGTHS = (698, 175, 144, 123, 108, 97, 86, 75, 64, 50)


@dataclass(frozen=True)
class Plan:
    """What one process of a run needs on its GPU.

    Attributes:
        parallel: `ddp`, a whole model on every GPU, or `fsdp`, all parameters sharded over them.
        micro_tokens: tokens of a forward pass.
        items: bytes by item; they add up to the peak of a training step.
        capacity: bytes that the GPU reports.
        evaluation: bytes by item; they add up to the peak of an evaluation that decodes one sentence at a time.
        rows: sentences, each as long as the longest example, that have room side by side in an evaluation.
        longest: tokens of the longest example.
        of_others: the plan with micro-batches of so many tokens.
    """

    parallel: str
    micro_tokens: int
    items: dict[str, int]
    capacity: int
    evaluation: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    longest: int = 0
    of_others: Callable[[int], "Plan"] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def largest_micro_tokens(self) -> int:
        """The largest micro-batch that fits, within a sixty-fourth; 0 if not even the longest example does."""
        assert self.of_others is not None, "a plan made by hand has no others"
        if not self.of_others(self.longest).fits:
            return 0
        fitting, failing = self.longest, 2 * self.longest
        while self.of_others(failing).fits:
            fitting, failing = failing, 2 * failing
        while failing - fitting > fitting // 64:
            middle = (fitting + failing) // 2
            fitting, failing = (middle, failing) if self.of_others(middle).fits else (fitting, middle)
        return fitting

    @property
    def total(self) -> int:
        """Of a training step."""
        return sum(self.items.values())

    @property
    def evaluation_total(self) -> int:
        return sum(self.evaluation.values())

    @property
    def peak(self) -> int:
        """Of the run."""
        return max(self.total, self.evaluation_total)

    @property
    def usable(self) -> int:
        return int(USABLE * self.capacity)

    @property
    def spare(self) -> int:
        """Usable bytes left over; negative where a step, or an evaluation one sentence at a time, does not fit."""
        return self.usable - self.peak

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    def __str__(self) -> str:
        """A line for each item, in GiB."""
        lines = {**self.items, "total": self.total, f"{USABLE:.0%} of what the GPU reports": self.usable}
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {size / GIB:6.2f}" for name, size in lines.items())


def plan_memory(
    model: Llama,
    parallel: str,
    gpus: int,
    capacity: int,
    precision: str,
    micro_tokens: int,
    recompute: int = 0,
    lengths: Sequence[int] = LENGTHS,
) -> Plan:
    """The memory of a training step, and of an evaluation, on each of `gpus` GPUs.

    Args:
        model: with its LoRA layers, or with some or all of its own weights trainable; the meta device will do.
        parallel: `ddp` or `fsdp`.
        capacity: bytes that a GPU reports (`torch.cuda.get_device_properties(0).total_memory`).
        precision: of the products: `fp32`, `fp16` or `bf16`.
        recompute: activation checkpointing of every k-th block; 0: of none.
        lengths: of examples of which a micro-batch is thought to be made, the longest among them. It is
            never cut, so a micro-batch has at least its length.
    """
    sharded = parallel == "fsdp"
    held = _held(model, sharded, gpus, DTYPES[precision].itemsize)
    deciding, row = _evaluation(model, sharded, held, DTYPES[precision].itemsize, max(lengths))
    rows = max(0, (int(USABLE * capacity) - sum(deciding.values())) // row + 1)

    def at(tokens: int) -> Plan:
        # a device that is no CPU: attention is a GPU's
        packing = Packing(filled_up(micro_batch(tokens, lengths)), torch.device("meta"))
        step = Step(model, precision, packing, recompute, sharded)
        peaks = {"activations": step.activations, "logits": step.logits, "backward": step.backward}
        items = held | peaks | {"overhead": CONTEXT_BYTES}
        return Plan(parallel, tokens, items, capacity, deciding, rows, max(lengths), at)

    return at(max(micro_tokens, max(lengths)))


def typical(lengths: Sequence[int]) -> tuple[int, ...]:
    """The longest of many examples and the deciles below it, as in `LENGTHS`."""
    ordered = sorted(lengths, reverse=True)
    return tuple(ordered[len(ordered) * tenth // 10] for tenth in range(10))


def micro_batch(tokens: int, lengths: Sequence[int]) -> list[int]:
    """Lengths of a micro-batch of that many tokens: the longest example and the others in turn, as
    `batch.deal` orders them."""
    longest, *others = sorted(lengths, reverse=True)
    chosen, others = [longest], others or [longest]
    room = tokens - longest
    while room > 0:
        chosen.append(min(others[len(chosen) % len(others)], room))
        room -= chosen[-1]
    return sorted(chosen, reverse=True)


def _held(model: Llama, sharded: bool, gpus: int, width: int) -> dict[str, int]:
    """Bytes by item of what lives from step to step: the base model, in the products' dtype under LoRA and else in
    fp32; all that is trained in fp32, with its gradient, two moments and a step count."""
    trainable = trainable_parameters(model)
    learning = sum(parameter.numel() for parameter in trainable.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    lora = learning if lora_layers(model) else 0
    share = gpus if sharded else 1
    linear = [layer for layer in lora_layers(model).values() if isinstance(layer, LoRALinear) and not layer.dropout]
    cast = 0 if sharded or width == 4 else width * sum(one.lora_A.numel() + one.lora_B.numel() for one in linear)
    return {
        "base": ((total - lora) * width if lora else total * 4) // share,
        "LoRA": lora * 4 // share,
        "gradients": learning * 4 // share,
        "optimizer": (learning * 8 + len(trainable) * 4) // share,
        "LoRA cast": cast,  # by `cast_factors`
        # ddp has no buckets here: GradientSum works in place
        "buckets or gathered layers": _gathered(model, width) if sharded else 0,
    }


def _evaluation(
    model: Llama, sharded: bool, held: dict[str, int], width: int, longest: int
) -> tuple[dict[str, int], int]:
    """Bytes by item of an evaluation that decodes a sentence at a time, and the bytes that each further one takes.

    The gradients are gone, the optimizer's moments stay; the frozen weights of merged layers wait on the host. A layer
    is merged in fp32, W0 and the update; of weights in fp32 that learn autocast keeps copies in half precision.
    """
    config, adapted = model.config, lora_layers(model).values()
    converts = not (adapted or sharded or width == 4)
    blocks = [parameter_count(block) for block in model.model.layers]
    largest = max((layer.weight.numel() for layer in adapted), default=0)
    gathered = width * (parameter_count(model) - sum(blocks) + 3 * max(blocks)) * sharded
    ends = (model.model.embed_tokens, model.lm_head)
    parts = model.tied and not sharded and any(end in adapted for end in ends)  # merged, they are two matrices
    cache = slot_bytes(config, width) * longest
    one_pass = pass_bytes(config, width, longest, 1, 4 if converts else width)
    merging = (8 + width * sharded) * largest
    return {
        **{name: held[name] for name in ("base", "LoRA", "optimizer")},
        "gathered layers": gathered,
        "second matrix of tied ends": width * model.lm_head.weight.numel() * parts,
        "copies in half precision": width * parameter_count(model, learning=True) * converts,
        "cache of a sentence": cache,
        "its pass, or merging": max(one_pass, merging - cache - gathered),
        "overhead": CONTEXT_BYTES,
    }, cache + one_pass


def plan_host(model: Llama, parallel: str, processes: int, precision: str, computes: bool) -> dict[str, int]:
    """Bytes of the host's memory by item that each of a machine's processes needs, python and torch aside.

    Args:
        model: as in `plan_memory`.
        processes: over which `fsdp` shards.
        computes: the model is on the host, and not on a GPU.
    """
    sharded, width = parallel == "fsdp", DTYPES[precision].itemsize
    held = _held(model, sharded, processes, width) if computes else {}
    waiting = sum(layer.weight.numel() for layer in lora_layers(model).values()) * width
    return held | {
        "a tensor that is read or written": 4 * max(parameter.numel() for parameter in model.parameters()),
        MERGING: waiting // (processes if sharded else 1),
    }


def _gathered(model: Llama, width: int) -> int:
    """Bytes that FSDP2 (`distributed.sharding.shard`) holds beside a rank's own shard, at the most of three moments.

    All through a pass embedding, norm and head (one group, a tied matrix once), from the head's backward pass on
    with their gradients. With them, when a block computes, this block, the all-gather of the next and its copy
    into parameters, and in the backward pass the block's gradients, which become fp32 for the reduce-scatter;
    at the start, their own all-gather and the first block's; at the end their own gradients' reduce-scatter.
    """
    blocks = model.model.layers
    block, learning = max(map(parameter_count, blocks)), max(parameter_count(one, learning=True) for one in blocks)
    ends = parameter_count(model) - sum(map(parameter_count, blocks))
    ends_learning = parameter_count(model, learning=True) - sum(parameter_count(one, learning=True) for one in blocks)
    return max(
        width * (ends + ends_learning + 3 * block) + (width + 4) * learning,
        width * (2 * ends + block),
        width * (ends + ends_learning) + 4 * ends_learning,
    )


# ---- when it was not enough ----


@contextmanager
def explained(plan: Plan | None, device: torch.device) -> Iterator[None]:
    """Turns torch's error into one that says what was planned, what was measured and what to change.

    Raises:
        OutOfMemory
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if plan is None:
            raise
        share = "" if plan.parallel == "fsdp" else "--parallel fsdp with several processes, "
        raise OutOfMemory(
            f"the GPU's memory does not suffice. {error}\n\n"
            f"planned, in GiB ({plan.parallel}, micro-batches of {plan.micro_tokens:,} tokens):\n{plan}\n\n"
            f"{measured(device)}\n\n"
            f"what helps: --activation-checkpointing 1, a smaller --micro-tokens, {share}more processes, a lower "
            f"--rank; {FRAGMENTS}"
        ) from error
