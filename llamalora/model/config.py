"""The shape of a Llama: the fields of a Hugging Face `config.json`, checked. Without torch, for the command line."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..mistakes import file_instead, is_run, wrong_folder

PRECISIONS = ("fp32", "fp16", "bf16")  # that matrix products can run in


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
    """How rotary frequencies are stretched: `linear` (all by `factor`) or `llama3` (only the low ones).

    The fields after `factor` are those of `llama3`, which needs them all.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: float | None = None


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
            nullable = ("num_key_value_heads", "head_dim")  # here null says what a missing field says
            config = {name: value for name, value in config.items() if value is not None or name not in nullable}
            theta, scaling = _rope(config)
            hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
            if "head_dim" not in config and hidden % heads:
                raise ConfigError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
            tied = config.get("tie_word_embeddings", False)
            if not isinstance(tied, bool):
                raise ConfigError(f"tie_word_embeddings is {tied!r}, not true or false")
            bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
            for token in (bos, *token_ids(eos)):
                if not isinstance(token, int | None) or isinstance(token, bool):
                    raise ConfigError(f"bos_token_id or eos_token_id is {token!r}, not the number of a token")
            return LlamaConfig(
                vocab_size=_whole(config, "vocab_size"),
                hidden_size=hidden,
                intermediate_size=_whole(config, "intermediate_size"),
                num_hidden_layers=_whole(config, "num_hidden_layers"),
                num_attention_heads=heads,
                num_key_value_heads=_whole(config, "num_key_value_heads", heads),
                head_dim=_whole(config, "head_dim", hidden // heads),
                max_position_embeddings=_whole(config, "max_position_embeddings", 2048),
                rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
                rope_theta=theta,
                rope_scaling=scaling,
                tie_word_embeddings=tied,
                bos_token_id=bos,
                eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            )
        except (TypeError, AttributeError, ArithmeticError, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None

    def to_dict(self) -> dict:
        """The contents of a `config.json` that transformers reads as LlamaForCausalLM."""
        config = {field.name: getattr(self, field.name) for field in fields(self)}
        scaling = self.rope_scaling
        if scaling is not None:
            config["rope_scaling"] = {name: value for name, value in vars(scaling).items() if value is not None}
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
    if not isinstance(architectures, list) or "LlamaForCausalLM" not in architectures:
        raise ConfigError(f"architectures is {architectures}; only LlamaForCausalLM is supported")


def _rope(config: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, looked for where transformers 5 looks for them, and in its order: together in `rope_scaling`,
    or without one in `rope_parameters`; what is not there, at the top."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_scaling is {rope!r}, not an object")
    if any(isinstance(value, dict) for value in rope.values()) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"rope_parameters is {rope}; only one rope for all layers and all dimensions is supported")
    theta = _number(rope if "rope_theta" in rope else config, "rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope_scaling type is {kind!r}; supported are default, linear and llama3")
    numbers: dict[str, float] = {"factor": _number(rope, "factor")}
    if kind == "llama3":
        numbers |= {name: _number(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
        name, longest = "original_max_position_embeddings", _whole(config, "max_position_embeddings", 2048)
        numbers[name] = _whole(config if name in config else rope, name, longest)
    if not all(0 < number < math.inf for number in numbers.values()):
        raise ConfigError(f"rope_scaling has {numbers}; they must be above 0")
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ConfigError(f"rope_scaling has {numbers}; low_freq_factor must be below high_freq_factor")
    return theta, RopeScaling(kind, **numbers)


def _number(config: dict, name: str, default: float | None = None) -> float:
    return float(_checked(config, name, default, int | float, "a number"))


def _whole(config: dict, name: str, default: int | None = None) -> int:
    return _checked(config, name, default, int, "a whole number")


def _checked(config: dict, name: str, default: Any, kind: Any, words: str) -> Any:
    value = config.get(name, default)
    if value is None and name not in config:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}, not {words}")
    return value


# ---- the files of a model folder that are JSON ----


class CheckpointError(InputError):
    """A folder that cannot be loaded or written; the message names the file and what is wrong."""


def read_config(folder: str | Path) -> LlamaConfig:
    """The configuration of a model folder; `eos_token_id` has the end tokens of `generation_config.json` as well.

    Raises:
        CheckpointError: no such folder or file, not JSON, or a model that Llama cannot represent.
    """
    path = Path(folder) / "config.json"
    if not path.is_file() or is_run(path.parent):
        raise CheckpointError(wrong_folder(folder, "model folder", f"{path}: no such file"))
    config = read_json(path)
    beside = path.with_name("generation_config.json")
    further = list(token_ids(read_json(beside).get("eos_token_id"))) if beside.is_file() else []
    if not all(isinstance(token, int) for token in further):
        raise CheckpointError(f"{beside}: eos_token_id is {further!r}, not the numbers of tokens")
    ends = token_ids(config.get("eos_token_id"))
    if further := [token for token in further if token not in ends]:
        config["eos_token_id"] = [*ends, *further]
    try:
        return LlamaConfig.from_dict(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(file_instead(path) or f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object")
    return content
