"""JSON lines with spans, as doccano, spaCy, Prodigy and our own `predict` write them."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from .documents import Document, Reading, Span, sentence_bounds
from .format import Format
from .json_lines import json_head, json_records

_MENTIONS = ("entities", "ents", "spans", "annotations", "label", "labels")
# What is read, and what says the same in another way.
_KNOWN = {"id", "text", "answer", *_MENTIONS}
_KNOWN_OF_MENTIONS = {"start", "end", "start_offset", "end_offset", "label", "text", "token_start", "token_end", "id"}


def is_spans(lines: Iterable[str]) -> bool:
    """Whether a file is of JSON lines that hold a text."""
    head = json_head(lines)
    return bool(re.search(r'"text"\s*:\s*"|^\[\s*"', head)) and '"passages"' not in head


def span_documents(
    lines: Iterable[tuple[str, str]], name: str, reading: Reading, reference: Sequence[Document] = ()
) -> Iterator[Document]:
    """Parses JSON lines, or an array, of objects with a `text` and mentions, as they come.

    The mentions stand in `entities`, `ents`, `spans`, `annotations`, `label` or `labels`: each `[start, end, label]`,
    or an object with `start` and `end` (or `start_offset`, `end_offset`) and `label`; groups of them by name, as spaCy
    has them, are all read, and so is spaCy's older `[text, {"entities": ...}]`. Prodigy's examples whose `answer` is
    not `accept` are left out. Where there is no `id`, it is the file's stem and a running number (`dev-17`), or that of
    the `reference` in its place.

    Args:
        lines: each with its `file:line`.
        reading: takes notes, and what is wrong with single lines.
    """
    stem = re.sub(r"\.(jsonl|ndjson|json)(\.gz)?$", "", Path(name).name, flags=re.IGNORECASE)
    seen: dict[str, int] = {}
    for number, (where, record) in enumerate(json_records(lines, name, reading), start=1):
        if isinstance(record, list) and len(record) == 2 and isinstance(record[1], dict):
            record = {**record[1], "text": record[0]}
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(text, str):
            reading.faults.append(f'{where}: no text; each line is like {{"text": "...", "entities": [...]}}')
            continue
        answer = record.get("answer")
        if answer not in (None, "accept"):
            reading.notes[f"examples whose answer is {answer}, left out"] += 1
            continue
        id = record.get("id")
        if id is None:
            id = reference[number - 1].id if number <= len(reference) else f"{stem}-{number}"
        id = str(id)
        document = Document(id, text, (), sentence_bounds(text))
        spans = {_mention(where, item, document, reading) for item in _items(record, reading)}
        document = replace(document, spans=tuple(sorted(filter(None, spans))))
        if reading.is_new(where, document, seen):
            yield document


def _items(record: dict, reading: Reading) -> list:
    """What stands for mentions in a line."""
    found: dict[str, list] = {}
    for field in _MENTIONS:
        value = record.get(field)
        if isinstance(value, dict) and all(isinstance(group, list) for group in value.values()):  # spaCy's groups
            value = [item for group in value.values() for item in group]
        if isinstance(value, list) and not (value and all(isinstance(item, str) for item in value)):
            found[field] = value
        elif value is not None:  # labels of the whole text
            reading.notes[f"fields {field!r} that hold no mentions, not read"] += 1
    if not found:
        reading.notes["texts without a field of mentions"] += 1
    if sum(map(bool, found.values())) > 1:
        reading.notes["texts with mentions in several fields, all read"] += 1
    _note_others(record, _KNOWN, "fields {!r} not read", reading)
    return [item for value in found.values() for item in value]


def _mention(where: str, item: object, document: Document, reading: Reading) -> Span | None:
    written = None
    if isinstance(item, list) and len(item) == 3:
        start, end, label = item
    elif isinstance(item, dict):
        start, end = (item.get(name, item.get(f"{name}_offset")) for name in ("start", "end"))
        label, written = item.get("label"), item.get("text")
        _note_others(item, _KNOWN_OF_MENTIONS, "fields {!r} of mentions, not read", reading)
    else:
        form = '[start, end, label] or {"start": ..., "end": ..., "label": ...}'
        reading.faults.append(f"{where}: {json.dumps(item, ensure_ascii=False)[:60]} is no mention; write {form}")
        return None
    return reading.mention(where, document, start, end, label, written if isinstance(written, str) else None)


def _note_others(record: Mapping[str, object], known: Collection[str], note: str, reading: Reading) -> None:
    """Notes fields that are not read, but for those that are empty or by their name (`_view_id`) a tool's own."""
    for field, value in record.items():
        if field not in known and not field.startswith("_") and value not in (None, "", [], {}):
            reading.notes[note.format(field)] += 1


# ---- writing ----


def span_record(document: Document) -> dict:
    """The object of a line: id, text and entities, each with start, end, label and text."""
    entities = [vars(span) | {"text": document.text[span.start : span.end]} for span in document.spans]
    return {"id": document.id, "text": document.text, "entities": entities}


def write_spans(documents: Iterable[Document], file: TextIO, lost: Counter[str]) -> None:
    """Writes a line for each document; nothing is lost but the bounds of its sentences."""
    for document in documents:
        file.write(json.dumps(span_record(document), ensure_ascii=False) + "\n")


SPANS = Format("jsonl", ("jsonl", "ndjson", "json"), is_spans, span_documents, write_spans)
