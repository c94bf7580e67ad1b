"""What settings resolve to on this machine: model, data, precision, learning rate, tokens of a step."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch

from ..files import built_in, search_places
from ..model.config import read_config
from ..model.precision import choose_precision
from .settings import ResolvedSettings, Settings


def step_tokens(device: torch.device, processes: int) -> int:
    """The default of --batch-tokens. Below about 1,000 tokens a GPU is done before Python has given it the next work;
    2,048 leave a margin, and few enough steps that what crosses between the GPUs does not take most of the time. More
    than 8,192 in a step would leave an epoch of a corpus like BC5CDR fewer than 61 of them."""
    return 1024 if device.type == "cpu" else min(2048 * processes, 8192)


def resolve(settings: Settings, device: torch.device, processes: int = 1) -> tuple[ResolvedSettings, dict[str, str]]:
    """Fills in model, data, output folder, precision, learning rate and tokens of a step; and says why model, data and
    precision are what they are.

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
    # where sentences are counted, tokens are not: the same then on every machine
    tokens = settings.batch_tokens or (1024 if settings.batch_sentences else step_tokens(device, processes))
    chosen = {"model": model, "data": data, "out": out, "precision": precision, "lr": lr, "batch_tokens": tokens}
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
