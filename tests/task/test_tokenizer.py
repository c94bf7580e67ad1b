"""Token ids against transformers', continuations, and tokenizers that must be refused."""

import json
import shutil
from pathlib import Path

import pytest

from llamalora.corpus.documents import sentences_of
from llamalora.corpus.read import read_documents
from llamalora.task.tokenizer import (
    PROBES,
    JsonTokenizer,
    SentencePieceTokenizer,
    TokenizerError,
    check_fit,
    load_tokenizer,
)

STRINGS = (
    "x",
    "Input: Naïve T-cells (CD4⁺) — 5 µg/mL, β-blockers; 漢字かな 🙂 \u00a0e\u0301.",
    "two  spaces,   three,\ttab",
    " a space in front and one behind ",
    "line\nnext\n\nInput: x\nAnswer:",
    "[Chemical]pindolol[/Chemical]-induced @@fever##",
    "0.4 mg/kg x 12",
    "Ünïcödé ﬁ ½ Ⅳ １２",
)
KINDS = ("tiny_sentencepiece", "tiny_bytelevel")


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def converted(folder: Path):
    """transformers' form of a Llama `tokenizer.model`, as its LlamaConverter makes `tokenizer.json` for the hub.

    LlamaTokenizer.from_pretrained on a bare tokenizer.model is no oracle for runs of spaces: transformers 5 ranks
    merges by id, though these pieces have the lowest score.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(pieces.vocab_size())
    vocabulary = {pieces.id_to_piece(i): i for i in ids}
    merges = generate_merges(vocabulary, [(pieces.id_to_piece(i), pieces.get_score(i)) for i in ids])
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def training_sentences(folder: Path) -> list[str]:
    documents = read_documents(folder / "train.tsv")
    return [sentence.text for document in documents for sentence in sentences_of(document)]


# ---- ids ----


@pytest.mark.parametrize("name", ["tiny_sentencepiece", "llama2_tokenizer"])
def test_sentencepiece_ids_are_those_of_transformers(name, request):
    folder = request.getfixturevalue(name)
    ours, theirs = load_tokenizer(folder), converted(folder)
    assert isinstance(ours, SentencePieceTokenizer)
    assert (ours.vocab_size, ours.eos_id) == (theirs.vocab_size, theirs.eos_token_id)
    for text in STRINGS:
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize("name", ["tiny_bytelevel", "smollm2"])
def test_byte_level_ids_are_those_of_transformers(name, request):
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(name)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, JsonTokenizer)
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    for text in STRINGS:
        assert ours.encode(text) == theirs.encode(text), text


def test_llama2_ids_on_the_whole_training_split(llama2_tokenizer, bc5cdr_iob):
    """Against the class that a user of transformers gets from the same folder."""
    from transformers import LlamaTokenizer

    ours = load_tokenizer(llama2_tokenizer)
    theirs = LlamaTokenizer.from_pretrained(llama2_tokenizer, add_bos_token=True)
    texts = training_sentences(bc5cdr_iob)
    assert len(texts) == 4560
    expected = theirs(texts)["input_ids"]
    assert expected[0][0] == theirs.bos_token_id
    different = [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids]
    assert not different


def test_smollm2_ids_on_the_whole_training_split(smollm2, bc5cdr_iob):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    texts = training_sentences(bc5cdr_iob)
    expected = theirs(texts)["input_ids"]
    different = [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids]
    assert not different


def test_one_tokenizer_in_both_forms(tiny_sentencepiece, tmp_path):
    """Llama's tokenizer.json prepends a space like its tokenizer.model: whole texts, continuations, decoding."""
    converted(tiny_sentencepiece).save_pretrained(tmp_path)
    model, json_form = load_tokenizer(tiny_sentencepiece), load_tokenizer(tmp_path)
    assert isinstance(json_form, JsonTokenizer)
    assert (model.vocab_size, model.eos_id) == (json_form.vocab_size, json_form.eos_id)
    for text in STRINGS:
        ids, more = model.encode(text), model.encode_continuation(" " + text)
        assert json_form.encode(text) == ids
        assert json_form.encode_continuation(" " + text) == more, text
        assert json_form.decode(ids) == model.decode(ids)
        assert json_form.decode(more) == model.decode(more)


# ---- continuations and decoding ----


@pytest.mark.parametrize("text", STRINGS)
def test_a_continuation_joins_at_its_space(tokenizer, text):
    prompt = tokenizer.encode("Answer:")
    assert tokenizer.decode(prompt + tokenizer.encode_continuation(" x")) == "Answer: x"
    assert tokenizer.decode(prompt + tokenizer.encode_continuation(" " + text)) == "Answer: " + text


