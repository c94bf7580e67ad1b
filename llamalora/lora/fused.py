"""`adapted_linear` (layers.py) for several layers at once, with its own backward pass.

Dimensions: N tokens, I input features, O output features, R rank.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor]  # A, and scale * B


class FusedLinears(torch.autograd.Function):
    """W0 x + scale * B A x of several layers with one input and W0 frozen.

    Beside autograd's own form this reads x once for all A and sums the gradients of x, like the outputs, in the
    products' accumulators; and it keeps no half-precision copy of x, and none of its own of A and B.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, dtype: torch.dtype, scales: Sequence[float], casts: Sequence[Factors | None], *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        """`matrices` are W0, A and B of the first layer, then those of the next; `casts` as `LoRALinear.cast`."""
        weights, As, Bs = matrices[::3], matrices[1::3], matrices[2::3]
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, I)
            down, ups = _in_products(As, Bs, scales, casts, dtype)
            inner = F.linear(rows, down)  # (N, all R)
            outputs = [F.linear(rows, weight.to(dtype)) for weight in weights]
            for y, part, B in zip(outputs, _split(inner, As), ups, strict=True):
                y.addmm_(part, B.T)
        ctx.save_for_backward(x, inner, *matrices)
        ctx.dtype, ctx.scales, ctx.casts = dtype, scales, casts
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, inner, *matrices = ctx.saved_tensors
        weights, As, Bs = matrices[::3], matrices[1::3], matrices[2::3]
        dtype, grad_x = ctx.dtype, None
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            down, ups = _in_products(As, Bs, ctx.scales, ctx.casts, dtype)
            grad_inner = _joined([grad @ B for grad, B in zip(flat, ups, strict=True)], dim=1)  # (N, all R)
            if ctx.needs_input_grad[0]:
                grad_x = grad_inner @ down
                for grad, weight in zip(flat, weights, strict=True):
                    grad_x.addmm_(grad, weight.to(dtype))
                grad_x = grad_x.view_as(x).to(x.dtype)
            grad_As = (grad_inner.T @ rows).to(As[0].dtype).split([len(A) for A in As])
            grad_Bs = [  # (R, O), and then transposed, in half the time of (O, R)
                scaled((part.T @ grad).T.to(B.dtype), scale)
                for part, grad, B, scale in zip(_split(inner, As), flat, Bs, ctx.scales, strict=True)
            ]
        each = ((None, grad_A, grad_B) for grad_A, grad_B in zip(grad_As, grad_Bs, strict=True))
        return grad_x, None, None, None, *chain.from_iterable(each)


def scaled(matrix: Tensor, scale: float) -> Tensor:
    return matrix if scale == 1 else matrix * scale


def _joined(matrices: list[Tensor], dim: int = 0) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)


def _in_products(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], casts: Sequence[Factors | None], dtype
) -> tuple[Tensor, list[Tensor]]:
    """All A below each other (all R, I), and each scale * B (O, R), in the dtype of the products."""
    pairs = [
        cast or (A.to(dtype), scaled(B, scale).to(dtype))
        for A, B, scale, cast in zip(As, Bs, scales, casts, strict=True)
    ]
    return _joined([A for A, _ in pairs]), [B for _, B in pairs]


def _split(inner: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """(N, all R) -> (N, R) of each layer."""
    return inner.split([len(A) for A in As], dim=1)
