"""The paper's Tables 7 and 8 counted again: parameters that are trained, and what it takes to store them."""

from typing import Any

from ..lora.counts import audit
from ..lora.inject import count_parameters, make_trainable
from ..model.checkpoint import skeleton
from ..model.config import LLAMA_2, LlamaConfig
from ..text_table import aligned, wrapped
from ..training.memory import GIB
from .printed import RANKS, TABLE7, TABLE8, TARGETS


def table7(config: LlamaConfig) -> list[dict]:
    """Trainable parameters of each cell of Table 7, counted on the model that trains; with Llama-2-7B also the
    printed figure."""
    printed = TABLE7 if config == LLAMA_2["llama-2-7b"] else {}
    return [
        {
            "targets": targets,
            "rank": rank,
            "exact": count_parameters(make_trainable(skeleton(config), "lora", targets, rank))["trainable"],
            "printed": printed[targets][column] if printed else None,
        }
        for targets in TARGETS
        for column, rank in enumerate(RANKS)
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
        printed: dict[str, Any] | None = TABLE8[method] if config == LLAMA_2["llama-2-7b"] else None
        count = figures.trainable
        stored: dict[str, int] = {
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


def show_bytes(count: int) -> str:
    if count < 10**8:
        return f"{count / 10**6:.2f} MB = {count / 2**20:.2f} MiB"
    return f"{count / 10**9:.2f} GB = {count / GIB:.2f} GiB"


def show_table7(cells: list[dict]) -> str:
    rows = [["", *(f"r={rank}" for rank in RANKS)]]
    for targets in TARGETS:
        row = [cell for cell in cells if cell["targets"] == targets]
        rows.append([targets, *(f"{cell['exact']:,}" + _misprint(cell) for cell in row)])
    differing = [f"{cell['targets']} at r={cell['rank']}" for cell in cells if _misprint(cell)]
    if cells[0]["printed"] is None:
        return aligned(rows)
    note = f"Table 7 prints {len(cells) - len(differing)} of the {len(cells)} counts as they are; it differs for "
    return f"{aligned(rows)}\n\n{wrapped(note + ' and '.join(differing) + '.')}"


def _misprint(cell: dict) -> str:
    return "" if cell["printed"] in (None, cell["exact"]) else f" (printed: {cell['printed']:,})"


def show_table8(result: dict) -> str:
    printed = result["lora"]["printed"] is not None
    titles = ["", "trainable parameters", *(["storage in the paper"] if printed else [])]
    titles += [f"  {name}" for name in result["lora"]["readings"]]
    titles += ["saved by this project: the result", "saved by this project: a checkpoint"]
    methods = {"LoRA on all, r=128": result["lora"], "full fine-tuning": result["full"]}
    rows = zip(titles, *(_column8(name, of) for name, of in methods.items()), strict=True)
    if not printed:
        return aligned(list(rows))
    notes = []
    for name, of in methods.items():
        found = [f"{reading}, in {unit}" for reading, one in of["readings"].items() for unit in one["matches"]]
        notes.append(f"{of['printed']['storage']} for {name} reads as: {'; '.join(found) or 'none of these'}.")
    notes.append("Full fine-tuning has no LoRA weights; its own alone never come to the printed figure.")
    return "\n".join([aligned(list(rows)), "", *map(wrapped, notes)])


def _column8(title: str, of: dict) -> list[str]:
    """The cells of one method, ticked where they are the paper's."""
    cells = [(title, False), (f"{of['trainable']:,}", of["printed"] and of["printed"]["trainable"] == of["trainable"])]
    cells += [(of["printed"]["storage"], False)] if of["printed"] else []
    cells += [(show_bytes(reading["bytes"]), reading["matches"]) for reading in of["readings"].values()]
    cells += [(show_bytes(of["saved_bytes"]), False), (show_bytes(of["state_bytes"]), False)]
    return [f"{text} {'✓' if same else ' '}" for text, same in cells]
