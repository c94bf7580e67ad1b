"""Imported before torch, this gives it an emulated CUDA device: the library LLAMALORA_EMULATED, built of device.cpp.

`pytest -p emulated` does so; the tests in inside/ run in such a process. The card is
a V100 of 16 GB unless `CARD` is changed.
"""

import ctypes
import os
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace

assert "torch" not in sys.modules, "emulated must be imported before torch"
_library = ctypes.CDLL(os.environ["LLAMALORA_EMULATED"], mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402

for _name in ("held", "peak", "operations", "waits"):
    getattr(_library, f"emu_{_name}").restype = ctypes.c_long
_library.emu_names.restype = ctypes.c_char_p
_library.emu_set_limit.argtypes = [ctypes.c_long]


@dataclass
class Card:
    """
    Attributes:
        memory: bytes that it reports.
        tenants: bytes that other programs hold.
        fraction: of the memory that torch may take.
    """

    name: str = "Emulated V100"
    memory: int = int(15.77 * 2**30)
    capability: tuple[int, int] = (7, 0)
    tenants: int = 0
    fraction: float = 1.0


CARD = Card()


def held() -> int:
    """Bytes of the tensors that there are."""
    return _library.emu_held()


def peak() -> int:
    """The most that they have been."""
    return _library.emu_peak()


def _counted() -> Counter[str]:
    lines = _library.emu_names().decode().splitlines()
    by_name = {name: int(times) for name, times in (line.split("\t") for line in lines)}
    return Counter({"operations": _library.emu_operations(), "waits": _library.emu_waits()} | by_name)


_instead: Counter[str] = Counter()  # what `as_one` adds to the library's counts


def counts() -> dict[str, int]:
    """How often each operation ran since `clear`; `operations` and `waits`, for which the host stopped, of all."""
    found = _counted()
    found.update(_instead)
    return dict(found)


def clear() -> None:
    _library.emu_clear()
    _instead.clear()


def as_one(work, name: str | None = None):
    """What does the work, and counts it as one operation, as a compiled formula or a graph is."""

    def run(*arguments):
        before = _counted()
        result = work(*arguments)
        after = _counted()
        after.subtract(before)
        _instead.subtract(after)
        _instead.update(("operations", name or work.__name__))
        return result

    return run


def limit(size: int | None) -> None:
    """From now on no more than so many bytes can be held; None: any number."""
    _library.emu_set_limit(sys.maxsize if size is None else size)


# ---- what torch.cuda says ----


def _set_device(device) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    if index is not None:
        _library.emu_set_device(index)


def _exchange_device(index: int) -> int:
    before = _library.emu_device()
    if index >= 0:
        _library.emu_set_device(index)
    return before


def _properties(device=None) -> SimpleNamespace:
    major, minor = CARD.capability
    return SimpleNamespace(name=CARD.name, total_memory=CARD.memory, major=major, minor=minor, uuid="emulated")


_FACTS = {
    "_initialized": True,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 8,
    "current_device": lambda: _library.emu_device(),
    "set_device": _set_device,
    "_exchange_device": _exchange_device,
    "_maybe_exchange_device": _exchange_device,
    "get_device_name": lambda device=None: CARD.name,
    "get_device_capability": lambda device=None: CARD.capability,
    "get_device_properties": _properties,
    "get_arch_list": lambda: ["sm_70", "sm_80", "sm_90"],
    "is_bf16_supported": lambda including_emulation=True: including_emulation or CARD.capability >= (8, 0),
    "mem_get_info": lambda device=None: (CARD.memory - CARD.tenants - held(), CARD.memory),
    "get_per_process_memory_fraction": lambda device=None: CARD.fraction,
    "set_per_process_memory_fraction": lambda fraction, device=None: setattr(CARD, "fraction", fraction),
    "memory_allocated": lambda device=None: held(),
    "memory_reserved": lambda device=None: held(),
    "max_memory_allocated": lambda device=None: peak(),
    "max_memory_reserved": lambda device=None: peak(),
    "reset_peak_memory_stats": lambda device=None: _library.emu_reset_peak(),
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "manual_seed": lambda seed: None,  # the device draws from the CPU's generator
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
}
for _name, _fact in _FACTS.items():
    setattr(torch.cuda, _name, _fact)
import torch.cuda.amp.common  # noqa: E402

torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.backends.cuda.is_flash_attention_available = lambda: True
# they are the CPU's, which no capture leaves as they were in it
torch.cuda.default_generators = [SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)] * 8


