"""Data that the project may not hold: tests that want it skip, with the reason, where it is absent."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """`pytest -m quick`: what takes about a minute, for people who change something."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("slow", "faults")):
            item.add_marker("quick")


def _folder(what: str, probe: str, *places: Path) -> Path:
    for place in places:
        if any(place.glob(probe)):
            return place
    pytest.skip(f"{what} not found in {', '.join(map(str, places))}")


@pytest.fixture(scope="session")
def bc5cdr() -> Path:
    """The folder of the official PubTator files: LLAMALORA_DATA, data/bc5cdr or ../shared/data/bc5cdr."""
    places = [ROOT / "data/bc5cdr", ROOT / "../shared/data/bc5cdr"]
    if named := os.environ.get("LLAMALORA_DATA"):
        places.insert(0, Path(named))
    return _folder("BC5CDR", "CDR_*Set.PubTator.txt*", *places)


@pytest.fixture(scope="session")
def bc5cdr_iob() -> Path:
    """The folder of the tokenised corpus (train.tsv, devel.tsv, test.tsv)."""
    return _folder("BC5CDR in IOB", "*.tsv", ROOT / "data/bc5cdr-iob", ROOT / "../shared/data/bc5cdr-iob")


@pytest.fixture(scope="session")
def llama2_tokenizer() -> Path:
    """The folder of Llama-2's tokenizer.model."""
    return _folder("Llama-2 tokenizer", "tokenizer.model", ROOT / "../shared/data/llama2-tokenizer")


@pytest.fixture
def opened(tmp_path) -> Callable[[str], str]:
    """What becomes of a page when its scripts run in headless Chromium: LLAMALORA_CHROMIUM, or one on the path."""
    names = [os.environ.get("LLAMALORA_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    browser = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if browser is None:
        pytest.skip("no Chromium: LLAMALORA_CHROMIUM names none, and none is on the path")

    def open_page(page: str) -> str:
        (tmp_path / "opened.html").write_text(page, encoding="utf-8")
        flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
        command = [browser, *(f"--{flag}" for flag in flags.split()), "--disable-sync", "--window-size=1200,900"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'opened.html'}"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return open_page


# ---- models and tokenizers ----

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracles are built from configurations, nothing is fetched
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# own text, to train tiny tokenizers on
TEXT = (
    """Input: A mild fever followed the second dose of pindolol, but no rash.
Answer: A mild [Disease]fever[/Disease] followed the second dose of [Chemical]pindolol[/Chemical], but no [Disease]rash
Input: Naloxone (0.4 mg/kg) reversed the drowsiness of 12 of 15 patients; headache persisted in three.
Answer: Disease: drowsiness, headache; Chemical: naloxone, caffeine
The task is to identify @@Disease## entities in the input. Please rewrite the text, naïve café-style, 漢字 too.
"""
    * 4
)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M, a real Llama: LLAMALORA_SMOLLM2 or weights/smollm2-135m."""
    named = [Path(os.environ["LLAMALORA_SMOLLM2"])] if os.environ.get("LLAMALORA_SMOLLM2") else []
    return _folder("SmolLM2-135M", "model.safetensors", *named, ROOT / "weights/smollm2-135m")


@pytest.fixture(scope="session")
def tiny_sentencepiece(tmp_path_factory) -> Path:
    """A folder with a small tokenizer.model made the way of Llama-2's."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=400, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.99, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_bytelevel(tmp_path_factory) -> Path:
    """A folder with a small byte-level BPE tokenizer.json made the way of SmolLM2's."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("bytelevel")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT.splitlines(),
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=["<begin>", "<end>"], show_progress=False
        ),
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder
