"""Adapters in PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .checkpoint import CheckpointError, read_json, read_tensor, tensor_shapes
from .lora import KINDS, LoRAEmbedding, adapt, kind_of, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# fields of LoraConfig that change what the tensors mean, and that must be unset to be read here
_UNSUPPORTED = (
    "use_dora",
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


def _keys(name: str, embedding: bool) -> tuple[str, str]:
    """The file's keys of A and B for the layer `name`."""
    pattern = "lora_embedding_{}" if embedding else "lora_{}.weight"
    return tuple(f"{_PREFIX}{name}.{pattern.format(factor)}" for factor in "AB")


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "") -> None:
    """Writes the LoRA layers of a model as a PEFT adapter folder.

    Args:
        base_model: recorded as `base_model_name_or_path`.

    Raises:
        ValueError: the model has no LoRA layer.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layer to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        key_a, key_b = _keys(name, isinstance(layer, LoRAEmbedding))
        # copies: an adapter file must hold no shared storage
        tensors[key_a] = layer.lora_A.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        tensors[key_b] = layer.lora_B.detach().float().cpu().clone(memory_format=torch.contiguous_format)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _peft_config(model, base_model)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


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
        "use_dora": False,
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


def load_adapter(model: nn.Module, folder: str | Path, dropout: float | None = None) -> None:
    """Injects LoRA layers as an adapter folder describes them and fills them, in place.

    Which layers, and their ranks, follow from the tensors in the file; alpha, rsLoRA and dropout from
    the configuration.

    Args:
        dropout: in place of the configuration's.

    Raises:
        CheckpointError: no such folder, an adapter of another kind (DoRA, modules_to_save, ...), or
            tensors that are missing, unexpected, not finite or of another base model's shapes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such adapter folder")
    config = read_json(folder / CONFIG)
    _refuse_unsupported(folder / CONFIG, config)
    path = folder / WEIGHTS
    if not path.is_file():
        hint = "; pickled weights are not read" if (folder / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"{path}: no such file{hint}")
    shapes = tensor_shapes(path)
    ranks = _match_layers(path, model, shapes)
    rslora = bool(config.get("use_rslora"))
    try:
        alphas = {name: _pattern(config.get("alpha_pattern"), name, float(config["lora_alpha"])) for name in ranks}
        for name, rank in ranks.items():
            if rank != _pattern(config.get("rank_pattern"), name, int(config["r"])):
                raise CheckpointError(f"{path}: {name} has rank {rank}, which {CONFIG} does not say")
        dropout = float(config.get("lora_dropout") or 0.0) if dropout is None else dropout
        adapt(model, {name: (rank, alphas[name]) for name, rank in ranks.items()}, rslora, dropout)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: r or lora_alpha is missing or malformed ({error})") from None
    fill_adapter(model, path)


def fill_adapter(model: nn.Module, path: Path) -> None:
    """Copies the tensors of an adapter file into the LoRA layers that the model has already.

    Raises:
        CheckpointError: the layers are not the file's, or a tensor is not finite.
    """
    ranks = _match_layers(path, model, tensor_shapes(path))
    layers = lora_layers(model)
    if {name: layer.rank for name, layer in layers.items()} != ranks:
        raise CheckpointError(f"{path}: holds other layers or ranks than the model's targets and rank")
    for name, layer in layers.items():
        for parameter, key in zip(
            (layer.lora_A, layer.lora_B), _keys(name, isinstance(layer, LoRAEmbedding)), strict=True
        ):
            tensor = read_tensor(path, key)
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path}: {key} holds NaN or infinity")
            with torch.no_grad():
                parameter.copy_(tensor)


def _match_layers(path: Path, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Module name -> rank, for the layers that the file's keys name, in the model's order."""
    ranks, expected = {}, set()
    for name, module in model.named_modules():
        if kind_of(name) is None:
            continue
        embedding = isinstance(module, nn.Embedding)
        key_a, key_b = _keys(name, embedding)
        present = [key for key in (key_a, key_b) if key in shapes]
        if not present:
            continue
        if len(present) == 1:
            raise CheckpointError(f"{path}: lacks {key_b if present[0] == key_a else key_a}")
        expected |= {key_a, key_b}
        rank = ranks[name] = shapes[key_a][0]
        wide, tall = module.weight.shape if embedding else reversed(module.weight.shape)
        for key, wanted in ((key_a, (rank, wide)), (key_b, (tall, rank))):
            if shapes[key] != wanted:
                raise CheckpointError(
                    f"{path}: {key} has shape {shapes[key]}, the base model needs {wanted}; "
                    "is it an adapter of another model?"
                )
    unexpected = sorted(shapes.keys() - expected)
    if unexpected:
        raise CheckpointError(f"{path}: {unexpected[0]} fits no layer of the model ({len(unexpected)} such keys)")
    if not ranks:
        raise CheckpointError(f"{path}: holds no tensor")
    return ranks


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
