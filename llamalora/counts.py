"""Exact parameter counts and bytes of what is trained, and the paper's Tables 7 and 8: counted on the very model that
would be trained, built on the meta device without weights."""

from dataclasses import dataclass

import torch

from . import paper
from .checkpoint import skeleton
from .cli import UsageError
from .lora import KINDS, count_parameters, inject_lora, kind_of, lora_layers, train_weights, trainable_parameters
from .model import LLAMA_2, Llama, LlamaConfig
from .peft_format import factor_keys
from .stream import file_bytes

GIB = 2**30


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


def build(config: LlamaConfig, targets: str, rank: int, method: str, dora: bool = False) -> Llama:
    """The model as training has it, on the meta device.

    Raises:
        UsageError: targets or a rank that cannot be.
    """
    model = skeleton(config)
    if method == "full":
        return model.requires_grad_(True)
    try:
        inject_lora(model, targets, rank, dora=dora) if method == "lora" else train_weights(model, targets)
    except ValueError as error:
        raise UsageError(f"--targets {targets} --rank {rank}: {error}") from None
    return model


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
            tuple(model.get_submodule(layers[0]).weight.shape),
            of_layer[layers[0]],
            sum(of_layer[layer] for layer in layers),
        )
        for kind, layers in groups.items()
        if layers
    }
    adapter = {}
    for name, layer in lora_layers(model).items():
        adapter |= zip(factor_keys(name, layer.dora), (part.shape for part in layer.parts), strict=True)
    state = {}
    for name, parameter in trainable.items():
        state |= {f"{part}.{name}": parameter.shape for part in ("parameter", "exp_avg", "exp_avg_sq")}
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


# ---- the paper's tables ----


def table7(config: LlamaConfig) -> list[dict]:
    """Trainable parameters of each cell of Table 7, counted on the model that trains; with Llama-2-7B also the
    printed figure."""
    printed = paper.TABLE7 if config == LLAMA_2["llama-2-7b"] else {}
    return [
        {
            "targets": targets,
            "rank": rank,
            "exact": count_parameters(build(config, targets, rank, "lora"))["trainable"],
            "printed": printed[targets][column] if printed else None,
        }
        for targets in paper.TARGETS
        for column, rank in enumerate(paper.RANKS)
    ]


def table8(config: LlamaConfig) -> dict:
    """What LoRA (all layers, r=128) and full fine-tuning train and store: bytes by what may be counted as storage,
    with the units in which that comes to the paper's figure; and the files of this project."""
    audits = {"lora": audit(build(config, "all", 128, "lora")), "full": audit(build(config, "all", 128, "full"))}
    both = audits["lora"].base + audits["lora"].trainable
    result = {}
    for method, figures in audits.items():
        printed = paper.TABLE8[method] if config == LLAMA_2["llama-2-7b"] else None
        count = figures.trainable
        stored = {
            "trained weights, fp16": 2 * count,
            "trained weights, fp32": 4 * count,
            "trained weights and two Adam moments, fp32": 12 * count,
            "base weights and LoRA's together, fp32": 4 * both,
        }
        result[method] = {
            "trainable": count,
            "printed": printed,
            "readings": {
                name: {"bytes": size, "matches": [] if printed is None else _matches(size, printed["storage"])}
                for name, size in stored.items()
            },
            "saved_bytes": figures.adapter_bytes or figures.model_bytes,
            "state_bytes": figures.state_bytes,
        }
    return result


def _matches(size: int, printed: str) -> list[str]:
    """The units in which a size reads as the printed one, rounded as that is."""
    units = {"GB": 10**9, "GiB": GIB}
    return [unit for unit, value in units.items() if f"{size / value:.1f}GB" == printed]
