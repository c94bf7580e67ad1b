"""What settings resolve to on this machine: the places of model and data, precision, learning rate."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch

from ..files import built_in, search_places
from ..model.checkpoint import read_config
from ..model.precision import choose_precision
from .settings import ResolvedSettings, Settings


def resolve(settings: Settings, device: torch.device) -> tuple[ResolvedSettings, dict[str, str]]:
    """Fills in model, data, output folder, precision and learning rate; and says why model, data and precision are
    what they are.

    Raises:
        CheckpointError: no such model folder.
    """
    why = {}
    model, why["model"] = _place(settings.model, "weights/llama-2-7b", "weights/tiny", "config.json")
    data, why["data"] = choose_data(settings.data)
    precision, why["precision"] = choose_precision(settings.precision, device)
    out = settings.out
    if out is None:
        what = f"r{settings.rank}" if settings.adapts else settings.method
        out = f"runs/{datetime.now():%Y%m%d-%H%M%S}-{settings.format}-{what}-{Path(model).name}"
    config = read_config(model)
    lr = settings.lr
    if lr is None:
        lr = float(f"{1.2 / config.hidden_size * (1 if settings.adapts else 0.1):.3g}")
    chosen = {"model": model, "data": data, "out": out, "precision": precision, "lr": lr}
    return ResolvedSettings(**asdict(settings) | chosen), why


def choose_data(given: str | None) -> tuple[str, str]:
    """The corpus folder, and why it is that one."""
    return _place(given, "data/bc5cdr", "data/sample", ".")


def _place(given: str | None, preferred: str, otherwise: str, proof: str) -> tuple[str, str]:
    if given is not None:
        return given, "requested"
    for place in search_places():
        if (place / preferred / proof).exists():
            return str(place / preferred), f"found at {preferred}"
    return str(built_in(otherwise)), f"built in, since {preferred} is not there"
