"""Checks every file that a run has saved against the SHA-256 sums taken when it was
written, and that its results are its own."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

from ..cli import Parser, called
from ..evaluation.own import foreign, own_scoring
from ..evaluation.result import RESULT, find_changes, read_result
from ..model.config import CheckpointError
from ..runs.folder import RUN_CONFIG, read_settings, read_task
from ..runs.state import checkpoints_of, find_damage, find_leftovers


@dataclass(frozen=True)
class Folder:
    """A checkpoint or saved model: its size, and what is wrong with it, nothing if it is sound."""

    name: str
    files: int
    bytes: int
    damage: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a run has saved.

    Attributes:
        config: what is wrong with `config.json`; None if it is sound.
        results: name of each `eval-SPLIT.json` -> what is wrong with it or its answers, and how it is not the run's.
        leftovers: of an interrupted save, each with what --resume does about it.
        resume: the newest sound checkpoint, from which --resume goes on; None if there is none.
    """

    run: str
    config: str | None
    folders: tuple[Folder, ...]
    results: dict[str, tuple[str, ...]]
    leftovers: dict[str, str]
    resume: str | None

    @property
    def sound(self) -> bool:
        damage = [*(folder.damage for folder in self.folders), *self.results.values()]
        return self.config is None and not any(damage)


def main(argv: list[str]) -> None:
    parser = Parser(
        "verify",
        "RUN",
        description=__doc__,
        epilog="Exit code: 0 if all is sound, 1 if something is damaged, 2 if RUN is no run.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    arguments = parser.parse_args(argv)
    report = check_run(Path(arguments.run))
    print(json.dumps(asdict(report) | {"sound": report.sound}, indent=2) if arguments.json else show(report))
    sys.exit(not report.sound)


def check_run(folder: Path) -> Report:
    """
    Raises:
        CheckpointError: no such folder, or one that is no run.
    """
    saved = [*checkpoints_of(folder), *(folder / name for name in ("best", "last") if (folder / name).exists())]
    try:
        read_settings(folder)
        read_task(folder)
        config = None
    except CheckpointError as error:
        if not saved:
            raise
        config = str(error)
    folders = [_check(folder, path) for path in saved]
    sound = (item.name for item in folders if item.name.startswith("checkpoints/") and not item.damage)
    splits = [path.stem.removeprefix("eval-") for path in sorted(folder.glob(RESULT.format("*")))]
    # a result is about the best model: nothing can be said of it, nor is it written anew, while that is damaged
    comparable = config is None and not any(item.damage for item in folders if item.name == "best")
    results = {RESULT.format(split): _check_result(folder, split, comparable) for split in splits}
    leftovers = {path.relative_to(folder).as_posix(): _fate(path) for path in find_leftovers(folder)}
    return Report(str(folder), config, tuple(folders), results, leftovers, next(sound, None))


def _fate(path: Path) -> str:
    if path.suffix == ".old" and not path.with_suffix("").exists():
        return "the only copy, --resume puts it back"
    return "harmless, --resume clears it away"


def _check(folder: Path, saved: Path) -> Folder:
    sizes = [path.stat().st_size for path in saved.rglob("*") if path.is_file()]
    return Folder(saved.relative_to(folder).as_posix(), len(sizes), sum(sizes), tuple(find_damage(saved)))


def _check_result(run: Path, split: str, comparable: bool) -> tuple[str, ...]:
    found = find_changes(run, split)
    if comparable and not found:
        found = [f"not the run's own result: {how}" for how in foreign(read_result(run, split), run, split)]
    if comparable and found:
        own = own_scoring(run, split)
        limit = "" if own["limit"] is None else f" --limit {own['limit']}"
        flags = f"--run {quote(str(run))} --split {split}{limit} --precision {own['precision']}"
        found.append(f"{called('eval')} {flags} writes it anew")
    return tuple(found)


def show(report: Report) -> str:
    lines = [f"{report.run}: {RUN_CONFIG} {'DAMAGED' if report.config else 'sound'}"]
    lines += [f"  {report.config}"] if report.config else []
    for item in report.folders:
        state = "DAMAGED" if item.damage else "sound"
        lines.append(f"{item.name:<24} {state:<8} {item.files} files, {item.bytes / 2**20:.1f} MiB")
        lines += [f"  {problem}" for problem in item.damage]
    for name, damage in report.results.items():
        lines.append(f"{name:<24} {'DAMAGED' if damage else 'sound'}")
        lines += [f"  {problem}" for problem in damage]
    for name, fate in report.leftovers.items():
        lines.append(f"{name:<24} left by an interrupted save; {fate}")
    damaged = sum(bool(item.damage) for item in report.folders)
    lines.append("")
    if report.config:
        lines.append(f"without a sound {RUN_CONFIG} the run cannot be used: restore it from a copy")
    elif damaged:
        lines.append(f"{damaged} of {len(report.folders)} saved folders {'is' if damaged == 1 else 'are'} damaged")
    elif report.folders:
        lines.append(f"all {len(report.folders)} saved folders are sound")
    else:
        lines.append("nothing has been saved yet")
    if wrong := [name for name, damage in report.results.items() if damage]:
        lines.append(f"not as the run itself wrote it: {', '.join(wrong)}")
    broken = {item.name: bool(item.damage) for item in report.folders}
    if broken.get("best") and not report.config:
        last = f"{called('eval')} --run {quote(report.run)} --which last"
        other = "" if broken.get("last", True) else f"; {last} scores the last model, which is sound"
        lines.append(f"restore best from a copy{other}")
    if report.resume and not report.config:
        again = f"{called('train')} --resume {quote(str(report.run))}"
        lines.append(f"{again} goes on from {report.resume}, if the run has not ended there")
    elif not report.resume and any(item.name.startswith("checkpoints/") for item in report.folders):
        lines.append("no checkpoint is sound: the run cannot be resumed, start it again in another folder")
    return "\n".join(lines)
