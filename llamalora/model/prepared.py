"""A model that only answers, in the form in which its device computes fastest: `onednn.py` for a CPU, `joined.py` for a
GPU. Without gradients, and as long as the weights do not change."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import joined, onednn
from .free_memory import SHARE, free_memory
from .llama import Backbone, Llama
from .tensors import is_sharded


@contextmanager
def prepared(model: Llama) -> Iterator[Backbone]:
    """The model's backbone with its linear layers in that form, for as long as the context lasts; or the model's own
    where there is none: for a sharded model, one with updates that are not merged or with hooks, in a precision that
    the form is not for, or where memory does not suffice."""
    form = _form([layer for layer in model.model.modules() if isinstance(layer, nn.Linear)])
    if form is None:
        yield model.model
        return
    twin = _twin(model, form)
    try:
        yield twin
    finally:
        for module in twin.modules():
            if isinstance(module, joined.Together):
                module.part()


def _form(linears: list[nn.Linear]) -> ModuleType | None:
    """What suits the linear layers of a backbone."""
    weights = [layer.weight for layer in linears]
    device, dtype = weights[0].device, weights[0].dtype
    if any(_does_more(layer) or (layer.weight.device, layer.weight.dtype) != (device, dtype) for layer in linears):
        return None
    form: ModuleType
    if device.type == "cpu":
        able = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
        form, more = onednn, 2 * sum(weight.nbytes for weight in weights)
        able = able and dtype == torch.bfloat16
    else:
        form, more = joined, 3 * max(weight.nbytes for weight in weights)  # while some are laid below each other
        casts = (
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != dtype
        )  # weights, at each product
        able = device.type == "cuda" and not casts
    return form if able and more <= SHARE * free_memory(device) else None


def _does_more(layer: nn.Linear) -> bool:
    """Whether its output is anything but the product with its weight, which is whole."""
    merged = getattr(layer, "merged", True)
    return not merged or bool(layer._forward_hooks or layer._forward_pre_hooks) or is_sharded(layer.weight)


def _twin(model: Llama, form: Any) -> Backbone:
    backbone = model.model
    with torch.device("meta"):
        twin = Backbone(model.config)
    twin.embed_tokens, twin.norm = backbone.embed_tokens, backbone.norm
    blocks: Iterable[tuple[Any, Any]] = zip(twin.layers, backbone.layers, strict=True)
    for block, own in blocks:
        block.input_layernorm, block.post_attention_layernorm = own.input_layernorm, own.post_attention_layernorm
        attention, given = block.self_attn, own.self_attn
        attention.run = given.run
        attention.q_proj = form.Together([given.q_proj, given.k_proj, given.v_proj])
        attention.o_proj = form.alone(given.o_proj)
        block.mlp = form.JoinedMLP(own.mlp)
    return twin
