"""What people give by mistake, recognised, so that a refusal can say what to give instead."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from .files import BUILT_IN, built_in

LLAMA = "meta-llama/Llama-2-7b-hf"
FETCHED = {"weights/smollm2-135m": "smollm2-135m", "data/bc5cdr": "bc5cdr"}  # as the pages call them -> for `fetch`


def nearest(name: str, known: Iterable[str], place: Path = Path()) -> str:
    """The end of a refusal: which known name (in a place) is near an unknown one, if one is."""
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {place / found[0]}?" if found else ""


def nearest_path(path: str | Path) -> str:
    """As `nearest`, of a path that is not there: one that is, and whose parts are the same or near."""
    found = Path(Path(path).anchor)
    for part in Path(path).relative_to(found).parts:
        if not (found / part).exists():
            near = difflib.get_close_matches(part, (entry.name for entry in found.glob("*")), 1)
            if not near:
                return ""
            part = near[0]
        found /= part
    return f"; did you mean {found}?"


def download(name: str) -> str:
    """The command that fetches a model from the Hub, Llama-2-7B to where it is found without a flag."""
    if name != LLAMA:
        return f"hf download {name} --local-dir weights/{Path(name).name}"
    files = "--include config.json --include 'model*.safetensors*' --include tokenizer.model"
    return f"hf download {name} --local-dir weights/llama-2-7b {files} (its licence: weights/README.md)"


def wrong_folder(path: str | Path, wanted: str, otherwise: str) -> str:
    """Why a path is not the folder that was wanted: nothing is there, or something else.

    Args:
        wanted: `model folder`, `adapter folder`, `run folder` or `corpus folder`.
        otherwise: what to say where neither is so.
    """
    given, path = str(path), Path(path)
    if path.exists():
        there = _what_is(path)
        return f"{path}: no {wanted} but {there}" if there and wanted not in there else otherwise
    return f"{path}: no such {wanted}{_instead(given, path.as_posix(), wanted)}"


def _instead(given: str, name: str, wanted: str) -> str:
    """What to give, or to do first, where no folder of that name is there."""
    if name in BUILT_IN:
        return f"; the built-in one is {built_in(name)}"
    if name in FETCHED:
        return f"; this brings it: python -m llamalora fetch {FETCHED[name]}"
    if name == "weights/llama-2-7b":
        return f"; this brings it: {download(LLAMA)}"
    if near := nearest_path(name):
        return near
    target = "weights/llama-2-7b" if name == LLAMA else f"weights/{Path(name).name}"
    if wanted not in ("model folder", "adapter folder") or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given):
        return ""
    if target in BUILT_IN:
        return f"; the built-in one is {built_in(target)}"
    if Path(target).exists():
        return f"; did you mean {target}?"
    return f"; nothing is fetched from the Hub here, so first: {download(name)}"


def file_instead(path: Path) -> str | None:
    """What a file that cannot be read is instead, if that is known, and what to do."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs"):
        return f"{path}: a Git LFS pointer, not the file itself, which `git lfs pull` or `hf download` brings"
    if re.match(rb"\s*<(!doctype )?html", start, re.IGNORECASE):
        return f"{path}: a web page, not the file itself; download it again (a gated one needs hf auth login)"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", start):
        return f"{path}: a tiktoken vocabulary, which is not read; the tokenizer.json of the same model is needed"
    return None


def is_run(folder: Path) -> bool:
    """Whether a run was started there."""
    return isinstance(_read(folder / "config.json").get("settings"), dict)


def _what_is(path: Path) -> str | None:
    """What is there, if it is something that this program reads or writes."""
    if not path.is_dir():
        return "a GGUF file; take the model's safetensors" if path.suffix == ".gguf" else "a file"
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
    if cached := sorted(path.glob("snapshots/*/*config.json")):
        return f"a folder of the Hub's cache; what it holds is in {cached[-1].parent}"
    if "params.json" in names and any(name.endswith(".pth") for name in names):
        return (
            "a Llama as Meta gives it; take its repository that ends in -hf from the Hub, or convert it with "
            "transformers' convert_llama_weights_to_hf.py"
        )
    if "config.json" not in names and any(name.endswith(".gguf") for name in names):
        return "a folder of GGUF files; take the model's safetensors"
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
