"""Corpus statistics: against the paper's Table 5, and against counts made another way."""

import json
import re
from pathlib import Path

import pytest

from llamalora.__main__ import main
from llamalora.cli import run_command
from llamalora.corpus.documents import Documents, sentences_of
from llamalora.corpus.read import find_splits, read_documents
from llamalora.paper.stats import statistics
from llamalora.task.definition import Task
from llamalora.task.prompt import render_answer
from llamalora.task.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data/sample"


def stats(capsys, *flags) -> dict:
    main(["stats", *map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def printed(capsys, *flags) -> str:
    main(["stats", *map(str, flags)])
    return capsys.readouterr().out


def test_bc5cdr_agrees_with_table_5(bc5cdr, capsys):
    result = stats(capsys, "--data", bc5cdr)
    assert [split["documents"] for split in result.values()] == [500, 500, 500]
    assert all(split["mentions"] == split["table5"] for split in result.values())
    text = printed(capsys, "--data", bc5cdr)
    assert text.count("✓") == 6 + 1 and "4,182 ✓" in text and "Table 5:" not in text


def test_a_count_that_differs_stands_beside_the_paper_s(bc5cdr_iob, capsys):
    """Two mentions of the tokenised form are cut in two."""
    text = printed(capsys, "--data", bc5cdr_iob)
    assert "4,246 (Table 5: 4,244)" in text and text.count("✓") == 5 + 1


def test_lengths_in_tokens(tiny_sentencepiece, capsys):
    result = stats(capsys, "--data", SAMPLE, "--model", tiny_sentencepiece)
    tokenizer = load_tokenizer(tiny_sentencepiece)
    for name, path in find_splits(SAMPLE).items():
        documents = read_documents(path)
        task = Task("tagging", ("Disease", "Chemical"), False)
        sentences = [sentence for document in documents for sentence in sentences_of(document)]
        plain = [len(tokenizer.encode(sentence.text)) - 1 for sentence in sentences]  # without bos
        tagged = [
            len(tokenizer.encode(render_answer(task, sentence.text, sentence.spans))) - 1 for sentence in sentences
        ]
        for lengths, key in ((plain, "sentence"), (tagged, "answer")):
            found = result[name]["tokens"][key]
            assert found["max"] == max(lengths) and found["mean"] == pytest.approx(sum(lengths) / len(lengths))
        lengths = [len(sentence.text) for sentence in sentences]
        assert result[name]["characters_per_sentence"] == {"mean": pytest.approx(sum(lengths) / len(lengths)),
                                                           "max": max(lengths)}  # fmt: skip
    text = printed(capsys, "--data", SAMPLE, "--model", tiny_sentencepiece)
    assert "tokens of a sentence" in text and "tokens of it tagged" in text


def test_without_a_model_there_are_no_tokens(capsys):
    assert all("tokens" not in split for split in stats(capsys, "--data", SAMPLE).values())
    assert "tokens" not in printed(capsys, "--data", SAMPLE)


def test_other_labels_are_not_compared(tmp_path, tiny_sentencepiece, capsys):
    (tmp_path / "train.txt").write_text("Rome B-PLACE\nfell O\n\nA O\nfever B-Disease\n")
    (tmp_path / "test.txt").write_text("Nothing O\n")
    result = stats(capsys, "--data", tmp_path)
    assert result["train"]["mentions"] == {"Disease": 1, "PLACE": 1} and result["test"]["mentions"] == {}
    assert all("table5" not in split for split in result.values())
    text = printed(capsys, "--data", tmp_path, "--model", tiny_sentencepiece)
    assert "PLACE mentions" in text and "Table 5" not in text


def test_a_corpus_without_mentions(tmp_path, tiny_sentencepiece, capsys):
    (tmp_path / "train.txt").write_text("Nothing O\nhere O\n")
    text = printed(capsys, "--data", tmp_path, "--model", tiny_sentencepiece)
    assert "tokens of a sentence" in text and "tagged" not in text
    assert statistics({"train": Documents()})["train"]["sentences"] == 0


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "nowhere: no such corpus folder"),
    (["--data", str(SAMPLE), "--model", str(SAMPLE)], "no model folder but a corpus folder"),
    ([], "--data"),
])  # fmt: skip
def test_bad_input_ends_with_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["stats", *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_any_label_can_be_tagged(tmp_path, tiny_sentencepiece, capsys):
    """Before, the labels of this corpus were refused."""
    (tmp_path / "train.txt").write_text("Rome B-a;b\n")
    result = stats(capsys, "--data", tmp_path, "--model", tiny_sentencepiece)["train"]
    assert result["mentions"] == {"a;b": 1}
    assert result["tokens"]["answer"]["max"] > result["tokens"]["sentence"]["max"]


def test_the_ceiling_of_each_format(tmp_path, capsys):
    """Two of three mentions of a string that is tagged once in two of its places; of nested ones the outer alone."""
    lines = "Art B-LAW\n5 I-LAW\nand O\nArt O\n5 O\n\nArt B-LAW\n7 I-LAW\n"
    (tmp_path / "train.txt").write_text(lines)
    result = stats(capsys, "--data", tmp_path)["train"]["ceiling"]
    assert result == {"tagging": 1.0, "extraction": pytest.approx(4 / 5)}  # 2 found, 1 too many
    nested = "TU\tB-ORG\tO\nRome\tI-ORG\tB-LOC\n"
    (tmp_path / "train.txt").write_text(nested)
    result = stats(capsys, "--data", tmp_path)["train"]
    assert result["ceiling"] == {"tagging": pytest.approx(2 / 3), "extraction": pytest.approx(2 / 3)}
    assert result["overlapping"] == 1 and result["notes"] == {"mentions from a further column of tags": 1}
    text = printed(capsys, "--data", tmp_path)
    assert re.search(r"^F1 of right answers, extraction +66.67$", text, re.MULTILINE)
    assert "\n\ntrain: mentions from a further column of tags: 1" in text
