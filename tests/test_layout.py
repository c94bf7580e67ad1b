"""The files as a map of the project: who may import whom, how long a file may grow, what is no dependency."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llamalora"

# the way of the data: a module imports from lines above its own only
LAYERS = [
    {"errors", "text_table", "stream", "precision"},
    {"cli"},
    {"align", "corpus", "tokenizer", "packing", "distributed", "spectrum", "paper", "dora", "files"},
    {"ner", "score", "attention", "lora"},
    {"model"},
    {"checkpoint", "batch", "decode", "draft", "constrain"},
    {"peft_format", "runstate", "sharding"},
    {"training", "evaluate"},
    {"adapter", "analysis", "memory"},
    {"run", "fetch", "report", "counts", "stats"},
    {"placement", "hardware", "costs"},
    {"job", "systems", "inspect_adapter", "audit", "merging", "verify"},
    {"steplog", "predict"},
    {"loop"},
    {"experiments"},
    {"findings", "figures"},
    {"tables"},
    {"__main__", "__init__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
TEXT_ONLY = ("corpus", "align", "ner", "score", "tokenizer")  # the task's definition can be reviewed without torch
TOP = ("train", "eval")


def sources() -> dict[str, Path]:
    return {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; the package's own as `.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path}: the package has no folders"
            found |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = node.module == "llamalora"
            found |= {f".{alias.name}" for alias in node.names} if whole else {node.module}
    return {f".{name.split('.')[1]}" if name.startswith("llamalora.") else name for name in found}


def own(path: Path) -> set[str]:
    return {name[1:] for name in imports(path) if name.startswith(".")}


def reached(module: str) -> set[str]:
    """A module and all of the package that it imports, directly or not."""
    seen, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= own(sources()[name]) - seen
    return seen


def test_the_parser_of_this_file_sees_imports():
    """All forms: absolute, relative by module and by package, inside a function."""
    assert {"torch", ".model"} <= imports(PACKAGE / "decode.py")
    assert {".ner", ".tokenizer"} <= imports(PACKAGE / "batch.py")
    assert {"sentencepiece", "tokenizers"} <= imports(PACKAGE / "tokenizer.py")
    assert {".run", ".loop"} <= imports(ROOT / "train.py")


def test_every_module_has_its_layer():
    assert sorted(sources().keys() - LEVEL.keys()) == [], "these modules have no layer in LAYERS"
    assert sorted(LEVEL.keys() - sources().keys()) == [], "these are in LAYERS, but not in the package"


@pytest.mark.parametrize("module", sorted(LEVEL.keys() & sources().keys()))
def test_imports_follow_the_way_of_the_data(module):
    for name in own(sources()[module]) & LEVEL.keys():
        assert LEVEL[name] < LEVEL[module], f"{module} imports {name}, which is not below it"


def test_no_two_modules_import_each_other():
    for module in sources():
        for name in own(sources()[module]):
            assert module not in reached(name), f"{module} and {name} import each other"


def test_model_knows_nothing_of_lora():
    assert "lora" not in reached("model")
    assert "lora" not in (PACKAGE / "model.py").read_text().lower().replace("knows nothing of lora", "")


@pytest.mark.parametrize("module", TEXT_ONLY)
def test_the_definition_of_the_task_needs_no_torch(module):
    for name in reached(module):
        roots = {found.split(".")[0] for found in imports(sources()[name])}
        assert not roots & {"torch", "safetensors"}, f"{module} needs {name}, which imports torch"


@pytest.mark.parametrize("path", [*sources().values(), *(ROOT / f"{name}.py" for name in TOP)], ids=lambda p: p.name)
def test_oracles_are_for_tests_only(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"transformers", "peft", "accelerate", "datasets", "pickle", "tests", "helpers"}


def test_nothing_in_the_package_imports_the_scripts():
    for path in sources().values():
        assert not imports(path) & set(TOP), path


def test_no_file_is_longer_than_600_lines():
    files = [path for place in (PACKAGE, ROOT, ROOT / "tests", ROOT / "weights") for path in place.glob("*.py")]
    assert len(files) > 20
    assert {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 600} == {}
