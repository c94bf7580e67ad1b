"""A saved model in other hands: what stands beside it, predict and annotate with it, its card, peft with it."""

import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from helpers import tiny_model

import eval as evaluation
import llamalora
import train
from llamalora.__main__ import main as command
from llamalora.cli import UsageError, run_command
from llamalora.corpus.documents import Document, Sentence, Span, all_sentences, sentence_bounds
from llamalora.corpus.pubtator import write_pubtator
from llamalora.corpus.read import read_splits
from llamalora.distributed.world import World
from llamalora.errors import InputError
from llamalora.evaluation import annotate as annotating
from llamalora.evaluation.annotate import answer_documents
from llamalora.evaluation.card import model_card, with_scores
from llamalora.evaluation.draft import prime
from llamalora.evaluation.result import read_result
from llamalora.evaluation.systems import System
from llamalora.model.checkpoint import save_model
from llamalora.model.config import CheckpointError
from llamalora.runs.shared import RECORD, base_name, find_base, read_record, recorded_task
from llamalora.runs.state import CARD
from llamalora.task.definition import Task
from llamalora.task.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

HOME = Path(train.__file__).parent
TINY = HOME / "weights/tiny"
TEXTS = ["Aspirin caused nausea. The patient died of it.", "No drug was given.", "Fever and rash"]
BOTH = Task("tagging", ("Disease", "Chemical"), per_label=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A corpus of a few documents."""
    folder = tmp_path_factory.mktemp("data")
    for split, documents in read_splits(HOME / "data/sample").items():
        with (folder / f"{split}.PubTator.txt").open("w") as file:
            write_pubtator(documents[: 12 if split == "train" else 1], file)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """It has learnt to tag, badly."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    flags = f"--model {TINY} --data {data} --epochs 3 --eval-limit 2 --precision fp32"
    run_command(train.main, [*flags.split(), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory) -> Path:
    """The same adapter, away from its run."""
    return Path(shutil.copytree(run / "best", tmp_path_factory.mktemp("away") / "adapter"))


@pytest.fixture
def bare(adapter, tmp_path) -> Path:
    """The adapter as PEFT would have saved it."""
    folder = Path(shutil.copytree(adapter, tmp_path / "bare"))
    for name in (RECORD, CARD, "manifest.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path / "texts.txt"


def predicted(capsys, *flags) -> list[dict]:
    run_command(command, ["predict", *map(str, flags), "--precision", "fp32"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- predict ----


def test_predict_takes_a_run_an_adapter_and_a_model(run, adapter, bare, texts, tmp_path, capsys):
    expected = predicted(capsys, "--run", run, texts)
    assert sum(len(one["entities"]) for one in expected) > 0
    for flags in (
        ["--adapter", run / "best"],
        ["--adapter", adapter],  # weights/tiny is looked for by its name
        ["--adapter", adapter, "--model", TINY],
        ["--adapter", bare, "--labels", "Disease,Chemical"],
    ):
        assert predicted(capsys, *flags, texts) == expected, flags
    run_command(command, ["merge", "--adapter", str(adapter), "--out", str(tmp_path / "merged"), "--no-probe"])
    capsys.readouterr()
    assert [one["text"] for one in predicted(capsys, "--model", tmp_path / "merged", texts)] == TEXTS


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "give either --run, or --model, --adapter or both"),
        (["--run", "RUN", "--adapter", "RUN/best"], "give either --run"),
        (["--adapter", "BARE"], f"BARE: no {RECORD} in it says what it is asked; give --labels"),
        (["--adapter", "RUN"], "RUN: no adapter folder but a training run"),
        (["--adapter", "nowhere"], "nowhere: no such adapter folder"),
        (["--model", "weights/tiny"], f"weights/tiny: no {RECORD} in it"),
        (["--adapter", "RUN/best", "--labels", "Disease"], "--labels: no effect with RUN/best"),
        (["--run", "RUN", "--format", "tagging"], "--format: no effect with --run"),
        (["--adapter", "RUN/best", "--which", "last"], "--which: no effect without --run"),
        (["--adapter", "BARE", "--labels", "Disease,Disease"], "--labels Disease,Disease: name each label once"),
        (["--adapter", "BARE", "--labels", "A,B", "--format", "extraction", "--constrain"], "--constrain needs"),
    ],
)
def test_what_predict_refuses(flags, words, run, bare, texts, monkeypatch, capsys):
    monkeypatch.chdir(HOME)
    places = {"RUN": str(run), "BARE": str(bare)}
    argv = [re.sub("RUN|BARE", lambda name: places[name[0]], flag) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run_command(command, ["predict", *argv, str(texts)])
    assert stop.value.code == 2
    assert re.sub("RUN|BARE", lambda name: places[name[0]], words) in capsys.readouterr().err


def test_a_damaged_adapter_is_refused_wherever_it_lies(adapter, tmp_path):
    shared = Path(shutil.copytree(adapter, tmp_path / "shared"))
    (shared / ".gitattributes").write_text("as a download has it")
    llamalora.load_annotator(TINY, shared)
    weights = bytearray((shared / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (shared / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: damaged, its SHA-256 differs"):
        llamalora.load_annotator(TINY, shared)
    for argv in (["inspect", str(shared)], ["merge", "--adapter", str(shared), "--out", str(tmp_path / "merged")]):
        with pytest.raises(CheckpointError, match="damaged"):
            command([*argv, *(["--model", str(TINY)] if argv[0] == "merge" else [])])


def test_a_manifest_of_another_program_is_left_alone(tmp_path):
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    (base / "manifest.json").write_text('{"name": "an app", "files": ["a"]}')
    llamalora.load_annotator(base, task=Task("tagging", ("Disease",), True))


def test_other_weights_than_the_adapters_are_noticed(adapter, tmp_path):
    other = Path(shutil.copytree(TINY, tmp_path / "other"))
    llamalora.load_annotator(other, adapter)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.warns(UserWarning, match=f"{other}: not the files of weights that {adapter} was trained on"):
        llamalora.load_annotator(other, adapter)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"task": {"labels": 3}}, "holds no task"),
        ({"base": "tiny"}, "is no record of this version, by its base.name"),
        ({"settings": {"method": "magic"}}, "is no record of this version, by its settings.method"),
    ],
)
def test_a_record_of_another_program_is_named(change, words, adapter, bare):
    record = json.loads((adapter / RECORD).read_text())
    (bare / RECORD).write_text(json.dumps(record | change))
    with pytest.raises(InputError, match=f"{RECORD}: {words}"):
        recorded_task(bare)


# ---- annotate ----


def test_annotate_says_what_predict_writes(adapter, texts, capsys):
    model, tokenizer, task = llamalora.load_annotator(adapter=adapter, dtype=torch.float32)
    found = llamalora.annotate(model, tokenizer, TEXTS, task)
    written = predicted(capsys, "--adapter", adapter, texts)
    rounded = [[vars(one) | {"confidence": round(one.confidence, 4)} for one in mentions] for mentions in found]
    assert rounded == [one["entities"] for one in written]
    unmerged = llamalora.load_adapter(llamalora.load_model(TINY, torch.float32), adapter)
    again = llamalora.annotate(unmerged, tokenizer, iter(TEXTS), batch=1)
    assert [[(one.start, one.end, one.label) for one in mentions] for mentions in again] == [
        [(one.start, one.end, one.label) for one in mentions] for mentions in found
    ]


def test_annotate_reads_texts_of_any_length(adapter):
    """Each sentence by itself, at its place in the text; what does not fit the context is named."""
    model, tokenizer, task = llamalora.load_annotator(adapter=adapter, dtype=torch.float32)
    sentence = "Aspirin caused a fever."
    (alone,) = llamalora.annotate(model, tokenizer, [sentence], task, constrain=True)
    assert alone and all(sentence[one.start : one.end] == one.text for one in alone)
    (many,) = llamalora.annotate(model, tokenizer, [" ".join([sentence] * 70)], task, constrain=True)
    places = [(one.start - place, one.end - place, one.label) for place in (0, 24, 48) for one in alone]
    assert [(one.start, one.end, one.label) for one in many[: len(places)]] == [
        (one.start + shift, one.end + shift, one.label) for shift in (0, 24, 48) for one in alone
    ]
    assert len(many) == 70 * len(alone)
    with pytest.warns(UserWarning, match="text 1: characters 0 to 5000 may lack mentions: longer than"):
        assert llamalora.annotate(model, tokenizer, ["", "ab cd" * 1000], task) == [[], []]


def test_annotate_refuses_what_would_silently_be_something_else(adapter):
    model, tokenizer, task = llamalora.load_annotator(adapter=adapter)
    with pytest.raises(InputError, match="one string"):
        llamalora.annotate(model, tokenizer, "Aspirin", task)
    with pytest.raises(InputError, match="extraction"):
        llamalora.annotate(model, tokenizer, ["x"], Task("extraction", ("Disease",), True), constrain=True)
    with pytest.raises(InputError, match="give a model"):
        llamalora.load_annotator()
    with pytest.raises(InputError, match="another task"):
        llamalora.load_annotator(adapter=adapter, task=Task("tagging", ("Disease",), True))
    with pytest.raises(InputError, match=f"has no {RECORD}"):
        llamalora.load_annotator(TINY)


def test_drafts_are_primed_once_and_the_priming_lasts(monkeypatch):
    """For all documents of a stream, and what one chunk shows is not carried into the next."""
    task, known = BOTH, [Sentence("1", 0, "A fever came.", (Span(2, 7, "Disease"),))]
    primed = []
    monkeypatch.setattr(annotating, "prime", lambda *given: primed.append(prime(*given)) or primed[-1])
    system = System(llamalora.load_model(TINY, torch.float32), load_tokenizer(TINY), task, known)
    texts = [f"A rash {n}." for n in range(3)]
    documents = [Document(text, text, (), sentence_bounds(text)) for text in texts]
    monkeypatch.setattr(annotating, "DOCUMENTS_AT_ONCE", 1)
    outputs = [answers[0].output for _, answers in answer_documents(system, documents, World())]
    assert len(outputs) == 3 and len(primed) == 1
    fresh = prime(task, known)
    assert (primed[0].strings, primed[0].words) == (fresh.strings, fresh.words)
    twin = fresh.copy()
    twin.learn(Sentence("2", 0, "A fever and a rash.", (Span(14, 18, "Disease"),)))
    assert (primed[0].strings, primed[0].words, primed[0].starting) == (fresh.strings, fresh.words, fresh.starting)


# ---- names of bases ----


def base(folder: Path, named: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({} if named is None else {"_name_or_path": named}))
    return folder


@pytest.mark.parametrize(
    "place, named, expected",
    [
        ("weights/llama-2-7b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("llama-2-7b-ner", "meta-llama/Llama-2-7b-hf", "llama-2-7b-ner"),  # made of it, and another model
        ("mine", "/home/me/llama", "mine"),
        ("weights/mine", None, "weights/mine"),
        ("hub/models--a-b--C--d/snapshots/0123", None, "a-b/C--d"),
    ],
)
def test_a_base_has_a_name_that_is_no_path_of_this_machine(place, named, expected, tmp_path, monkeypatch):
    folder = base(tmp_path / place, named)
    assert base_name(folder) == expected
    monkeypatch.chdir(folder.parent)
    assert base_name(folder.name) == expected
    (tmp_path / "link").symlink_to(folder)
    if "hub" in place:
        assert base_name(tmp_path / "link") == expected


def test_a_base_is_found_by_its_name(run, tmp_path, monkeypatch):
    assert find_base(run / "best") == Path(str(TINY))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    folder.mkdir()

    def named(name: str) -> Path:
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
        return folder

    with pytest.raises(UsageError, match=r"--adapter needs the base model as well: --model FOLDER \(.*names none"):
        find_base(named(""))
    with pytest.raises(UsageError, match="o/Mine-7b is not here.*hf download o/Mine-7b --local-dir weights/Mine-7b"):
        find_base(named("o/Mine-7b"))
    with pytest.raises(UsageError, match="hf download meta-llama/Llama-2-7b-hf --local-dir weights/llama-2-7b --incl"):
        find_base(named("meta-llama/Llama-2-7b-hf"))
    mine = base(tmp_path / "weights/mine", "o/Mine-7b")
    assert find_base(named("o/Mine-7b")).resolve() == mine and find_base(named("weights/mine")).resolve() == mine
    assert find_base(named(str(mine))) == mine  # as other tools write it


# ---- the card ----


def snippets(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)


def test_the_hub_reads_the_card(run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(run / "best" / CARD)
    result = read_result(run, "dev")
    assert card.data.base_model == "weights/tiny" and card.data.library_name == "peft"
    values = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert values == {key: round(result["micro"][key], 4) for key in ("f1", "precision", "recall")}
    assert {one.dataset_split for one in card.data.eval_results} == {"dev"}
    assert f"| development | 2 | {100 * result['micro']['precision']:.2f} |" in card.text
    assert json.loads((run / "best/adapter_config.json").read_text())["base_model_name_or_path"] == "weights/tiny"
    assert "`weights/tiny` is the base's folder; put in where it lies." in card.text
    record = read_record(run / "best")
    record["base"]["name"] = "o/Mine-7b"
    assert "`o/Mine-7b` is the base by its name on the Hub." in model_card(record)
    assert "It has not been scored." in (run / "last" / CARD).read_text()


def test_neither_card_nor_record_quote_the_corpus_or_a_path_of_this_machine(run, data):
    beside = "".join((run / "best" / name).read_text() for name in (CARD, RECORD, "adapter_config.json"))
    for documents in read_splits(data).values():
        assert not [sentence.text for sentence in all_sentences(documents) if sentence.text in beside]
    assert not [place for place in (HOME, run, data) if str(place) in beside]


def test_demonstrations_are_not_shown(run):
    """They are sentences of the corpus. Without them the model cannot be asked, so the record has them."""
    record = json.loads((run / "best" / RECORD).read_text())
    record["task"]["demonstrations"] = [["A secret.", "A [Disease]secret[/Disease]."]]
    card = model_card(record)
    assert "secret" not in card and "1 demonstrations from the training corpus" in card


@pytest.mark.parametrize("form", ["tagging", "extraction"])
@pytest.mark.parametrize("labels, shown", [(("Chemical", "Disease"), "naloxone"), (("Gene",), "Alpha")])
def test_the_example_is_ours_and_right(form, labels, shown, run):
    record = json.loads((run / "best" / RECORD).read_text())
    record["task"] |= {"format": form, "labels": labels, "per_label": len(labels) == 1}
    prompt, answer = re.search(r"```\nInput: (.*)\nAnswer: (.*)\n```", model_card(record)).groups()
    expected = {
        ("tagging", "naloxone"): "A mild [Disease]fever[/Disease] followed the second dose of "
        "[Chemical]naloxone[/Chemical].",
        ("extraction", "naloxone"): "Chemical: naloxone; Disease: fever",
        ("tagging", "Alpha"): "@@Alpha## was found beside beta in every sample.",
        ("extraction", "Alpha"): "Alpha",
    }
    assert shown in prompt and answer == expected[form, shown]


def test_later_scores_come_into_a_card_that_somebody_has_edited(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    path = folder / "best" / CARD
    edited = (
        path.read_text().replace("---\nbase_model", "---\nlicense: mit\nbase_model").replace("## Licence", "## Mine")
    )
    path.write_text(edited)
    run_command(evaluation.main, ["--run", str(folder), "--split", "test", "--precision", "fp32"])
    text = path.read_text()
    micro = read_result(folder, "test")["micro"]
    assert "license: mit\n" in text and "## Mine" in text
    assert re.findall(r"^\| (\w+) \| \d+ \| \d+\.", text, re.MULTILINE) == ["development", "test"]
    assert f"split: test}}\n    metrics:\n    - {{type: f1, value: {micro['f1']:.4f}}}" in text
    record = read_record(folder / "best")
    assert with_scores(text, record, [read_result(folder, "dev")]) == edited
    lower = text.replace("model-index:", "model-index:\n- name: old\n  x: 1\nlanguage: en\nmodel-index:", 1)
    assert with_scores(lower, record, []).partition("\n---\n")[0].endswith("language: en")
    assert with_scores("All mine.", record, []) == "All mine."
    run_command(evaluation.main, ["--run", str(folder), "--limit", "1", "--out", str(tmp_path / "out")])  # another's
    assert path.read_text() == text
    path.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(command, ["verify", str(folder)])
    assert ended.value.code == 0, capsys.readouterr().out


def test_what_a_card_says_runs_and_agrees(adapter, tmp_path, monkeypatch):
    """Here, and in transformers with peft: the same tokens in, the same answer out."""
    monkeypatch.chdir(HOME)
    own, theirs = snippets(adapter / CARD)
    space: dict = {}
    with redirect_stdout(StringIO()) as printed:
        exec(own.replace("FOLDER", str(adapter)), space)
    text = "A mild fever followed the second dose of naloxone."
    (mentions,) = llamalora.annotate(space["model"], space["tokenizer"], [text])
    assert len(printed.getvalue().splitlines()) == len(mentions)
    other: dict = {}
    with redirect_stdout(StringIO()) as printed, pytest.warns(UserWarning, match="tie_word_embeddings"):
        exec(theirs.replace("FOLDER", str(adapter)), other)
    ids = space["tokenizer"].encode(f"Input: {text}\nAnswer:")
    assert other["ids"].tolist() == [ids]  # with bos, though weights/tiny has nothing that says so to transformers
    model, tokenizer, _ = llamalora.load_annotator(adapter=adapter, dtype=torch.float32)
    (answer,) = llamalora.generate(model, [ids], tokenizer.eos_id, max_new_tokens=100).outputs
    theirs_fp32 = other["model"].float().generate(other["ids"], max_new_tokens=100, do_sample=False)
    assert theirs_fp32[0, len(ids) :].tolist()[: len(answer)] == answer


def test_a_merged_model_brings_task_card_and_tokenizer_along(adapter, tmp_path, capsys):
    run_command(command, ["merge", "--adapter", str(adapter), "--out", str(tmp_path / "merged"), "--no-probe"])
    merged = tmp_path / "merged"
    assert recorded_task(merged) == BOTH == recorded_task(adapter)
    card = (merged / CARD).read_text()
    assert "library_name: transformers" in card and "predict --model FOLDER" in card and "peft" not in card
    scores = re.compile("<!-- scores -->.*<!-- end of scores -->", re.DOTALL)
    assert scores.search(card)[0] == scores.search((adapter / CARD).read_text())[0]
    assert (merged / "tokenizer_config.json").read_bytes() == (adapter / "tokenizer_config.json").read_bytes()
    # merged into what was itself trained here: the base's own record, sums and name are not the new model's
    again = Path(shutil.copytree(merged, tmp_path / "base"))
    (again / "manifest.json").write_text("{}")
    config = json.loads((again / "config.json").read_text()) | {"_name_or_path": "o/base"}
    (again / "config.json").write_text(json.dumps(config))
    bare = tmp_path / "bare"
    llamalora.save_adapter(llamalora.inject_lora(llamalora.load_model(again), "q", 2), bare)
    out = tmp_path / "out"
    run_command(command, ["merge", "--adapter", str(bare), "--model", str(again), "--out", str(out), "--no-probe"])
    assert not {RECORD, CARD, "manifest.json"} & {path.name for path in out.iterdir()}
    assert "_name_or_path" not in json.loads((out / "config.json").read_text())


def test_a_whole_model_says_what_it_is_asked(data, tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    assert recorded_task(tmp_path / "model") is None
    flags = f"--model {TINY} --data {data} --limit-train 8 --epochs 1 --eval-limit 1 --method partial"
    run_command(train.main, [*flags.split(), "--targets", "q", "--labels", "Disease", "--out", str(tmp_path / "run")])
    best = tmp_path / "run/best"
    assert recorded_task(best) == Task("tagging", ("Disease",), per_label=True)
    card = (best / CARD).read_text()
    assert "library_name: transformers" in card and "| rank |" not in card and "| targets | q |" in card
    model, tokenizer, task = llamalora.load_annotator(best)
    assert len(llamalora.annotate(model, tokenizer, TEXTS, task)) == 3
