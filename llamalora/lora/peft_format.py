"""What a folder in PEFT's adapter format holds: found and checked before a tensor is read, with or without a model.

Dimensions: R rank; A is (R, wide) and B is (tall, R), so a linear layer's weight is (tall, wide), and an
embedding's (wide, tall). DoRA's magnitude is (tall,).
"""

import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.checkpoint import skeleton
from ..model.config import CheckpointError, LlamaConfig
from ..model.llama import Llama
from ..model.tensors import finite, read_tensor, tensor_entries
from .kinds import kind_of
from .layers import lora_scale
from .peft_config import ADAPTER_CONFIG, PeftConfig, read_peft_config

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDS = ("model.embed_tokens", "lm_head")
_SUFFIX = re.compile(r"\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|(base_layer\.)?weight)$")


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
    def kind(self) -> str:
        """The kind of layer: `q` ... `head`."""
        kind = kind_of(self.name)
        assert kind is not None, f"{self.name} can carry no update"
        return kind

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys in the file of A, B and, with DoRA, the magnitude."""
        return factor_keys(self.name, self.dora)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that the update belongs to: (O, I) of a linear layer, (V, D) of the embedding."""
        return (self.wide, self.tall) if kind_of(self.name) == "embed" else (self.tall, self.wide)

    def read(self) -> tuple[Tensor, ...]:
        """A, B and, with DoRA, the magnitude, in the dtype of the file.

        Raises:
            CheckpointError: a value that is not finite.
        """
        return tuple(finite(read_tensor(self.path, key), self.path, key) for key in self.keys)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder.

    Attributes:
        path: of the file of tensors.
        config: what its `adapter_config.json` says.
        layers: module name -> its factors; in the model's order, where a model was given.
        alphas: module name -> alpha.
        base: module name -> the key of the frozen weight that the file brings along. PEFT stores embedding and head
            where they are adapted, resized or trained, and puts them in the place of the base model's.
    """

    path: Path
    config: PeftConfig
    layers: dict[str, Factors]
    alphas: dict[str, float]
    base: dict[str, str]

    @property
    def rslora(self) -> bool:
        return self.config.use_rslora

    @property
    def dora(self) -> bool:
        return self.config.use_dora

    def scale(self, name: str) -> float:
        """What B A of this layer is multiplied by."""
        return lora_scale(self.alphas[name], self.layers[name].rank, self.rslora)

    def frozen(self, name: str, weight: Tensor) -> Tensor:
        """The weight that the layer's update belongs to: the one that the file brings along, else the base model's.

        Warns where rows of the two differ by more than rounding, to bf16 or to fp16's smallest number.

        Args:
            weight: the base model's, whose dtype and device are kept.

        Raises:
            CheckpointError: a value that is not finite.
        """
        if name not in self.base:
            return weight
        key = self.base[name]
        stored = finite(read_tensor(self.path, key).to(weight.device, weight.dtype), self.path, key)
        changed = sum(map(_changed_rows, stored.split(4096), weight.split(4096)))
        if changed:
            warnings.warn(
                f"{self.path}: brings along its own {name}.weight, which takes the place of the base model's, as in "
                f"PEFT; {changed:,} of {len(stored):,} rows differ",
                stacklevel=2,
            )
        return stored


def _changed_rows(stored: Tensor, weight: Tensor) -> int:
    same = torch.isclose(stored.float(), weight.float(), rtol=2**-7, atol=2**-24)
    return int((~same).any(dim=1).sum())


def factor_keys(name: str, dora: bool = False) -> tuple[str, ...]:
    """The file's keys of A, B and, with DoRA, the magnitude for the layer of this module name."""
    pattern = "lora_embedding_{}" if kind_of(name) == "embed" else "lora_{}.weight"
    parts = [pattern.format(factor) for factor in "AB"] + (["lora_magnitude_vector"] if dora else [])
    return tuple(f"{_PREFIX}{name}.{part}" for part in parts)


def frozen_key(name: str, adapted: bool) -> str:
    """Where PEFT looks for the frozen weight of embedding or head in a file."""
    return f"{_PREFIX}{name}.{'base_layer.' if adapted else ''}weight"


