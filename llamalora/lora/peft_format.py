"""What a folder in PEFT's adapter format holds: found and checked before a tensor is read, with or without a model.

Dimensions: R rank; A is (R, wide) and B is (tall, R), so a linear layer's weight is (tall, wide), and an
embedding's (wide, tall). DoRA's magnitude is (tall,).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..mistakes import wrong_folder
from ..model.checkpoint import read_json, skeleton
from ..model.config import LlamaConfig
from ..model.tensors import CheckpointError, read_tensor, tensor_shapes
from .inject import kind_of
from .layers import lora_scale

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIX = re.compile(r"\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|(base_layer\.)?weight)$")
# fields of LoraConfig that change what the tensors mean, and that must be unset to be read here
_UNSUPPORTED = (
    "use_qalora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Factors:
    """Where an adapter file holds the A (R, wide) and B (tall, R) of one layer, and with DoRA its magnitude (tall,)."""

    name: str
    path: Path
    rank: int
    wide: int
    tall: int
    dora: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """Of A, B and, with DoRA, the magnitude in the file."""
        return factor_keys(self.name, self.dora)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that the update belongs to: (O, I) of a linear layer, (V, D) of the embedding."""
        return (self.wide, self.tall) if kind_of(self.name) == "embed" else (self.tall, self.wide)

    def read(self) -> tuple[Tensor, ...]:
        """A, B and, with DoRA, the magnitude, in the dtype of the file.

        Raises:
            CheckpointError: a value that is not finite.
        """
        tensors = []
        for key in self.keys:
            tensors.append(read_tensor(self.path, key))
            if not torch.isfinite(tensors[-1]).all():
                raise CheckpointError(f"{self.path}: {key} holds NaN or infinity")
        return tuple(tensors)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder.

    Attributes:
        path: of the file of tensors.
        config: the contents of its `adapter_config.json`.
        layers: module name -> its factors; in the model's order, where a model was given.
        alphas: module name -> alpha.
        base: module name -> the key of a copy of its frozen weight, which PEFT stores for embedding and head.
    """

    path: Path
    config: dict
    layers: dict[str, Factors]
    alphas: dict[str, float]
    base: dict[str, str]

    @property
    def rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    def scale(self, name: str) -> float:
        """What B A of this layer is multiplied by."""
        return lora_scale(self.alphas[name], self.layers[name].rank, self.rslora)

    def check_base(self, name: str, weight: Tensor) -> None:
        """Compares the stored copy of the layer's frozen weight, if there is one, with the base model's.

        Raises:
            CheckpointError: they differ by more than the rounding to bf16, in which either may be stored.
        """
        if name in self.base:
            stored = read_tensor(self.path, self.base[name]).to(weight.device, torch.float32)
            if stored.shape != weight.shape or torch.norm(stored - weight.float()) > 2**-8 * torch.norm(stored):
                raise CheckpointError(f"{self.path}: {self.base[name]} is not the base model's {name}.weight")


def factor_keys(name: str, dora: bool = False) -> tuple[str, ...]:
    """The file's keys of A, B and, with DoRA, the magnitude for the layer of this module name."""
    pattern = "lora_embedding_{}" if kind_of(name) == "embed" else "lora_{}.weight"
    parts = [pattern.format(factor) for factor in "AB"] + (["lora_magnitude_vector"] if dora else [])
    return tuple(f"{_PREFIX}{name}.{part}" for part in parts)


def read_adapter(folder: str | Path, model: nn.Module | None = None) -> Adapter:
    """What an adapter folder holds.

    Which layers, and their ranks, follow from the tensors in the file; alpha, rsLoRA and DoRA from the
    configuration, which must agree with the file.

    Args:
        model: the base model (the meta device will do), whose layers and shapes must be the adapter's;
            without it any Llama's will do.

    Raises:
        CheckpointError: no such folder, an adapter of another kind (QALoRA, modules_to_save, ...), or
            tensors that are missing, unexpected, or of shapes that fit neither each other nor the model.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        missing = f"{folder / ADAPTER_CONFIG}: no such file"
        raise CheckpointError(wrong_folder(folder, "adapter folder", missing))
    config = read_json(folder / ADAPTER_CONFIG)
    _refuse_unsupported(folder / ADAPTER_CONFIG, config)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        hint = "; pickled weights are not read" if (folder / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"{path}: no such file{hint}")
    layers, base = read_layout(path, model, bool(config.get("use_dora")))
    try:
        alphas = {name: float(_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])) for name in layers}
        ranks = {name: int(_pattern(config.get("rank_pattern"), name, config["r"])) for name in layers}
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: r or lora_alpha is missing or malformed ({error!r})"
        ) from None
    for name, layer in layers.items():
        if layer.rank != ranks[name]:
            raise CheckpointError(f"{path}: {name} has rank {layer.rank}, which {ADAPTER_CONFIG} does not say")
    if model is None:
        _check_uniform(layers)
        blocks = 1 + max(block_of(name) or 0 for name in layers)
        names = [_in_block(name, block) for block in range(blocks) for name in _names_of_one_block()]
    else:
        names = _adaptable(model)
    for name in names:
        # its update would be missing without a word
        if name not in layers and _targeted(config, name):
            raise CheckpointError(f"{path}: lacks {factor_keys(name)[0]}, though {ADAPTER_CONFIG} targets its layer")
    return Adapter(path, config, layers, alphas, base)


def read_layout(
    path: Path, model: nn.Module | None = None, dora: bool = False
) -> tuple[dict[str, Factors], dict[str, str]]:
    """The adapted layers of an adapter file, and its keys of frozen weights, both by module name.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    shapes = tensor_shapes(path)
    modules = None if model is None else _adaptable(model)
    found, base, strange = set(), {}, []
    for key in shapes:
        name = _SUFFIX.sub("", key).removeprefix(_PREFIX)
        known = _in_block(name, 0) in _names_of_one_block() if modules is None else name in modules
        if not known or not key.startswith(_PREFIX):
            strange.append(key)
        elif key in factor_keys(name, dora):
            found.add(name)
        elif key in (f"{_PREFIX}{name}.weight", f"{_PREFIX}{name}.base_layer.weight"):
            base[name] = key
        else:
            strange.append(key)
    if strange:
        hint = f"; does {ADAPTER_CONFIG} lack use_dora?" if strange[0].endswith("lora_magnitude_vector") else ""
        raise CheckpointError(f"{path}: {strange[0]} fits no layer of the model ({len(strange)} such keys){hint}")
    if not found:
        raise CheckpointError(f"{path}: holds no tensor of an update")
    names = [name for name in modules if name in found] if modules else sorted(found, key=_place)
    layers = {name: _factors(path, name, shapes, modules and tuple(modules[name].weight.shape), dora) for name in names}
    return layers, base


