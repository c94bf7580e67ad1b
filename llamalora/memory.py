"""How much GPU memory a training step takes, item by item, known before it is run.

Dimensions: N tokens of a micro-batch, D hidden, F feed-forward, R rank, V vocabulary.
What autograd keeps for the backward pass is written down tensor by tensor (`Step.saved`); a test counts what
the model really saves and names the entry that is off.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from .errors import RunError
from .lora import KINDS, LoRALinear, lora_layers, trainable_parameters
from .model import Llama
from .packing import Packing
from .precision import DTYPES
from .training import LOGITS_AT_ONCE, SOFTMAX_AT_ONCE

GIB = 2**30
CONTEXT_BYTES = int(0.36 * GIB)  # CUDA's own: of the 15.77 GiB that a V100 reports, 15.41 are left to tensors
REPORTED = 0.9856  # of the GB in a card's name (which are GiB), what it reports: 15.77 of 16
USABLE = 0.95  # of what it reports: the allocator wastes some, and a plan is no measurement

# tokens of the training examples of BC5CDR (tagging, all labels, Llama-2's tokenizer): the longest, and the deciles
LENGTHS = (698, 175, 144, 123, 108, 97, 86, 75, 64, 50)

Saved = dict[tuple[str, str], int]  # (module, tensor) -> bytes


@dataclass(frozen=True)
class Plan:
    """What one process of a run needs on its GPU.

    Attributes:
        parallel: `ddp`, a whole model on every GPU, or `fsdp`, all parameters sharded over them.
        micro_tokens: tokens of a forward pass.
        items: bytes by item; they add up to the peak.
        capacity: bytes that the GPU reports.
        largest_micro_tokens: the largest micro-batch that fits; 0 if not even the longest example does.
    """

    parallel: str
    micro_tokens: int
    items: dict[str, int]
    capacity: int
    largest_micro_tokens: int = 0

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def usable(self) -> int:
        return int(USABLE * self.capacity)

    @property
    def spare(self) -> int:
        """Usable bytes left over; negative where the step does not fit."""
        return self.usable - self.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    def __str__(self) -> str:
        """A line for each item, in GiB."""
        lines = {**self.items, "total": self.total, f"{USABLE:.0%} of what the GPU reports": self.usable}
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {size / GIB:6.2f}" for name, size in lines.items())


def plan(
    model: Llama,
    parallel: str,
    gpus: int,
    capacity: int,
    precision: str,
    micro_tokens: int,
    recompute: int = 0,
    lengths: Sequence[int] = LENGTHS,
) -> Plan:
    """The memory of a training step on each of `gpus` GPUs.

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

    def at(tokens: int) -> Plan:
        # a device that is no CPU: attention's rectangles are a GPU's
        packing = Packing(micro_batch(tokens, lengths), torch.device("meta"))
        step = Step(model, precision, packing, recompute, sharded)
        peaks = {"activations": step.activations, "logits": step.logits, "backward": step.backward}
        return Plan(parallel, tokens, held | peaks | {"overhead": CONTEXT_BYTES}, capacity)

    chosen = at(max(micro_tokens, max(lengths)))
    fitting = max(lengths)
    if not at(fitting).fits:
        return chosen
    failing = 2 * fitting
    while at(failing).fits:
        fitting, failing = failing, 2 * failing
    while failing - fitting > fitting // 64:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if at(middle).fits else (fitting, middle)
    return replace(chosen, largest_micro_tokens=fitting)


