"""What people give by mistake, recognised, so that a refusal can say what to give instead."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from .files import BUILT_IN, built_in


def nearest(name: str, known: Iterable[str], place: Path = Path()) -> str:
    """The end of a refusal: which known name (in a place) is near an unknown one, if one is."""
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {place / found[0]}?" if found else ""


def wrong_folder(path: str | Path, wanted: str, otherwise: str) -> str:
    """Why a path is not the folder that was wanted: nothing is there, or something else.

    Args:
        wanted: `model folder`, `adapter folder`, `run folder` or `corpus folder`.
        otherwise: what to say where neither is so.
    """
    path = Path(path)
    if path.exists():
        there = _what_is(path)
        return f"{path}: no {wanted} but {there}" if there and wanted not in there else otherwise
    hint = nearest(path.name, (entry.name for entry in path.parent.glob("*")), path.parent)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists()
    if path.as_posix() in BUILT_IN:
        hint = f"; the built-in one is {built_in(path.as_posix())}"
    elif on_hub and wanted in ("model folder", "adapter folder"):
        hint = f"; nothing is fetched from the Hub here, so first: hf download {path} --local-dir weights/{path.name}"
    return f"{path}: no such {wanted}{hint}"


def is_run(folder: Path) -> bool:
    """Whether a run was started there."""
    return isinstance(_read(folder / "config.json").get("settings"), dict)


def _what_is(path: Path) -> str | None:
    """What is there, if it is something that this program reads or writes."""
    if not path.is_dir():
        return "a file"
    config = _read(path / "config.json")
    if is_run(path):
        base = config["settings"].get("model")
        return f"a training run; its base model is {base}, what it has learnt is in {path / 'best'}"
    home = next((f" in the run {parent}" for parent in path.parents if is_run(parent)), "")
    if (path / "adapter_config.json").is_file():
        base = _read(path / "adapter_config.json").get("base_model_name_or_path")
        return f"a PEFT adapter{home}; its base model is {base or 'not named'}"
    if {"model_type", "hidden_size"} & config.keys():
        return f"a model folder{home}, by its config.json"
    if home:
        return f"a folder{home}"
    endings = "pubtator|tsv|conllu?|iob2?|bio(es)?|bmes|txt|jsonl?|ndjson|xml|bioc"
    corpus_file = rf"(cdr_.*set|train|dev(el)?|valid(ation)?|test)\.({endings})"
    names = [entry.name.lower() for entry in path.iterdir()]
    if "config.json" not in names and any(re.match(corpus_file, name) for name in names):
        return "a corpus folder"
    return None


def _read(path: Path) -> dict:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
