"""How a run fits the memory it finds: ddp or fsdp, the micro-batch, what is recomputed. The memory plan decides."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..cli import UsageError
from ..distributed.sharding import whole_blocks
from ..distributed.world import World
from ..lora.inject import make_trainable
from ..model.checkpoint import skeleton
from ..model.config import LlamaConfig
from ..model.free_memory import GIB, free_memory
from ..model.llama import Llama
from ..model.precision import DTYPES
from ..runs.settings import ResolvedSettings, Settings
from .memory import CONTEXT_BYTES, Plan, plan_host, plan_memory, typical

CPU_MICRO_TOKENS = 2048
SPARINGLY = (0, 4, 2, 1)  # which blocks are recomputed: none, every fourth, every second, all


@dataclass(frozen=True)
class Placement:
    """
    Attributes:
        parallel: `ddp`, a whole model in every process, or `fsdp`, all parameters spread over them.
        micro_tokens: tokens of a forward pass.
        recompute: activations of every k-th block are recomputed; 0: of none.
        plan: of a GPU's memory; None on a CPU.
        why: the reason for `parallel`.
        whole: with fsdp, blocks of which each process keeps the frozen weights whole.
        host: bytes by item that each process needs of the host (`plan_host`).
    """

    parallel: str
    micro_tokens: int
    recompute: int
    plan: Plan | None
    why: str
    whole: int = 0
    host: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        some = f", recomputing one block in {self.recompute}"
        recomputed = {0: "", 1: ", recomputing every block"}.get(self.recompute, some)
        words = f"{self.parallel} ({self.why}), micro-batches of up to {self.micro_tokens:,} tokens{recomputed}"
        if self.whole:
            words += f", {self.whole} blocks kept whole"
        if self.host:
            *always, merging = self.host.values()
            words += f"; {sum(always) / GIB:.2f} GiB of the host planned for each process, "
            words += f"{merging / GIB:.2f} more to merge updates for an evaluation, if they are free"
        if self.plan is None:
            return words
        plan = self.plan
        return (
            f"{words}; {plan.total / GIB:.1f} of {plan.capacity / GIB:.1f} GiB planned on each GPU, in an evaluation "
            f"{plan.evaluation_total / GIB:.1f} with one sentence at a time, and room for {plan.rows:,} of the longest"
        )


def place(settings: ResolvedSettings, config: LlamaConfig, lengths: Sequence[int], world: World) -> Placement:
    """What `auto` stands for on this machine, the same on every process.

    Args:
        lengths: of the training examples.

    Raises:
        UsageError: fsdp with a single process, or with DoRA in half precision.
    """
    if settings.parallel == "fsdp" and world.size == 1:
        raise UsageError("--parallel fsdp: there is one process, nobody to share the model with; use torchrun")
    model = make_trainable(skeleton(config), **settings.learning)
    if world.device.type == "cuda":
        capacity = min(world.gather(capacity_of(world.device)))
        return _checked(fit(model, settings, lengths, world.size, capacity), settings, model, world)
    parallel, why = settings.parallel, "requested"
    if parallel == "auto":
        parallel, why = "ddp", "one process" if world.size == 1 else "on the CPU"
    micro_tokens = settings.micro_tokens if isinstance(settings.micro_tokens, int) else CPU_MICRO_TOKENS
    recompute = settings.activation_checkpointing if isinstance(settings.activation_checkpointing, int) else 0
    return _checked(Placement(parallel, micro_tokens, recompute, None, why), settings, model, world)


def capacity_of(device: torch.device) -> int:
    """Bytes that a GPU has for this process, CUDA's own part included, and what other programs hold left out."""
    total = torch.cuda.mem_get_info(device)[1]
    return min(total, free_memory(device) + torch.cuda.memory_allocated(device) + CONTEXT_BYTES)


def check_parallel(placement: Placement, settings: Settings) -> None:
    """
    Raises:
        UsageError: fsdp with DoRA in half precision.
    """
    if placement.parallel == "fsdp" and settings.dora and settings.precision != "fp32":
        raise UsageError(
            f"--dora: under fsdp ({placement.why}) its magnitudes, which need fp32, would be gathered in "
            f"{settings.precision}; use --parallel ddp, --precision fp32, or leave it out"
        )


def _checked(placement: Placement, settings: Settings, model: Llama, world: World) -> Placement:
    check_parallel(placement, settings)
    computes = world.device.type == "cpu"
    host = plan_host(model, placement.parallel, world.size, settings.precision, computes)
    return replace(placement, host=host)


def fit(model: Llama, settings: Settings, lengths: Sequence[int], gpus: int, capacity: int) -> Placement:
    """ddp where the leanest step fits, else fsdp; as little recomputation as lets a process's share of an
    optimizer step through in one pass; and if all of it does not suffice, the largest micro-batch that fits.

    If nothing fits, it is the leanest placement all the same, and says so: the plan may be slightly off.

    Args:
        model: on the meta device.
        settings: with the tokens of a step, or its sentences.
        lengths: of the training examples.
        capacity: bytes that each GPU reports.
    """
    lengths = typical(lengths)
    longest = max(lengths)
    every, micro_tokens = settings.activation_checkpointing, settings.micro_tokens
    recomputed = (every,) if isinstance(every, int) else SPARINGLY
    if settings.batch_sentences:
        step = settings.batch_sentences * sum(lengths) // len(lengths)
    else:
        assert settings.batch_tokens is not None, "`resolve` chooses it"
        step = settings.batch_tokens
    tokens = micro_tokens if isinstance(micro_tokens, int) else longest + step // gpus
    least = micro_tokens if isinstance(micro_tokens, int) else longest

    def planned(parallel: str, micro_tokens: int, recompute: int) -> Plan:
        return plan_memory(model, parallel, gpus, capacity, settings.precision, micro_tokens, recompute, lengths)

    parallel, why = settings.parallel, "requested"
    if parallel == "auto":
        leanest = planned("ddp", least, recomputed[-1])
        parallel = "ddp" if leanest.fits or gpus == 1 else "fsdp"
        why = f"ddp needs at least {leanest.peak / GIB:.1f} of {leanest.usable / GIB:.1f} usable GiB"
    for recompute in recomputed:
        chosen = planned(parallel, tokens, recompute)
        if chosen.fits:
            break
    if not chosen.fits and settings.micro_tokens == "auto":
        chosen = planned(parallel, chosen.largest_micro_tokens, recompute)
    if not chosen.fits:
        why += f"; NOT ENOUGH MEMORY by {-chosen.spare / GIB:.1f} GiB as planned, trying"
    whole = 0
    if parallel == "fsdp" and settings.adapts:  # half of what is spare: the other half is for sentences side by side
        whole = whole_blocks(model, gpus, DTYPES[settings.precision].itemsize, chosen.spare // 2)
    return Placement(parallel, chosen.micro_tokens, recompute, chosen, why, whole)
