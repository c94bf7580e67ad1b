"""What a block computes value by value: norms, rotary embedding, SwiGLU; and the writing of a cache.

Each is a formula, a plain function of tensors; where something learns within an autograd function that saves little.
`run` is what computes formulas: as they stand, operation by operation; or compiled, one kernel that reads its tensors
once.

They are compiled rather than whole blocks, since they hold nearly all that fusing can spare: products stay what they
are. They compile in seconds; what is saved, which the memory plan counts, stays what it is; and neither FSDP's hooks
nor layers that somebody put into the model are compiled with them. No formula has a product, so Triton does for a V100.

Dimensions: N tokens, D hidden, H heads, E head size, F feed-forward.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Formula = Callable[..., Any]
Run = Callable[[Formula], Formula]


def plain(formula: Formula) -> Formula:
    """The formula itself."""
    return formula


@cache
def compiled(formula: Formula) -> Formula:
    """The formula as one kernel, or few, for any number of tokens. The first call takes the time to compile it."""
    return for_any_tokens(torch.compile(formula, fullgraph=True))


def for_any_tokens(program: Formula) -> Formula:
    """Calls a compiled formula so that it is not compiled again: for another number of tokens, the first dimension but
    one of size 1, or for tensors that need no gradient."""

    def run(*given: Any) -> Any:
        own = [one.detach() if isinstance(one, Tensor) else one for one in given]
        for one in own:
            if isinstance(one, Tensor) and one.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(one, int(one.shape[0] == 1))
        return program(*own)

    return run


def compile_formulas(model: nn.Module, run: Run = compiled) -> None:
    """Lets a model compute its formulas by `run`, in place. Its parameters, their names and its modules stay."""
    for module in model.modules():
        if hasattr(module, "run"):
            module.__dict__["run"] = run


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device; None if it can."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "the GPU is too old for Triton"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
    variable, usual = ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    if not any(map(shutil.which, (os.environ.get(variable, ""), *usual))):
        return f"there is no compiler ({' or '.join(usual)})"
    if device.type == "cpu" and not _compiles_vectors():
        return "torch.compile can use no vector instructions here; without them formulas take several times as long"
    return None


def _compiles_vectors() -> bool:
    """Whether torch.compile has found vector instructions for the CPU: it builds and loads a program for each kind."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return bool(pick_vec_isa())


# ---- the norm ----


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / rms(x), computed in fp32; and 1 / rms(x)."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype), inverse


def normalize_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None]:
    of_weight = (grad * (x.float() * inverse).to(x.dtype)).sum_to_size(weight.shape) if learns else None
    unit, wide = x * inverse, (grad * weight).float()
    of_x = torch.addcmul(wide, unit, (wide * unit).mean(-1, keepdim=True), value=-1).mul_(inverse).to(x.dtype)
    return of_x, of_weight


def add_normalize(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x + y
    return total, *normalize(total, weight, eps)


def add_normalize_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, inverse: Tensor, weight: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None]:
    of_total, of_weight = normalize_backward(grad, total, inverse, weight, learns)
    return of_total.add_(grad_total), of_weight


class _Normalize(torch.autograd.Function):
    """Saves x, where autograd would save four copies of its size."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, run: Run) -> Tensor:
        y, inverse = run(normalize)(x, weight, eps)
        ctx.save_for_backward(x, inverse, weight)
        ctx.run = run
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *ctx.run(normalize_backward)(grad, *ctx.saved_tensors, ctx.needs_input_grad[1]), None, None


class _AddNormalize(torch.autograd.Function):
    """x + y, and its norm. Saves the sum."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, weight: Tensor, eps: float, run: Run) -> tuple[Tensor, Tensor]:
        total, normalized, inverse = run(add_normalize)(x, y, weight, eps)
        ctx.save_for_backward(total, inverse, weight)
        ctx.run = run
        return total, normalized

    @staticmethod
    def backward(ctx, grad_total: Tensor, grad: Tensor):
        learns = ctx.needs_input_grad[2]
        of_total, of_weight = ctx.run(add_normalize_backward)(grad_total, grad, *ctx.saved_tensors, learns)
        return of_total, of_total, of_weight, None, None


class RMSNorm(nn.Module):
    run: Run = staticmethod(plain)

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """weight * x / rms(x); with y, x + y and the same of that."""
        if y is None:
            return _Normalize.apply(x, self.weight, self.eps, self.run)
        return _AddNormalize.apply(x, y, self.weight, self.eps, self.run)


# ---- rotary embedding ----


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (B, T, heads, E) turned by their positions' angles: rotate-half convention, in fp32 like the angles."""
    return _rotate_one(q, cos, sin), _rotate_one(k, cos, sin)


def rotate_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, -sin)


def _rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Rotate(torch.autograd.Function):
    """Saves the angles, which all layers share."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.run = run
        return run(rotate)(q, k, cos, sin)

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor):
        return *ctx.run(rotate_back)(grad_q, grad_k, *ctx.saved_tensors), None, None, None


# ---- what a cache keeps ----


def write_slots(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, places: Tensor) -> None:
    """Writes k and v (N, K, E) into keys and values (all places, E), to the places (N, K)."""
    keys[places] = k.to(keys.dtype)
    values[places] = v.to(values.dtype)


# ---- SwiGLU ----


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Saves its two inputs alone, and computes silu(gate) again for the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, run: Run) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.run = run
        return run(swiglu)(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *ctx.run(swiglu_backward)(grad, *ctx.saved_tensors), None
