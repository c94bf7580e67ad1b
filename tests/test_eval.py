"""eval.py, predict and score as their users run them, on runs of the built-in checkpoint."""

import json
from pathlib import Path

import pytest

import eval as evaluation
import train
from llamalora import corpus, evaluate, ner
from llamalora.__main__ import main as command
from llamalora.cli import run_command

HOME = Path(train.__file__).parent
SIZE = ["--limit-train", "40", "--epochs", "1", "--eval-limit", "2"]
FLAGS = ["--model", "weights/tiny", "--data", "data/sample", *SIZE]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"all": [], "Disease": ["--labels", "Disease"], "Chemical": ["--labels", "Chemical"]}.items():
        run_command(train.main, [*FLAGS, *flags, "--out", str(folder / name)])
    return folder


def run_eval(capsys, *flags):
    run_command(evaluation.main, [*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def test_eval_agrees_with_score_on_its_own_predictions(runs, tmp_path, capsys):
    predictions = tmp_path / "predictions.PubTator"
    result = run_eval(capsys, "--run", runs / "all", "--split", "test", "--predictions", predictions)
    assert result == json.loads((runs / "all" / "eval-test.json").read_text())
    run_command(command, ["score", "data/sample/test.PubTator.txt", str(predictions), "--json"])
    scored = json.loads(capsys.readouterr().out)
    # entities that no source holds have no place in a PubTator file; apart from them the counts are the same
    invented = result["health"]["not_in_source"]
    for key, more in (("tp", 0), ("fn", 0), ("fp", invented)):
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
    gold = HOME / "data/sample/test.PubTator.txt"
    run_command(command, ["predict", "--run", str(runs / "all"), "--to", "pubtator", str(gold)])
    out = tmp_path / "out.PubTator"
    out.write_text(capsys.readouterr().out)
    assert [d.text for d in corpus.read(out)] == [d.text for d in corpus.read(gold)]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--run", "nowhere"], "no such"),
        (["--run", "RUN", "--limit", "0"], "--limit"),
        (["--model", "weights/tiny"], "--data"),
        (["--run", "RUN", "--run", "RUN"], "two runs"),
        (["--model", "weights/tiny", "--adapter", "weights", "--data", "data/sample"], "adapter_config.json"),
    ],
)
def test_bad_input_is_refused(runs, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        run_command(evaluation.main, [str(runs / "all") if flag == "RUN" else flag for flag in flags])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def gold_answers(documents, task, change=lambda output: output):
    """Answers of a model that knows the gold, after `change`."""
    for document in documents:
        for sentence in corpus.sentences(document):
            output = change(ner.render(task, sentence.text, sentence.spans))
            yield evaluate.Answer(sentence, output, ner.parse(task, sentence.text, output))


def test_assess_counts_as_sets_of_document_offsets():
    documents = corpus.read(HOME / "data/sample/dev.PubTator.txt")
    task = ner.Task("tagging", ("Disease", "Chemical"), per_label=False)
    perfect = evaluate.assess(documents, list(gold_answers(documents, task)), task.labels)
    assert perfect["micro"]["f1"] == 1 and perfect["health"]["exact_copy"] == 1
    assert perfect["micro"]["tp"] == sum(len(document.spans) for document in documents)
    assert perfect["secondary"]["string_set"]["micro"]["f1"] == 1

    def only_first_tag(output):
        return output.replace("[Chemical]", "").replace("[/Chemical]", "")

    answers = list(gold_answers(documents, task, only_first_tag))
    result = evaluate.assess(documents, answers, task.labels)
    gold = {(d.id, s.start, s.end, s.label) for d in documents for s in d.spans}
    found = {
        (d.id, s.start, s.end, s.label) for d in evaluate.predicted_documents(documents, answers) for s in d.spans
    }
    assert result["micro"]["tp"] == len(gold & found)
    assert result["micro"]["fn"] == len(gold - found) == result["types"]["Chemical"]["fn"]


def test_an_entity_that_is_not_in_the_source_is_a_false_positive():
    document = corpus.Document("1", "Nothing here.", (), ((0, 13),))
    task = ner.Task("extraction", ("Disease",), per_label=True)
    (answer,) = gold_answers([document], task, lambda output: "fever")
    result = evaluate.assess([document], [answer], task.labels)
    assert (result["micro"]["tp"], result["micro"]["fp"]) == (0, 1)
    assert result["health"]["not_in_source"] == 1


def test_select_keeps_only_the_gold_of_the_chosen_sentences():
    documents = corpus.read(HOME / "data/sample/dev.PubTator.txt")
    for limit in (1, 5, 30):
        kept, chosen = evaluate.select(documents, limit)
        inside = sum(len(sentence.spans) for sentence in chosen)
        assert len(chosen) == limit and sum(len(document.spans) for document in kept) == inside
    assert evaluate.select(documents, None)[0] == documents


def test_joined_answers_obey_the_order():
    document = corpus.Document("1", "Lead poisoning kills.", (), ((0, 21),))
    answers = {}
    for label, mention in (("Disease", "Lead poisoning"), ("Chemical", "Lead")):
        task = ner.Task("extraction", (label,), per_label=True)
        answers[label] = list(gold_answers([document], task, lambda output, mention=mention: mention))
    (disease,) = evaluate.joined(answers, ("Disease", "Chemical"))
    (chemical,) = evaluate.joined(answers, ("Chemical", "Disease"))
    assert [span.label for span in disease.parsed.spans] == ["Disease"]
    assert [span.label for span in chemical.parsed.spans] == ["Chemical"]
