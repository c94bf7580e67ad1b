"""The parts of a training step: schedule, optimizer, masked loss, one scaled update.

Dimensions: M supervised tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed.gradients import GradientSum
from ..distributed.sharding import within
from ..distributed.world import World
from ..errors import RunError
from ..lora.inject import lora_layers, trainable_parameters
from ..lora.layers import LoRALinear
from ..model.elementwise import Run, plain
from ..model.llama import Llama
from ..model.precision import autocast
from ..model.tensors import is_sharded, own_rows, placed, whole
from .batch import MicroBatch

LOGITS_AT_ONCE = 2**25  # logits held at a time: 64 MiB in half precision
SOFTMAX_AT_ONCE = (2**20, 2**24)  # of these, by a CPU and by a GPU, in fp32


class DivergedError(RunError):
    """Training cannot go on: gradients that stay infinite, or parameters that never move."""


def learning_rate(peak: float, update: int, total: int, warmup: int, schedule: str) -> float:
    """The rate of update 0 ... total - 1: linear warm-up, then `cosine` to zero or `constant`."""
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (update - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def backward(
    model: Llama,
    batch: MicroBatch,
    supervised: float,
    scaler: torch.amp.GradScaler,
    precision: str,
    recompute: int = 0,
    summing: GradientSum | None = None,
) -> Tensor:
    """Forward and backward of one micro-batch; gradients add up in the parameters.

    The loss is the sum of cross entropies over the micro-batch's supervised tokens, divided by
    `supervised`, their number in the whole optimizer step: a mean of means would favour short answers.
    The output head sees supervised positions only and a chunk at a time: each chunk's logits are
    gone, backward pass included, before the next are made.

    Args:
        supervised: infinite for a micro-batch that counts for nothing, and whose gradients are zero.
        recompute: as in `Backbone.forward`.
        summing: given with a process's last micro-batch of a step: sums what is complete while others are computed.

    Returns:
        This micro-batch's share of the step's loss, in nats a token, in fp64 on the device: a GPU's host would wait
        for all that it has launched if it read that now.
    """

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        loss = torch.zeros((), device=batch.ids.device)
        factor = scaler.scale(torch.ones_like(loss)) / supervised
        with autocast(precision, batch.ids.device):
            hidden = model.model(batch.ids, packing=batch.packing, recompute=recompute)
            # even if the head alone learns: it is the backbone's backward pass that ends a step of a sharded model
            hidden = hidden[0].index_select(0, batch.predictors).requires_grad_()  # (M, D)
            leaf = hidden.detach().requires_grad_()
            chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
            for states, targets in zip(leaf.split(chunk), batch.targets.split(chunk), strict=True):
                logits = model.lm_head(states)  # (chunk, V)
                added, gradient = _cross_entropy(logits, targets, factor, model.run)
                logits.backward(gradient)
                loss += added / supervised
                del logits, gradient  # before the next chunk's are made, and before the backbone's backward pass
        return hidden, leaf.grad, loss

    hidden, gradient, loss = within(model, forward)
    if summing:
        summing.begin(model.model)
    hidden.backward(gradient)
    return loss.double()


@torch.no_grad()
def _cross_entropy(logits: Tensor, targets: Tensor, factor: Tensor, run: Run = plain) -> tuple[Tensor, Tensor]:
    """The sum of the cross entropies of logits (M, V), and `factor` times its gradient (M, V): softmax less one-hot.

    Computed in fp32: by a compiled formula, or in place, of so few rows at a time that a CPU's cache holds them, or
    that a GPU is busy with.
    """
    if run is not plain:
        return run(cross_entropy)(logits, targets[:, None], factor)
    rows = max(1, SOFTMAX_AT_ONCE[logits.device.type == "cuda"] // logits.shape[-1])
    gradient, loss = torch.empty_like(logits), factor.new_zeros(())
    for part, target, result in zip(*(x.split(rows) for x in (logits, targets[:, None], gradient)), strict=True):
        wide = result if result.dtype == torch.float32 else torch.empty(part.shape, device=part.device)
        torch.sub(part, part.amax(-1, keepdim=True).float(), out=wide)
        chosen = wide.gather(1, target)
        total = wide.exp_().sum(-1, keepdim=True)
        loss += (total.log() - chosen).sum()
        wide.mul_(factor / total).scatter_add_(1, target, -factor.expand_as(target))
        result.copy_(wide)
    return loss, gradient


def cross_entropy(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """What `_cross_entropy` computes, as a formula to be compiled, which holds no fp32 logits then; targets (M, 1)."""
    wide = logits.float()
    less = wide - wide.amax(-1, keepdim=True)
    total = less.exp().sum(-1, keepdim=True)
    one_hot = torch.arange(logits.shape[-1], device=logits.device) == targets
    gradient = (less.exp() / total - one_hot.float()) * factor
    return (total.log() - less.gather(1, targets)).sum(), gradient.to(logits.dtype)


@dataclass(frozen=True)
class Update:
    """What an optimizer step did."""

    grad_norm: float  # before clipping, over all trainable parameters
    skipped: bool  # gradients were not finite, parameters stayed
    scale: float  # of the loss in this step: 1 except in fp16


class Optimizer:
    """AdamW over the trainable parameters, with clipping, loss scaling, and the step that is skipped
    when a gradient is not finite: by all processes alike, since they hold the same summed gradients, or
    rows of them whose norms are gathered."""

    MOST_SKIPS = 25  # in a row; fp16's scale halves at each, from 65536 far below 1

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        device: torch.device,
        weight_decay: float,
        clip: float,
        loraplus: float = 1.0,
    ):
        self.parameters = trainable_parameters(model)
        self.adam = torch.optim.AdamW(
            _groups(model, self.parameters, loraplus), lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.clip = clip or math.inf
        self.sharded = any(map(is_sharded, self.parameters.values()))
        self._sums: GradientSum | None = None
        self.skips_in_a_row = 0

    def sums(self, world: World) -> GradientSum:
        """What sums the gradients over processes; alone, for a sharded model's backward pass sums them itself."""
        if self._sums is None:
            self._sums = GradientSum(self.parameters.values(), World() if self.sharded else world)
        return self._sums

    def step(self, lr: float, world: World) -> Update:
        """Sums gradients over processes, unscales, clips, updates.

        Raises:
            DivergedError: `MOST_SKIPS` steps in a row had gradients that were not finite.
        """
        self.sums(world).end()
        for group in self.adam.param_groups:
            group["lr"] = lr * group["ratio"]
        self.scaler.unscale_(self.adam)
        measured = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip))
        # read together, since a GPU's host waits for each reading
        norm, scale = torch.stack([measured, self.scaler.scale(torch.ones_like(measured))]).tolist()
        finite = math.isfinite(norm)
        if finite:
            self.scaler.step(self.adam)
        self.scaler.update()
        self.sums(world).clear()
        self.skips_in_a_row = 0 if finite else self.skips_in_a_row + 1
        if self.skips_in_a_row == self.MOST_SKIPS:
            raise DivergedError(
                f"{self.MOST_SKIPS} steps in a row had gradients that are not finite (loss scale "
                f"{self.scaler.get_scale():g}); lower --lr, or use --precision fp32 to find the cause"
            )
        return Update(norm, not finite, scale)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Everything that a resumed run needs: parameters and moments by name, and JSON values."""
        tensors: dict[str, Tensor] = {f"parameter.{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.adam.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors, {"scaler": self.scaler.state_dict(), "skips_in_a_row": self.skips_in_a_row}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], state: dict) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(placed(tensors[f"parameter.{name}"], parameter))
            if f"step.{name}" in tensors:
                moments = {
                    key: torch.empty_like(parameter).copy_(placed(tensors[f"{key}.{name}"], parameter))
                    for key in ("exp_avg", "exp_avg_sq")
                }
                # torch keeps the step count on the CPU unless the fused kernel wants it on the device
                self.adam.state[parameter] = moments | {"step": tensors[f"step.{name}"].to(parameter.device, copy=True)}
        self.scaler.load_state_dict(state["scaler"])
        self.skips_in_a_row = state["skips_in_a_row"]


def _groups(model: nn.Module, parameters: dict[str, nn.Parameter], ratio: float) -> list[dict]:
    """AdamW's groups for LoRA+ (Hayou et al. 2024): every linear layer's B learns `ratio` times as fast as the rest.

    The argument is that A reads an input as wide as the model, and B one as wide as the rank. Both of the
    embedding's factors read narrow inputs (a token, R values), so they share the common rate, where peft gives
    them a constant one of their own (1e-6). DoRA's magnitudes, which are as large as rows of W0, share it, too.
    """
    fast = {id(layer.lora_B) for layer in lora_layers(model).values() if isinstance(layer, LoRALinear)}
    groups: dict[float, list[nn.Parameter]] = {1.0: [], ratio: []}
    for parameter in parameters.values():
        groups[ratio if id(parameter) in fast else 1.0].append(parameter)
    return [{"params": members, "ratio": rate} for rate, members in groups.items() if members]


class MovementCheck:
    """Proof that every trainable parameter learns: some move only from the second update on, because
    their partner starts as zero, so the check is made after `UPDATES` of them."""

    UPDATES = 3

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self.before = self._fingerprints()

    @torch.no_grad()
    def _fingerprints(self) -> dict[str, tuple[float, float]]:
        """Sum and norm of the rows of each parameter that this process keeps."""
        kept = {name: own_rows(parameter) for name, parameter in self.parameters.items()}
        return {
            name: (values.sum(dtype=torch.float64).item(), values.norm(dtype=torch.float64).item())
            for name, values in kept.items()
        }

    def __call__(self, world: World) -> None:
        """
        Raises:
            DivergedError: naming the parameters that are what they were, on every process.
        """
        unmoved = {name for name, value in self._fingerprints().items() if value == self.before[name]}
        everywhere = set.intersection(*world.gather(unmoved))
        still = [name for name in self.parameters if name in everywhere]
        if still:
            shown = ", ".join(still[:6]) + (f" and {len(still) - 6} more" if len(still) > 6 else "")
            raise DivergedError(f"after {self.UPDATES} updates these parameters have not moved: {shown}")
