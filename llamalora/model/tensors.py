"""Tensors in safetensors files, read and written one by one, and those of which each process keeps some rows."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import RunError
from ..mistakes import file_instead
from .config import CheckpointError

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor name -> dtype and shape

# in the order in which the safetensors library lays tensors out: wide ones first
_NAMES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FLOATS = {name: dtype for dtype, name in _NAMES.items() if dtype.is_floating_point}


def _layout(entries: Entries) -> tuple[bytes, list[str]]:
    """The header of a safetensors file, byte by byte the library's, and the order of its tensors."""
    rank = {dtype: number for number, dtype in enumerate(_NAMES)}
    order = sorted(entries, key=lambda name: (rank[entries[name][0]], name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = entries[name]
        start, end = end, end + _bytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def file_bytes(entries: Entries) -> int:
    """The exact size in bytes of the safetensors file that would hold these tensors, header included."""
    return len(_layout(entries)[0]) + sum(_bytes(*entry) for entry in entries.values())


def write_tensors(path: Path, entries: Entries, tensor: Callable[[str], Tensor | Iterator[Tensor]]) -> None:
    """Writes a safetensors file, asking for one tensor after the other, so that one is in memory at a time.

    Args:
        entries: what the file will hold; dtypes are int64 and floating-point ones.
        tensor: name -> the tensor, of the dtype and shape in `entries`, or its rows, block by block.
    """
    header, order = _layout(entries)
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            dtype, shape = entries[name]
            content, missing = tensor(name), torch.Size(shape).numel()
            for block in [content] if isinstance(content, Tensor) else content:
                assert (block.dtype, block.shape[1:]) == (dtype, shape[1:]), name
                file.write(block.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
                missing -= block.numel()
            assert missing == 0, name


@contextmanager
def streamed(model: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Lets a model on the meta device compute on the CPU: each layer's parameters are read, as fp32, when
    it is called, and dropped when it is done. The next layer's take their place in memory, since the system needs
    longer to give fresh pages than a layer to compute with them.

    Args:
        read: parameter name -> its values.
    """
    handles = []
    layers = {name: dict(module.named_parameters(recurse=False)) for name, module in model.named_modules()}
    place = torch.empty(max(sum(shape.numel() for shape in shapes.values()) for shapes in layers.values()))

    def around(name: str, module: nn.Module, shapes: dict[str, nn.Parameter]) -> None:
        assert not any(module.children()), "its parameters would share their place with its children's"
        sizes = [shape.numel() for shape in shapes.values()]

        def fetch(*_) -> None:
            for (key, shape), values in zip(shapes.items(), place[: sum(sizes)].split(sizes), strict=True):
                values = values.view(shape.shape).copy_(read(f"{name}.{key}"))
                setattr(module, key, nn.Parameter(values, requires_grad=False))

        def drop(*_) -> None:
            for key, parameter in shapes.items():
                setattr(module, key, parameter)

        handles.extend([module.register_forward_pre_hook(fetch), module.register_forward_hook(drop)])

    for name, shapes in layers.items():
        if shapes:
            around(name, model.get_submodule(name), shapes)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- tensors of which each process keeps some rows ----


def is_sharded(tensor: Any) -> bool:
    """Whether each process keeps only some rows of the tensor (a DTensor, whose module takes a second to import)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All rows of a tensor. Those of a sharded one are gathered, so every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_rows(tensor: Any) -> Tensor:
    """The rows that this process keeps, which share their storage with the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def placed(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor as another one is kept: on its device, in its dtype, of a sharded one this process's rows."""
    if not is_sharded(like):
        return tensor.to(like.device, like.dtype)
    mesh = like.device_mesh
    rows = -(-len(tensor) // mesh.size())
    own = tensor[mesh.get_local_rank() * rows :][:rows].to(like.device, like.dtype, copy=True)
    return type(like).from_local(own, mesh, like.placements, shape=tensor.shape, stride=tensor.stride())


def tensor_entries(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape of every tensor in a safetensors file of weights, from its header alone.

    Raises:
        CheckpointError: missing, truncated or otherwise no safetensors file, or values that are no floating-point
            numbers of 16 bits or more (quantised weights mean nothing without the scales that belong to them).
    """
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
    for name, (dtype, _) in found.items():
        if dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {name} is stored as {dtype}; only {', '.join(_FLOATS)} are read")
    return {name: (_FLOATS[dtype], shape) for name, (dtype, shape) in found.items()}


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file; the file is mapped for this call only, so that it does not stay
    in memory beside the copies made of it."""
    with _open(path) as file:
        return file.get_tensor(name)


def finite(tensor: Tensor, path: Path, name: str) -> Tensor:
    """The tensor, read from that file under that name.

    Raises:
        CheckpointError: a value is not finite.
    """
    # the sum is found much faster, and is finite unless it overflows
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise CheckpointError(f"{path}: {name} holds NaN or infinity, as {tensor.dtype}")
    return tensor


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(file_instead(path) or f"{path}: damaged or missing ({error})") from None


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for (see `read_tensor`).

    Raises:
        CheckpointError: missing, truncated or otherwise no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        with _open(path) as file:
            self.names = frozenset(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return read_tensor(self.path, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file tensor by tensor: one at a time is copied from a GPU, or gathered.

    Sharded tensors are gathered from all processes, which must all call this; the first one writes.

    Raises:
        RunError: it cannot be written (a full disk, for one).
    """
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    only_gives = any(map(is_sharded, tensors.values())) and dist.get_rank() > 0
    try:
        write_tensors(
            Path(os.devnull) if only_gives else path, entries, lambda name: whole(tensors[name].detach()).cpu()
        )
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error})") from None
