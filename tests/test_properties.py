"""What others wrote - corpora, outputs of models, adapters, configurations, flags - as hypothesis' worst inventions.

Each is read, or ends in the error that names it. EXAMPLES=10 tries ten times as many.
"""

import io
import json
import math
import os
import re
from collections import Counter

import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as evaluation
import train
from llamalora.cli import run_command
from llamalora.commands import audit, merge, predict, verify
from llamalora.corpus.documents import CorpusError, Document, Span, sentence_bounds, sentences_of
from llamalora.corpus.pubtator import write_pubtator
from llamalora.corpus.read import read_documents, stream_documents
from llamalora.lora.adapter import load_adapter, save_adapter
from llamalora.lora.inject import inject_lora
from llamalora.lora.peft_config import read_peft_config
from llamalora.model.checkpoint import load_model, read_config, save_model
from llamalora.model.config import ConfigError, LlamaConfig
from llamalora.model.llama import Llama
from llamalora.model.tensors import CheckpointError
from llamalora.paper import stats, tables
from llamalora.runs.folder import read_settings, read_task
from llamalora.runs.settings import Settings
from llamalora.task.definition import Task
from llamalora.task.parse import parse
from llamalora.task.prompt import render_answer

pytestmark = pytest.mark.slow

MANY = int(os.environ.get("EXAMPLES", "1"))


def tried(examples: int):
    """So many invented cases, the same ones each time."""
    return settings(
        max_examples=examples * MANY,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


ODD = "\ufeff\0\r\t\u2028\u0301\u200f\u05d0\u0627漢字😀👨‍👩‍👧ﬁÅé|[]@#:;,-_ \u00a0"
WORDS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(ODD)), max_size=12)
TEXTS = st.lists(WORDS, max_size=8).map(" ".join)


@st.composite
def mutated(draw, content: bytes):
    """Some bytes of a valid file changed, left out, repeated or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 12)))
        data[start:stop] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[start:stop]) * 2)))
    return bytes(data)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


# ---- corpora ----

PUBTATOR = (
    "7|t|Fever after α-methyl 漢方.\n7|a|No é rash 😀 in 3.\n7\t0\t5\tFever\tDisease\tD1\n7\t12\t20\tα-methyl\t"
    "Chemical\tC1\n7\tCID\tC1\tD1\n\n8|t|Nausea.\n8|a|\n8\t0\t6\tNausea\tDisease\t-1\n"
).encode()
CONLL = "Fever\tB-Disease\nafter\tO\nα-methyl\tB-Chemical\nacid\tI-Chemical\n\n-DOCSTART- O\n\nNo\tO\n".encode()
LAYERS = (
    b"#\thttp://a.b\n1-2\tzum\t_\tO\n1\tzu\tO\tO\n2\tTU\tB-ORG|B-X\tO\n3\tRom\tI-ORG|O\tB-LOC\n\n1\t#\tO\tO\n2\tx\tM-X\tO\n"
)  # fmt: skip


def read_or_refused(path) -> list[Document]:
    try:
        documents = read_documents(path)
    except CorpusError as error:
        assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", str(error)), error
        return []
    for document in documents:
        for span in document.spans:
            assert 0 <= span.start < span.end <= len(document.text) and span.label
        assert all(0 <= start < end <= len(document.text) for start, end in document.sentences)
        for sentence in sentences_of(document):
            assert all(0 <= span.start < span.end <= len(sentence.text) for span in sentence.spans)
    return documents


@pytest.mark.parametrize(
    "name, valid",
    [("train.txt", PUBTATOR), ("train.tsv", CONLL), ("train.conllu", LAYERS)],
    ids=["pubtator", "conll", "layers"],
)
def test_mutated_corpora(name, valid, place):
    """Documents, or a CorpusError with the file and mostly the line."""

    @tried(400)
    @given(st.one_of(mutated(valid), st.binary(max_size=200), TEXTS.map(str.encode)))
    def check(data):
        path = place / name
        path.write_bytes(data)
        read_or_refused(path)
        path.write_bytes(b"\xef\xbb\xbf" + valid.replace(b"\n", b"\r\n"))
        assert len(read_or_refused(path)) >= 2

    check()


@st.composite
def documents(draw):
    text = draw(TEXTS.filter(str.strip))
    found = []
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start + 1, len(text)))
        if text[start:end] == text[start:end].strip():
            found.append(Span(start, end, draw(st.sampled_from(["Disease", "X-1"]))))
    return Document("17", text, tuple(sorted(set(found))), sentence_bounds(text))


def test_pubtator_is_written_and_read_back(place):
    @tried(300)
    @given(documents())
    def check(document):
        path = place / "written.txt"
        file = io.StringIO()
        write_pubtator([document], file)
        path.write_bytes(file.getvalue().encode())
        (back,) = read_documents(path)
        assert (back.id, back.spans) == (document.id, document.spans)
        assert back.text == re.sub(r"[\t\r\n]", " ", document.text)

    check()


def test_streams_to_predict(place, capsys):
    """Documents whose sentences lie inside them, written as both formats, or a CorpusError that names the file."""

    @tried(200)
    @given(st.one_of(mutated(PUBTATOR), mutated(CONLL), st.binary(max_size=100), TEXTS.map(str.encode)))
    def check(data):
        path = place / "stream.txt"
        path.write_bytes(data)
        try:
            for document in stream_documents(str(path), Counter()):
                assert all(0 <= start < end <= len(document.text) for start, end in document.sentences)
                predict.write([document], {}, {}, "jsonl")
                predict.write([document], {}, {}, "pubtator")
        except CorpusError as error:
            assert str(path) in str(error)
        capsys.readouterr()

    check()


# ---- outputs of models ----

ODD_LABELS = ("T047,T033", "C++", "C", "Disease (rare)", "a;b", "a_b", "a: b", "[x]", "/x", "x", "@@", "##", "-")
TASKS = [
    Task(form, labels, len(labels) == 1)
    for form in ("tagging", "extraction")
    for labels in (("Disease",), ("Disease", "Chemical"), ODD_LABELS, ("[x]",))
]
MARKS = ["@@", "##", "[Disease]", "[/Disease]", "[Chemical]", "[/Chemical]", "Disease:", "Chemical: ", ", ", "; ", "\n"]
SENTENCES = TEXTS.map(lambda text: " ".join(text.split())).filter(bool)


@st.composite
def gold(draw):
    """A task, a sentence, its mentions that do not overlap, and the right answer."""
    task, text = draw(st.sampled_from(TASKS)), draw(SENTENCES)
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pairs = zip(places[::2], places[1::2], strict=False)
    spans = tuple(Span(start, end, draw(st.sampled_from(task.labels))) for start, end in pairs)
    return task, text, spans, render_answer(task, text, spans)


@st.composite
def answers(draw):
    """The right answer to a sentence, with pieces left out, repeated or put in; or anything."""
    task, text, _, right = draw(gold())
    if draw(st.booleans()):
        return task, text, draw(st.lists(st.one_of(WORDS, st.sampled_from(MARKS))).map(" ".join))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(right)))
        stop = min(len(right), start + draw(st.integers(0, 6)))
        right = right[:start] + draw(st.one_of(st.just(""), st.sampled_from(MARKS), WORDS)) + right[stop:]
    return task, text, right


@tried(1000)
@given(answers(), st.booleans())
def test_any_output_is_parsed(case, truncated):
    """Never an exception, a mention outside the sentence, or two that overlap."""
    task, text, output = case
    parsed = parse(task, text, output, truncated)
    end = 0
    for span in parsed.spans:
        assert end <= span.start < span.end <= len(text) and span.label in task.labels
        end = span.end
    assert parsed.truncated == truncated


@tried(400)
@given(gold())
def test_the_right_tagging_is_parsed_back(case):
    """Except for mentions with whitespace at their ends, which no corpus has, and per-label ones beside an @ or #: of
    `@@x###` the format does not say whether the mention is x or x#."""
    task, text, spans, answer = case
    beside = "".join(text[max(0, place - 1) : place + 1] for span in spans for place in (span.start, span.end))
    bare = all(text[span.start : span.end].strip() == text[span.start : span.end] for span in spans)
    if task.format == "tagging" and bare and not (task.per_label and set(beside) & set("@#")):
        parsed = parse(task, text, answer)
        assert parsed.spans == spans and parsed.exact_copy and not parsed.unbalanced