def _factors(
    path: Path, name: str, shapes: dict[str, tuple[int, ...]], weight: tuple[int, int] | None, dora: bool
) -> Factors:
    """Checks the shapes of an update's tensors against each other and, if given, against that of the frozen weight."""
    keys = factor_keys(name, dora)
    for key in keys:
        if key not in shapes:
            raise CheckpointError(f"{path}: lacks {key}")
    key_a, key_b = keys[:2]
    for key in (key_a, key_b):
        if len(shapes[key]) != 2 or 0 in shapes[key]:
            raise CheckpointError(f"{path}: {key} has shape {shapes[key]}, not that of a matrix")
    (rank, wide), (tall, _) = shapes[key_a], shapes[key_b]
    if weight is not None:
        tall, wide = reversed(weight) if kind_of(name) == "embed" else weight
    for key, wanted in zip(keys, ((rank, wide), (tall, rank), (tall,)), strict=False):
        if shapes[key] != wanted:
            beside = f"B with shape {shapes[key_b]}" if wanted == (tall,) else f"A with shape {shapes[key_a]}"
            against = beside if weight is None else "the base model"
            raise CheckpointError(
                f"{path}: {key} has shape {shapes[key]}, {against} needs {wanted}; is it an adapter of another model?"
            )
    return Factors(name, path, rank, wide, tall, dora)


def _check_uniform(layers: dict[str, Factors]) -> None:
    """Refuses layers of one kind that belong to weights of several shapes, as no Llama has them."""
    first: dict[str, Factors] = {}
    for layer in layers.values():
        other = first.setdefault(kind_of(layer.name), layer)
        if layer.shape != other.shape:
            raise CheckpointError(
                f"{layer.path}: {layer.name} updates a weight of shape {layer.shape}, {other.name} one of "
                f"{other.shape}; they are not layers of one model"
            )


def block_of(name: str) -> int | None:
    """The number of the block that the module belongs to; None for embedding and head."""
    match = re.match(r"model\.layers\.(0|[1-9]\d{0,2})\.", name)
    return int(match[1]) if match else None


def _in_block(name: str, block: int) -> str:
    """The same module of another block; any other name as it is."""
    return name if block_of(name) is None else name.replace(f".{block_of(name)}.", f".{block}.", 1)


@lru_cache
def _names_of_one_block() -> tuple[str, ...]:
    """The layers of a Llama of one block that can carry an update."""
    return tuple(_adaptable(skeleton(LlamaConfig(num_hidden_layers=1))))


def _place(name: str) -> tuple[int, int]:
    """The place of a module in a Llama, to sort by."""
    block = block_of(name)
    block = {"embed": -1, "head": 1000}[kind_of(name)] if block is None else block
    return block, _names_of_one_block().index(_in_block(name, 0))


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if kind_of(name)}


def _targeted(config: dict, name: str) -> bool:
    """Whether the configuration means the module of this name, by PEFT's rules."""
    targets, blocks = config.get("target_modules") or (), config.get("layers_to_transform")
    if not _matches(targets, name) or _matches(config.get("exclude_modules") or (), name):
        return False
    if blocks is None or isinstance(targets, str) or name in targets:
        return True
    return block_of(name) in ([blocks] if isinstance(blocks, int) else blocks)


def _matches(patterns: str | Iterable[str], name: str) -> bool:
    """PEFT's way to name modules: a regular expression for the whole name, or a list of ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(f".{name}".endswith(f".{pattern}") for pattern in patterns)


def _refuse_unsupported(path: Path, config: dict) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for field in _UNSUPPORTED:
        if config.get(field):
            raise CheckpointError(f"{path}: {field} is set to {config[field]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; only 'none' is supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise CheckpointError(f"{path}: init_lora_weights {init!r} changes the base model, which is not supported")


def _pattern(pattern: dict | None, name: str, default: float) -> float:
    """PEFT's exceptions: a regular expression for the end of a module name -> its rank or alpha."""
    matching = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, default)
