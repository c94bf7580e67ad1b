"""What can be trained: the nine kinds of layer, and the ways to train them. Without torch, for the command line."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError

# the nine kinds of layer of the paper's section 3.4, in its order
KINDS = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "up": "up_proj",
    "down": "down_proj",
    "gate": "gate_proj",
    "embed": "embed_tokens",
    "head": "lm_head",
}
_KIND_OF = {module: kind for kind, module in KINDS.items()}


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        adapts: low-rank updates learn, so what comes of it is an adapter; else weights of the model itself learn.
        targeted: they are those of the target layers; else every parameter learns.
    """

    adapts: bool
    targeted: bool


METHODS = {"lora": Method(True, True), "partial": Method(False, True), "full": Method(False, False)}


def parse_targets(targets: str | Sequence[str]) -> tuple[str, ...]:
    """`all`, a comma list or a sequence of kinds, or of PEFT's names for them (`q_proj`) -> kinds in the paper's order.

    Raises:
        InputError: an unknown or missing kind.
    """
    given = targets.split(",") if isinstance(targets, str) else targets
    names = [_KIND_OF.get(name.strip(), name.strip()) for name in given if name.strip()]
    unknown = [name for name in names if name not in (*KINDS, "all")]
    if unknown or not names:
        raise InputError(f"unknown target {', '.join(unknown) or targets!r}; choose all or any of {','.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in names or "all" in names)


def kind_of(name: str) -> str | None:
    """The kind (`q` ... `head`) of the layer with this module name; None for other modules."""
    return _KIND_OF.get(name.rpartition(".")[2])


def what_learns(method: str, targets: str, rank: int, dora: bool) -> str:
    """The parameters that learn, in words for a person."""
    if not METHODS[method].targeted:
        return "all parameters"
    if not METHODS[method].adapts:
        return f"the weights of {targets}"
    return f"{'DoRA' if dora else 'LoRA'} of rank {rank} on {targets}"