def read_adapter(folder: str | Path, model: Llama | None = None) -> Adapter:
    """What an adapter folder holds.

    Shapes and ranks follow from the tensors in the file; which layers, alpha, rsLoRA and DoRA from the configuration,
    with which the file must agree.

    Args:
        model: the base model (the meta device will do), whose layers and shapes must be the adapter's;
            without it any Llama's will do.

    Raises:
        CheckpointError: what `read_peft_config` refuses, or tensors that are missing, unexpected, no
            floating-point numbers, or of shapes that fit neither each other nor the model.
    """
    folder = Path(folder)
    config = read_peft_config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is pickled and not read; load it in peft, whose save_pretrained writes safetensors"
        raise CheckpointError(f"{path}: no such file{hint if pickled else ''}")
    layers, base = read_layout(path, model, config.use_dora)
    for name, layer in layers.items():
        if layer.rank != config.rank(name):
            raise CheckpointError(f"{path}: {name} has rank {layer.rank}, which {ADAPTER_CONFIG} does not say")
    if model is None:
        _check_uniform(layers)
        blocks = 1 + max(block_of(name) or 0 for name in layers)
        names = [_in_block(name, block) for block in range(blocks) for name in _names_of_one_block()]
    else:
        names = list(_adaptable(model))
    for name in names:
        # one update would be missing, the other one too many, without a word
        if config.targets(name) and name not in layers:
            raise CheckpointError(f"{path}: lacks {factor_keys(name)[0]}, though {ADAPTER_CONFIG} targets its layer")
        if name in layers and not config.targets(name):
            raise CheckpointError(f"{path}: holds {layers[name].keys[0]}, but {ADAPTER_CONFIG} targets no such layer")
    return Adapter(path, config, layers, {name: config.alpha(name) for name in layers}, base)


def read_layout(
    path: Path, model: Llama | None = None, dora: bool = False
) -> tuple[dict[str, Factors], dict[str, str]]:
    """The adapted layers of an adapter file, and its keys of frozen weights, both by module name.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    shapes = {key: shape for key, (_, shape) in tensor_entries(path).items()}
    wanted = {} if model is None else {name: tuple(weight.shape) for name, weight in _adaptable(model).items()}
    found, copies, strange = set(), {}, []
    for key in shapes:
        name = _SUFFIX.sub("", key).removeprefix(_PREFIX)
        known = _in_block(name, 0) in _names_of_one_block() if model is None else name in wanted
        if not known or not key.startswith(_PREFIX):
            strange.append(key)
        elif key in factor_keys(name, dora):
            found.add(name)
        elif key in (f"{_PREFIX}{name}.weight", f"{_PREFIX}{name}.base_layer.weight"):
            copies[key] = name
        else:
            strange.append(key)
    base = {name: frozen_key(name, name in found) for name in copies.values()}
    strange += copies.keys() - base.values()
    if strange:
        hint = f"; does {ADAPTER_CONFIG} lack use_dora?" if strange[0].endswith("lora_magnitude_vector") else ""
        raise CheckpointError(f"{path}: {strange[0]} fits no layer of the model ({len(strange)} such keys){hint}")
    if not found:
        raise CheckpointError(f"{path}: holds no tensor of an update")
    names = [name for name in wanted if name in found] if wanted else sorted(found, key=_place)
    layers = {name: _factors(path, name, shapes, wanted.get(name), dora) for name in names}
    for name, key in base.items():
        shape = wanted.get(name) or (layers[name].shape if name in layers else shapes[key])
        if shapes[key] != shape:
            raise CheckpointError(
                f"{path}: {key} has shape {shapes[key]}, the base model's is {shape}; if it is the vocabulary that was "
                "enlarged, that of the base model must be, too"
            )
    return layers, _of_both_ends(path, base) if model is not None and model.tied else base


def _of_both_ends(path: Path, base: dict[str, str]) -> dict[str, str]:
    """Where embedding and head are one matrix, the key of either is that of both."""
    keys = [base[name] for name in _ENDS if name in base]
    if len(keys) == 2 and not torch.equal(*(read_tensor(path, key) for key in keys)):
        raise CheckpointError(f"{path}: {keys[0]} and {keys[1]} differ, but are one matrix in the base model")
    return base | dict.fromkeys(_ENDS, keys[0]) if keys else base


def _factors(
    path: Path, name: str, shapes: dict[str, tuple[int, ...]], weight: tuple[int, ...] | None, dora: bool
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
        other = first.setdefault(layer.kind, layer)
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
    if block is None:
        block = -1 if kind_of(name) == "embed" else 1000
    return block, _names_of_one_block().index(_in_block(name, 0))


def _adaptable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen weights of the layers that can carry an update, by module name."""
    return {name: model.get_parameter(f"{name}.weight") for name, _ in model.named_modules() if kind_of(name)}
