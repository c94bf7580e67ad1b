"""eval.py, predict and score as their users run them, on runs of the built-in checkpoint."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from llamalora.__main__ import main as command
from llamalora.cli import run_command
from llamalora.corpus.documents import Sentence
from llamalora.corpus.read import read_documents
from llamalora.distributed.world import join_world
from llamalora.evaluation.answer import answer_sentences, confidences
from llamalora.evaluation.answered import select_sentences
from llamalora.evaluation.constrain import Constraint
from llamalora.evaluation.generate import generate
from llamalora.evaluation.result import read_answers, read_result
from llamalora.evaluation.systems import load_run
from llamalora.runs.folder import read_settings, read_task
from llamalora.runs.state import _seal
from llamalora.task.definition import Task
from llamalora.task.parse import parse
from llamalora.task.prompt import render_prompt
from llamalora.task.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

HOME = Path(train.__file__).parent
SIZE = ["--limit-train", "40", "--epochs", "1", "--eval-limit", "2"]
MODEL = ["--model", "weights/tiny", "--data", "data/sample"]
FLAGS = [*MODEL, *SIZE]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"all": [], "Disease": ["--labels", "Disease"], "Chemical": ["--labels", "Chemical"]}.items():
        run_command(train.main, [*FLAGS, *flags, "--out", str(folder / name)])
    return folder


def run_eval(capsys, *flags):
    run_command(evaluation.main, [*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def invented(result: dict) -> int:
    return result["health"]["not_in_source"]


def test_eval_agrees_with_score_on_its_own_predictions(runs, tmp_path, capsys):
    predictions = tmp_path / "predictions.PubTator"
    flags = ("--predictions", predictions, "--html", tmp_path / "page.html")
    result = run_eval(capsys, "--run", runs / "all", "--split", "test", *flags)
    assert "</html>" in (tmp_path / "page.html").read_text()
    assert result["errors"]["schemes"]["strict"]["micro"]["f1"] == result["micro"]["f1"]
    assert result["errors"]["calibration"]["count"] == result["micro"]["tp"] + result["micro"]["fp"] - invented(result)
    assert result["errors"]["seen"]["seen"]["fn"] > 0
    assert result == read_result(runs / "all", "test")
    run_command(command, ["score", "data/sample/test.PubTator.txt", str(predictions), "--json"])
    scored = json.loads(capsys.readouterr().out)
    # entities that no source holds have no place in a PubTator file; `placed` counts without them
    assert result["placed"] == {key: scored[key] for key in ("micro", "types")}
    for key, more in (("tp", 0), ("fn", 0), ("fp", invented(result))):
        assert result["micro"][key] == scored["micro"][key] + more


def test_a_peft_adapter_scores_like_its_run(runs, capsys):
    run = run_eval(capsys, "--run", runs / "all", "--limit", 5, "--precision", "fp32")
    flags = ("--model", "weights/tiny", "--adapter", runs / "all" / "best", "--data", "data/sample")
    other = run_eval(capsys, *flags, "--limit", 5, "--precision", "fp32")
    assert run["micro"] == other["micro"] and run["health"] == other["health"]
    assert run["sentences"] == 5


def test_drafts_and_batches_do_not_change_answers(runs, tmp_path, capsys):
    written = []
    for number, flags in enumerate((["--draft", "none"], ["--batch", 1], ["--batch", 7])):
        file = tmp_path / f"{number}.PubTator"
        flags = ("--run", runs / "all", "--limit", 12, "--precision", "fp32", "--predictions", file, *flags)
        result = run_eval(capsys, *flags)
        written.append((file.read_text(), result["micro"], result["health"]))
    assert written[0] == written[1] == written[2]


def test_one_label_runs_are_joined(runs, capsys):
    flags = ("--run", runs / "Disease", "--run", runs / "Chemical", "--limit", 4)
    result = run_eval(capsys, *flags)
    assert list(result["types"]) == ["Disease", "Chemical"]
    assert run_eval(capsys, *flags, "--order", "Chemical,Disease")["sentences"] == 4


def test_predict_writes_json_lines_and_pubtator(runs, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Aspirin caused nausea. The patient died.\n\nNo drug was given.\n")
    run_command(command, ["predict", "--run", str(runs / "all"), str(text)])
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [document["id"] for document in documents] == ["1", "3"]
    for document in documents:
        for entity in document["entities"]:
            assert document["text"][entity["start"] : entity["end"]] == entity["text"]
            assert 0 < entity["confidence"] <= 1
    gold = HOME / "data/sample/test.PubTator.txt"
    run_command(command, ["predict", "--run", str(runs / "all"), "--to", "pubtator", str(gold)])
    out = tmp_path / "out.PubTator"
    out.write_text(capsys.readouterr().out)
    assert [d.text for d in read_documents(out)] == [d.text for d in read_documents(gold)]


def run_predict(capsys, *flags) -> tuple[str, str]:
    run_command(command, ["predict", *map(str, flags)])
    return capsys.readouterr()


def test_predict_refuses_two_documents_of_one_id(runs, tmp_path, capsys):
    """It gave mentions of the first to the second, outside its text."""
    text = tmp_path / "text.txt"
    text.write_text("7|t|Aspirin caused nausea and a fever that lasted.\n7|a|\n\n7|t|It did.\n7|a|\n")
    with pytest.raises(SystemExit) as stop:
        run_predict(capsys, "--run", runs / "all", text)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{text}:4: a second document 7" in err


def test_predict_reads_conll_as_sentences(runs, tmp_path, capsys):
    """Each line was a document. What it writes can be scored."""
    gold = tmp_path / "gold.tsv"
    gold.write_text("1\tAspirin\tB-Chemical\n2\tcaused\tO\n3\tnausea\tB-Disease\n\n1\tNone\tO\n2\tdied\tO\n")
    out, err = run_predict(capsys, "--run", runs / "all", gold)
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["Aspirin caused nausea", "None died"]
    assert f"{gold}: documents read as CoNLL (a token and its tag a line): 2" in err
    assert f"{gold}: lines whose running number was skipped: 5" in err
    predicted = tmp_path / "out.PubTator"
    predicted.write_text(run_predict(capsys, "--run", runs / "all", "--to", "pubtator", gold)[0])
    run_command(command, ["score", str(gold), str(predicted), "--json"])
    out, err = capsys.readouterr()
    scored = json.loads(out)
    assert scored["micro"]["tp"] + scored["micro"]["fn"] == 2 and scored["missing"] == 0
    assert scored["notes"] == [f"{gold}: lines whose running number was skipped: 5"] == err.splitlines()


def test_predictions_about_a_text_with_a_tab_can_be_scored(runs, tmp_path, capsys):
    gold, predicted = tmp_path / "gold.txt", tmp_path / "out.txt"
    gold.write_text("7|t|Aspirin\tcaused nausea.\n7|a|\n7\t0\t7\tAspirin\tChemical\n")
    predicted.write_text(run_predict(capsys, "--run", runs / "all", "--to", "pubtator", gold)[0])
    run_command(command, ["score", str(gold), str(predicted), "--json"])
    assert json.loads(capsys.readouterr().out)["documents"] == 1


@pytest.mark.parametrize("form", ["jsonl", "pubtator"])
def test_predict_says_which_sentences_it_has_not_read(runs, tmp_path, capsys, form):
    long = "and " * 2000 + "so on."
    text = tmp_path / "text.txt"
    text.write_text(f"No drug was given. {long.capitalize()} He died.\nNone.\n")
    out, err = run_predict(capsys, "--run", runs / "all", "--to", form, text)
    assert f"document 1: the sentence from 19 to {19 + len(long)} may lack mentions: longer than the model's" in err
    if form == "jsonl":
        first, second = (json.loads(line)["unread"] for line in out.splitlines())
        assert [19, 19 + len(long)] in first and [19, 19 + len(long)] not in second


def test_gold_of_labels_that_the_model_does_not_know_is_told(runs, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "dev.tsv").write_text("Rome\tB-PLACE\nfell\tO\nAda\tB-PER\n\nA\tO\nfever\tB-Disease\nBo\tB-PER\n")
    flags = ("--run", runs / "all", "--data", data, "--out", tmp_path)
    result = run_eval(capsys, *flags)
    assert result["unscored"] == {"PER": 2, "PLACE": 1}
    assert result["micro"]["tp"] + result["micro"]["fn"] == 1
    run_command(evaluation.main, list(map(str, flags)))
    assert "which count nowhere: PER 2, PLACE 1" in " ".join(capsys.readouterr().out.split())


def test_any_label_set_is_trained_and_scored(tmp_path, capsys):
    """Labels that tags cannot hold were refused, with a word about --labels, which nobody had given."""
    data = tmp_path / "data"
    data.mkdir()
    lines = "1\tAspirin\tB-C++\n2\tcaused\tO\n3\tnausea\tB-T047,T033\n4\there\tB-T047\n\n"
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text(lines * 3)
    size = ["--epochs", "1", "--model", "weights/tiny", "--data", str(data)]
    run_command(train.main, [*size, "--out", str(tmp_path / "all")])
    out = capsys.readouterr().out
    assert "tagging of C++, T047, T047,T033" in out and "[T047_T033]nausea[/T047_T033]" in out
    assert out.count("lines whose running number was skipped: 12") == 2
    result = read_result(tmp_path / "all", "dev")
    assert list(result["types"]) == ["C++", "T047", "T047,T033"] and result["unscored"] == {}
    run_command(train.main, [*size, "--out", str(tmp_path / "one"), "--labels", "T047,T033", "--limit-train", "2"])
    assert read_task(tmp_path / "one") == Task("tagging", ("T047,T033",), per_label=True)
    assert read_result(tmp_path / "one", "dev")["unscored"] == {"C++": 3, "T047": 3}


def test_compare_reads_what_eval_left_in_runs(runs, tmp_path, capsys):
    scores = [run_eval(capsys, "--run", runs / name, "--split", "test") for name in ("all", "Disease")]
    flags = ["compare", str(runs / "all"), str(runs / "Disease"), "--split"]
    run_command(command, [*flags, "test", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result["types"]) == ["Disease"]  # the label that both answer for
    for name, alone in zip("ab", scores, strict=True):
        assert result["micro"][name] == alone["types"]["Disease"]
    few, damaged, without = (
        shutil.copytree(runs / "Disease", tmp_path / name) for name in ("few", "damaged", "without")
    )
    run_eval(capsys, "--run", few, "--split", "test", "--limit", 3, "--out", tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        shutil.copy(path, few)
    different = f"different sentences ({scores[0]['sentences']} and 3)"
    (damaged / "answers-test.jsonl").write_text("{")
    config = json.loads((without / "config.json").read_text())
    config["settings"]["data"] = str(tmp_path / "data")
    (without / "config.json").write_text(json.dumps(config))
    (tmp_path / "data").mkdir()
    shutil.copy(HOME / "data/sample/dev.PubTator.txt", tmp_path / "data")
    for argv, words in (
        ([*flags, "train"], "not scored on train"),
        ([*flags[:2], str(few), "--split", "test"], different),
        ([*flags[:2], str(damaged), "--split", "test"], f"{damaged / 'answers-test.jsonl'}: changed since"),
        ([*flags[:2], str(without), "--split", "test"], f"{tmp_path / 'data'} has only dev"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_command(command, argv)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--run", "nowhere"], "no such"),
        (["--run", "RUN", "--limit", "0"], "--limit"),
        (["--model", "weights/tiny"], "--data"),
        (["--run", "RUN", "--run", "RUN"], "two systems answer"),
        (["--model", "weights/tiny", "--adapter", "weights", "--data", "data/sample"], "adapter_config.json"),
        (["--run", "RUN", "--run", "DISEASE", "--order", "Disease"], "two systems answer"),
        (["--run", "RUN/best"], "RUN/best: no run folder but a PEFT adapter in the run RUN"),
        ([*MODEL, "--adapter", "RUN"], "RUN: no adapter folder but a training run"),
        (
            ["--model", "RUN", "--data", "data/sample"],
            "its base model is weights/tiny, what it has learnt",
        ),
        (["--model", "RUN/best", "--data", "data/sample"], "no model folder but a PEFT adapter in the run RUN"),
        ([*MODEL, "--shots", "9999"], "--shots is 9999; the training split has 417 sentences"),
        ([*MODEL, "--out", "README.md"], "--out README.md: is a file"),
        ([*MODEL, "--out", "RUN"], "it is not about that run alone"),
        (["--run", "DISEASE", "--out", "RUN"], "it is not about that run alone"),
        (["--run", "RUN", "--out", "RUN/best"], "holds a saved model"),
        ([*MODEL, "--predictions", "nowhere/x"], "--predictions nowhere/x"),
        ([*MODEL, "--adapter", ""], "--adapter is empty"),
        # flags without effect
        (["--run", "RUN", "--adapter", "RUN/best"], "--adapter: no effect with --run"),
        (["--run", "RUN", "--labels", "all", "--format", "tagging"], "--format, --labels: no effect with --run"),
        (["--run", "RUN", "--shots", "0", "--instruction"], "--instruction, --shots: no effect with --run"),
        (["--run", "RUN", "--model", "weights/tiny"], "give either --run, or --model"),
        (["--run", "RUN", "--order", "Disease,Chemical"], "--order: no effect unless several runs are joined"),
        ([*MODEL, "--which", "best"], "--which: no effect without --run"),
        ([*MODEL, "--format", "extraction", "--draft", "none"], "--draft: no effect where answers do not repeat"),
    ],
)
def test_bad_input_is_refused(runs, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        named = {"RUN": str(runs / "all"), "DISEASE": str(runs / "Disease")}
        run_command(evaluation.main, [re.sub("RUN|DISEASE", lambda name: named[name[0]], flag) for flag in flags])
    assert stop.value.code == 2
    assert words.replace("RUN", str(runs / "all")) in capsys.readouterr().err


# ---- a run's own results ----


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of a run that is scored on the first 2 sentences; its last adapter is not its best."""
    folder = shutil.copytree(runs / "all", tmp_path / "run")
    tensors = load_file(folder / "last/adapter_model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, folder / "last/adapter_model.safetensors")
    (folder / "last/manifest.json").unlink()
    _seal(folder / "last")
    return folder


def verified(run: Path, capsys) -> tuple[int, str]:
    """The exit code of `verify`, and what it prints."""
    with pytest.raises(SystemExit) as ended:
        run_command(command, ["verify", str(run)])
    return int(ended.value.code), capsys.readouterr().out


FOREIGN = {
    "it is on the first 1, the run's own on the first 2": ["--limit", "1"],
    "it is on all sentences, the run's own on the first 2": [],
    "it is not about the model in": ["--limit", "2", "--which", "last"],
    "its answers were constrained": ["--limit", "2", "--constrain"],
    "it was computed in": ["--limit", "2", "--precision", "OTHER"],
    "it is not on the corpus of the run": ["--limit", "2", "--data", "DATA"],
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_a_run_keeps_its_own_results_alone(reason, run, tmp_path, capsys):
    other = "fp32" if read_settings(run).precision != "fp32" else "bf16"
    shutil.copytree(HOME / "data/sample", tmp_path / "data")
    with (tmp_path / "data/test.PubTator.txt").open("a") as file:
        file.write("\n9999|t|One more.\n")
    dev = tmp_path / "data/dev.PubTator.txt"
    dev.write_text(dev.read_text().replace("\t-1\n", "\tD1\n", 1))  # of which there is a note to tell
    places = {"OTHER": other, "DATA": str(tmp_path / "data")}
    flags = ["--run", str(run), *(places.get(flag, flag) for flag in FOREIGN[reason])]
    before = contents(run)
    run_command(evaluation.main, flags)
    assert f"not the run's own result: {reason}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as refused:
        run_command(evaluation.main, [*flags, "--out", str(run)])
    assert refused.value.code == 2 and reason in capsys.readouterr().err
    assert contents(run) == before
    # written elsewhere and brought there, it is noticed
    run_command(evaluation.main, [*flags, "--out", str(tmp_path / "out")])
    for path in (tmp_path / "out").iterdir():
        shutil.copy(path, run)
    capsys.readouterr()
    code, output = verified(run, capsys)
    assert code == 1 and f"not the run's own result: {reason}" in output
    assert f"llamalora eval --run {run} --split dev --limit 2 --precision {read_settings(run).precision}" in output


def test_another_base_model_than_the_runs_is_noticed(run, tmp_path, capsys):
    base = shutil.copytree(HOME / "weights/tiny", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, base / "model.safetensors")
    config = json.loads((run / "config.json").read_text())
    config["settings"]["model"] = str(base)
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    run_command(evaluation.main, ["--run", str(run), "--limit", "2"])
    told = " ".join(capsys.readouterr().err.split())
    assert "not kept, for it is not the run's own result: the base model is not the one" in told
    assert f"{base}: not the files of weights that {run / 'best'} was trained on" in told
    assert contents(run) == before
    run_command(evaluation.main, [*MODEL[:1], str(base), *MODEL[2:], "--adapter", str(run / "best"), "--limit", "1"])
    assert f"{base}: not the files of weights" in capsys.readouterr().err
    run_command(command, ["merge", "--run", str(run), "--out", str(tmp_path / "merged")])
    assert f"{base}: not the files of weights" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("main, flags, name, remedy", [
    (command, ["predict", "--run", "RUN", "notes.txt"], "model", "in place of --run give --model FOLDER"),
    (evaluation.main, ["--run", "RUN", "--data", str(HOME / "data/sample")], "model", "--adapter RUN/best"),
    (command, ["merge", "--run", "RUN", "--out", "merged"], "model", "give its folder with --model"),
    (train.main, ["--resume", "RUN"], "model", "give its folder with --model"),
    (train.main, ["--resume", "RUN", "--model", str(HOME / "weights/tiny")], "data", "give its folder with --data"),
    (evaluation.main, ["--run", "RUN"], "data", "give its folder with --data"),
    (command, ["compare", "RUN", "RUN"], "data", "from where that path leads to it"),
])  # fmt: skip
def test_relative_paths_of_a_run_lead_nowhere_in_another_folder(
    main, flags, name, remedy, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("Fever came.\n")
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= {"model": "w/tiny", "data": "d/sample"}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        run_command(main, [str(run) if flag == "RUN" else flag for flag in flags])
    told = " ".join(capsys.readouterr().err.split())
    what = {"model": "base model, w/tiny", "data": "corpus, d/sample"}[name]
    assert ended.value.code == 2 and "not the files of weights" not in told
    assert f"{run}: its {what} in its config.json (relative to the folder where it was trained), is not here; " in told
    assert remedy.replace("RUN", str(run)) in told


@pytest.mark.parametrize("there", [False, True])
def test_a_corpus_that_is_not_the_runs_is_told(there, run, tmp_path, capsys):
    if there:
        shutil.copytree(HOME / "data/sample", tmp_path / "data")
        (tmp_path / "data/dev.PubTator.txt").unlink()
    config = json.loads((run / "config.json").read_text())
    config["settings"]["data"] = str(tmp_path / "data")
    (run / "config.json").write_text(json.dumps(config))
    with join_world() as world:
        assert not load_run(run, "best", "fp32", world).known
    told = capsys.readouterr().err
    assert f"without the training sentences of {run}" in told
    assert f"{tmp_path / 'data'}: is not the corpus" in told or not there


def test_an_adapter_is_asked_what_it_learnt(runs, capsys):
    flags = (*MODEL, "--adapter", runs / "Disease/best", "--limit", 3)
    assert list(run_eval(capsys, *flags)["types"]) == ["Disease"]
    with pytest.raises(SystemExit) as refused:
        run_eval(capsys, *flags, "--labels", "all")
    assert refused.value.code == 2
    assert f"--labels: no effect with {runs / 'Disease/best'}, which is asked" in capsys.readouterr().err


def test_an_id_that_no_prediction_can_have_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "dev.jsonl").write_text('{"id": "PMC|1", "text": "Fever.", "entities": [[0, 5, "Disease"]]}\n')
    flags = ["--model", "weights/tiny", "--data", str(tmp_path), "--predictions", str(tmp_path / "x"), "--out"]
    with pytest.raises(SystemExit) as refused:
        run_command(evaluation.main, [*flags, str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert refused.value.code == 2 and "'PMC|1': no PubTator id" in err and not out
    assert not (tmp_path / "out").exists()


def test_a_run_scored_as_it_scores_itself(run, capsys):
    before = read_result(run, "dev")
    assert verified(run, capsys)[0] == 0
    (run / "eval-dev.json").unlink()
    again = run_eval(capsys, "--run", run, "--limit", 2, "--batch", 1, "--draft", "none")
    assert again == read_result(run, "dev")
    assert {name: again[name] for name in before if name != "speed"} == {k: before[k] for k in before if k != "speed"}
    assert verified(run, capsys)[0] == 0


def test_results_that_were_changed_are_noticed(run, runs, capsys):
    result, answers = run / "eval-dev.json", run / "answers-dev.jsonl"
    right, written = result.read_text(), answers.read_text()
    for path, content, named in (
        (result, right.replace('"documents": 1', '"documents": 2'), result),
        (result, right.replace('"split"', '"spilt"'), result),
        (result, right[:-9], result),
        (result, "{}", result),
        (answers, written.replace("output", "Output", 1), answers),
        (answers, "", answers),
        (result, (runs / "Disease/eval-dev.json").read_text(), answers),
    ):
        path.write_text(content)
        code, output = verified(run, capsys)
        assert code == 1 and str(named) in output, output
        result.write_text(right)
        answers.write_text(written)
    assert verified(run, capsys)[0] == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- confidence ----


def uniform(vocab_size: int, **options):
    """A model that finds every token equally probable, so that it chooses token 0."""
    model = tiny_model(vocab_size=vocab_size, max_position_embeddings=512, **options)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_confidence_is_the_probability_of_the_tokens_of_the_mention(tiny_bytelevel):
    tokenizer = load_tokenizer(tiny_bytelevel)
    output = "é [Disease]fever[/Disease], [Chemical]mesna[/Chemical]"
    ids = tokenizer.encode_continuation(" " + output)
    log_probs = [-0.01 * (place + 1) for place in range(len(ids))]
    task = Task("tagging", ("Disease", "Chemical"), per_label=False)
    parsed = parse(task, "é fever, mesna", output)
    assert [output[first:last] for first, last in parsed.written] == [
        "[Disease]fever[/Disease]", "[Chemical]mesna[/Chemical]",
    ]  # fmt: skip
    texts = [tokenizer.spellings[token].decode(errors="replace") for token in ids]
    opening, closing = (next(i for i, text in enumerate(texts) if mark in text) for mark in ("[", "],"))
    by_hand = math.exp(sum(log_probs[opening : closing + 1]))
    assert confidences(tokenizer, ids, log_probs, parsed.written)[0] == pytest.approx(by_hand)


def test_confidence_under_a_uniform_model_counts_its_choices(tiny_bytelevel):
    """Under the constraint each token has probability 1 / (tokens allowed there)."""
    tokenizer, task = load_tokenizer(tiny_bytelevel), Task("tagging", ("Disease",), per_label=True)
    model, sentence = uniform(tokenizer.vocab_size), Sentence("1", 0, "ab c", ())
    prompt = tokenizer.encode(render_prompt(task, sentence.text))
    grammar = Constraint(tokenizer, task, [sentence.text], [60])
    decoding = generate(model, [prompt], tokenizer.eos_id, 60, grammar=grammar)
    state, expected = grammar.start(0), []
    for token in decoding.outputs[0]:
        moves = grammar.moves(state)
        expected.append(-math.log(len(moves)))
        state = moves[token]
    assert decoding.log_probs[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("named, ended", [(0, True), ((5, 0), True), ((1, 0), True), (1, False), (None, False)])
def test_an_end_token_of_the_configuration_ends_an_answer(named, ended, tiny_bytelevel):
    """Beside the tokenizer's own."""
    tokenizer, task = load_tokenizer(tiny_bytelevel), Task("tagging", ("Disease",), per_label=True)
    assert tokenizer.eos_id == 1
    model = uniform(tokenizer.vocab_size, eos_token_id=named)
    with join_world() as world:
        (answer,), _ = answer_sentences(model, tokenizer, task, [Sentence("1", 0, "ab c", ())], world, quiet=True)
    assert answer.parsed.truncated != ended


@pytest.mark.parametrize("ends, ended", [(1, True), ((1,), False), ((1, 0), True)])
def test_several_end_tokens_are_all_that_there_are(ends, ended):
    """With one of them alone, those of the configuration end an output, too."""
    decoding = generate(uniform(8, eos_token_id=(0, 1)), [[2]], ends, 5)
    assert decoding.truncated == [not ended]


@pytest.mark.parametrize("constrain", [False, True])
def test_confidences_do_not_depend_on_batches_and_drafts(constrain, runs):
    with join_world() as world:
        system = load_run(runs / "all", "best", "fp32", world)
        _, asked = select_sentences(read_documents(HOME / "data/sample/dev.PubTator.txt"), 12)
        variants = [
            answer_sentences(
                system.model, system.tokenizer, system.task, asked, world, batch, draft, True, constrain=constrain
            )[0]
            for batch, draft in ((1, 0), (5, 0), (12, 40))
        ]
    if constrain:  # untrained, it tags hardly anything by itself
        assert sum(len(item.confidence) for item in variants[0]) > 3
    for other in variants[1:]:
        for ours, theirs in zip(other, variants[0], strict=True):
            assert ours.output == theirs.output
            assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-4)
            assert all(0 < sure <= 1 for sure in ours.confidence.values())
            assert ours.parsed.exact_copy or not constrain


def test_answers_keep_their_confidences(runs, tmp_path, capsys):
    run_eval(capsys, "--run", runs / "all", "--limit", 12, "--constrain", "--out", tmp_path)
    result = read_result(tmp_path, "dev")
    assert result["health"]["exact_copy"] == 1 and result["health"]["truncated"] == 0
    _, asked = select_sentences(read_documents(HOME / "data/sample/dev.PubTator.txt"), 12)
    answers = read_answers(tmp_path, "dev", read_task(runs / "all"), asked)
    assert any(item.confidence for item in answers)
    assert all(item.confidence.keys() == set(item.parsed.spans) for item in answers)


def test_the_constraint_is_for_tagging(tmp_path, capsys):
    flags = "--model weights/tiny --data data/sample --format extraction --constrain --limit 1"
    with pytest.raises(SystemExit) as stop:
        run_command(evaluation.main, flags.split())
    assert stop.value.code == 2 and "--constrain needs a" in capsys.readouterr().err