@pytest.mark.parametrize("text", STRINGS)
def test_decoding_inverts_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_continuation(" " + text)) == text
    if not text.startswith(" "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", STRINGS)
def test_spellings_are_the_bytes_of_a_text(tokenizer, text):
    ids = tokenizer.encode_continuation(" " + text)
    assert b"".join(tokenizer.spellings[i] for i in ids).decode() == " " + text
    assert len(tokenizer.spellings) == tokenizer.vocab_size
    assert tokenizer.spellings[tokenizer.eos_id] is None


def test_every_byte_has_a_token(tokenizer):
    """What makes every text expressible, also one token at a time."""
    single = {spelling for spelling in tokenizer.spellings if spelling and len(spelling) == 1}
    assert {bytes([byte]) for byte in range(256)} <= single


@pytest.mark.parametrize("name", ["smollm2", "llama2_tokenizer"])
def test_spellings_of_real_vocabularies(name, request):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    for token, spelling in enumerate(tokenizer.spellings):
        if spelling is not None and (text := spelling.decode(errors="ignore")).encode() == spelling:
            assert "x" + text == tokenizer.decode([*tokenizer.encode_continuation(" x"), token])


def test_an_empty_continuation(tokenizer):
    ids = tokenizer.encode_continuation(" ")
    assert tokenizer.decode(tokenizer.encode("Answer:") + ids).rstrip() == "Answer:"
    assert tokenizer.decode(ids) == ""


def test_special_tokens_are_not_text(tokenizer):
    ids = tokenizer.encode_continuation(" x")
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "x"
    assert tokenizer.eos_id not in tokenizer.encode("x y")
    end = next(piece for piece, token in tokenizer.vocabulary.items() if token == tokenizer.eos_id)
    text = f"a {end}b{end} c"  # a text may spell it
    assert tokenizer.eos_id not in (*tokenizer.encode(text), *tokenizer.encode_continuation(f" {text}"))
    assert tokenizer.decode(tokenizer.encode_continuation(f" {text}")) == text


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    """A model may have more rows than its tokenizer has tokens, and choose one of them."""
    ids = tokenizer.encode_continuation(" x")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 7]) == "x"


# ---- added tokens ----

TAGGED = "Answer: [Chemical]naïve[/Chemical] T-cells, β-block IL‑2 µg ½ [Disease]fever"
ADDED = ["[Chemical]", "[/Chemical]", "naïve", "β-block", "IL‑2 ", "µg ½"]


