"""Adapters in PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.llama import Llama
from ..model.tensors import save_tensors
from .inject import adapt, lora_layers
from .kinds import KINDS, kind_of
from .peft_config import ADAPTER_CONFIG
from .peft_format import ADAPTER_WEIGHTS, Factors, factor_keys, frozen_key, read_adapter


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "") -> None:
    """Writes the LoRA layers of a model as a PEFT adapter folder, with the frozen weights that `load_adapter` changed.

    Args:
        base_model: recorded as `base_model_name_or_path`.

    Raises:
        InputError: the model has no LoRA layer.
    """
    layers = lora_layers(model)
    if not layers:
        raise InputError("the model has no LoRA layer to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= zip(factor_keys(name, layer.dora), layer.parts, strict=True)
    for name in getattr(model, "brought", ()):
        weight = layers[name].frozen if name in layers else model.get_parameter(f"{name}.weight")
        tensors[frozen_key(name, name in layers)] = weight
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)
    config = _peft_config(model, base_model)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _peft_config(model: nn.Module, base_model: str) -> dict:
    layers = lora_layers(model)
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(getattr(layer, "dropout", 0.0) for layer in layers.values()),
        "target_modules": _target_modules(model),
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "use_rslora": any(layer.rslora for layer in layers.values()),
        "use_dora": any(layer.dora for layer in layers.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _target_modules(model: nn.Module) -> list[str]:
    """Kinds that are adapted throughout by their short name, single layers by their full one."""
    layers = lora_layers(model)
    total = Counter(kind_of(name) for name, _ in model.named_modules())
    adapted = Counter(map(kind_of, layers))
    whole = {kind for kind in adapted if adapted[kind] == total[kind]}
    return [KINDS[kind] for kind in KINDS if kind in whole] + [n for n in layers if kind_of(n) not in whole]


def load_adapter(model: Llama, folder: str | Path, dropout: float | None = None) -> Llama:
    """Injects LoRA layers as an adapter folder describes them and fills them, in place.

    Frozen weights that the folder brings along (a resized or trained embedding or head) take the place of the model's,
    as in PEFT, with a warning where they differ. Those that do are `model.brought`, for `save_adapter`.

    Args:
        dropout: in place of the configuration's.

    Raises:
        CheckpointError: what `read_adapter` refuses, or tensors that are not finite.
    """
    adapter = read_adapter(folder, model)
    frozen = {name: adapter.frozen(name, model.get_parameter(f"{name}.weight")) for name in adapter.base}
    brought = [name for name in frozen if not torch.equal(frozen[name], model.get_parameter(f"{name}.weight"))]
    dropout = adapter.config.lora_dropout if dropout is None else dropout
    ranks = {name: (layer.rank, adapter.alphas[name]) for name, layer in adapter.layers.items()}
    adapt(model, ranks, adapter.rslora, dropout, dora=adapter.dora)
    _fill(model, adapter.layers, frozen)
    model.__dict__["brought"] = brought[:1] if model.tied else brought
    return model


@torch.no_grad()
def _fill(model: nn.Module, layers: dict[str, Factors], frozen: dict[str, Tensor]) -> None:
    for name, weight in frozen.items():
        model.get_parameter(f"{name}.weight").copy_(weight)
    for name, layer in lora_layers(model).items():
        for part, tensor in zip(layer.parts, layers[name].read(), strict=True):
            part.copy_(tensor)
