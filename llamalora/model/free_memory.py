"""How much memory is free, on a GPU or on the host."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30
SHARE = 0.9  # of what is free, that is planned with: allocators waste some
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory(device: "torch.device") -> int:
    """Bytes that a process may still take on a device: of a GPU what the driver and torch's allocator have free, within
    the fraction that torch may take; of the host, which the processes of a run share evenly, what can be had without
    swapping, within the limits of the process's control groups. Where a system does not tell, nothing seems limited."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return max(0, min(free, allowed - reserved)) + reserved - torch.cuda.memory_allocated(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_available(), *_left_in_groups()) // processes


def _available() -> int:
    return 1024 * _fields(PROC / "meminfo").get("MemAvailable:", sys.maxsize // 1024)


def _left_in_groups() -> list[int]:
    """Bytes below the limit of each control group that the process is in, versions 1 and 2, those above it included.
    What files take there is given back when it is needed."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return [sys.maxsize]
    left = [sys.maxsize]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = (
            ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        root = GROUPS / controllers
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                held = _fields(folder / "memory.stat")
                files = held.get("inactive_file", 0) + held.get("active_file", 0)
                left.append(max(0, limit - max(0, used - files)))
    return left


def _number(path: Path) -> int | None:
    """A file's number; None where there is none, such as `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """Name -> number of a file with one of each on a line."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
