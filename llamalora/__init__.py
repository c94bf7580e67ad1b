"""LoRA fine-tuning of Llama-2 for named-entity recognition, in plain PyTorch.

>>> model = load_model("weights/tiny")
>>> inject_lora(model, targets="all", rank=8)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str):
    """The public names, of `api.py`. They need torch, which `llamalora --help` and a wrong flag do not wait for."""
    api = import_module(".api", __name__)
    if name not in ("__all__", *api.__all__):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
