"""Exact parameter counts and bytes of what is trained, counted on the very model that would be trained, built on the
meta device without weights."""

from dataclasses import dataclass

import torch

from ..model.llama import Llama
from ..model.tensors import file_bytes
from .inject import count_parameters, lora_layers, trainable_parameters
from .kinds import KINDS, kind_of
from .peft_format import factor_keys


@dataclass(frozen=True)
class Kind:
    """What is trained in the layers of one kind.

    Attributes:
        layers: how many there are.
        shape: of the weight: (O, I), of the embedding (V, D), of a norm (D,).
        parameters_each: trainable ones in a layer.
        parameters: in all of them.
    """

    layers: int
    shape: tuple[int, ...]
    parameters_each: int
    parameters: int


@dataclass(frozen=True)
class Audit:
    """Exact figures of a model that is set up for training.

    Attributes:
        trainable: parameters that learn.
        base: parameters of the model without its updates, a tied matrix once.
        percent: trainable of base.
        kinds: by kind of layer.
        adapter_bytes: size of `adapter_model.safetensors`; of full fine-tuning None.
        model_bytes: tensors of the model that full and partial fine-tuning save, in fp32; of LoRA None.
        state_bytes: size of a checkpoint's `tensors.safetensors`: parameters, two moments, step counts.
    """

    trainable: int
    base: int
    percent: float
    kinds: dict[str, Kind]
    adapter_bytes: int | None
    model_bytes: int | None
    state_bytes: int


def audit(model: Llama) -> Audit:
    """Counts a model that has its LoRA layers, or of which some or all weights learn."""
    counts, trainable = count_parameters(model), trainable_parameters(model)
    of_layer: dict[str, int] = {}
    for name, parameter in trainable.items():
        layer = name.rpartition(".")[0]
        of_layer[layer] = of_layer.get(layer, 0) + parameter.numel()
    groups: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "norm")}
    for layer in of_layer:
        groups[kind_of(layer) or "norm"].append(layer)
    kinds = {
        kind: Kind(
            len(layers),
            tuple(model.get_parameter(f"{layers[0]}.weight").shape),
            of_layer[layers[0]],
            sum(of_layer[layer] for layer in layers),
        )
        for kind, layers in groups.items()
        if layers
    }
    adapter: dict[str, tuple[int, ...]] = {}
    for name, adapted in lora_layers(model).items():
        shapes = (tuple(part.shape) for part in adapted.parts)
        adapter |= zip(factor_keys(name, adapted.dora), shapes, strict=True)
    state: dict[str, tuple[int, ...]] = {}
    for name, parameter in trainable.items():
        state |= {f"{part}.{name}": tuple(parameter.shape) for part in ("parameter", "exp_avg", "exp_avg_sq")}
        state[f"step.{name}"] = ()
    return Audit(
        trainable=counts["trainable"],
        base=counts["base"],
        percent=100 * counts["trainable"] / counts["base"],
        kinds=kinds,
        adapter_bytes=_file_bytes(adapter) if adapter else None,
        model_bytes=None if adapter else 4 * counts["base"],
        state_bytes=_file_bytes(state),
    )


def _file_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return file_bytes({name: (torch.float32, tuple(shape)) for name, shape in shapes.items()})
