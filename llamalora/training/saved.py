"""What autograd keeps of a training step, tensor by tensor; a test counts what the model really saves and names the
entry that is off.

Dimensions: N tokens of a micro-batch, D hidden, F feed-forward, R rank, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..lora.inject import lora_layers, trainable_parameters
from ..lora.kinds import KINDS
from ..lora.layers import LoRALinear
from ..model.attention import attention_kernel
from ..model.llama import Llama
from ..model.packing import Packing
from ..model.precision import DTYPES
from .step import LOGITS_AT_ONCE, SOFTMAX_AT_ONCE

Saved = dict[tuple[str, str], int]  # (module, tensor) -> bytes


def parameter_count(module: nn.Module, learning: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)


def learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


@dataclass(frozen=True)
class Step:
    """One micro-batch through `step.backward`: what it holds beside parameters and their gradients.

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

    @property
    def kernel(self) -> str:
        """Of attention. In half precision the CPU's, which no plan is for, is counted as a GPU's on rectangles."""
        device = self.packing.positions.device
        kernel = attention_kernel(self.model.config.head_dim, DTYPES[self.precision], device)
        return "rectangles" if kernel == "products" else kernel

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

        For each chunk the logits and their gradient (computed block by block in fp32), with DoRA also the gradient
        before m / norm; the hidden states and their gradient; the head's gradient.
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
        """What the backward pass, which has its peak in the last block, holds beyond that: at its MLP, or at its
        attention where rectangles are padded.

        At the MLP four tensors (N, F), from the gradient of the product to those of gate and up, while the input of
        `down` is freed. At attention the gradients of its output, queries, keys and values as rectangles, when all
        that the block saves behind it is freed. With either hidden states and their gradient; the gradient of one
        matrix; and if that block is recomputed, all that it saves.
        """
        config, number = self.model.config, self.model.config.num_hidden_layers - 1
        last = f"model.layers.{number}"
        block, _ = self._block(last, reached=True)
        behind = ("mlp", "post_attention_layernorm", "self_attn.o_proj")
        freed = sum(size for (name, _), size in block.items() if name.startswith(tuple(f"{last}.{x}" for x in behind)))
        heads = config.num_attention_heads * config.head_dim
        mlp = 4 * self.width * config.intermediate_size * self.tokens
        mlp -= block.get((f"{last}.mlp.down_proj", "input"), 0)
        slots = self.tokens
        if self.kernel == "rectangles":
            slots = sum(math.prod(one.shape) for one in self.packing.rectangles)
        attention = 4 * self.width * heads * slots + self._summed_in_fp32 - freed
        held = max(mlp, attention)
        held += 2 * self.width * config.hidden_size * self.tokens + self._gradient_of(self.model)
        if self._recomputes(number):
            held += sum(block.values()) - block[f"{last}.input_layernorm", "input"]
        return max(0, held - self.logits)

    @property
    def _summed_in_fp32(self) -> int:
        """What the kernels without rectangles sum the queries' gradient in: the memory-efficient one in a rectangle of
        tiles of 64, as long as the longest sequence, and flash in the row, with up to 128 tokens more a sequence."""
        heads, lengths = self.model.config.num_attention_heads, self.packing.lengths
        tile = {"memory-efficient": 64, "flash": 32}.get(self.kernel)
        if tile is None:
            return 0
        longest = -(-max(lengths) // 64) * 64
        slots = len(lengths) * longest if tile == 64 else sum(lengths) + 128 * len(lengths)
        return 4 * slots * heads * -(-self.model.config.head_dim // tile) * tile

    def _recomputes(self, number: int) -> bool:
        return bool(self.recompute) and number % self.recompute == 0

    @property
    def _converted(self) -> int:
        """Half-precision copies: autocast keeps those of what learns, the backward pass those of frozen weights."""
        return self.width * parameter_count(self.model, learning=bool(self.recompute)) if self.converts else 0

    def _copies(self, *parameters: nn.Parameter) -> int:
        """Bytes of the copies of fp32 parameters that the products need in half precision."""
        return self.width * sum(p.numel() for p in parameters) if self.width < 4 else 0

    def _gradient_of(self, module: nn.Module) -> int:
        """Bytes of the gradient of the largest matrix that learns, before it is added up: in fp32 unless sharded."""
        largest = max((p.numel() for p in trainable_parameters(module).values()), default=0)
        return largest * (self.width if self.sharded or self.width == 4 else self.width + 4)

    # ---- what is saved between forward and backward ----

    def saved(self) -> Saved:
        """Bytes that autograd keeps of the backbone's forward pass, parameters excepted."""
        config, tokens = self.model.config, self.tokens
        kept: Saved = {("model", "ids and places"): 16 * tokens}
        kept["model", "cosines and sines"] = 8 * config.head_dim * tokens
        embedding = lora_layers(self.model).get("model.embed_tokens")
        if embedding is not None:
            kept["model.embed_tokens", "rows of A"] = self.width * embedding.rank * tokens
            kept["model.embed_tokens", "B converted"] = self._copies(embedding.lora_B)
            if embedding.dora:  # the stretched rows are kept as the input of the first block
                kept["model.embed_tokens", "m / norm, and the norm"] = 8 * config.hidden_size
        reached = learns(self.model.model.embed_tokens)  # does the block's input depend on anything that learns?
        for number in range(config.num_hidden_layers):
            name = f"model.layers.{number}"
            block, reached = self._block(name, reached)
            kept |= {(name, "input"): self.stream * config.hidden_size * tokens} if self._recomputes(number) else block
        if reached:
            kept |= self._norm("model.norm")
        return kept

    def _block(self, name: str, reached: bool) -> tuple[Saved, bool]:
        """What a block saves, and whether its output depends on anything that learns."""
        config, tokens, width = self.model.config, self.tokens, self.width
        heads, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        kept: Saved = {}
        if reached:
            kept |= self._norm(f"{name}.input_layernorm")
        if self._linear(kept, attention, ("q", "k", "v"), config.hidden_size) or reached:
            reached = True
            kept |= self._attention(attention, heads, keys, (f"{attention}.v_proj", "output") in kept)
        if self._linear(kept, attention, ("o",), heads) or reached:
            reached = True
            if self.kernel != "rectangles" and (f"{attention}.o_proj", "input") in kept:
                kept.pop((attention, "output"), None)  # which is that; not there where nothing before it learns
            kept |= self._norm(f"{name}.post_attention_layernorm")
        if self._linear(kept, mlp, ("gate", "up"), config.hidden_size) or reached:
            reached = True
            for tensor in ("gate", "up"):
                if (f"{mlp}.{tensor}_proj", "output") not in kept:
                    kept[mlp, tensor] = width * config.intermediate_size * tokens
        return kept, self._linear(kept, mlp, ("down",), config.intermediate_size) or reached

    def _attention(self, name: str, heads: int, keys: int, value_is_kept: bool) -> Saved:
        """What attention itself saves, for queries and keys of so many features."""
        config, tokens, width = self.model.config, self.tokens, self.width
        if self.kernel == "rectangles":
            # A padded rectangle is a copy, and the row it is made of is kept beside it; one without padding
            # is a view of the row. Keys and values are repeated for the queries that share them.
            shapes = [(math.prod(one.shape), one.slots is not None) for one in self.packing.rectangles]
            slots, padded = sum(size for size, _ in shapes), sum(size for size, is_padded in shapes if is_padded)
            row, copy = (tokens, padded) if keys == heads else (tokens if padded else 0, slots)
            of_keys, of_values = (keys * rows + heads * copy for rows in (row, 0 if value_is_kept else row))
            of_queries, sums = heads * (tokens + padded), slots
        else:
            repeats = keys != heads and self.kernel == "memory-efficient"
            of_keys = (heads if repeats else keys) * tokens
            of_values = 0 if value_is_kept and not repeats else of_keys
            of_queries = heads * tokens
            slots = sums = tokens
            if self.kernel == "memory-efficient":
                sums = len(self.packing.lengths) * -(-max(self.packing.lengths) // 32) * 32
        return {
            (name, "q"): width * of_queries,
            (name, "k"): width * of_keys,
            (name, "v"): width * of_values,
            (name, "output"): width * heads * slots,
            (name, "logarithms of sums"): 4 * config.num_attention_heads * sums,
        }

    def _norm(self, name: str) -> Saved:
        size = self.stream * self.model.config.hidden_size * self.tokens
        return {(name, "input"): size, (name, "1 / rms"): 4 * self.tokens}

    def _linear(self, kept: Saved, parent: str, kinds: tuple[str, ...], features: int) -> bool:
        """Adds what layers save that have one input between them; returns whether any of them learns."""
        names = [f"{parent}.{KINDS[kind]}" for kind in kinds]
        layers = {name: self.model.get_submodule(name) for name in names}
        learning = [name for name in names if learns(layers[name])]
        adapted = {name: layer for name in learning if isinstance(layer := layers[name], LoRALinear)}
        dropping = {name: layer for name, layer in adapted.items() if layer.dropout}
        inputs = len(learning) - len(dropping)
        if inputs:
            kept[names[0], "input"] = self.width * features * self.tokens * (inputs if self.converts else 1)
        for name, layer in adapted.items():
            kept[name, "x A^T"] = self.width * layer.rank * self.tokens
        for name, layer in dropping.items():
            kept[name, "input after dropout, and the mask"] = (self.width + 1) * features * self.tokens
            kept[name, "A and B converted"] = self._copies(layer.lora_A, layer.lora_B)
        for name, layer in adapted.items():
            if layer.dora:
                output = self.width * layer.out_features * self.tokens
                what, size = ("W0 x and B A x after dropout", 2 * output) if name in dropping else ("output", output)
                kept[name, what] = size
                kept[name, "m / norm, and the norm"] = 8 * layer.out_features
        return bool(learning)
