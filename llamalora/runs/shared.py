"""What stands beside a saved model so that somebody else can use it: what it is asked, of which base it is, its
tokenizer."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ..cli import UsageError
from ..files import BUILT_IN, built_in, search_places
from ..lora.kinds import METHODS
from ..lora.peft_config import ADAPTER_CONFIG
from ..mistakes import download, is_run, wrong_folder
from ..model.config import CheckpointError, read_json
from ..task.definition import Task
from ..task.tokenizer import SentencePieceTokenizer
from .folder import RUN_CONFIG, TOKENIZER_FILES, fingerprint, read_settings, read_task
from .settings import ResolvedSettings, Settings
from .state import MANIFEST, find_differences

RECORD = "llamalora.json"
# of a machine or a folder, said by the task already, or of what is measured while a model learns
_LEFT_OUT = (*Settings.FREE, "model", "data", "format", "labels", "instruction", "shots", "eval_every", "eval_limit")
_HELD: dict[tuple[str, ...], type] = {
    ("base", "name"): str,
    ("base", "fingerprint"): str,
    ("data", "name"): str,
    ("data", "sentences"): int,
    ("trainable",): int,
    ("settings", "method"): str,
}


def base_name(folder: str | Path) -> str:
    """What a base model is called elsewhere, by the first of these that there is:

    - its name on the Hub, where the folder is of the Hub's cache (`models--OWNER--NAME/snapshots/...`);
    - its name on the Hub as `_name_or_path` of its `config.json` has it, where the folder is called like its beginning
      (a model that was made from that one keeps the field, but is another model);
    - the folder's name, behind `weights/` where it stands in a folder of that name.
    """
    folder = Path(folder).absolute()
    for part in folder.resolve().parts:
        if cached := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return "/".join(cached.groups())
    named = read_json(folder / "config.json").get("_name_or_path")
    if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        own = named.partition("/")[2]
        if folder.name and own.lower().startswith(folder.name.lower()):
            return named
    return f"weights/{folder.name}" if folder.parent.name == "weights" else folder.name


def on_hub(name: str) -> bool:
    """Whether a `base_name` is one on the Hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith("weights/")


def find_base(adapter: Path) -> Path:
    """The folder of an adapter's base model: that of the run it lies in, else one of that name here, in a `weights/`
    where models are looked for, or built in.

    Raises:
        UsageError: none of them is there.
        CheckpointError: no adapter is.
    """
    if not (adapter / ADAPTER_CONFIG).is_file():
        missing = f"{adapter / ADAPTER_CONFIG}: no such file"
        raise CheckpointError(wrong_folder(adapter, "adapter folder", missing))
    run = adapter.absolute().parent
    if is_run(run) and (base := Path(read_settings(run).model)).is_dir():
        return base
    name = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        named = f"{adapter / ADAPTER_CONFIG} names none"
        raise UsageError(f"--adapter needs the base model as well: --model FOLDER ({named})")
    for folder in _candidates(name):
        if (folder / "config.json").is_file():
            return folder
    fetch = f"; from the Hub: {download(name)}" if on_hub(name) else ""
    raise UsageError(f"--adapter {adapter}: its base model {name} is not here; give its folder with --model{fetch}")


def _candidates(name: str) -> Iterator[Path]:
    yield from (Path(name), *(place / name for place in search_places()))
    if name in BUILT_IN:
        yield built_in(name)
    for place in search_places():
        for config in sorted(place.glob("weights/*/config.json")):
            if base_name(config.parent) == name:
                yield config.parent


def verify_shared(folder: Path) -> None:
    """Checks the files that the manifest of a model saved here lists; others may have come with a download, and a
    manifest without our record is another program's.

    Raises:
        CheckpointError: those that are missing or damaged.
    """
    ours = (folder / RECORD).is_file() and (folder / MANIFEST).is_file()
    if ours and (found := find_differences(folder, read_json(folder / MANIFEST))):
        raise CheckpointError("\n  ".join([*found, f"if they were changed on purpose, remove {MANIFEST}"]))


def other_base(saved: str | Path, base: str | Path) -> str:
    """What there is to say if the weights of a base model are not those that a saved model was trained on; nothing if
    they are, where no record says which those were, or where there is no base."""
    trained_on = (read_record(saved) or {}).get("base", {}).get("fingerprint")
    if trained_on is None or not Path(base).is_dir() or trained_on == weights_fingerprint(Path(base)):
        return ""
    return (
        f"{base}: not the files of weights that {saved} was trained on; unless they hold the same numbers, it will "
        "answer otherwise"
    )


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """The files of a model's tokenizer, beside what was trained; with a configuration for transformers, which a
    sentencepiece model alone leaves to guess."""
    copied = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    for name in copied:
        (folder / name).write_bytes((Path(source) / name).read_bytes())
    if copied == ["tokenizer.model"]:
        config = SentencePieceTokenizer(folder / copied[0]).transformers_config
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def describe_model(settings: ResolvedSettings, task: Task, sentences: int, trainable: int) -> dict:
    """What `RECORD` holds of a trained model: nothing that is of this machine alone.

    Args:
        sentences: that it was trained on.
        trainable: parameters.
    """
    model = Path(settings.model)
    chosen = asdict(settings) | {"alpha": settings.rank if settings.alpha is None else settings.alpha}
    return {
        "task": asdict(task),
        "base": {"name": base_name(model), "fingerprint": weights_fingerprint(model)},
        "data": {"name": Path(settings.data).resolve().name, "sentences": sentences},
        "trainable": trainable,
        "settings": {name: value for name, value in chosen.items() if name not in (*_LEFT_OUT, *settings.idle)},
    }


def weights_fingerprint(folder: Path) -> str:
    """A hash of a model's weights, see `fingerprint`: other names or shards are other files."""
    return fingerprint(sorted(folder.glob("*.safetensors")))


def write_record(record: dict, folder: Path) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict | None:
    """What `write_record` wrote; None if nothing did.

    Raises:
        CheckpointError: it lacks something that `describe_model` puts there.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    for names, kind in _HELD.items():
        value: object = record
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind) or names[-1] == "method" and value not in METHODS:
            raise CheckpointError(f"{path}: is no record of this version, by its {'.'.join(names)}")
    return record


def recorded_task(folder: str | Path) -> Task | None:
    """What a saved model is asked, by what stands beside it, or by the run that it lies in; None if neither is there.

    Raises:
        CheckpointError: a record that is not this version's.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        run = folder.absolute().parent
        return read_task(run) if (run / RUN_CONFIG).is_file() and is_run(run) else None
    try:
        return Task.from_dict(record["task"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / RECORD}: holds no task ({error})") from None
