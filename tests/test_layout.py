"""The rooms of the package: who may import whom, how long a file may grow, what is no dependency."""

import ast
import graphlib
import tomllib
from functools import cache
from pathlib import Path

import pytest

import llamalora
from llamalora import api
from llamalora.files import BUILT_IN

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llamalora"

# room -> the rooms that it may import, and what these may; every room may import the files at the top of the package
ARROWS = {
    "corpus": set(),
    "task": {"corpus"},
    "model": set(),
    "lora": {"model"},
    "inspection": {"lora"},
    "distributed": {"lora"},
    "runs": {"distributed", "task"},
    "evaluation": {"runs"},
    "training": {"evaluation"},
    "paper": {"training"},
    "commands": {"paper", "inspection"},
}
# the public names and the commands: they may import every room, and no room them
FACES = ("__init__", "__main__", "api")
TEXT_ONLY = ("corpus", "task")  # the definition of the task can be reviewed without torch
ORACLES = {"transformers", "peft", "accelerate", "datasets", "ctranslate2", "pickle", "tests", "helpers"}
LONGEST = 320  # lines of a package file
SCRIPTS = ("train", "eval")

FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(path: Path) -> frozenset[str]:
    """All that a file imports, anywhere in it: of the package `room/file`, of other packages their dotted names."""
    here = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            parts = (*base, *(node.module.split(".") if node.module else ()))
            whole = "/".join(parts[1:])
            if parts[0] != "llamalora":
                found.add(".".join(parts))
            elif whole in FILES and not (PACKAGE / whole).is_dir():
                found.add(whole)
            else:  # `from .room import file`, or a public name of the package
                inside = ("/".join((*parts[1:], alias.name)) for alias in node.names)
                found |= {name if name in FILES else "__init__" for name in inside}
    return frozenset(found)


def own(name: str) -> set[str]:
    """The package files that a package file imports."""
    return set(imports(FILES[name])) & FILES.keys()


def room_of(name: str) -> str | None:
    return name.split("/")[0] if "/" in name else None


def below(room: str) -> set[str]:
    """The rooms that a room may import, directly or by way of another."""
    return ARROWS[room].union(*map(below, ARROWS[room]))


def test_the_parser_of_this_file_sees_imports():
    """All forms: absolute, relative to room and package, of a module, inside a function."""
    assert {"torch", "model/llama"} <= imports(FILES["evaluation/generate"])
    assert {"task/prompt", "task/tokenizer"} <= imports(FILES["training/batch"])
    assert {"sentencepiece", "tokenizers"} <= imports(FILES["task/tokenizer"])
    assert {"lora/inject", "model/llama"} <= imports(FILES["api"])
    assert {"runs/settings", "training/loop", "cli"} <= imports(FILES["commands/train"])
    assert {"commands/train", "cli"} <= imports(ROOT / "train.py")


def test_the_public_names_are_those_of_the_api():
    namespace: dict = {}
    exec("from llamalora import *", namespace)
    assert {name: getattr(api, name) for name in api.__all__} == {name: namespace[name] for name in api.__all__}
    assert set(api.__all__) < set(dir(llamalora))
    with pytest.raises(AttributeError, match="'llamalora' has no attribute 'fit'"):
        _ = llamalora.fit


def test_every_room_has_its_arrows():
    assert {room_of(name) for name in FILES} - {None} == ARROWS.keys()
    assert tuple(graphlib.TopologicalSorter(ARROWS).static_order())  # raises where they run in a circle


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_arrows(name):
    room = room_of(name)
    for other in own(name):
        if name in FACES:
            continue
        assert other not in FACES, f"{name} imports {other}"
        if room_of(other) is not None and room_of(other) != room:
            assert room is not None, f"{name} stands at the top and imports {other} out of a room"
            assert room_of(other) in below(room), f"{name} imports {other}: no arrow leads from {room} there"


def test_every_room_is_in_the_wheel():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert set(packages) == {"llamalora", *(f"llamalora.{name.replace('/', '.')}" for name in (*ARROWS, *BUILT_IN))}


def test_no_files_import_each_other_around_a_circle():
    tuple(graphlib.TopologicalSorter({name: own(name) for name in FILES}).static_order())


@pytest.mark.parametrize("room", TEXT_ONLY)
def test_the_definition_of_the_task_needs_no_torch(room):
    for name in (name for name in FILES if room_of(name) == room):
        roots = {found.split(".")[0] for found in imports(FILES[name])}
        assert not roots & {"torch", "safetensors"}, f"{name} imports torch"


def test_to_convert_a_corpus_needs_no_torch():
    reached = {"commands/convert"}
    while new := {other for name in reached for other in own(name)} - reached:
        reached |= new
    assert "corpus/read" in reached
    assert not {name for name in reached if "torch" in {found.split(".")[0] for found in imports(FILES[name])}}


def test_the_model_knows_nothing_of_lora():
    for name in (name for name in FILES if room_of(name) == "model"):
        text = FILES[name].read_text(encoding="utf-8").lower().replace("knows nothing of lora", "")
        assert "lora" not in text.replace("llamalora", ""), f"{name} mentions LoRA"


@pytest.mark.parametrize("path", [*FILES.values(), *(ROOT / f"{name}.py" for name in SCRIPTS)], ids=lambda p: p.stem)
def test_oracles_are_for_tests_and_the_scripts_for_users(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & ORACLES
    assert not roots & set(SCRIPTS) or path.parent == ROOT


def test_no_file_is_too_long():
    def longer_than(most: int, paths) -> dict[str, int]:
        lines = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in paths}
        return {name: count for name, count in lines.items() if count > most}

    assert longer_than(LONGEST, FILES.values()) == {}
    assert longer_than(600, [*ROOT.glob("tests/**/*.py"), *ROOT.glob("*/*.py")]) == {}
