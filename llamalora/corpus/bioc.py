"""BioC, as XML and as JSON: collections of documents of passages, as PubTator Central and PMC hand them out.

XML is read and written by the library `bioc` (`pip install 'llamalora[bioc]'`); JSON is the same tree.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from .documents import CorpusError, Document, Reading, Span, sentence_bounds
from .format import Format
from .json_lines import json_head, json_records

_WIDEST = 1000  # spaces between two passages that are written for the sake of their offsets
# How many units of an offset a character takes. The standard leaves that open.
_UNITS: dict[str, Callable[[str], int]] = {
    "characters": len,
    "UTF-8 bytes": lambda text: len(text.encode()),
    "UTF-16 units": lambda text: len(text.encode("utf-16-le")) // 2,
}


def is_bioc_xml(lines: Iterable[str]) -> bool:
    """Whether a file begins as BioC XML does."""
    head = ""
    for line in lines:
        head += line
        if not line.lstrip().startswith("<") and line.strip() or len(head) > 2000 or "<collection" in head:
            break
    return head.lstrip().startswith("<") and "<collection" in head


def is_bioc_json(lines: Iterable[str]) -> bool:
    """Whether a file begins as BioC JSON does: a collection, several, or a document a line."""
    return bool(re.search(r'"(documents|passages|bioctype)"\s*:', json_head(lines)))


def bioc_xml_documents(
    lines: Iterable[tuple[str, str]], name: str, reading: Reading, reference: Sequence[Document] = ()
) -> Iterator[Document]:
    """The documents of BioC XML (see `_documents`).

    Raises:
        CorpusError: the library is not installed, or this is no such XML.
    """
    biocxml, biocjson = _library(name)
    # whatever coding it declares, it has been decoded
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", "\n".join(line for _, line in lines))
    if "<!ENTITY" in text:
        raise CorpusError(f"{name}: declares entities, which BioC does not need and which may read other files")
    try:
        collection = biocxml.loads(text)
    except Exception as error:  # lxml's errors of syntax, and whatever the library meets where something is missing
        raise CorpusError(f"{name}: no BioC XML ({type(error).__name__}: {error})") from error
    return _documents(((name, biocjson.toJSON(document)) for document in collection.documents), reading)


def bioc_json_documents(
    lines: Iterable[tuple[str, str]], name: str, reading: Reading, reference: Sequence[Document] = ()
) -> Iterator[Document]:
    """The documents of BioC JSON (see `_documents`): of a collection, of a list of them, of one under a name
    (`{"PubTator3": [...]}`), or a document a line."""
    records = json_records(lines, name, reading)
    return _documents(((place, found) for where, record in records for place, found in _found(where, record)), reading)


def _found(where: str, value: object) -> Iterator[tuple[str, object]]:
    """The documents in a value, wherever they are in it."""
    if isinstance(value, list):
        for item in value:
            yield from _found(where, item)
    elif isinstance(value, dict) and "passages" not in value:
        inner = [item for item in value.values() if isinstance(item, list)]
        for item in inner:
            yield from _found(where, item)
        if not inner:
            yield where, value
    else:
        yield where, value


def _library(name: str):
    try:
        from bioc import biocjson, biocxml
    except ImportError:
        raise CorpusError(f"{name}: BioC XML needs the library bioc: pip install 'llamalora[bioc]'") from None
    return biocxml, biocjson


# ---- the tree -> documents ----


@dataclass
class _Piece:
    """A passage, or a sentence of one that has no text itself."""

    offset: int  # where it begins, as the file counts
    text: str
    is_sentence: bool
    start: int = 0  # where it begins in our document


def _documents(records: Iterable[tuple[str, object]], reading: Reading) -> Iterator[Document]:
    """Documents of BioC's tree as JSON has it.

    The text is that of the passages, at their offsets; no sentence goes beyond a passage. A mention in several
    locations is read from the first to the last. Offsets count characters, or bytes or UTF-16 units where only these
    fit the texts of a document's mentions.
    """
    seen: dict[str, int] = {}
    for where, record in records:
        try:
            document = _document(where, record, reading)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            id = record.get("id") if isinstance(record, dict) else None
            reading.faults.append(f"{where}: document {id}: no BioC ({type(error).__name__}: {error})")
            continue
        if reading.is_new(where, document, seen):
            yield document


def _document(where: str, record, reading: Reading) -> Document:
    passages = record["passages"]
    nodes = [record, *passages, *(sentence for passage in passages for sentence in passage.get("sentences") or ())]
    annotations = [item for node in nodes for item in node.get("annotations") or ()]
    if relations := sum(len(node.get("relations") or ()) for node in nodes):
        reading.notes["relations not read"] += relations
    pieces = [piece for passage in passages for piece in _pieces(passage)]
    unit = _unit(pieces, annotations)
    if unit != "characters":
        reading.notes[f"documents whose offsets count {unit}, read so"] += 1
    if len(passages) > 1:
        reading.notes["documents of several passages, read as one text"] += 1
    text = ""
    sentences: list[tuple[int, int]] = []
    end = 0  # of the piece before, as the file counts
    for piece in pieces:
        gap = piece.offset - end
        if not 0 <= gap <= _WIDEST:
            reading.notes["passages that do not follow the one before by their offset, moved there"] += 1
            gap = 1 if text else 0
        piece.start = len(text) + gap
        text += " " * gap + piece.text
        whole = [(0, len(piece.text))] if piece.is_sentence else sentence_bounds(piece.text)
        sentences += [(piece.start + first, piece.start + last) for first, last in whole]
        end = piece.offset + _UNITS[unit](piece.text)
    id = str(record["id"])
    document = Document(id, text, (), tuple(sentences))
    spans = {_mention(where, item, document, pieces, unit, reading) for item in annotations}
    return Document(id, text, tuple(sorted(filter(None, spans))), document.sentences)


def _pieces(passage: dict) -> list[_Piece]:
    if passage.get("text"):
        return [_Piece(int(passage["offset"]), passage["text"], False)]
    sentences = passage.get("sentences") or ()
    return [_Piece(int(item["offset"]), item["text"], True) for item in sentences if item.get("text")]


def _unit(pieces: Sequence[_Piece], annotations: Sequence[dict]) -> str:
    """What the offsets count: characters, unless only another unit fits all mentions that say their text."""
    if all(piece.text.isascii() for piece in pieces):
        return "characters"
    told = [item for item in annotations if item.get("text") and len(item.get("locations") or ()) == 1]

    def fits(unit: str) -> bool:
        for item in told:
            (start, end), *_ = _locations(item)
            piece = _piece_at(start, pieces)
            begin, stop = (_characters(piece.text, offset - piece.offset, unit) for offset in (start, end))
            if piece.text[begin:stop].split() != item["text"].split():
                return False
        return bool(told)

    return next(filter(fits, _UNITS), "characters")


def _mention(
    where: str, item: dict, document: Document, pieces: Sequence[_Piece], unit: str, reading: Reading
) -> Span | None:
    locations = _locations(item)
    place = f"{where}: annotation {item.get('id')} of {document.id}"
    if not locations:  # as NLM-Chem's concepts of a whole article
        reading.notes["annotations without a location, which mark no text, left out"] += 1
        return None
    if not pieces:
        reading.faults.append(f"{place}: its document has no text")
        return None
    parts = []
    for start, end in locations:
        first, last = _piece_at(start, pieces), _piece_at(max(start, end - 1), pieces)
        begin = first.start + _characters(first.text, start - first.offset, unit)
        parts.append((begin, last.start + _characters(last.text, end - last.offset, unit)))
    start, end, written = reading.joined(document.text, parts, item.get("text"))
    infons = item.get("infons") or {}
    if further := len(infons.keys() - {"type"}):
        reading.notes["infons of mentions beside their type, not read"] += further
    return reading.mention(place, document, start, end, infons.get("type"), written)


def _locations(item: dict) -> list[tuple[int, int]]:
    """Start and end of each location, as the file counts."""
    found = item.get("locations") or ()
    return [(int(place["offset"]), int(place["offset"]) + int(place["length"])) for place in found]


def _piece_at(offset: int, pieces: Sequence[_Piece]) -> _Piece:
    """The last piece that begins at the offset or before, else the first."""
    return max((piece for piece in pieces if piece.offset <= offset), key=lambda piece: piece.offset, default=pieces[0])


def _characters(text: str, units: int, unit: str) -> int:
    """How many characters take so many units from the beginning of a text; more than there are beyond its end."""
    if unit == "characters" or units <= 0:
        return units
    coding, width = ("utf-8", 1) if unit == "UTF-8 bytes" else ("utf-16-le", 2)
    beyond = max(0, units - _UNITS[unit](text))
    return len(text.encode(coding)[: units * width].decode(coding, errors="ignore")) + beyond


# ---- writing ----


def write_bioc_xml(documents: Iterable[Document], file: TextIO, lost: Counter[str]) -> None:
    """Writes a collection, each document as one passage whose annotations have their label as `type`.

    Raises:
        CorpusError: the library is not installed, or a text has characters that XML cannot hold.
    """
    biocxml, biocjson = _library("--to bioc")
    collection = biocjson.loads(json.dumps(_collection(documents)))
    try:
        file.write(biocxml.dumps(collection))
    except ValueError as error:  # lxml's, of control characters
        raise CorpusError(f"--to bioc: a text that XML cannot hold ({error}); --to biocjson can") from error


def write_bioc_json(documents: Iterable[Document], file: TextIO, lost: Counter[str]) -> None:
    """`write_bioc_xml`, as JSON."""
    json.dump(_collection(documents), file, ensure_ascii=False, indent=1)
    file.write("\n")


def _collection(documents: Iterable[Document]) -> dict:
    tree = [
        {
            "bioctype": "BioCDocument",
            "id": document.id,
            "infons": {},
            "passages": [
                {
                    "bioctype": "BioCPassage",
                    "offset": 0,
                    "infons": {},
                    "text": document.text,
                    "sentences": [],
                    "annotations": [
                        {
                            "id": str(number),
                            "infons": {"type": span.label},
                            "text": document.text[span.start : span.end],
                            "locations": [{"offset": span.start, "length": span.end - span.start}],
                        }
                        for number, span in enumerate(document.spans, start=1)
                    ],
                    "relations": [],
                }
            ],
            "annotations": [],
            "relations": [],
        }
        for document in documents
    ]
    head = {"bioctype": "BioCCollection", "source": "llamalora", "date": "", "key": "", "version": "1.0", "infons": {}}
    return head | {"documents": tree}


BIOC = Format("bioc", ("xml", "bioc"), is_bioc_xml, bioc_xml_documents, write_bioc_xml, whole=True)
BIOC_JSON = Format(
    "biocjson", ("json", "jsonl", "ndjson"), is_bioc_json, bioc_json_documents, write_bioc_json, whole=True
)
