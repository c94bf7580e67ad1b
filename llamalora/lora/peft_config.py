"""What an `adapter_config.json` says, by PEFT's rules: checked field by field before any of it is used. Without
torch, for the command line."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..mistakes import wrong_folder
from ..model.config import CheckpointError, read_json
from .kinds import kind_of

ADAPTER_CONFIG = "adapter_config.json"
# initialisations that leave the base model as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move its weights
_HARMLESS_INITS = ("none", "true", "false", "gaussian", "eva", "orthogonal", "mica")
_BIASES = ("none", "all", "lora_only")  # to train, and this Llama has none: a tensor of one in the file is refused
# other fields that say nothing about what the tensors mean
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),  # of the initialisation, which is checked
    "fan_in_fan_out",  # which PEFT sets to false for linear layers
    *("megatron_core", "qalora_group_size", "runtime_config"),  # nothing without others, which are refused
}
# around the regular expressions of layers_pattern and of the keys of rank_pattern and alpha_pattern
_BLOCK, _END = r"(?:.*?\.)?(?:{})\.(?P<block>\d+)\.", r"(.*\.)?({})$"


@dataclass(frozen=True)
class PeftConfig:
    """The fields of PEFT's LoraConfig that say what the tensors of an adapter mean, by their names there.

    Attributes:
        target_modules, exclude_modules: a regular expression for whole module names, or a list of ends of them.
        layers_to_transform: the only blocks that are targeted; an empty list stands for all.
        layers_pattern: regular expressions for what stands before the number of a block in a module's name.
        rank_pattern, alpha_pattern: exceptions: a regular expression for the end of a module name -> rank or alpha.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: int | list[int]
    layers_pattern: str | list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def rank(self, name: str) -> int:
        """The rank of the layer with this module name."""
        return _exception(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """The alpha of the layer with this module name."""
        return _exception(self.alpha_pattern, name, self.lora_alpha)

    def targets(self, name: str) -> bool:
        """Whether the layer with this module name has an update."""
        if _matches(self.exclude_modules, name):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return kind_of(name) not in ("embed", "head")
            return _matches(self.target_modules, name)
        return name in self.target_modules or (_matches(self.target_modules, name) and self._transforms(name))

    def _transforms(self, name: str) -> bool:
        """Whether `layers_to_transform` leaves the module in."""
        if self.layers_to_transform == []:
            return True
        patterns = _listed(self.layers_pattern or "[^.]*")
        found = filter(None, (re.match(_BLOCK.format(pattern), name) for pattern in patterns))
        return any(int(block["block"]) in _listed(self.layers_to_transform) for block in list(found)[:1])


def read_peft_config(path: Path) -> PeftConfig:
    """The contents of an `adapter_config.json`.

    Raises:
        CheckpointError: no such folder, an adapter of another kind (QALoRA, modules_to_save, ...), one whose
            initialisation moved the base model, a field that is set but not known here, or one that is missing or
            malformed.
    """
    if not path.is_file():
        raise CheckpointError(wrong_folder(path.parent, "adapter folder", f"{path}: no such file"))
    given = read_json(path)
    _refuse_unsupported(path, given)

    def field(name: str, wanted: str, fits: Callable[[Any], bool], default: Any = None) -> Any:
        value = default if given.get(name) is None else given[name]
        if value is None:
            raise CheckpointError(f"{path}: {name} is missing")
        if not fits(value):
            raise CheckpointError(f"{path}: {name} is {value!r}, not {wanted}")
        return value

    def truth(name: str) -> bool:
        return field(name, "true or false", lambda value: isinstance(value, bool), False)

    def names(name: str, default: list[str]) -> str | list[str]:
        return field(name, "a regular expression or a list of module names", _are_names, default)

    def exceptions(name: str, values: str, fits: Callable[[Any], bool]) -> dict:
        return field(name, f"regular expressions, each with {values}", lambda value: _are_exceptions(value, fits), {})

    return PeftConfig(
        r=field("r", "a whole number above 0", _is_rank),
        lora_alpha=field("lora_alpha", "a finite number", _is_number),
        lora_dropout=field("lora_dropout", "a number of at least 0 and below 1", _is_dropout, 0.0),
        use_rslora=truth("use_rslora"),
        use_dora=truth("use_dora"),
        target_modules=names("target_modules", ["q_proj", "v_proj"]),  # PEFT's default for a Llama
        exclude_modules=names("exclude_modules", []),
        layers_to_transform=field("layers_to_transform", "the numbers of layers", _are_numbers, []),
        layers_pattern=field("layers_pattern", "a regular expression or a list of them", _are_block_patterns, []),
        rank_pattern=exceptions("rank_pattern", "a whole number above 0", _is_rank),
        alpha_pattern=exceptions("alpha_pattern", "a finite number", _is_number),
    )


def _refuse_unsupported(path: Path, given: dict) -> None:
    if given.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {given.get('peft_type')!r}; only 'LORA' is supported")
    if given.get("bias", "none") not in _BIASES:
        raise CheckpointError(f"{path}: bias is {given['bias']!r}, not one of {', '.join(_BIASES)}")
    init = given.get("init_lora_weights")
    if str(init).lower() not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {init!r}, which may have moved the weights of the base model; convert the "
            "adapter by PEFT's save_pretrained with path_initial_model_for_weight_conversion"
        )
    known = {"peft_type", "bias", "init_lora_weights", *_HARMLESS, *(field.name for field in fields(PeftConfig))}
    for name, value in given.items():
        if value and name not in known:
            raise CheckpointError(f"{path}: {name} is set to {value!r}, which is not supported")


# ---- PEFT's rules for names ----


def _matches(patterns: str | list[str], name: str) -> bool:
    """A regular expression for the whole name, or a list of ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(f".{name}".endswith(f".{pattern}") for pattern in patterns)


def _exception(values: dict, name: str, default: Any) -> Any:
    """The value of the first regular expression that fits the end of the name."""
    return next((value for pattern, value in values.items() if re.match(_END.format(pattern), name)), default)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


# ---- what a field may hold ----


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_dropout(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_expression(value: Any, around: str = "{}") -> bool:
    try:
        return isinstance(value, str) and re.compile(around.format(value)) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _are_names(value: Any) -> bool:
    return _is_expression(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_numbers(value: Any) -> bool:
    return all(map(_is_whole, _listed(value)))


def _are_block_patterns(value: Any) -> bool:
    return all(_is_expression(pattern, _BLOCK) for pattern in _listed(value))


def _are_exceptions(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, dict) and all(_is_expression(key, _END) and fits(values[key]) for key in values)
