"""Builds the emulated device for the torch that is installed, without importing it."""

import fcntl
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


class CannotBuild(Exception):
    """The reason is for people."""


def build(folder: Path) -> Path:
    """The library, which takes about 10 s to build, and is kept in `folder`.

    Raises:
        CannotBuild: there is no compiler, or torch is not built for CPUs.
        subprocess.CalledProcessError: device.cpp does not compile.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotBuild("no C++ compiler: neither CXX nor g++ is on the path")
    home, source = Path(find_spec("torch").origin).parent, Path(__file__).with_name("device.cpp")
    version = runpy.run_path(str(home / "version.py"))
    if sys.platform != "linux" or version["cuda"] or version["hip"]:
        raise CannotBuild("the device is emulated for a CPU build of torch on Linux")
    key = f"{home} {version['__version__']} {compiler}".encode() + source.read_bytes()
    built = folder / f"{hashlib.sha256(key).hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one builds
        if not built.exists():
            partial, include = built.with_suffix(".tmp"), home / "include"
            subprocess.run(
                [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{include}",
                 f"-I{include}/torch/csrc/api/include", str(source), "-o", str(partial), f"-L{home}/lib", "-lc10",
                 "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"],
                check=True,
            )  # fmt: skip
            partial.replace(built)
    return built
