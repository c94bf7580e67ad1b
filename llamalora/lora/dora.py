"""Weight-decomposed low-rank adaptation: m * V / ||V|| row by row, with V = W0 + scale * B A (Liu et al. 2024).

Dimensions: N tokens, I input features, O output features, R rank. m is (O,), in fp32; a row belongs to an output.
The gradient takes ||V|| for a constant (section 4.3 of the paper), as PEFT does.
"""

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny  # of a squared norm: a row of zeros stays zero instead of becoming NaN


@torch.no_grad()
def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """|| W0 + scale * B A || of each row, (O,) in fp32, for W0 (O, I), A (R, I) and B (O, R).

    By ||W0||^2 + 2 scale <W0, B A> + scale^2 ||B A||^2, in which <W0, B A> = <W0 A^T, B>: no matrix of the size
    of W0 is made. The cost is that of R tokens through the layer, and a pass over W0.
    """
    with torch.autocast(weight.device.type, enabled=False):
        wide_A, wide_B = A.float(), B.float()
        cross = (weight @ A.to(weight.dtype).T).float()  # (O, R)
        own = wide_B @ (wide_A @ wide_A.T)  # (O, R)
        squares = _norms(weight).square() + scale * ((2 * cross + scale * own) * wide_B).sum(1)
    return squares.clamp_min(SMALLEST).sqrt()


def initial_magnitude(weight: Tensor) -> Tensor:
    """m of W0 (O, I) itself, so that the update starts as zero."""
    return _norms(weight.detach())


def normalise_(weight: Tensor, magnitude: Tensor) -> None:
    """V (O, I) in fp32 becomes m * V / ||V||, in place."""
    weight.mul_((magnitude / _norms(weight).clamp_min(SMALLEST**0.5))[:, None])


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


class Stretch(torch.autograd.Function):
    """y * c for y (..., O) and c (O,) in fp32, rounded once to the dtype of y, and c not before: what a step of
    training changes of it is less than half precision shows.

    Saves its output, which the next operation mostly keeps as well, and which says what y was.
    """

    @staticmethod
    def forward(ctx, y: Tensor, c: Tensor) -> Tensor:
        stretched = torch.mul(y, c, out=torch.empty_like(y))
        ctx.save_for_backward(stretched, c)
        return stretched

    @staticmethod
    def backward(ctx, grad: Tensor):
        stretched, c = ctx.saved_tensors
        grad_c = (grad * stretched).flatten(0, -2).sum(0, dtype=torch.float32) / torch.where(c == 0, 1, c)
        return torch.mul(grad, c, out=torch.empty_like(grad)), grad_c