# ---- graphs: what is launched while one is captured is run again with the same tensors ----

import weakref  # noqa: E402

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

REFUSED = "CUDA error: operation not permitted when stream is capturing"
_graphs: "weakref.WeakSet[CUDAGraph]" = weakref.WeakSet()
_pools, _used = count(1), set()


class Stream:
    """Its work is done at once, as that of all of them."""

    def __init__(self, device: "torch.device | str | int | None" = None):
        self.device = torch.device("cuda", _library.emu_device()) if device is None else torch.device(device)


_current: dict[int, Stream] = {}


def current_stream(device: "torch.device | None" = None) -> Stream:
    index = _library.emu_device() if device is None or device.index is None else device.index
    return _current.setdefault(index, Stream(torch.device("cuda", index)))


def set_stream(stream: Stream) -> None:
    _current[stream.device.index] = stream


class CUDAGraph:
    def __init__(self):
        self.calls, self.number = [], None

    def replay(self) -> None:
        as_one(self._run, "graph")()

    def _run(self) -> None:
        for function, arguments, named, made in self.calls:
            again = function(*arguments, **named)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # a graph's results stand where they stood


class _Capture(TorchDispatchMode):
    """What `torch.cuda.graph` does. CUDA computes nothing while it captures: in the end results are spoiled, and what
    was there before is as it was. What goes on on another GPU than the stream's is not captured.

    Raises:
        RuntimeError: the host waits for the device, or gives it something that it would not give it again; a pool
            whose graphs are gone.
    """

    def __init__(self, graph: CUDAGraph, pool=None, stream: "Stream | None" = None, capture_error_mode: str = "global"):
        super().__init__()
        if pool is not None and pool[1] in _used - {other.number for other in _graphs}:
            raise RuntimeError("INTERNAL ASSERT FAILED: use_count > 0")
        self.graph, self.device = graph, (stream or _default).device
        self.capture_stream, self.before = stream or _default, current_stream((stream or _default).device)
        graph.number = next(_pools) if pool is None else pool[1]
        _used.add(graph.number)
        _graphs.add(graph)
        self.fresh = []
        self.written = []  # tensors, each with what it held before an operation wrote to it

    def __enter__(self):
        set_stream(self.capture_stream)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        set_stream(self.before)
        as_one(lambda: [tensor.copy_(held) for tensor, held in reversed(self.written)], "capture")()
        spoil = [tensor for tensor in self.fresh if tensor.is_floating_point()]
        as_one(lambda: [tensor.fill_(torch.nan) for tensor in spoil], "capture")()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        schema = function._schema.arguments
        places = [argument.name for argument in schema if argument.alias_info and argument.alias_info.is_write]
        known = dict(zip((argument.name for argument in schema), arguments, strict=False)) | named
        for tensor in (known[place] for place in places if isinstance(known.get(place), torch.Tensor)):
            self.written.append((tensor, as_one(tensor.cpu, "capture")()))
        before = _counted()
        made = function(*arguments, **named)
        after = _counted()
        if after["waits"] > before["waits"] or after["copy_ to the device"] > before["copy_ to the device"]:
            raise RuntimeError(f"{REFUSED} ({function})")
        given, results = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            for tree in ((arguments, named), made)
        )
        if all(tensor.device == self.device for tensor in (*given, *results)):
            self.graph.calls.append((function, arguments, named, made))
            storages = {tensor.untyped_storage().data_ptr() for tensor in given}
            self.fresh += [one for one in results if one.untyped_storage().data_ptr() not in storages]
        return made


_default = Stream(torch.device("cuda", 0))  # torch's own, of the GPU that was current first
for _name, _replaced in (("CUDAGraph", CUDAGraph), ("graph", _Capture), ("Stream", Stream),
                         ("graph_pool_handle", lambda: (0, next(_pools))),
                         ("current_stream", current_stream), ("set_stream", set_stream)):  # fmt: skip
    setattr(torch.cuda, _name, _replaced)
