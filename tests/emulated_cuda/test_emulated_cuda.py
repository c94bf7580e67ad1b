"""What needs a CUDA device: each file in inside/ is run by a pytest that has one, emulated on the CPU (`emulated.py`)
or, where torch finds one, an actual one (`actual.py`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build import CannotBuild, build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def library(request) -> Path | None:
    """The emulated device, built once by the first worker that needs it; None where there is an actual one."""
    if torch.cuda.is_available():
        return None
    try:
        return build(request.config.cache.mkdir("emulated_cuda"))
    except CannotBuild as reason:
        if os.environ.get("EMULATED_CUDA") == "required":  # by .ci/run
            raise
        pytest.skip(str(reason))


def pytest_inside(library: Path | None, *arguments: str) -> None:
    path = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_") or library and name.startswith("CUDA_")]:
        del environment[name]
    if library:
        environment["LLAMALORA_EMULATED"] = str(library)
    plugin = "emulated" if library else "actual"
    command = [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted((HERE / "inside").glob("test_*.py")), ids=lambda file: file.stem)
def test_on_the_device(library, file):
    pytest_inside(library, str(file))


@pytest.mark.faults
def test_all_combinations_of_the_plan(library):
    pytest_inside(library, "-m", "faults", str(HERE / "inside"))
