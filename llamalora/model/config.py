"""The shape of a Llama: the fields of a Hugging Face `config.json`, checked."""

import math
from dataclasses import dataclass, fields

from ..errors import InputError


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

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an output."""
        return frozenset(token_ids(self.eos_token_id))

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
            for token in (bos, *token_ids(eos)):
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


def token_ids(value: object) -> tuple:
    """The tokens of an `eos_token_id`: none, one, or several in a list."""
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


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
