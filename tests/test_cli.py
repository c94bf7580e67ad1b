"""The command line: which flags were given, and what is said to those who give the wrong thing."""

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from helpers import tiny_model

import llamalora
from llamalora import __version__
from llamalora.__main__ import MODULES, main
from llamalora.cli import Parser, UsageError, called, check_new_file, check_there, refuse_idle, run_command
from llamalora.corpus.read import find_splits
from llamalora.errors import InputError
from llamalora.lora.adapter import save_adapter
from llamalora.lora.inject import inject_lora
from llamalora.lora.peft_format import read_adapter
from llamalora.mistakes import LLAMA, download
from llamalora.model.checkpoint import read_config, save_model
from llamalora.runs.folder import read_settings, read_task, trained_folder
from llamalora.runs.settings import ResolvedSettings, Settings

ROOT = Path(__file__).parents[1]

# ---- flags ----


def parser() -> Parser:
    made = Parser()
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--alpha", type=float)
    made.add_argument("--run", action="append", default=[])
    made.add_argument("--resume", nargs="?", const="")
    made.add_argument("--json", action="store_true")
    made.add_argument("files", nargs="*", default=[])
    return made


@pytest.mark.parametrize("argv, given", [
    ([], set()),
    (["--rank", "8"], {"rank"}),  # at its default, and yet given
    (["--json", "--alpha", "0"], {"json", "alpha"}),
    (["--run", "a", "--run", "b", "--resume"], {"run", "resume"}),
])  # fmt: skip
def test_the_flags_that_were_given(argv, given):
    arguments = parser().parse_args(argv)
    plain = argparse.ArgumentParser(parents=[parser()], add_help=False).parse_args(argv)
    assert arguments.given - {"files"} == given
    assert {name: value for name, value in vars(arguments).items() if name != "given"} == vars(plain)


def test_flags_without_effect_are_named_and_only_those_that_were_given():
    arguments = parser().parse_args(["--rank", "8", "--json"])
    refuse_idle(arguments, {"rank json": False, "alpha run": "here"})
    with pytest.raises(UsageError, match="^--rank, --json: no effect here; leave it out$"):
        refuse_idle(arguments, {"alpha": "there", "rank alpha json": "here"})


@pytest.mark.parametrize("argv, message", [
    (["--rank", "eight"], "--rank: 'eight' is not a whole number"),
    (["--rank", "8.0"], "--rank: '8.0' is not a whole number"),
    (["--alpha", "much"], "--alpha: 'much' is not a number"),
    (["--rnak=8"], "--rnak: no such flag; did you mean --rank?"),
    (["-rank", "8"], "-rank: no such flag; did you mean --rank?"),
    (["--al", "1"], "--al: no such flag"),  # no abbreviations
    (["--rank"], "--rank: expected one argument"),
])  # fmt: skip
def test_what_is_wrong_with_a_flag(argv, message):
    with pytest.raises(UsageError) as caught:
        parser().parse_args(argv)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name, hint", [
    ("inspct", "did you mean inspect?"), ("table", "did you mean tables?"), ("trian", "did you mean train?"),
    ("evla", "did you mean eval?"), ("x", "choose from train, eval"),
])  # fmt: skip
def test_unknown_commands(name, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main, [name])
    assert ended.value.code == 2
    assert f"error: unknown command {name!r}; {hint}" in capsys.readouterr().err


def test_a_warning_of_ours_is_one_line_and_a_library_s_keeps_its_place(capsys):
    def warn(_):
        for file in (Path(llamalora.__file__).with_name("x.py"), Path("/lib/other.py")):
            warnings.warn_explicit("rows differ", UserWarning, str(file), 3, module="elsewhere")

    run_command(warn, [])
    assert capsys.readouterr().err == "rows differ\n/lib/other.py:3: UserWarning: rows differ\n"


