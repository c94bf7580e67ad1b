"""Low-rank updates put into a model that never mentions them, merged into its weights, and taken out again."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ..errors import InputError
from ..model.checkpoint import without_values
from ..model.tensors import is_sharded
from .fused import scaled
from .kinds import METHODS, kind_of, parse_targets
from .layers import PARTS, LoRAEmbedding, LoRALayer, LoRALinear

Model = TypeVar("Model", bound=nn.Module)


def make_trainable(
    model: Model,
    method: str = "lora",
    targets: str | Sequence[str] = "all",
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    dora: bool = False,
) -> Model:
    """Sets up, in place, what learns: by the method the updates that `inject_lora` puts in, the weights of the target
    layers, or every parameter. The model may be on the meta device.

    Raises:
        InputError: as `inject_lora`.
    """
    if not METHODS[method].targeted:
        return model.requires_grad_(True)
    if not METHODS[method].adapts:
        return train_weights(model, targets)
    return inject_lora(model, targets, rank, alpha, rslora, dropout, seed, dora)


def inject_lora(
    model: Model,
    targets: str | Sequence[str] = "all",
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    dora: bool = False,
) -> Model:
    """Freezes the model and puts a low-rank update on every layer of the target kinds, in place.

    Args:
        targets: `all`, or a comma list or sequence of q k v o up down gate embed head.
        rank: R; the update has R * (I + O) parameters a layer.
        alpha: the update is scaled by alpha / rank; default rank, so 1 (the paper's equation 2).
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023).
        dropout: on the input of A, in training mode; not on the embedding.
        seed: of the initial values, the same on every process and device.
        dora: learn the length of the weight's rows apart from their direction (Liu et al. 2024); O (of the
            embedding D) more parameters a layer.

    Raises:
        InputError: an unknown target, a target that matches no layer, or what `adapt` refuses.
    """
    names = _layers_of(model, targets)
    adapt(model, dict.fromkeys(names, (rank, rank if alpha is None else alpha)), rslora, dropout, seed, dora)
    return model


def train_weights(model: Model, targets: str | Sequence[str]) -> Model:
    """Freezes the model but for the weights of the target kinds: what full fine-tuning of just these layers trains.

    Where embedding and head are one matrix, either target trains it, in both of its places.

    Raises:
        InputError: an unknown target, or one that matches no layer.
    """
    names = _layers_of(model, targets)
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(f"{name}.weight").requires_grad_(True)
    return model


def _layers_of(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Module names of the layers of the target kinds."""
    kinds = parse_targets(targets)
    names = [name for name, _ in model.named_modules() if kind_of(name) in kinds]
    absent = [kind for kind in kinds if kind not in map(kind_of, names)]
    if absent:
        raise InputError(f"no layer of the model is of kind {', '.join(absent)}")
    return names


def adapt(
    model: nn.Module,
    layers: Mapping[str, tuple[int, float]],
    rslora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    dora: bool = False,
) -> None:
    """`inject_lora` layer by layer: module name -> its rank and alpha.

    Raises:
        InputError: a rank below 1, a dropout outside [0, 1), or a model that carries LoRA already.
    """
    if lora_layers(model):
        raise InputError("the model carries LoRA layers already")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}; it must be at least 0 and below 1")
    for rank, _ in layers.values():
        if rank < 1:
            raise InputError(f"rank is {rank}; it must be at least 1")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    too_wide = []
    for name, (rank, alpha) in layers.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | nn.Embedding), f"{name} is a {type(base).__name__}"
        if rank > min(base.weight.shape):
            too_wide.append(name)
        adapted: type = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted(base, rank, alpha, rslora, dropout, generator, dora))
    if too_wide:
        shown = ", ".join(too_wide[:4]) + (f" and {len(too_wide) - 4} more" if len(too_wide) > 4 else "")
        warnings.warn(f"the rank exceeds the smaller dimension of {shown}: it adds nothing there", stacklevel=2)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAEmbedding]:
    """The adapted layers by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear | LoRAEmbedding)}


def merge(model: Model, layers: "Iterable[LoRALinear | LoRAEmbedding] | None" = None, offload: bool = True) -> Model:
    """Applies every update to its frozen weight, in place, in fp32, rounded once to the weight's dtype.

    Afterwards the model costs what the base model costs. Tied embeddings come apart: embedding and head
    then have a matrix each.

    Args:
        layers: merge only these.
        offload: W0 of a layer on a GPU waits on the host; else where it is.
    """
    elsewhere = [module for module in model.modules() if not isinstance(module, LoRALayer)]
    in_use = {id(parameter) for module in elsewhere for parameter in module.parameters(recurse=False)}
    for layer in lora_layers(model).values() if layers is None else layers:
        # a GPU may have no room for W0 beside the merged weight; what a tied layer goes on using stays
        layer.merge(offload=offload and layer.weight.is_cuda and id(layer.weight) not in in_use)
    return model


def restore(model: Model) -> Model:
    """Undoes `merge` bitwise: the original weights were kept, and are put back."""
    for layer in lora_layers(model).values():
        layer.restore()
    return model


def merge_for_good(model: Model) -> Model:
    """`merge` without a way back: the adapted layers become plain ones, in place, and W0, A and B are freed one layer
    after the other, so that the memory holds little more than the model."""
    layers = lora_layers(model)
    while layers:
        name, layer = layers.popitem()
        layer.merge()
        with without_values():
            out, into = layer.weight.shape
            plain = nn.Linear(into, out, bias=False) if isinstance(layer, nn.Linear) else nn.Embedding(out, into)
        plain.weight = layer.weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
    return model


@contextmanager
def cast_factors(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Every linear layer's factors in the products' dtype, cast once for all passes until this ends, and not by each.

    Factors must not change meanwhile: it is for the micro-batches of an optimizer step. Gradients are those of the fp32
    factors, as ever. Those that are sharded, or in that dtype already, are left alone, and so are layers with dropout,
    through which autograd itself goes.
    """
    linear = [layer for layer in lora_layers(model).values() if isinstance(layer, LoRALinear) and not layer.dropout]
    layers = [one for one in linear if one.lora_A.dtype != dtype and not is_sharded(one.lora_A)]
    with torch.no_grad():
        fp32 = [part for one in layers for part in (one.lora_A, scaled(one.lora_B, one.scale))]
        cast = [torch.empty_like(part, dtype=dtype) for part in fp32]
        if layers:
            torch._foreach_copy_(cast, fp32)  # a few kernels on a GPU, however many layers there are
    del fp32  # which is no parameter where the scale is not 1
    for layer, A, B in zip(layers, cast[::2], cast[1::2], strict=True):
        layer.cast = A, B
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that learns, each shared parameter once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of values: `trainable`, and `base`, the model without its updates (a tied matrix once)."""
    names = {name: parameter.numel() for name, parameter in model.named_parameters()}
    lora = sum(count for name, count in names.items() if name.endswith(PARTS))
    trainable = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    return {"trainable": trainable, "base": sum(names.values()) - lora}
