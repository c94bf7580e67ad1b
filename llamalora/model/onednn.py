"""A CPU's pass in bf16 for a model that only answers: weights laid out once as oneDNN multiplies them, not at each
product; one product for q, k and v; SwiGLU and its residual within the products, before their results are rounded.

The operators are those that torch.compile puts in the place of linear layers, tried where the CPU has AVX-512.

Dimensions: I input features, O output features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .llama import MLP

ROWS = 256  # of the inputs for which oneDNN chooses the layout; others do as well


def alone(layer: nn.Linear) -> "Linear":
    """A layer that shares its input with no other."""
    return Linear(layer.weight)


class Linear(nn.Module):
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


class Together(Linear):
    """Several layers with one input as one."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__(torch.cat([layer.weight for layer in layers]))
        self.sizes = [layer.out_features for layer in layers]

    def fan_out(self, x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
        return self(x).split(self.sizes, -1)


class JoinedMLP(nn.Module):
    def __init__(self, mlp: MLP):
        super().__init__()
        self.gate, self.up, self.down = (Linear(x.weight) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down.with_other(self.up.with_other(x, self.gate(x, "swish"), "mul"), residual, "add")
