"""JSON lines with tokens and tags, as data sets of Hugging Face hold them."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TextIO

from .documents import CorpusError, Document, Reading, Span
from .format import Format
from .json_lines import json_head, json_records
from .tagged import UNNAMED, laid_out, mentions_of, named, tagged, tags_of

_TAGS = ("ner_tags", "tags", "labels", "label")
_MENTIONS = ("entities", "ner", "mentions")  # of SpERT and DyGIE++, by token
# Where the names of tags may stand that are numbers: beside the file.
NAMES = (
    "dataset_infos.json", "dataset_info.json", "features.json", "label.json", "labels.json", "labels.txt", "label.txt",
)  # fmt: skip


def is_tokens(lines: Iterable[str]) -> bool:
    """Whether a file is of JSON lines that hold tokens, and not only beside a text, whose mentions are spans."""
    head = json_head(lines)
    tagged = re.search(rf'"({"|".join(_TAGS)})"\s*:\s*\[\s*("|-?\d|\])', head)
    return bool(re.search(r'"tokens"\s*:\s*\[\s*("|\])', head) and (tagged or not re.search(r'"text"\s*:\s*"', head)))


def token_documents(
    lines: Iterable[tuple[str, str]], name: str, reading: Reading, reference: Sequence[Document] = ()
) -> list[Document]:
    """Parses JSON lines of objects with `tokens` and `ner_tags` (or `tags`, `labels`): a sentence a line.

    Each sentence is a document, unless lines that follow each other have the same `document_id`. Tags are names
    (`B-Disease`), or numbers whose names a file beside gives (`NAMES`). Ids are those of the file, else its stem and a
    running number, or those of the `reference` in order.

    Args:
        lines: each with its `file:line`.
        reading: takes notes, and what is wrong with single lines.
    """
    groups: dict[str, list[tuple[list[str], list[str]]]] = {}
    stem = re.sub(r"\.(jsonl|ndjson|json)(\.gz)?$", "", Path(name).name, flags=re.IGNORECASE)
    tag_names = _TagNames(Path(name).parent)
    last = None
    for where, record in json_records(lines, name, reading):
        sentence = _sentence(where, record, tag_names, reading)
        if sentence is None or not isinstance(record, dict):
            continue
        id = record.get("document_id", record.get("id"))
        if id is None:
            id = reference[len(groups)].id if len(groups) < len(reference) else f"{stem}-{len(groups) + 1}"
        if str(id) in groups and (str(id) != last or "document_id" not in record):
            reading.faults.append(f"{where}: a second document {id}; ids must be unique in a file")
        last = str(id)
        groups.setdefault(last, []).append(sentence)
    return [_document(id, sentences, reading) for id, sentences in groups.items()]


def _sentence(where: str, record: object, names: "_TagNames", reading: Reading) -> tuple[list[str], list[str]] | None:
    """The tokens and tags of a line; None and a fault where it has none."""
    tokens = record.get("tokens") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        reading.faults.append(f'{where}: no tokens; each line is like {{"tokens": ["..."], "ner_tags": ["O"]}}')
        return None
    field = next((field for field in _TAGS if isinstance(record.get(field), list)), None)
    if not field and (other := next((name for name in _MENTIONS if record.get(name)), None)):
        what = f"mentions in {other!r} by token, which are not read; give each token a tag in ner_tags"
        reading.faults.append(f"{where}: {what}")
        return None
    for other, value in record.items():
        if other not in ("id", "document_id", "tokens", field) and value not in (None, "", [], {}):
            reading.notes[f"fields {other!r} not read"] += 1
    if field is None:
        reading.notes["sentences without a field of tags"] += 1
    tags = record[field] if field else ["O"] * len(tokens)
    if len(tags) != len(tokens):
        reading.faults.append(f"{where}: {len(tokens)} tokens and {len(tags)} {field}; each token has one tag")
        return None
    try:
        given = [names.of(tag, field or "") for tag in tags]
    except CorpusError as error:
        reading.faults.append(f"{where}: {error}")
        return None
    cells = named(given)
    if cells is not given:
        reading.notes[UNNAMED] += 1
    if wrong := [cell for cell in cells if not tags_of(cell)]:
        reading.faults.append(f"{where}: {wrong[0]!r} is no tag; a tag is like O or B-Disease")
        return None
    pairs = [(token, cell) for token, cell in zip(tokens, cells, strict=True) if token.strip()]
    if blank := len(tokens) - len(pairs):
        reading.notes["tokens of nothing but whitespace, left out"] += blank
    return [token for token, _ in pairs], [cell for _, cell in pairs]


class _TagNames:
    """The names of tags that are numbers, looked for when the first one comes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: dict[str, list[str]] = {}

    def of(self, tag: object, field: str) -> str:
        """The name of a tag, which is its name or the number of it.

        Raises:
            CorpusError: no name is known for it.
        """
        if isinstance(tag, str) and not tag.isdigit():
            return tag
        if field not in self.found:
            self.found[field] = _names_beside(self.folder, field)
        names = self.found[field]
        if not names:
            raise CorpusError(
                f"{field} are numbers, and nothing in {self.folder} names them; put there a labels.txt with a tag a "
                f"line (O, B-Disease, ...) in the order of the numbers, or the data set's {NAMES[0]}"
            )
        if not re.fullmatch("[0-9]{1,9}", str(tag)) or int(str(tag)) >= len(names):
            raise CorpusError(f"{tag!r} is the number of no tag; {self.folder} names 0 to {len(names) - 1}")
        return names[int(str(tag))]


