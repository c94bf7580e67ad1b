"""Answers -> scores, and the files that keep both."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ..corpus.documents import CorpusError, Document, Sentence, Span, label_order
from ..files import replace_file, write_json
from ..model.config import CheckpointError, read_json
from ..task import error_tables
from ..task.definition import Task
from ..task.error_tables import format_summary
from ..task.errors import analyse
from ..task.parse import parse
from ..task.score import Keys, bootstrap, document_counts, format_table, score, span_keys
from ..text_table import legend, used, wrapped
from .answered import Answer

RESULT, ANSWERS = "eval-{}.json", "answers-{}.jsonl"  # of a split


def predicted_documents(documents: Sequence[Document], answers: Sequence[Answer]) -> list[Document]:
    """The documents with the mentions of the answers, as document offsets, in place of their own."""
    found: dict[str, list[Span]] = {}
    for item in answers:
        shifted = found.setdefault(item.sentence.document, [])
        for span in item.parsed.spans:
            shifted.append(Span(span.start + item.sentence.start, span.end + item.sentence.start, span.label))
    return [replace(document, spans=tuple(sorted(found.get(document.id, ())))) for document in documents]


def confidence_by_mention(answers: Sequence[Answer]) -> dict[tuple[str, int, int, str], float]:
    """The confidence of every mention of `predicted_documents`, by document, start, end and label."""
    return {_key(item.sentence, span): sure for item in answers for span, sure in item.confidence.items()}


def assess(
    documents: Sequence[Document],
    answers: Sequence[Answer],
    labels: Sequence[str],
    known: Collection[tuple[str, str]] = (),
) -> dict:
    """Scores of answers against documents' own mentions of these labels, ready for JSON.

    The headline is exact (document, start, end, label); an entity that its sentence does not hold counts
    as a false positive. Such an entity has no offsets, so that no file of predictions can tell of it: `placed` is the
    score without it, that which `llamalora score` gives those files. `unscored` counts gold mentions of
    other labels, which nobody asked for. `secondary` has two other conventions: each string placed at its first
    occurrence only, and the set of (sentence, string, label). `by_document` has the counts of true positives,
    false positives and false negatives of each document for the headline, and for the first of the others,
    so that results can be compared document by document. `errors` is `task.errors.analyse`.

    Args:
        known: the (label, string) of the mentions in training, if those seen there are to be told apart.
    """
    gold = gold_keys(documents, labels)
    placed, exact = placed_keys(answers), predicted_keys(answers)
    first, strings, gold_strings, inside = exact - placed, Keys(), Keys(), Keys()
    for item in answers:
        sentence, parsed = item.sentence, item.parsed
        here, text = (sentence.document, sentence.start), sentence.text
        named = [(span.label, text[span.start : span.end]) for span in parsed.spans]
        first |= {_key(sentence, span) for span in parsed.first}
        strings |= {(*here, string, label) for label, string in (*named, *parsed.not_in_source)}
        gold_strings |= {
            (*here, text[span.start : span.end], span.label) for span in sentence.spans if span.label in labels
        }
        inside |= {_key(sentence, span) for span in sentence.spans}
    gold_strings |= gold - inside  # cut by a sentence end: missed by every answer
    unscored = Counter(s.label for d in documents for s in d.spans if s.label not in labels)
    texts = {document.id: document.text for document in documents}
    ids = [document.id for document in documents]
    by_document = document_counts(gold, exact, ids)
    return {
        **score(gold, exact, labels),
        "interval": bootstrap(by_document),
        "placed": score(gold, placed, labels),
        "unscored": {label: unscored[label] for label in label_order(unscored)},
        "secondary": {
            "first_occurrence": score(gold, first, labels),
            "string_set": score(gold_strings, strings, labels),
        },
        "errors": analyse(gold, exact, labels, texts, known or None, confidence_by_mention(answers)),
        "health": health(answers),
        "documents": len(documents),
        "sentences": len(answers),
        "by_document": {
            "exact": dict(zip(ids, by_document.tolist(), strict=True)),
            "first_occurrence": dict(zip(ids, document_counts(gold, first, ids).tolist(), strict=True)),
        },
    }


def gold_keys(documents: Sequence[Document], labels: Collection[str]) -> Keys:
    """The documents' own mentions of these labels."""
    return {key for key in span_keys(documents) if key[-1] in labels}


