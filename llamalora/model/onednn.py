"""A CPU's pass in bf16 for a model that only answers: weights laid out once as oneDNN multiplies them, not at each
product; one product for q, k and v; SwiGLU and its residual within the products, before their results are rounded.

The operators are those that torch.compile puts in the place of linear layers, tried where the CPU has AVX-512.

Dimensions: I input features, O output features.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .free_memory import SHARE, free_memory
from .llama import MLP, Backbone, Llama
from .tensors import is_sharded

ROWS = 256  # of the inputs for which oneDNN chooses the layout; others do as well


def prepared(model: Llama) -> Backbone:
    """The model's backbone with its linear layers in that layout, beside those of the model; or the model's own, where
    that is none in bf16 on a CPU with all updates merged, or memory does not hold both. It is for answers, without
    gradients, and as long as the weights do not change."""
    backbone = model.model
    linears = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)]
    size = sum(layer.weight.nbytes for layer in linears)
    able = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not able or not all(map(_plain, linears)) or 2 * size > SHARE * free_memory(torch.device("cpu")):
        return backbone
    with torch.device("meta"):
        twin = Backbone(model.config)
    twin.embed_tokens, twin.norm = backbone.embed_tokens, backbone.norm
    blocks: Iterable[tuple[Any, Any]] = zip(twin.layers, backbone.layers, strict=True)
    for block, own in blocks:
        block.input_layernorm, block.post_attention_layernorm = own.input_layernorm, own.post_attention_layernorm
        attention, given = block.self_attn, own.self_attn
        attention.run = given.run
        attention.q_proj = _Together([given.q_proj, given.k_proj, given.v_proj])
        attention.o_proj = _Linear(given.o_proj.weight)
        block.mlp = _MLP(own.mlp)
    return twin


def _plain(layer: nn.Linear) -> bool:
    """Whether its output is that product and nothing more, in bf16 on the CPU."""
    weight = layer.weight
    alone = getattr(layer, "merged", True) and not (layer._forward_hooks or layer._forward_pre_hooks)
    return alone and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not is_sharded(weight)


class _Linear(nn.Module):
    """x (..., I) -> x W^T (..., O)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor, then: str = "none") -> Tensor:
        """`then`: what is done with the product, `swish` or nothing."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, then, [], "")

    def with_other(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        """The product and another tensor (..., O), by `add` or `mul`."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, None, how)


class _Together(_Linear):
    """Several layers with one input as one."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__(torch.cat([layer.weight for layer in layers]))
        self.sizes = [layer.out_features for layer in layers]

    def fan_out(self, x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
        return self(x).split(self.sizes, -1)


class _MLP(nn.Module):
    def __init__(self, mlp: MLP):
        super().__init__()
        self.gate, self.up, self.down = (_Linear(x.weight) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down.with_other(self.up.with_other(x, self.gate(x, "swish"), "mul"), residual, "add")