def shown(capsys, *argv: str) -> str:
    """The help of a command, for a terminal of 80 columns."""
    with suppress(SystemExit):
        main([*argv, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return text


@pytest.mark.parametrize("name", MODULES)
def test_each_command_has_a_line_and_a_help_with_an_example(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert f"\n  {name} " in shown(capsys)
    text = shown(capsys, name)
    assert f"usage: {called(name)} " in text and f"for example:\n  {called(name)} " in text


def test_the_help_of_eval_says_how_torchrun_lets_its_flags_alone(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(shown(capsys, "eval").split())
    assert "torchrun --nproc_per_node 4 -m -- llamalora eval --run RUN" in text and "-- eval.py --run RUN" in text


def test_the_flags_of_train_and_tables_stand_in_the_same_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    groups = ("data", "task", "LoRA", "optimisation", "memory and machine", "evaluation and output")
    found = {}
    for name in ("train", "tables"):
        for part in shown(capsys, name).split("\n\n"):
            title, _, rest = part.partition(":\n")
            found |= {(name, flag): title for flag in re.findall(r"^  (--\S+)", rest, re.MULTILINE)}
    settings = {f"--{item.name.replace('_', '-')}" for item in fields(Settings)}
    assert {flag for name, flag in found if name == "train"} == {"--resume", "--quiet", *settings}
    assert dict.fromkeys(title for (name, flag), title in found.items() if name == "train") == dict.fromkeys(
        ("options", *groups)
    )
    for name, flag in found:
        if name == "tables" and flag in settings and flag not in ("--limit-eval", "--out"):
            assert found[name, flag] == found["train", flag] != "options"


@pytest.mark.parametrize("started, calls", [
    ("/venv/bin/llamalora", "llamalora train, llamalora eval, llamalora verify"),
    ("train.py", "python train.py, python eval.py, python -m llamalora verify"),
    ("../clone/eval.py", "python ../clone/train.py, python ../clone/eval.py, python -m llamalora verify"),
    ("/site/llamalora/__main__.py",
     "python -m llamalora train, python -m llamalora eval, python -m llamalora verify"),
])  # fmt: skip
def test_what_is_advised_can_be_typed(started, calls, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    assert ", ".join(map(called, ("train", "eval", "verify"))) == calls


def test_help_and_wrong_flags_do_not_wait_for_torch():
    script = """
import sys
from llamalora import __version__
from llamalora.__main__ import main
from llamalora.cli import UsageError

for argv in ("", "--version", "trian", "train --help", "train --rank x", "train --rank 0", "train --rnak 8"):
    try:
        main(argv.split())
    except (SystemExit, UsageError) as end:
        print(end)
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    said = (f"llamalora {__version__}\n", "did you mean train?", "'x' is not a whole", "--rank is 0", "mean --rank?")
    assert all(words in done.stdout for words in said)


# ---- folders ----

READERS = {
    "model": read_config,
    "adapter": read_adapter,
    "run": read_settings,
    "run's task": read_task,
    "run's best": lambda folder: trained_folder(folder, "best"),
    "corpus": find_splits,
}
PLACES = {  # what is there -> what is said about it
    "model": "a model folder, by its config.json",
    "run/best": "a PEFT adapter in the run PLACE/run; its base model is PLACE/model",
    "adapter": "a PEFT adapter; its base model is not named",
    "run": "a training run; its base model is PLACE/model, what it has learnt is in PLACE/run/best",
    "run/checkpoints": "a folder in the run PLACE/run",
    "corpus": "a corpus folder",
    "corpus/train.tsv": "a file",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of each kind."""
    place = tmp_path_factory.mktemp("place")
    model = inject_lora(tiny_model(), "q", 2)
    save_model(tiny_model(), place / "model")
    save_adapter(model, place / "adapter")
    save_adapter(model, place / "run/best", str(place / "model"))
    settings = ResolvedSettings(
        model=str(place / "model"), data=str(place / "corpus"), out="", lr=1e-3, batch_tokens=1024
    )
    (place / "run/config.json").write_text(json.dumps({"settings": asdict(settings)}))
    (place / "run/checkpoints").mkdir()
    (place / "corpus").mkdir()
    (place / "corpus/train.tsv").write_text("Fever\tB-Disease\n")
    (place / "empty").mkdir()
    return place


RIGHT = {("model", "model"), ("adapter", "adapter"), ("adapter", "run/best"), ("run", "run"), ("corpus", "corpus")}
WRONG = [(wanted, there) for wanted in READERS for there in PLACES if (wanted.partition("'")[0], there) not in RIGHT]


@pytest.mark.parametrize("wanted, there", WRONG)
def test_a_folder_of_another_kind_is_recognised(wanted, there, place):
    kind = wanted.partition("'")[0]
    with pytest.raises(InputError) as caught:
        READERS[wanted](place / there)
    said = PLACES[there].replace("PLACE", str(place))
    assert str(caught.value) == f"{place / there}: no {kind} folder but {said}"


@pytest.mark.parametrize("wanted", READERS)
def test_a_folder_that_is_missing_or_empty(wanted, place):
    kind = wanted.partition("'")[0]
    with pytest.raises(InputError) as caught:
        READERS[wanted](place / "modle")
    assert str(caught.value) == f"{place / 'modle'}: no such {kind} folder; did you mean {place / 'model'}?"
    with pytest.raises(InputError, match=r"no such file|no corpus file"):
        READERS[wanted](place / "empty")


@pytest.mark.parametrize("wanted", ["model", "adapter"])
def test_a_name_on_the_hub(wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="o/Mine-7b: no such .*hf download o/Mine-7b --local-dir weights/Mine-7b$"):
        READERS[wanted]("o/Mine-7b")
    with pytest.raises(InputError, match="--local-dir weights/llama-2-7b --include config.json --include 'model"):
        READERS[wanted]("meta-llama/Llama-2-7b-hf")


def test_the_files_of_llama_2_are_those_that_its_page_names():
    page = (ROOT / "weights/README.md").read_text(encoding="utf-8").replace("\\\n", "").replace('"', "'")
    assert " ".join(download(LLAMA).partition(" (")[0].split()) in " ".join(page.split())


@pytest.mark.parametrize("name", ["./o/mine", "../o/mine", "/o/mine", "o/tiny", "weigths/mine", "weigths/tiny"])
def test_a_path_is_no_name_on_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "weights/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such model folder") as caught:
        read_config(name)
    assert "Hub" not in str(caught.value)
    near = {
        "weigths/mine": "did you mean weights/mine?",
        "weigths/tiny": f"the built-in one is {ROOT / 'weights/tiny'}",
    }
    assert near.get(name, "") in str(caught.value)


@pytest.mark.parametrize(
    "name, command",
    [
        ("weights/llama-2-7b", "hf download meta-llama/Llama-2-7b-hf"),
        ("weights/smollm2-135m", "python -m llamalora fetch smollm2-135m"),
        ("data/bc5cdr", "python -m llamalora fetch bc5cdr"),
    ],
)
def test_what_these_pages_name_comes_with_the_command_that_brings_it(name, command, tmp_path, monkeypatch):
    (tmp_path / f"{name}-other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{name}: no such .* folder; this brings it: {command}"):
        (find_splits if name.startswith("data") else read_config)(name)


def test_a_file_to_read_that_is_missing(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/gold.txt").touch()
    check_there(str(tmp_path / "made/gold.txt"), str(tmp_path / "made"))
    with pytest.raises(UsageError, match=f"no such file or folder; did you mean {tmp_path / 'made/gold.txt'}\\?"):
        check_there(str(tmp_path / "maed/glod.txt"))
    with pytest.raises(UsageError, match="no such file or folder$"):
        check_there(str(tmp_path / "made/other"))


@pytest.mark.parametrize("name, reader", [("weights/tiny", read_config), ("data/sample", find_splits)])
def test_what_is_built_in_is_named_where_it_is_not(name, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{name}: no such .* folder; the built-in one is {ROOT / name}$"):
        reader(name)


@pytest.mark.parametrize(
    "ending, code",
    [("pass", 0), ("raise InputError('no')", 2), ("sys.exit('why')", 1), ("sys.exit(143)", 143), ("1 / 0", 1)],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_before_python_tears_itself_down(processes, ending, code):
    """Gloo's threads would abort it now and then. What was printed is not lost, nor the exit code."""
    script = f"""
import atexit, sys
from llamalora.cli import run_command
from llamalora.errors import InputError

def main(argv):
    atexit.register(print, "torn down")
    sys.stdout.write("printed")
    {ending}

run_command(main, [])
"""
    environment = os.environ | {"WORLD_SIZE": str(processes), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout == "printed" + ("torn down\n" if processes == 1 else "")
    assert ("ZeroDivisionError" in done.stderr) == (ending == "1 / 0") and ("why" in done.stderr) == ("why" in ending)


@pytest.mark.parametrize(
    "argv",
    [
        ["stats", "--data", ""],
        ["stats", "--data="],
        ["merge", "--run", "", "--out", "x"],
        ["verify", ""],
        ["tables", "6", "--out", ""],
    ],
)
def test_empty_values_are_refused(argv, tmp_path, monkeypatch, capsys):
    """An unset variable of the shell meant the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_command(main, argv)
    assert stop.value.code == 2 and "is empty" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_value_that_ends_with_an_equals_sign_is_not_empty():
    assert parser().parse_args(["--run=a="]).run == ["a="]


def test_pages_do_not_take_the_place_of_other_files(tmp_path):
    arguments = argparse.Namespace(html=str(tmp_path / "config.json"), predictions=None)
    with pytest.raises(UsageError, match="another kind of file"):
        check_new_file(arguments, "html", "predictions")
    for place in (tmp_path, tmp_path / "none" / "page.html"):
        with pytest.raises(UsageError, match="--html .*must be a file in a folder that is there"):
            check_new_file(argparse.Namespace(html=str(place)), "html")
    check_new_file(argparse.Namespace(html=str(tmp_path / "page.html")), "html")