def placed_keys(answers: Sequence[Answer]) -> Keys:
    """The mentions of the answers, as far as their sentences hold them."""
    return {_key(item.sentence, span) for item in answers for span in item.parsed.spans}


def predicted_keys(answers: Sequence[Answer]) -> Keys:
    """The mentions of the answers, and the entities that are not in their sentence, by a key without a place."""
    keys = placed_keys(answers)
    for item in answers:
        here = (item.sentence.document, item.sentence.start, "not in source")
        keys |= {(*here, string, label) for label, string in item.parsed.not_in_source}
    return keys


def mention_strings(sentences: Sequence[Sentence]) -> set[tuple[str, str]]:
    """The (label, string) of all their mentions."""
    return {(span.label, item.text[span.start : span.end]) for item in sentences for span in item.spans}


def _key(sentence: Sentence, span: Span) -> tuple[str, int, int, str]:
    return (sentence.document, sentence.start + span.start, sentence.start + span.end, span.label)


def health(answers: Sequence[Answer]) -> dict:
    """How well-formed the outputs are: counts of sentences, except `exact_copy` (a share of them),
    `unaligned` and `not_in_source` (counts of mentions)."""
    parsed = [item.parsed for item in answers]
    return {
        "exact_copy": sum(p.exact_copy for p in parsed) / max(1, len(parsed)),
        "unbalanced": sum(p.unbalanced for p in parsed),
        "truncated": sum(p.truncated for p in parsed),
        "unaligned": sum(p.unaligned for p in parsed),
        "not_in_source": sum(len(p.not_in_source) for p in parsed),
        "overlong": sum(item.overlong for item in answers),
    }


def write_result(result: dict, answers: Sequence[Answer], folder: Path) -> Path:
    """Writes `answers-SPLIT.jsonl`, what the model wrote about each sentence and how sure it was of the mentions (as
    offsets into the sentence), and then `eval-SPLIT.json`, with the SHA-256 of both, into a folder; a reader never
    meets half of one. Returns the path of the second."""
    lines = []
    for item in answers:
        place = {"document": item.sentence.document, "start": item.sentence.start}
        state = {"output": item.output, "truncated": item.parsed.truncated, "overlong": item.overlong}
        mentions = [vars(span) | {"confidence": round(sure, 4)} for span, sure in item.confidence.items()]
        lines.append(json.dumps(place | state | {"mentions": mentions}, ensure_ascii=False) + "\n")
    written = "".join(lines)
    path, answers_path = (folder / name.format(result["split"]) for name in (RESULT, ANSWERS))
    replace_file(answers_path, written)
    sums = {path.name: _sha256(json.dumps(result)), answers_path.name: _sha256(written)}
    return write_json(result | {"sha256": sums}, path)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_result(folder: Path, split: str) -> dict:
    """What was given to `write_result`."""
    result = json.loads((folder / RESULT.format(split)).read_text())
    result.pop("sha256", None)
    return result


def find_changes(folder: Path, split: str) -> list[str]:
    """Which of the two files of a result are not as `write_result` wrote them."""
    path, answers = (folder / name.format(split) for name in (RESULT, ANSWERS))
    try:
        result = read_json(path)
        written = answers.read_text(encoding="utf-8") if answers.is_file() else ""
    except (CheckpointError, ValueError) as error:
        return [str(error)]
    sums = result.pop("sha256", None)
    found = {path: _sha256(json.dumps(result)), answers: _sha256(written)}
    if not isinstance(sums, dict):
        return [f"{path}: has no SHA-256, so it is another program's or another version's"]
    return [f"{file}: changed since it was written" for file, sum in found.items() if sums.get(file.name) != sum]


