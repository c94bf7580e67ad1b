"""The package as its users install it: a wheel, made from the source distribution, and used in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from llamalora.files import BUILT_IN

ROOT = Path(__file__).parents[1]
BUILD = """
import sys, tarfile
from os import chdir
from setuptools import build_meta

place = sys.argv[1]
source = build_meta.build_sdist(place)
tarfile.open(f"{place}/{source}").extractall(place, filter="data")
chdir(f"{place}/{source.removesuffix('.tar.gz')}")
build_meta.build_wheel(place)
"""
USE = """
from pathlib import Path

from llamalora.__main__ import main

main("train --limit-train 8 --epochs 1 --eval-limit 1 --precision fp32 --targets q --rank 1".split())
(run,) = Path("runs").iterdir()
main(["eval", "--run", str(run), "--split", "test", "--limit", "1", "--html", "errors.html"])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that holds what the wheel installs."""
    try:
        if int(version("setuptools").partition(".")[0]) < 77:
            pytest.skip("setuptools is older than pyproject.toml asks for")
    except PackageNotFoundError:
        pytest.skip("setuptools is not there")
    place = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("llamalora", *BUILT_IN):
        shutil.copytree(ROOT / name, place / "clone" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "clone")
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(place)], cwd=place / "clone", capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_wheel_carries_the_package_and_what_is_built_in_and_nothing_else(site):
    wanted = contents(ROOT / "llamalora")
    for name in BUILT_IN:
        wanted |= {f"{name}/{file}": content for file, content in contents(ROOT / name).items()}
    assert contents(site / "llamalora") == wanted
    (other,) = (path for path in site.iterdir() if path.name != "llamalora")
    assert "llamalora = llamalora.__main__:run" in (other / "entry_points.txt").read_text()


@pytest.mark.slow
def test_what_a_wheel_installs_trains_and_evaluates_in_an_empty_folder_and_writes_nowhere_else(site, tmp_path):
    before = contents(site)
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, missing in zip(BUILT_IN, ("weights/llama-2-7b", "data/bc5cdr"), strict=True):
        assert f"{site / 'llamalora' / name} (built in, since {missing} is not there)" in " ".join(done.stdout.split())
    assert "python -m llamalora eval --run runs/" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.html", "runs"]
    assert contents(site) == before