# ---- model and adapter folders ----


@pytest.fixture(scope="module")
def folders(place):
    model = tiny_model(num_hidden_layers=1)
    save_model(model, place / "model")
    inject_lora(model, "q,embed", 2)
    save_adapter(model, place / "adapter", base_model="model")
    return place


def skewed(name: str):
    """A safetensors file with another length of its header, or other numbers and names in it."""

    def replace(data: bytes, pair) -> bytes:
        return data.replace(*pair, 1)

    pairs = [(b"[2,32]", b"[3,32]"), (b"F32", b"F16"), (b"[0,", b"[8,"), (b"base_model", b"case_model"),
             (b"[2,32]", b"[9999999999,32]"), (b"F32", b"I32"), (b"F32", b"BOOL")]  # fmt: skip
    return lambda data: st.one_of(
        mutated(data),
        st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + data[8:]),
        st.integers(0, len(data)).map(lambda n: data[:n]),
        st.sampled_from(pairs).map(lambda pair: replace(data, pair)),
    )


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_mutated_adapters(file, folders):
    """A CheckpointError, or a model that loads and computes; no more memory than the file could fill."""
    valid = (folders / "adapter" / file).read_bytes()
    base = load_model(folders / "model", torch.float32)

    @tried(150)
    @given(skewed(file)(valid))
    def check(data):
        (folders / "adapter" / file).write_bytes(data)
        model = Llama(base.config)
        model.load_state_dict(base.state_dict())
        try:
            load_adapter(model, folders / "adapter")
        except CheckpointError as error:
            assert str(folders / "adapter") in str(error)
        else:
            model(torch.tensor([[1, 5, 9]]))

    try:
        check()
    finally:
        (folders / "adapter" / file).write_bytes(valid)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_mutated_models(file, folders):
    valid = (folders / "model" / file).read_bytes()

    @tried(150)
    @given(skewed(file)(valid))
    def check(data):
        (folders / "model" / file).write_bytes(data)
        try:
            load_model(folders / "model", torch.float32)
        except CheckpointError as error:
            assert str(folders / "model") in str(error)

    try:
        check()
    finally:
        (folders / "model" / file).write_bytes(valid)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIG = tiny_config().to_dict() | {"rope_scaling": SCALING, "rope_parameters": None}


