"""Which cards train which Llama-2: the memory plan over models, methods and cards."""

from ..lora.inject import make_trainable
from ..model.checkpoint import skeleton
from ..model.config import LLAMA_2
from ..model.free_memory import GIB
from .cards import CARDS, REPORTED, USABLE
from .memory import plan_memory

# column -> the card that stands for all of its memory
COLUMNS = {
    "V100 16 GB": CARDS["V100-16"],
    "RTX 24 GB": CARDS["RTX-4090"],
    "V100 32 GB": CARDS["V100-32"],
    "A100 40 GB": CARDS["A100-40"],
    "A100 80 GB, H100": CARDS["A100-80"],
    "H200": CARDS["H200"],
}
METHODS = {"LoRA on all, r=8": ("lora", 8), "LoRA on all, r=128": ("lora", 128), "full": ("full", 0)}
GPUS = (2, 4, 8, 16, 32, 64)


def table() -> list[dict]:
    """For each model, method and card: GiB of the leanest step (one example of BC5CDR's longest, every block
    recomputed) with ddp and with fsdp on each number of GPUs, and the fewest GPUs on which it fits, with 5 % to spare:
    1, with ddp; more, with fsdp; or None."""
    cells = []
    for name, config in LLAMA_2.items():
        for method, (kind, rank) in METHODS.items():
            model = make_trainable(skeleton(config), kind, "all", rank)
            needed = {precision: _needed(model, precision) for precision in ("fp16", "bf16")}
            for title, card in COLUMNS.items():
                capacity, precision = int(card.memory * GIB * REPORTED), card.half
                usable = USABLE * capacity
                fitting = [gpus for gpus, total in needed[precision].items() if total <= usable]
                cell = {"model": name, "method": method, "card": title, "precision": precision, "capacity": capacity}
                cells.append(cell | {"bytes": needed[precision], "fewest_gpus": min(fitting, default=None)})
    return cells


def _needed(model, precision: str) -> dict[int, int]:
    """Number of GPUs -> bytes on each; on 1 with ddp, which takes as much on each of several."""
    needed = {}
    for gpus in (1, *GPUS):
        # of no capacity, on which the items do not depend
        needed[gpus] = plan_memory(model, "fsdp" if gpus > 1 else "ddp", gpus, 0, precision, 1, recompute=1).peak
    return needed


def show(cells: list[dict]) -> str:
    """The table as Markdown: what fits, with the GiB that it takes on each GPU."""
    lines = ["| | | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name in LLAMA_2:
        for method in METHODS:
            row = [cell for cell in cells if (cell["model"], cell["method"]) == (name, method)]
            lines.append(f"| {name} | {method} | " + " | ".join(map(_verdict, row)) + " |")
    return "\n".join(lines)


def _verdict(cell: dict) -> str:
    gpus = cell["fewest_gpus"]
    if gpus is None:
        return f"more than {GPUS[-1]}"
    return f"{'ddp' if gpus == 1 else f'fsdp, {gpus} or more'} ({cell['bytes'][gpus] / GIB:.1f})"