def typical(lengths: Sequence[int]) -> tuple[int, ...]:
    """The longest of many examples and the deciles below it, as in `LENGTHS`."""
    ordered = sorted(lengths, reverse=True)
    return tuple(ordered[len(ordered) * tenth // 10] for tenth in range(10))


def micro_batch(tokens: int, lengths: Sequence[int]) -> list[int]:
    """Lengths of a micro-batch of that many tokens: the longest example and the others in turn, as
    `batch.deal` orders them."""
    longest, *others = sorted(lengths, reverse=True)
    chosen, others = [longest], others or [longest]
    while (room := tokens - sum(chosen)) > 0:
        chosen.append(min(others[len(chosen) % len(others)], room))
    return sorted(chosen, reverse=True)


def _held(model: Llama, sharded: bool, gpus: int, width: int) -> dict[str, int]:
    """Bytes by item of what lives from step to step: the base model, in the products' dtype under LoRA and else in
    fp32; all that is trained in fp32, with its gradient, two moments and a step count."""
    trainable = trainable_parameters(model)
    learning = sum(parameter.numel() for parameter in trainable.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    lora = learning if lora_layers(model) else 0
    share = gpus if sharded else 1
    return {
        "base": ((total - lora) * width if lora else total * 4) // share,
        "LoRA": lora * 4 // share,
        "gradients": learning * 4 // share,
        "optimizer": (learning * 8 + len(trainable) * 4) // share,
        # DDP has no buckets here: World.sum_gradients works in place
        "buckets or gathered layers": _gathered(model, width) if sharded else 0,
    }


def _gathered(model: Llama, width: int) -> int:
    """Bytes that FSDP2 (`sharding.shard`) holds beside a rank's own shard, at the most of three moments.

    All through a pass embedding, norm and head (one group, a tied matrix once), from the head's backward pass on
    with their gradients. With them, when a block computes, this block, the all-gather of the next and its copy
    into parameters, and in the backward pass the block's gradients, which become fp32 for the reduce-scatter;
    at the start, their own all-gather and the first block's; at the end their own gradients' reduce-scatter.
    """
    blocks = model.model.layers
    block, learning = max(map(_size, blocks)), max(_size(one, learning=True) for one in blocks)
    ends = _size(model) - sum(map(_size, blocks))
    ends_learning = _size(model, learning=True) - sum(_size(one, learning=True) for one in blocks)
    return max(
        width * (ends + ends_learning + 3 * block) + (width + 4) * learning,
        width * (2 * ends + block),
        width * (ends + ends_learning) + 4 * ends_learning,
    )


def _size(module: nn.Module, learning: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


@dataclass(frozen=True)
class Step:
    """One micro-batch through `training.backward`: what it holds beside parameters and their gradients.

    Attributes:
        packing: of the micro-batch.
        recompute: activation checkpointing of every k-th block; 0: of none.
        sharded: under FSDP all parameters compute in the products' dtype; else, without LoRA, they are
            fp32, and so is the residual stream, and autocast converts at every product.
    """

    model: Llama
    precision: str
    packing: Packing
    recompute: int = 0
    sharded: bool = False

    @property
    def tokens(self) -> int:
        return self.packing.positions.numel()

    @property
    def width(self) -> int:
        """Bytes of a value in the products."""
        return DTYPES[self.precision].itemsize

    @cached_property
    def converts(self) -> bool:
        return not (lora_layers(self.model) or self.sharded or self.width == 4)

    @property
    def stream(self) -> int:
        """Bytes of a value of the residual stream."""
        return 4 if self.converts else self.width

    # ---- the three figures of a plan ----

    @property
    def activations(self) -> int:
        """Bytes kept from the forward to the backward pass."""
        return sum(self.saved().values()) + (0 if self.recompute else self._converted)

    @property
    def logits(self) -> int:
        """The most that the output head holds beside the activations, if every token is supervised.

        Of each chunk the logits and their gradient, computed of a block in fp32, under DoRA that before m / norm as
        well; hidden states and their gradient; the gradient of the head.
        """
        config = self.model.config
        chunk, block = (
            max(1, min(self.tokens, most // config.vocab_size)) * config.vocab_size
            for most in (LOGITS_AT_ONCE, SOFTMAX_AT_ONCE[1])
        )
        dora = getattr(self.model.lm_head, "dora", False)
        most = max(0 if self.width == 4 else 4 * block,
                   dora * self.width * chunk + self._gradient_of(self.model.lm_head))  # fmt: skip
        most += 2 * self.width * chunk
        return most + 2 * self.width * config.hidden_size * self.tokens + (self._converted if self.recompute else 0)

    @property
    def backward(self) -> int:
        """What the backward pass, which has its peak in the last block's MLP, holds beyond that.

        Four tensors (N, F), from the gradient of the product to those of gate and up, while the input of
        `down` is freed; hidden states and their gradient; the gradient of one matrix. If that block is
        recomputed, also all that it saves.
        """
        config, number = self.model.config, self.model.config.num_hidden_layers - 1
        last = f"model.layers.{number}"
        block, _ = self._block(last, reached=True)
        held = 4 * self.width * config.intermediate_size * self.tokens
        held -= block.get((f"{last}.mlp.down_proj", "input"), 0)
        held += 2 * self.width * config.hidden_size * self.tokens + self._gradient_of(self.model)
        if self._recomputes(number):
            held += sum(block.values()) - block[f"{last}.input_layernorm", "input"]
        return max(0, held - self.logits)

    def _recomputes(self, number: int) -> bool:
        return bool(self.recompute) and number % self.recompute == 0

    @property
    def _converted(self) -> int:
        """Half-precision copies: autocast keeps those of what learns, the backward pass those of frozen weights."""
        return self.width * _size(self.model, learning=self.recompute) if self.converts else 0

    def _copies(self, *parameters: nn.Parameter) -> int:
        """Of fp32 parameters, for the products."""
        return self.width * sum(p.numel() for p in parameters) if self.width < 4 else 0

    def _gradient_of(self, module: nn.Module) -> int:
        """Of the largest matrix that learns, before it is added up, in fp32 unless sharded."""
        largest = max((p.numel() for p in trainable_parameters(module).values()), default=0)
        return largest * (self.width if self.sharded or self.width == 4 else self.width + 4)

    # ---- what is saved between forward and backward ----

    def saved(self) -> Saved:
        """Bytes that autograd keeps of the backbone's forward pass, parameters excepted."""
        config, tokens = self.model.config, self.tokens
        found: Saved = {("model", "ids and places"): 16 * tokens}
        found["model", "cosines and sines"] = 8 * config.head_dim * tokens
        embedding = lora_layers(self.model).get("model.embed_tokens")
        if embedding is not None:
            found["model.embed_tokens", "rows of A"] = self.width * embedding.rank * tokens
            found["model.embed_tokens", "B converted"] = self._copies(embedding.lora_B)
            if embedding.dora:  # the stretched rows are kept as the input of the first block
                found["model.embed_tokens", "m / norm, and the norm"] = 8 * config.hidden_size
        reached = _learns(self.model.model.embed_tokens)  # does the block's input depend on anything that learns?
        for number in range(config.num_hidden_layers):
            name = f"model.layers.{number}"
            block, reached = self._block(name, reached)
            found |= {(name, "input"): self.stream * config.hidden_size * tokens} if self._recomputes(number) else block
        if reached:
            found |= self._norm("model.norm")
        return found

    def _block(self, name: str, reached: bool) -> tuple[Saved, bool]:
        """What a block saves, and whether its output depends on anything that learns."""
        config, tokens, width = self.model.config, self.tokens, self.width
        heads, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        found: Saved = {}
        if reached:
            found |= self._norm(f"{name}.input_layernorm")
        if self._linear(found, attention, ("q", "k", "v"), config.hidden_size) or reached:
            reached = True
            # A padded rectangle is a copy, and the row it is made of is kept beside it; one without padding
            # is a view of the row. Keys and values are repeated for the queries that share them.
            shapes = [(math.prod(one.shape), one.slots is not None) for one in self.packing.rectangles]
            slots, padded = sum(size for size, _ in shapes), sum(size for size, is_padded in shapes if is_padded)
            found[attention, "q"] = width * heads * (tokens + padded)
            for tensor in ("k", "v"):
                row, copy = (tokens, padded) if keys == heads else (tokens if padded else 0, slots)
                if (f"{attention}.v_proj", "output") in found and tensor == "v":
                    row = 0
                found[attention, tensor] = width * (keys * row + heads * copy)
            found[attention, "output"] = width * heads * slots
            found[attention, "logarithms of sums"] = 4 * config.num_attention_heads * slots
        if self._linear(found, attention, ("o",), heads) or reached:
            reached = True
            found |= self._norm(f"{name}.post_attention_layernorm")
        if self._linear(found, mlp, ("gate", "up"), config.hidden_size) or reached:
            reached = True
            for tensor in ("gate", "up"):
                if (f"{mlp}.{tensor}_proj", "output") not in found:
                    found[mlp, tensor] = width * config.intermediate_size * tokens
        return found, self._linear(found, mlp, ("down",), config.intermediate_size) or reached

    def _norm(self, name: str) -> Saved:
        size = self.stream * self.model.config.hidden_size * self.tokens
        found = {(name, "input"): size, (name, "1 / rms"): 4 * self.tokens}
        return found | ({(name, "normalised input"): size} if _learns(self.model.get_submodule(name)) else {})

    def _linear(self, found: Saved, parent: str, kinds: tuple[str, ...], features: int) -> bool:
        """Adds what layers save that have one input between them; returns whether any of them learns."""
        names = [f"{parent}.{KINDS[kind]}" for kind in kinds]
        layers = {name: self.model.get_submodule(name) for name in names}
        learning = [name for name in names if _learns(layers[name])]
        adapted = [name for name in learning if isinstance(layers[name], LoRALinear)]
        dropping = [name for name in adapted if layers[name].dropout]
        inputs = len(learning) - len(dropping)
        if inputs:
            found[names[0], "input"] = self.width * features * self.tokens * (inputs if self.converts else 1)
        for name in adapted:
            found[name, "x A^T"] = self.width * layers[name].rank * self.tokens
        for name in dropping:
            found[name, "input after dropout, and the mask"] = (self.width + 1) * features * self.tokens
            found[name, "A and B converted"] = self._copies(layers[name].lora_A, layers[name].lora_B)
        for name in adapted:
            if layers[name].dora:
                output = self.width * layers[name].out_features * self.tokens
                kept = {"W0 x and B A x after dropout": 2 * output} if name in dropping else {"output": output}
                found |= {(name, tensor): size for tensor, size in kept.items()}
                found[name, "m / norm, and the norm"] = 8 * layers[name].out_features
        return bool(learning)


# ---- when it was not enough ----


class OutOfMemory(RunError):
    """A GPU's memory did not suffice; the message sets the plan beside what was measured."""


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
        held, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        share = "" if plan.parallel == "fsdp" else "--parallel fsdp with several processes, "
        raise OutOfMemory(
            f"the GPU's memory does not suffice. {error}\n\n"
            f"planned, in GiB ({plan.parallel}, micro-batches of {plan.micro_tokens:,} tokens):\n{plan}\n\n"
            f"measured: {held / GIB:.2f} GiB held by tensors at the peak, {reserved / GIB:.2f} by the allocator "
            "(CUDA itself and other programs take the rest)\n\n"
            f"what helps: --activation-checkpointing 1, a smaller --micro-tokens, {share}more processes, a lower "
            "--rank; in an evaluation a smaller --eval-batch; where much is reserved and not held, the environment "
            "variable PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        ) from error