@pytest.fixture(params=KINDS)
def enlarged(request, tmp_path):
    """A folder whose tokenizer.json adds ordinary tokens and a special one, beside tokenizer.model where there is one,
    and transformers' view of it."""
    from transformers import AddedToken, AutoTokenizer

    source = request.getfixturevalue(request.param)
    whole = request.param == "tiny_bytelevel"
    theirs = AutoTokenizer.from_pretrained(source) if whole else converted(source)
    theirs.add_tokens(ADDED if whole else [AddedToken(token, normalized=False) for token in ADDED])
    theirs.add_tokens([AddedToken("<pad>", special=True)], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    for path in source.glob("tokenizer.model"):
        shutil.copy(path, tmp_path)
    return tmp_path, theirs


def test_what_tokenizer_json_adds_is_not_lost(enlarged):
    folder, theirs = enlarged
    ours = load_tokenizer(folder)
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    for text in (*STRINGS, TAGGED):
        assert ours.encode(text) == theirs.encode(text), text


def test_only_special_added_tokens_have_no_spelling(enlarged):
    """The text comes back where transformers' decoder garbles it: it takes the ï of a token for a byte."""
    folder, theirs = enlarged
    ours = load_tokenizer(folder)
    ids = ours.encode_continuation(" " + TAGGED)
    assert ours.decode(ids).replace(" ", "") == TAGGED.replace(" ", "")  # Llama's puts spaces behind added tokens
    for token in ADDED:
        assert ours.spellings[theirs.convert_tokens_to_ids(token)] == token.encode()
    assert ours.spellings[theirs.convert_tokens_to_ids("<pad>")] is None


def test_special_tokens_beyond_the_model_are_left_out(enlarged):
    """A token for padding that was added later, for which the model got no row: without it, it is a text."""
    folder, theirs = enlarged
    beyond = theirs.convert_tokens_to_ids("<pad>")
    (folder / "config.json").write_text(json.dumps({"vocab_size": beyond}))
    ours = load_tokenizer(folder)
    check_fit(ours, beyond, folder)
    assert max(ours.encode("a <pad> b")) < beyond and ours.decode(ours.encode_continuation(" a <pad> b")) == "a <pad> b"
    assert ours.encode(TAGGED) == theirs.encode(TAGGED)


@pytest.mark.parametrize("kind", ["tiny_sentencepiece", "llama2_tokenizer"])
def test_bos_is_left_out_where_the_folder_says_so(kind, request, tmp_path):
    usual = load_tokenizer(source := request.getfixturevalue(kind))
    shutil.copy(source / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    ours = load_tokenizer(tmp_path)
    for text in STRINGS:
        assert ours.encode(text) == usual.encode(text)[1:]
    if kind == "llama2_tokenizer":
        theirs = pytest.importorskip("transformers").LlamaTokenizer.from_pretrained(source, add_bos_token=False)
        assert all(ours.encode(text) == theirs.encode(text) for text in (TAGGED, "no bos"))


@pytest.mark.parametrize("scheme", ["never", "first", "always"])
def test_continuations_under_metaspace(scheme, tiny_sentencepiece, tmp_path):
    """As transformers 5 writes Llama's tokenizer.json; `always` puts a space behind every added token."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    theirs = converted(tiny_sentencepiece)
    backend = theirs.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    theirs.add_tokens(ADDED if scheme != "always" else [])
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in (*STRINGS, TAGGED, TAGGED.removeprefix("Answer: ")):
        ids = ours.encode_continuation(" " + text)
        assert ours.decode(ids) == text and ours.spell(ids).decode() == " " + text
        assert ours.decode(ours.encode("Answer:") + ids) == "Answer: " + text
        assert ours.encode("Answer: " + text) == theirs.encode("Answer: " + text)


def test_added_tokens_that_are_nowhere_are_refused(tiny_sentencepiece, tmp_path):
    """As transformers 4 left them beside a tokenizer.model; a special one is no part of a text."""
    shutil.copytree(tiny_sentencepiece, tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 400, "[Chemical]": 401}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    with pytest.raises(TokenizerError, match=r"lacks '\[Chemical\]' \(1 such"):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    assert load_tokenizer(tmp_path).encode("x y") == load_tokenizer(tiny_sentencepiece).encode("x y")
    for decoder in ({"401": {"content": "[Chemical]", "special": False}}, {"401": "[Chemical]"}, ["[Chemical]"]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
        with pytest.raises(TokenizerError, match=f"{tmp_path}: its"):
            load_tokenizer(tmp_path)


def test_an_added_end_token(tiny_sentencepiece, tmp_path):
    theirs = converted(tiny_sentencepiece)
    theirs.add_special_tokens({"eos_token": "<|im_end|>"})
    theirs.save_pretrained(tmp_path)
    shutil.copy(tiny_sentencepiece / "tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).eos_id == theirs.eos_token_id == 400


# ---- sentencepiece variants ----


def trained(folder: Path, **options) -> Path:
    from sentencepiece import SentencePieceTrainer

    lines = (Path(__file__).parents[2] / "data/sample/train.PubTator.txt").read_text().splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=400, byte_fallback=True, normalization_rule_name="identity", character_coverage=0.99,
        minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("symbols", [[], ["[Chemical]", "[/Chemical]", "  "]], ids=["plain", "symbols"])
@pytest.mark.parametrize("dummy", [True, False])
def test_continuations_of_sentencepiece_variants(dummy, symbols, tmp_path):
    options = {"remove_extra_whitespaces": False, "add_dummy_prefix": dummy, "user_defined_symbols": symbols}
    tokenizer = load_tokenizer(trained(tmp_path, **options))
    for text in (*STRINGS, TAGGED, " two first"):
        ids = tokenizer.encode_continuation(" " + text)
        assert tokenizer.decode(ids) == text and tokenizer.spell(ids).decode() == " " + text
        assert tokenizer.decode(tokenizer.encode("Answer:") + ids) == "Answer: " + text


@pytest.mark.parametrize(
    "options",
    [
        {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": True},  # the space before an answer would be lost
    ],
)
def test_a_tokenizer_that_moves_spaces_is_refused(options, tmp_path):
    with pytest.raises(TokenizerError, match=f"{tmp_path}: its tokenizer moves spaces"):
        load_tokenizer(trained(tmp_path, **options))


# ---- folders ----


def test_the_end_token_comes_from_the_model_where_the_tokenizer_names_none(tiny_bytelevel, tmp_path):
    shutil.copy(tiny_bytelevel / "tokenizer.json", tmp_path)
    with pytest.raises(TokenizerError, match="no eos token"):
        load_tokenizer(tmp_path)
    for file in ("generation_config.json", "config.json"):
        for eos in (7, [7, 8]):
            (tmp_path / file).write_text(json.dumps({"eos_token_id": eos}))
            assert load_tokenizer(tmp_path).eos_id == 7
        (tmp_path / file).unlink()


def test_the_end_token_of_the_tokenizer_wins(tiny_bytelevel, tmp_path):
    shutil.copytree(tiny_bytelevel, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(tmp_path).eos_id == load_tokenizer(tiny_bytelevel).eos_id != 7
    written = {"eos_token": {"content": "<end>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(written))
    assert load_tokenizer(tmp_path).eos_id == load_tokenizer(tiny_bytelevel).eos_id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<fin>"}))
    with pytest.raises(TokenizerError, match="lacks the eos token '<fin>'"):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_of_the_file_are_ignored(tiny_bytelevel, tmp_path):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tiny_bytelevel / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    shutil.copytree(tiny_bytelevel, tmp_path, dirs_exist_ok=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    for text in STRINGS:
        assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(tiny_bytelevel).encode(text)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=f"{tmp_path}.*neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00garbage" * 50, "half"], ids=["empty", "garbage", "truncated"])
@pytest.mark.parametrize("source, file", list(zip(KINDS, ("tokenizer.model", "tokenizer.json"), strict=True)))
def test_a_corrupt_tokenizer_is_named(source, file, content, request, tmp_path):
    shutil.copytree(request.getfixturevalue(source), tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(TokenizerError, match=file):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_corrupt_file_beside_the_tokenizer_is_named(file, content, tiny_bytelevel, tmp_path):
    shutil.copytree(tiny_bytelevel, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError, match=file):
        load_tokenizer(tmp_path)


OTHERS = {
    "IQ== 0\nIg== 1\nIw== 2\n": "a tiktoken vocabulary.* tokenizer.json of the same model is needed",
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 499723\n": "a Git LFS pointer.*hf download",
    "<!DOCTYPE html><html>Access denied": "a web page",
}


@pytest.mark.parametrize("content", OTHERS)
def test_a_tokenizer_model_that_is_not_sentencepiece(content, tiny_bytelevel, tmp_path):
    """As Llama-3 has it beside its tokenizer.json, which is read then; alone, it is named."""
    folder = Path(shutil.copytree(tiny_bytelevel, tmp_path / "model"))
    expected = load_tokenizer(folder)
    (folder / "tokenizer.model").write_text(content)
    assert all(load_tokenizer(folder).encode(text) == expected.encode(text) for text in STRINGS)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=f"tokenizer.model: {OTHERS[content]}"):
        load_tokenizer(folder)


def test_the_tokenizer_must_fit_the_model(tokenizer):
    size = tokenizer.vocab_size
    for fitting in (size, size + 1, round(size / 0.92)):
        check_fit(tokenizer, fitting, "folder")
    for other in (size - 1, 2 * size):
        with pytest.raises(TokenizerError, match=f"folder: the tokenizer has {size} tokens but the model {other}"):
            check_fit(tokenizer, other, "folder")


def test_the_tokenizer_json_of_llama_2_is_not_byte_level(llama2_tokenizer, tmp_path):
    """Its pieces hold an ordinary `Ġ`; read as GPT-2's bytes, answers came back with `▁` for spaces."""
    transformers = pytest.importorskip("transformers")
    transformers.LlamaTokenizer.from_pretrained(str(llama2_tokenizer), add_bos_token=True).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    tokenizer = load_tokenizer(tmp_path)
    answer = " [Disease]Flu[/Disease] is bad\nand 漢"
    assert tokenizer.spell(tokenizer.encode_continuation(answer)).decode() == answer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # beside a tokenizer.model with the same tokens, it is what transformers reads, and cuts some texts otherwise
    shutil.copy(llama2_tokenizer / "tokenizer.model", tmp_path)
    both = load_tokenizer(tmp_path)
    for text in (*PROBES, "Input: Naloxone reverses it.\nAnswer:"):
        assert tokenizer.encode(text) == both.encode(text) == theirs(text)["input_ids"]
