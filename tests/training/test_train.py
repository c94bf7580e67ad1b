"""train.py as its users run it: the whole loop on the built-in checkpoint, cut short."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluate
import train
from llamalora.cli import run_command
from llamalora.lora.inject import trainable_parameters
from llamalora.runs.folder import read_settings
from llamalora.runs.settings import Settings
from llamalora.training import loop

pytestmark = pytest.mark.slow

HOME = Path(train.__file__).parent
SHORT = (
    "--model", "weights/tiny", "--data", "data/sample", "--limit-train", "24", "--epochs", "2", "--batch-tokens", "512",
    "--eval-limit", "3", "--save-every", "2", "--precision", "fp32",
)  # fmt: skip


def start(*flags, launcher=(), threads=1):
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *SHORT, *map(str, flags)],
        cwd=HOME,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_steps(process, run, count):
    for _ in range(3000):
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


def adapters_equal(one, other):
    a, b = (load_file(folder / "last" / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    code, output = finish(start("--out", run))
    assert code == 0, output
    return run, output


def test_first_lines_say_what_is_used(whole):
    run, output = whole
    for words in ("weights/tiny (requested)", "data/sample (requested)", "fp32 (requested)", str(run)):
        assert words in output
    shown = output[output.rindex("⟦") : output.rindex("⟧")]
    assert shown.endswith("<end>") and "Answer" not in shown


def test_first_lines_say_what_no_answer_holds(tmp_path):
    text = {"text": "Acute fever.", "entities": [[0, 11, "A"], [6, 11, "B"]]}
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(json.dumps(text) + "\n")
    for labels, said in (("A,B", True), ("B", False)):
        given = ("--data", tmp_path, "--labels", labels, "--out", tmp_path / labels, "--max-steps", 1)
        _, output = finish(start(*given))
        assert ("train: mentions that overlap a longer one, in no answer: 1" in output) == said


def test_metrics_have_a_line_a_step(whole):
    run, _ = whole
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert 0 < line["supervised_tokens"] < line["tokens"] <= 512
        assert line["padding"] < 0.05 and line["peak_memory_bytes"] > 0 and line["grad_norm"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_run_folder_is_complete(whole):
    run, _ = whole
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["seed"] == 0 and config["versions"]["torch"]
    assert None not in [config["settings"][name] for name in ("model", "data", "out", "epochs", "lr")]
    for name in ("best", "last"):
        assert (run / name / "adapter_config.json").is_file()
    result = json.loads((run / "eval-dev.json").read_text())
    assert result["sentences"] == 3 and set(result["micro"]) == {"tp", "fp", "fn", "precision", "recall", "f1"}


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path, number, code):
    run = tmp_path / "run"
    process = start("--out", run)
    wait_for_steps(process, run, 3)
    process.send_signal(number)
    assert finish(process)[0] == code
    assert len(metrics(run)) < len(metrics(whole[0]))
    code, output = finish(start("--out", run, "--resume"))
    assert code == 0 and "resuming after step" in output
    assert adapters_equal(run, whole[0])
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(whole[0])]


def test_four_processes_learn_what_one_learns(tmp_path):
    flags = ("--targets", "all", "--rank", "128", "--epochs", "1")
    one, four = tmp_path / "one", tmp_path / "four"
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "4", "--master_port", "0", "--rdzv_backend", "c10d",
                "--rdzv_endpoint", "localhost:0")  # fmt: skip
    for run, how in ((one, ()), (four, launcher)):
        code, output = finish(start("--out", run, *flags, launcher=how))
        assert code == 0, output
    a, b = (load_file(run / "last" / "adapter_model.safetensors") for run in (one, four))
    assert metrics(one)[-1]["loss"] == pytest.approx(metrics(four)[-1]["loss"], rel=1e-4)
    for key in a:
        # Where an entry's gradient is nearly zero, Adam makes a full step of its rounding error: 1 in 5,000 may be so.
        off = (a[key] - b[key]).abs().flatten().sort().values
        assert off.norm() < 5e-3 * a[key].norm(), key
        assert off[: -1 - len(off) // 5000].norm() < 1e-4 * a[key].norm(), key


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_on_the_cpu(tmp_path, precision):
    run_command(train.main, [*SHORT, "--out", str(tmp_path / "run"), "--precision", precision])
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_full_fine_tuning_with_checkpointing_equals_without(tmp_path):
    for name, extra in (("plain", ()), ("recomputed", ("--activation-checkpointing", "--micro-tokens", "200"))):
        run_command(train.main, [*SHORT, "--epochs", "1", "--method", "full", "--out", str(tmp_path / name), *extra])
    plain, other = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("plain", "recomputed"))
    for key, tensor in plain.items():
        assert (tensor - other[key]).abs().max() < 1e-4, key


def test_dora_with_loraplus_resumed_and_scored(tmp_path, capsys):
    """Two variants of LoRA at once: resumed equals uninterrupted, and the adapter that is saved scores as it did."""
    flags = ("--dora", "--loraplus", "4", "--dropout", "0.1", "--targets", "q,down,embed,head")
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, output = finish(start("--out", whole, *flags))
    assert code == 0 and "DoRA of rank 8 on q,down,embed,head" in output, output
    process = start("--out", run, *flags)
    wait_for_steps(process, run, 3)
    process.kill()
    process.wait()
    assert finish(start("--out", run, "--resume"))[0] == 0
    assert adapters_equal(run, whole)
    then = json.loads((whole / "eval-dev.json").read_text())
    run_command(evaluate.main, ["--run", str(whole), "--limit", "3", "--precision", "fp32", "--json"])
    assert json.loads(capsys.readouterr().out)["micro"] == then["micro"]


def test_partial_fine_tuning_changes_the_target_layers_alone(tmp_path, capsys):
    """Interrupted, continued and scored like any run; what it saves is a whole model."""
    flags = ("--method", "partial", "--targets", "q,embed")
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, output = finish(start("--out", whole, *flags))
    assert code == 0 and "the weights of q,embed (embed and head are one matrix)" in output, output
    process = start("--out", run, *flags)
    wait_for_steps(process, run, 3)
    process.terminate()
    assert finish(process)[0] == 128 + signal.SIGTERM
    assert finish(start("--out", run, "--resume"))[0] == 0
    base, best, last, other = (
        load_file(folder / "model.safetensors")
        for folder in (HOME / "weights/tiny", whole / "best", whole / "last", run / "last")
    )
    assert base.keys() == best.keys() == last.keys() == other.keys()
    changed = {name for name, tensor in base.items() if not tensor.float().equal(last[name].float())}
    assert changed == {name for name in base if "q_proj" in name or "embed_tokens" in name}
    assert all(last[name].equal(other[name]) for name in last)
    assert read_settings(whole).lr == pytest.approx(0.12 / 256, rel=1e-2)

    then = json.loads((whole / "eval-dev.json").read_text())
    run_command(evaluate.main, ["--run", str(whole), "--limit", "3", "--precision", "fp32", "--json"])
    assert json.loads(capsys.readouterr().out)["micro"] == then["micro"]


def refused(capsys, *flags):
    """The message on standard error of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(train.main, [*SHORT, *map(str, flags)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_bad_flags_are_refused(capsys, tmp_path):
    out = tmp_path / "run"
    for flags, words in {
        ("--model", tmp_path / "absent"): ("absent", "no such model folder"),
        ("--targets", "q,zz"): ("zz", "--targets"),
        ("--rank", "0"): ("--rank", "at least 1"),
        ("--data", tmp_path): (str(tmp_path), "train"),
        ("--labels", "Gene"): ("Gene", "Disease, Chemical"),
        ("--labels", "disease"): ("did you mean Disease?",),
        ("--labels", "Chemical,Chemical"): ("--labels Chemical,Chemical: name each label once",),
        ("--lr", "nan"): ("--lr",),
        ("--loraplus", "0.5"): ("--loraplus", "at least 1"),
        ("--loraplus", "4", "--method", "full"): ("--loraplus", "--method is full"),
        ("--dora", "--method", "partial"): ("--dora", "--method is partial"),
        ("--rank", "8", "--alpha", "8", "--method", "full"): ("--rank, --alpha", "no effect with --method full"),
        ("--targets", "all", "--method", "full"): ("--targets: no effect with --method full",),
        ("--dropout", "0.1", "--loraplus", "4", "--targets", "embed_tokens"): ("--dropout, --loraplus: no effect on",),
        ("--batch-sentences", "4"): ("--batch-tokens: no effect with --batch-sentences",),  # which is in SHORT
        ("--alpha", "0"): ("--alpha is 0.0",),
        ("--alpha", "-1"): ("--alpha is -1.0",),
        ("--alpha", "nan"): ("--alpha is nan",),
        ("--shots", "9999"): ("--shots is 9999", "417 sentences"),
        ("--seed", "99999999999999999999"): ("--seed",),
        ("--epochs", "1000000000"): ("--epochs is 1000000000",),
        ("--rank", "eight"): ("error: --rank: 'eight' is not a whole number",),
        ("--lr", "fast"): ("error: --lr: 'fast' is not a number",),
        ("--micro-tokens", "some"): ("error: --micro-tokens: 'some' is not a whole number",),
        ("--rnak", "8"): ("error: --rnak: no such flag; did you mean --rank?",),
        ("weights/tiny",): ("'weights/tiny' is one argument too many",),
        ("--resume",): ("--resume",),
        ("--resume", tmp_path / "none"): ("none",),
    }.items():
        message = refused(capsys, *flags, *(() if "--resume" in flags else ("--out", out)))
        assert all(word in message for word in words), message
        assert not out.exists()


def test_a_resumed_run_does_not_say_that_its_defaults_were_requested(capsys, whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    run_command(train.main, ["--resume", str(run), "--data", "data/sample"])
    said = capsys.readouterr().out
    for words in ("weights/tiny", "data/sample", "fp32"):
        assert f"{words} (as the run was started)" in said
    run_command(train.main, ["--resume", str(run), "--data", str(HOME / "data/sample")])
    assert f"data       {HOME / 'data/sample'} (requested)" in capsys.readouterr().out


def copy_tiny(folder, *left_out):
    folder.mkdir()
    for path in (HOME / "weights/tiny").iterdir():
        if path.name not in left_out:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_broken_model_folders_are_refused(capsys, tmp_path):
    model = copy_tiny(tmp_path / "untokenized", "tokenizer.model")
    assert "neither tokenizer.model nor tokenizer.json" in refused(capsys, "--model", model)
    model = copy_tiny(tmp_path / "cut")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert str(model / "model.safetensors") in refused(capsys, "--model", model)


def test_wrong_offset_is_refused_with_its_line(capsys, tmp_path):
    text = (HOME / "data/sample/train.PubTator.txt").read_text().splitlines()
    number = next(i for i, line in enumerate(text) if line.count("\t") > 3)
    fields = text[number].split("\t")
    text[number] = "\t".join([fields[0], str(int(fields[1]) + 1), *fields[2:]])
    (tmp_path / "train.PubTator.txt").write_text("\n".join(text))
    assert f"train.PubTator.txt:{number + 1}:" in refused(capsys, "--data", tmp_path)


def test_a_run_that_has_learnt_nothing_is_no_success(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "backward", lambda model, batch, *_: spoilt(model))
    flags = (*SHORT, "--targets", "q", "--out", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as ended:
        run_command(train.main, list(flags))
    steps = len(metrics(tmp_path / "run"))
    assert ended.value.code == 1
    assert f"error: none of the {steps} steps changed a parameter" in capsys.readouterr().err


def spoilt(model):
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    return torch.tensor(torch.nan, dtype=torch.float64)


def test_a_finished_run_is_not_overwritten(capsys, whole):
    before = (whole[0] / "metrics.jsonl").read_bytes()
    assert "--resume" in refused(capsys, "--out", whole[0])
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_resuming_as_another_run_is_refused(capsys, whole, tmp_path):
    run = whole[0]
    assert "--targets is q" in refused(capsys, "--out", run, "--resume", "--targets", "q")
    message = refused(capsys, "--resume", run, "--rank", "9")
    assert "--rank is 9" in message and "leave such flags out to go on, or start a new run" in message
    assert "--out: no effect with --resume RUN" in refused(capsys, "--resume", run, "--out", tmp_path / "elsewhere")
    other = copy_tiny(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert "base model" in refused(capsys, "--out", run, "--resume", "--model", other)


def test_a_flag_at_its_default_counts_when_resuming(capsys, tmp_path):
    out = tmp_path / "run"
    run_command(train.main, [*SHORT, "--epochs", "1", "--targets", "q", "--out", str(out)])
    assert "--targets is all" in refused(capsys, "--epochs", "1", "--resume", out, "--targets", "all")


def test_a_folder_that_cannot_be_had_is_refused_before_the_model_is_read(capsys, tmp_path, monkeypatch, whole):
    monkeypatch.setattr("llamalora.training.loop.build_model", None)  # a call would be a traceback
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, "--out", tmp_path / "file" / "run")
    assert "holds a run already" in refused(capsys, "--out", whole[0])
    (tmp_path / "data").mkdir()
    shutil.copy(HOME / "data/sample/train.PubTator.txt", tmp_path / "data")
    message = refused(capsys, "--out", tmp_path / "run", "--data", tmp_path / "data")
    assert "--eval-limit" in message and "no development split" in message


def test_targets_have_one_form():
    """By whatever names and in whatever order they are given: cells and resumed runs are compared by them."""
    nine = "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj,gate_proj,embed_tokens,lm_head"
    assert Settings(targets="v_proj,q_proj").targets == Settings(targets="v, q").targets == "q,v"
    assert Settings(targets=nine).targets == Settings(targets="q,all").targets == "all"


def test_rank_above_a_dimension_warns(tmp_path, capsys):
    out = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        run_command(train.main, [*SHORT, "--epochs", "1", "--rank", "300", "--targets", "k", "--out", str(out)])
    assert re.search("^the rank exceeds .*k_proj", capsys.readouterr().err, re.MULTILINE)
    assert read_settings(out).rank == 300