def _names_beside(folder: Path, field: str) -> list[str]:
    """The names of tags in the order of their numbers, from the first of `NAMES` that has them."""
    for path in (folder / name for name in NAMES):
        try:
            text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            names = lines if path.suffix == ".txt" else _names_in(json.loads(text), field) if lines else []
        except (OSError, ValueError, RecursionError) as error:
            raise CorpusError(f"{path}: cannot be read ({error})") from error
        if names:
            return names
    return []


def _names_in(value: object, field: str) -> list[str]:
    """The names in a description of features (`names` of the field), in a list, or in a table of names and numbers."""
    if isinstance(value, list):
        return value if all(isinstance(name, str) for name in value) else []
    if not isinstance(value, dict):
        return []
    if value and all(isinstance(number, int) for number in value.values()):  # {"O": 0, "B-Disease": 1}
        return sorted(value, key=lambda name: value[name]) if sorted(value.values()) == [*range(len(value))] else []
    if value and all(str(number) in value for number in range(len(value))):  # {"0": "O", "1": "B-Disease"}
        return [str(value[str(number)]) for number in range(len(value))]
    inner = value.get(field)
    if isinstance(inner, dict):
        feature = inner.get("feature", inner)
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list):
            return _names_in(names, field)
    return next(filter(None, (_names_in(part, field) for part in value.values() if isinstance(part, dict))), [])


def _document(id: str, sentences: Sequence[tuple[list[str], list[str]]], reading: Reading) -> Document:
    sentences = [sentence for sentence in sentences if sentence[0]]
    text, tokens = laid_out(words for words, _ in sentences)
    spans = set()
    for (_, cells), bounds in zip(sentences, tokens, strict=True):
        for first, last, label in mentions_of(cells):
            spans.add(reading.trimmed(text, Span(bounds[first][0], bounds[last][1], label)))
    ends = tuple((bounds[0][0], bounds[-1][1]) for bounds in tokens)
    return Document(id, text, tuple(sorted(filter(None, spans))), ends, tuple(chain(*tokens)))


# ---- writing ----


def write_tokens(documents: Iterable[Document], file: TextIO, lost: Counter[str]) -> None:
    """Writes a line for each sentence: id, tokens, ner_tags as names (IOB2), and `document_id` where there are several.

    Args:
        lost: takes what cannot be written (see `tagged`).
    """
    for document in documents:
        sentences = tagged(document, lost)
        for number, sentence in enumerate(sentences, start=1):
            own = {"id": document.id}
            if len(sentences) > 1:
                own = {"id": f"{document.id}-{number}", "document_id": document.id}
            line = {"tokens": [word for word, _ in sentence], "ner_tags": [tag for _, tag in sentence]}
            file.write(json.dumps(own | line, ensure_ascii=False) + "\n")


TOKENS = Format("hf", ("json", "jsonl", "ndjson"), is_tokens, token_documents, write_tokens)
