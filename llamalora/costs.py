"""The paper's Tables 7 and 8 counted again: parameters that are trained, and what it takes to store them."""

from . import paper
from .checkpoint import skeleton
from .counts import audit
from .lora import count_parameters, make_trainable
from .memory import GIB
from .model import LLAMA_2, LlamaConfig


def table7(config: LlamaConfig) -> list[dict]:
    """Trainable parameters of each cell of Table 7, counted on the model that trains; with Llama-2-7B also the
    printed figure."""
    printed = paper.TABLE7 if config == LLAMA_2["llama-2-7b"] else {}
    return [
        {
            "targets": targets,
            "rank": rank,
            "exact": count_parameters(make_trainable(skeleton(config), "lora", targets, rank))["trainable"],
            "printed": printed[targets][column] if printed else None,
        }
        for targets in paper.TARGETS
        for column, rank in enumerate(paper.RANKS)
    ]


def table8(config: LlamaConfig) -> dict:
    """What LoRA (all layers, r=128) and full fine-tuning train and store: bytes by what may be counted as storage,
    with the units in which that comes to the paper's figure; and the files of this project."""
    audits = {
        "lora": audit(make_trainable(skeleton(config), "lora", "all", 128)),
        "full": audit(make_trainable(skeleton(config), "full")),
    }
    both = audits["lora"].base + audits["lora"].trainable
    result = {}
    for method, figures in audits.items():
        printed = paper.TABLE8[method] if config == LLAMA_2["llama-2-7b"] else None
        count = figures.trainable
        stored = {
            "trained weights, fp16": 2 * count,
            "trained weights, fp32": 4 * count,
            "trained weights and two Adam moments, fp32": 12 * count,
            "base weights and LoRA's together, fp32": 4 * both,
        }
        result[method] = {
            "trainable": count,
            "printed": printed,
            "readings": {
                name: {"bytes": size, "matches": [] if printed is None else _matches(size, printed["storage"])}
                for name, size in stored.items()
            },
            "saved_bytes": figures.adapter_bytes or figures.model_bytes,
            "state_bytes": figures.state_bytes,
        }
    return result


def _matches(size: int, printed: str) -> list[str]:
    """The units in which a size reads as the printed one, rounded as that is."""
    units = {"GB": 10**9, "GiB": GIB}
    return [unit for unit, value in units.items() if f"{size / value:.1f}GB" == printed]
