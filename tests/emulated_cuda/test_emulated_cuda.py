"""What needs a CUDA device, on an emulated one: each file in inside/ is run by a pytest that has it (`emulated.py`)."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def library(request) -> Path:
    """The emulated device, built for the torch that is installed: once (in about 10 s), by the first who needs it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: neither CXX nor g++ is on the path")
    if sys.platform != "linux" or torch.version.cuda or torch.version.hip:
        pytest.skip("the device is emulated for a CPU build of torch on Linux")
    source, home = HERE / "device.cpp", Path(torch.__file__).parent
    key = hashlib.sha256(f"{home} {torch.__version__} {compiler}".encode() + source.read_bytes()).hexdigest()[:16]
    folder = request.config.cache.mkdir("emulated_cuda")
    built, partial = folder / f"{key}.so", folder / f"{key}.tmp"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one builds
        if not built.exists():
            include = home / "include"
            subprocess.run(
                [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{include}",
                 f"-I{include}/torch/csrc/api/include", str(source), "-o", str(partial), f"-L{home}/lib", "-lc10",
                 "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"],
                check=True,
            )  # fmt: skip
            partial.replace(built)
    return built


def pytest_inside(library: Path, *arguments: str) -> None:
    path = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "LLAMALORA_EMULATED": str(library), "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name in [name for name in environment if name.startswith(("PYTEST_", "CUDA_"))]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-p", "emulated", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted((HERE / "inside").glob("test_*.py")), ids=lambda file: file.stem)
def test_on_the_device(library, file):
    pytest_inside(library, str(file))


@pytest.mark.faults
def test_all_combinations_of_the_plan(library):
    pytest_inside(library, "-m", "faults", str(HERE / "inside"))