def read_answers(folder: Path, split: str, task: Task, asked: Sequence[Sentence]) -> list[Answer]:
    """The answers that `write_result` wrote, parsed again.

    Args:
        asked: the sentences that they are about, in order.

    Raises:
        CorpusError: they are about others.
    """
    answers = []
    path = folder / ANSWERS.format(split)
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
        if [(kept["document"], kept["start"]) for kept in lines] != [(item.document, item.start) for item in asked]:
            raise CorpusError(f"{path}: answers about other sentences than the corpus has now")
        for sentence, kept in zip(asked, lines, strict=True):
            parsed = parse(task, sentence.text, kept["output"], kept["truncated"])
            confidence = {Span(m["start"], m["end"], m["label"]): m["confidence"] for m in kept["mentions"]}
            answers.append(Answer(sentence, kept["output"], parsed, kept["overlong"], confidence))
    return answers


WORDS = {
    "first occurrence": "an extracted string counts at its first place alone",
    "string set": "strings with labels are compared, not their places",
    "exact copies": "outputs that change nothing in what they copy",
    "unbalanced": "outputs whose tags or lists are not well formed",
    "truncated": "outputs that met the limit of new tokens",
    "unaligned": "tagged mentions that could not be placed, so rejected",
    "not in source": "predicted strings that the sentence does not hold",
    "overlong": "sentences that exceed the model's context: not asked",
}


def format_legend(result: dict, text: str) -> str:
    """What the words of a report mean, those that stand in `text`; of troubles only those that there were."""
    none = {name.replace("_", " ") for name, count in result["health"].items() if not count}
    known = {word: meaning for word, meaning in (WORDS | error_tables.WORDS).items() if word not in none}
    return legend(used(known, text))


def format_report(result: dict) -> str:
    """The scores as a table for the terminal, with the health of the outputs below."""
    interval, state, secondary = result["interval"], result["health"], result["secondary"]
    table = format_table(result)
    lines = [
        f"95 % interval of micro F1 (bootstrap over {result['documents']} documents): "
        f"{100 * interval['low']:.2f} to {100 * interval['high']:.2f}"
        if result["documents"] > 1
        else "no interval of micro F1, which is drawn over documents: there is one",
        f"other conventions: first occurrence {100 * secondary['first_occurrence']['micro']['f1']:.2f}, "
        f"string set {100 * secondary['string_set']['micro']['f1']:.2f}",
        *([format_summary(result["errors"])] if "errors" in result else []),  # runs of earlier versions have none
        f"outputs: {100 * state['exact_copy']:.1f} % exact copies; "
        + ", ".join(
            f"{name.replace('_', ' ')} {state[name]}"
            for name in ("unbalanced", "truncated", "unaligned", "not_in_source", "overlong")
        ),
    ]
    if state["not_in_source"] and "placed" in result:
        placed, headline = result["placed"]["micro"], result["micro"]
        lines.append(
            f"false positives that stand nowhere in their sentence, so that files of predictions lack them: "
            f"{headline['fp'] - placed['fp']}; `score` gives such a file F1 {100 * placed['f1']:.2f}"
        )
    if result.get("unscored"):
        counts = ", ".join(f"{label} {number:,}" for label, number in result["unscored"].items())
        lines.append(f"gold mentions of labels that the model is not asked for, which count nowhere: {counts}")
    if "speed" in result:
        speed = result["speed"]
        lines.append(
            f"speed: {speed['sentences_per_second']:.2f} sentences/s, {speed['tokens_per_second']:.0f} tokens/s, "
            f"{speed['tokens_per_row_pass']:.1f} tokens of an answer in each pass"
        )
    return "\n".join([table, *map(wrapped, lines)])