@tried(400)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON, min_size=1, max_size=3))
def test_any_config(changes):
    """A ConfigError, or a shape of positive whole numbers."""
    try:
        config = LlamaConfig.from_dict(CONFIG | changes)
    except ConfigError:
        return
    numbers = [config.vocab_size, config.hidden_size, config.num_hidden_layers, config.head_dim, config.rope_theta]
    assert min(numbers) > 0 and config.num_attention_heads % config.num_key_value_heads == 0


ADAPTER = {"target_modules": ["q_proj"], "exclude_modules": [], "layers_to_transform": [0], "layers_pattern": "layers",
           "rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*": 3}, "lora_dropout": 0.1, "use_rslora": True,
           "use_dora": False, "bias": "none", "init_lora_weights": "eva", "other": None}  # fmt: skip


@tried(400)
@given(st.dictionaries(st.sampled_from(["r", "lora_alpha", *ADAPTER]), JSON, min_size=1, max_size=3))
def test_any_adapter_config(place, changes):
    """A CheckpointError that names the file, or rules that can be asked."""
    path = place / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | ADAPTER | changes))
    try:
        config = read_peft_config(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        for name in ("lm_head", "model.layers.0.self_attn.q_proj"):
            assert config.targets(name) in (True, False) and config.rank(name) > 0 and config.alpha(name) < math.inf


DEEP = "[" * 10**5  # as deep as Python's reader of JSON does not go


def test_any_config_file(place):
    @tried(200)
    @given(st.one_of(JSON.map(json.dumps), WORDS, st.binary(max_size=40), st.just(DEEP)))
    def check(content):
        data = content if isinstance(content, bytes) else content.encode()
        (place / "config.json").write_bytes(data)
        for read in (read_config, read_settings, read_task):
            # the folder holds an adapter, which may be said instead
            with pytest.raises(CheckpointError, match="config.json|PEFT adapter"):
                read(place)

    check()


RUN = {
    "settings": vars(Settings(model="m", data="d", out="o")),
    "task": {"format": "tagging", "labels": ["Disease"], "per_label": True, "instruction": False, "demonstrations": []},
}


@pytest.mark.parametrize("part, read", [("settings", read_settings), ("task", read_task)])
def test_any_run_config(part, read, place):
    """What it says of the right types, or a CheckpointError that names config.json."""

    @tried(300)
    @given(st.dictionaries(st.sampled_from(sorted(RUN[part])), JSON, max_size=2))
    def check(changes):
        (place / "config.json").write_text(json.dumps(RUN | {part: RUN[part] | changes}))
        try:
            found = read(place)
        except CheckpointError as error:
            assert "config.json" in str(error)
        else:
            assert type(found) in (Settings, Task)

    check()


# ---- the command line ----

COMMANDS = {
    "train": (train.main, "model data out targets rank alpha dropout epochs lr warmup weight-decay clip batch-tokens "
              "batch-sentences seed shots labels loraplus keep timeout precision resume limit-train "
              "max-steps patience"),
    "eval": (evaluation.main, "run model adapter labels shots order data split limit precision batch draft out"),
    "predict": (predict.main, "run which model adapter labels format to precision batch"),
    "audit": (audit.main, "model targets rank gpus gpu-memory gpu nodes link network micro-tokens batch-tokens "
              "memory time"),
    "tables": (tables.main, "seeds limit-eval ranks rates lr-full demonstrations predictions model data"),
    "merge": (merge.main, "run adapter model out probe"),
    "stats": (stats.main, "data"),
    "verify": (verify.main, "json"),
}  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(["0", "-1", "1e400", "nan", "inf", "-inf", "99999999999999999999", "1.5", "", " ", "q", "all", ",",
                     "/dev/null", "/", "x" * 300, "weights/tiny", "data/sample"]),
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=6),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_any_command_line(command, tmp_path, monkeypatch, capsys):
    """Exit code 2 (or 1, for a file) with a message, or help; never a traceback, never a run."""
    main, names = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llamalora.training.loop.build_model", _stop)
    monkeypatch.setattr("llamalora.paper.runner.Runner.run", _stop)

    @tried(60)
    @given(st.lists(st.tuples(st.sampled_from(names.split()), VALUES), max_size=4), st.lists(VALUES, max_size=2))
    def check(flags, rest):
        argv = [word for name, value in flags for word in (f"--{name}", value)] + rest
        try:
            run_command(main, argv)
        except SystemExit as ended:
            assert ended.code in (0, 1, 2, "ran"), (argv, ended.code)
        assert "Traceback" not in capsys.readouterr().err

    check()


def _stop(*_, **__):
    raise SystemExit("ran")
