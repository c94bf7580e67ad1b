"""What results were made by: version and commit, day, machine."""

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..distributed.world import World


def origin(world: World) -> dict:
    """Ready for JSON. `version` is None where the package is not installed, and `commit`
    where it does not run from a clone; a commit ends in -dirty where the clone has changes."""
    clone, commit = Path(__file__).parents[2], None
    if (clone / ".git").exists():
        asked = ["git", "-C", str(clone), "describe", "--always", "--dirty"]
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None
    return {"version": _version(), "commit": commit, "date": str(date.today()), "machine": _machine(world)}


def _version() -> str | None:
    try:
        return version("llamalora")
    except PackageNotFoundError:  # it runs from a clone, uninstalled
        return None


def _machine(world: World) -> dict:
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor()
    return {"device": name, "processes": world.size, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
