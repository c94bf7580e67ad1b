"""A GPU's pass for a model that only answers, of few kernels a block, since a token by itself leaves a GPU less to do
than launching them takes: one product for q, k and v, one for gate and up, and the residual within the last.

Dimensions: N tokens, D hidden, I input features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .elementwise import SwiGLU
from .llama import MLP


def alone(layer: nn.Linear) -> nn.Module:
    """A layer that shares its input with no other."""
    return layer


class Together(nn.Module):
    """Several layers with one input as one. Their weights become its rows, so that memory holds them once."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.layers, self.sizes = tuple(layers), [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])  # (all outputs, I)
        for layer, rows in zip(layers, self.weight.split(self.sizes), strict=True):
            layer.weight.data = rows

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """x (..., I) -> the output of each layer."""
        return F.linear(x, self.weight).split(self.sizes, -1)

    def fan_out(self, x: Tensor, _: Sequence[nn.Module]) -> Sequence[Tensor]:
        return self(x)

    def part(self) -> None:
        """Each layer has a weight of its own again: one that outlives the others would keep the memory of all."""
        del self.weight
        for layer in self.layers:
            layer.weight.data = layer.weight.data.clone()


class JoinedMLP(nn.Module):
    def __init__(self, mlp: MLP):
        super().__init__()
        self.run = mlp.run
        self.inner, self.down = Together([mlp.gate_proj, mlp.up_proj]), mlp.down_proj

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual (1, N, D); the residual is overwritten."""
        y = SwiGLU.apply(*self.inner(x), self.run)
        return residual.squeeze(0).addmm_(y.squeeze(0), self.down.weight.T)[None]
