"""Llama-2 by hand. It knows nothing of LoRA.

Dimensions: B batch, T tokens, D hidden, F feed-forward, H query heads, K key/value heads, E head size,
S cache slots, V vocabulary, N tokens of a packed row (see packing.py).
Module names are Hugging Face's, so a checkpoint loads without a key map.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend_cached, attend_packed
from .config import LlamaConfig
from .elementwise import RMSNorm, Rotate, Run, SwiGLU, plain
from .packing import KVCache, Packing


@lru_cache
def _inverse_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Rotary frequencies, in radians a position, of the E/2 pairs of dimensions."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent  # (E/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    # Llama 3: waves longer than the original context are stretched, short ones kept, between them a blend
    wavelength = 2 * math.pi / frequency
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low and high and context, f"llama3 needs every field of {scaling}"
    turns = context / wavelength
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling.factor)


def rope(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of the rotary angles, each (B, T, 1, E) in fp32, for positions (B, T)."""
    angles = (positions[..., None].float() * _inverse_frequencies(config, positions.device))[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def fan_out(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """The output of each layer for x. Layers that can share the work have a `fan_out` of their own, which does so."""
    for layer in layers:
        if shared := getattr(layer, "fan_out", None):
            return shared(x, layers)
    return [layer(x) for layer in layers]


class Attention(nn.Module):
    run: Run = staticmethod(plain)

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angles, packing: Packing, cache: KVCache | None) -> Tensor:
        projected = fan_out(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)  # (1, N, H, E), and K for H
        q, k = Rotate.apply(q, k, *angles, self.run)
        if cache is not None:
            cache.write(self.layer, k, v, packing, self.run)
        if packing.continues:
            assert cache is not None, "sequences that go on have a cache"
            y = attend_cached(q.squeeze(0), cache, self.layer, packing)
        else:
            y = attend_packed(q.squeeze(0), k.squeeze(0), v.squeeze(0), packing)
        return self.o_proj(y.flatten(1)[None])


class MLP(nn.Module):
    run: Run = staticmethod(plain)

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.down_proj(SwiGLU.apply(*fan_out(x, self.gate_proj, self.up_proj), self.run))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *context) -> Tensor:
        x, normalized = self.post_attention_layernorm(x, self.self_attn(self.input_layernorm(x), *context))
        return self.mlp(normalized, x)


class Backbone(nn.Module):
    """Everything below the output head: ids to hidden states."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, ids: Tensor, packing: Packing | None = None, cache: KVCache | None = None, recompute: int = 0
    ) -> Tensor:
        """Hidden states (B, T, D) of ids (B, T).

        Args:
            packing: ids is one row (1, N) of several sequences; without one, every row is a sequence.
            cache: is written, and read where the packing continues; needs a packing.
            recompute: activation checkpointing: of every k-th block keep only the input for the backward pass;
                1 is every block, 0 none.
        """
        rows, length = ids.shape
        packing = packing or Packing([length] * rows, ids.device)
        context = (rope(self.config, packing.positions), packing, cache)
        x = self.embed_tokens(ids.reshape(1, -1))
        for number, block in enumerate(self.layers):
            if recompute and number % recompute == 0 and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        return self.norm(x).view(rows, length, -1)


class Llama(nn.Module):
    """The language model: `model` is the backbone, `lm_head` the output head (one matrix if tied)."""

    run: Run = staticmethod(plain)  # of whoever computes with its logits

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie()

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix now: a merge may have parted those of a tied model."""
        return self.lm_head.weight is self.model.embed_tokens.weight

    def tie(self) -> None:
        """Makes the embedding's matrix the head's."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def make_cache(self, rows: int, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `rows` sequences of up to `slots` tokens, beside the weights and in their dtype."""
        config, weight = self.config, self.model.norm.weight
        heads = (config.num_key_value_heads, config.head_dim)
        return KVCache(config.num_hidden_layers, rows, slots, *heads, dtype or weight.dtype, weight.device)

    def forward(self, ids: Tensor, packing: Packing | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T); `packing` and `cache` as in `Backbone.forward`."""
        return self.lm_head(self.model(ids, packing, cache))
