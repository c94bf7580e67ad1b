"""In place of `emulated` where torch has a real GPU: `pytest -p actual` runs tests of inside/ on that.

The card calls itself a V100 of 16 GB, unless a test changes `CARD`, so that `auto` takes what a V100 has; those who
compile for it are told what it is.
"""

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from llamalora.model.elementwise import compiled as as_one

__all__ = ["CARD", "as_one", "clear", "counts", "held", "limit"]

CARD = SimpleNamespace(name=torch.cuda.get_device_name(), memory=int(15.77 * 2**30), capability=(7, 0), tenants=0)
_counts: Counter[str] = Counter()


def counts() -> Counter[str]:
    """How often a graph was repeated since `clear`."""
    return _counts


def clear() -> None:
    _counts.clear()


def held() -> int:
    """Bytes of the tensors that there are."""
    return torch.cuda.memory_allocated()


def limit(size: int | None) -> None:
    pytest.skip("the memory of a real GPU is not cut to the byte")


_replay, _capability = torch.cuda.CUDAGraph.replay, torch.cuda.get_device_capability


def _counted(graph: torch.cuda.CUDAGraph) -> None:
    _counts["graph"] += 1
    _replay(graph)


def _claimed(device=None) -> tuple[int, int]:
    asking = sys._getframe(1).f_globals["__name__"]
    return CARD.capability if asking.startswith("llamalora") else _capability(device)


torch.cuda.CUDAGraph.replay = _counted
torch.cuda.get_device_capability = _claimed
torch.cuda.get_arch_list = lambda: ["sm_70", "sm_80", "sm_90"]
torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation or CARD.capability >= (8, 0)
torch.cuda.mem_get_info = lambda device=None: (CARD.memory - CARD.tenants - torch.cuda.memory_reserved(), CARD.memory)
sys.modules["emulated"] = sys.modules[__name__]
