"""Llama-2 by hand: the configuration and the network. It knows nothing of LoRA.

Dimensions: B batch, T tokens, D hidden, F feed-forward, H query heads, K key/value heads, E head size,
S cache slots, V vocabulary, N tokens of a packed row (see packing.py).
Module names are Hugging Face's, so a checkpoint loads without a key map.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import attend_cached, attend_packed
from .errors import InputError
from .packing import KVCache, Packing


class ConfigError(InputError):
    """A model configuration that this implementation cannot represent; the message names the field."""


# beyond what any Llama has, and far enough below what overflows, or takes hours to build without a weight
_MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31,
    "rms_norm_eps": 1.0,
    "rope_theta": 1e15,
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` (all by `factor`) or `llama3` (only the low ones)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, field names as in a Hugging Face `config.json`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self):
        for name, most in _MOST.items():
            if not 0 < getattr(self, name) <= most:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 and at most {most:,}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings turn pairs of dimensions")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @staticmethod
    def named(name: str) -> "LlamaConfig":
        """The shape of `llama-2-7b`, `llama-2-13b` or `llama-2-70b` (Touvron et al. 2023).

        Raises:
            ConfigError: another name.
        """
        if name not in LLAMA_2:
            raise ConfigError(f"unknown model name {name!r}; known are {', '.join(LLAMA_2)}")
        return LLAMA_2[name]

    @staticmethod
    def from_dict(config: dict) -> "LlamaConfig":
        """From the contents of a Hugging Face `config.json`.

        Raises:
            ConfigError: what this Llama cannot represent (another architecture or activation, biases,
                quantised weights, an unknown rope scaling), or a field that is missing or malformed.
        """
        try:
            _refuse_unrepresentable(config)
            rope = config.get("rope_parameters") or {}  # transformers 5 keeps theta and scaling together
            scaling = config.get("rope_scaling") or rope
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
            for token in (bos, *(eos if isinstance(eos, list) else [eos])):
                if not isinstance(token, int | None):
                    raise ConfigError(f"bos_token_id or eos_token_id is {token!r}, not the number of a token")
            return LlamaConfig(
                vocab_size=int(config["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_hidden_layers=int(config["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
                rope_scaling=_rope_scaling(scaling),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                bos_token_id=bos,
                eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            )
        except KeyError as error:
            raise ConfigError(f"{error.args[0]} is missing") from None
        except (TypeError, AttributeError, ArithmeticError, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None

    def to_dict(self) -> dict:
        """The contents of a `config.json` that transformers reads as LlamaForCausalLM."""
        config = {field.name: getattr(self, field.name) for field in fields(self)}
        scaling = self.rope_scaling
        if scaling is not None:
            config["rope_scaling"] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
            if scaling.rope_type == "llama3":
                config["rope_scaling"] = dict(vars(scaling))
        if isinstance(self.eos_token_id, tuple):
            config["eos_token_id"] = list(self.eos_token_id)
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }


LLAMA_2 = {
    "llama-2-7b": LlamaConfig(),
    "llama-2-13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "llama-2-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}


def _refuse_unrepresentable(config: dict) -> None:
    for name, only in {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
    }.items():
        if config.get(name, only) not in (only, None):
            raise ConfigError(f"{name} is {config[name]!r}; this Llama supports only {only!r}")
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if "LlamaForCausalLM" not in architectures:
        raise ConfigError(f"architectures is {architectures}; only LlamaForCausalLM is supported")


def _rope_scaling(scaling: dict) -> RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope_scaling type is {kind!r}; supported are default, linear and llama3")
    kinds = {field.name: field.type for field in fields(RopeScaling) if field.name != "rope_type"}
    numbers = {name: kind(scaling[name]) for name, kind in kinds.items() if name in scaling}
    if not all(0 < number < math.inf for number in numbers.values()):
        raise ConfigError(f"rope_scaling is {scaling}; its numbers must be above 0")
    return RopeScaling(kind, **numbers)


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
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / wavelength
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling.factor)


def rope(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of the rotary angles, each (B, T, 1, E) in fp32, for positions (B, T)."""
    angles = (positions[..., None].float() * _inverse_frequencies(config, positions.device))[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class _Rotate(torch.autograd.Function):
    """Rotary embedding of x (B, T, heads, E), rotate-half convention; computed in fp32 like the angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        wide = x.float()
        return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


class _Normalize(torch.autograd.Function):
    """x / rms(x) in fp32. Saves x alone, where autograd would save four copies of its size."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse)
        return (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, inverse = ctx.saved_tensors
        unit, wide = x * inverse, grad.float()
        return torch.addcmul(wide, unit, (wide * unit).mean(-1, keepdim=True), value=-1).mul_(inverse).to(x.dtype), None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * _Normalize.apply(x, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Saves its two inputs alone, and computes silu(gate) again for the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def fan_out(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each layer makes of x. Layers of a kind that can share the work say so by a `fan_out` of their own."""
    for layer in layers:
        if hasattr(layer, "fan_out"):
            return layer.fan_out(x, layers)
    return [layer(x) for layer in layers]


class Attention(nn.Module):
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
        q, k = _Rotate.apply(q, *angles), _Rotate.apply(k, *angles)
        if cache is not None:
            cache.write(self.layer, k, v, packing)
        if packing.continues:
            y = attend_cached(q[0], cache, self.layer, packing)
        else:
            y = attend_packed(q[0], k[0], v[0], packing)
        return self.o_proj(y.flatten(1)[None])


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(*fan_out(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


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
