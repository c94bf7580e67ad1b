"""A model that only answers, in the form in which its device computes fastest: `onednn.py` for a CPU, `joined.py` for a
GPU. Without gradients, and as long as the weights do not change."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import joined, onednn
from .free_memory import SHARE, free_memory
from .llama import Backbone, Llama
from .tensors import is_sharded


@contextmanager
def prepared(model: Llama) -> Iterator[Backbone]:
    """The model's backbone with its linear layers in that form, for as long as the context lasts; or the model's own
    where there is none: for a model with sharded layers, with updates that are not merged or with hooks, in a precision
    that the form is not for, or where memory does not suffice."""
    form = _form(model.model)
    if form is None:
        yield model.model
        return
    with torch.device("meta"):
        backbone = twin = Backbone(model.config)
    with ExitStack() as undoing:
        undoing.callback(_part, twin)
        try:
            _fill(twin, model.model, form)
        except torch.OutOfMemoryError:
            undoing.close()
            backbone = model.model
        yield backbone


def _form(backbone: Backbone) -> ModuleType | None:
    """What suits the linear layers of a backbone."""
    linears = [module for module in backbone.modules() if isinstance(module, nn.Linear)]
    weights = [cast(Tensor, module.weight) for module in backbone.modules() if hasattr(module, "weight")]
    (device, dtype), *others = {(weight.device, weight.dtype) for weight in weights}
    if others or not dtype.is_floating_point or any(map(_does_more, linears)):
        return None
    form: ModuleType
    if device.type == "cpu":
        able = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
        form, more = onednn, 2 * sum(layer.weight.nbytes for layer in linears)
        able = able and dtype == torch.bfloat16
    else:
        form, more = joined, 3 * max(layer.weight.nbytes for layer in linears)  # while some are laid below each other
        casts = (
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != dtype
        )  # weights, at each product
        able = device.type == "cuda" and not casts
    return form if able and more <= SHARE * free_memory(device) else None


def _does_more(layer: nn.Linear) -> bool:
    """Whether its output is anything but the product with its weight, which is whole."""
    merged = getattr(layer, "merged", True)
    return not merged or bool(layer._forward_hooks or layer._forward_pre_hooks) or is_sharded(layer.weight)


def _fill(twin: Backbone, backbone: Backbone, form: Any) -> None:
    """Gives a twin on the meta device the layers of a backbone in a form."""
    twin.embed_tokens, twin.norm = backbone.embed_tokens, backbone.norm
    blocks: Iterable[tuple[Any, Any]] = zip(twin.layers, backbone.layers, strict=True)
    for block, own in blocks:
        block.input_layernorm, block.post_attention_layernorm = own.input_layernorm, own.post_attention_layernorm
        attention, given = block.self_attn, own.self_attn
        attention.run = given.run
        attention.q_proj = form.Together([given.q_proj, given.k_proj, given.v_proj])
        attention.o_proj = form.alone(given.o_proj)
        block.mlp = form.JoinedMLP(own.mlp)


def _part(twin: Backbone) -> None:
    """Gives the backbone's layers weights of their own again; all of them, even if memory does not suffice for one."""
    with ExitStack() as each:
        for module in twin.modules():
            if isinstance(module, joined.Together):
                each.callback(module.part)
