"""Writes a corpus in another format, and says what that format could not hold."""

import re
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from ..cli import Parser, UsageError, check_there
from ..corpus.documents import CorpusError, Document, Documents, corpus_statistics, label_order, labels_of, told
from ..corpus.format import Format
from ..corpus.read import FORMATS, find_splits, read_documents
from ..errors import InputError
from ..files import new_folder, replace_file, why_not_new
from ..text_table import aligned


def main(argv: list[str]) -> None:
    parser = Parser("convert", "data/sample brat-folder --to brat", description=__doc__)
    parser.add_argument("--from", dest="form", choices=FORMATS, metavar="FORMAT",
                        help=f"format of IN: {', '.join(FORMATS)} (default: what it looks like)")  # fmt: skip
    parser.add_argument("--to", choices=FORMATS, metavar="FORMAT",
                        help="format of OUT (default: what its ending says)")  # fmt: skip
    parser.add_argument("source", metavar="IN", help="corpus file, folder of brat's, or folder of train, dev and test")
    parser.add_argument("target", metavar="OUT", help="new file, or for brat and for several splits a new folder")
    arguments = parser.parse_args(argv)
    source, target = Path(arguments.source), Path(arguments.target)
    if "-" in (arguments.source, arguments.target):
        raise UsageError("-: files are read and written, no streams; give names")
    check_there(arguments.source)
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{target}: lies in {source}, which would then hold it, too; name another place")
    read = FORMATS.get(arguments.form)
    splits = splits_of(source)
    form = FORMATS[arguments.to] if arguments.to else format_by_name(target, bool(splits))
    check_target(target, form, bool(splits))
    corpora = {name: read_documents(path, form=read) for name, path in (splits or {"": source}).items()}
    outcomes = {}
    if splits:
        with new_folder(target) as folder:
            for name, documents in corpora.items():
                ending = "" if form.folder else f".{form.endings[0]}"
                outcomes[name] = written(documents, folder / f"{name}{ending}", form)
    else:
        outcomes[""] = written(corpora[""], target, form)
    print(account(corpora, outcomes))
    print(f"written to {target} ({form.name})")


def splits_of(source: Path) -> dict[str, Path]:
    """The splits of a corpus folder; none if it is a file, or brat's folder of texts.

    Raises:
        CorpusError: as `find_splits`, of a folder that has no texts either.
    """
    if not source.is_dir():
        return {}
    try:
        return find_splits(source)
    except CorpusError:
        if any(source.rglob("*.txt")):
            return {}
        raise


def format_by_name(target: Path, several: bool) -> Format:
    """The format that the ending of a new file says.

    Raises:
        UsageError: it says none.
    """
    own = [(form.endings[0], form) for form in FORMATS.values() if form.endings]
    others = [(ending, form) for form in FORMATS.values() for ending in form.endings[1:]]
    sure = [(ending, form) for ending, form in others if ending not in ("txt", "json", "jsonl")]
    for ending, form in () if several else (*own, *sure):
        if target.name.lower().endswith(f".{ending.lower()}"):
            return form
    if several:
        raise UsageError(f"--to is needed, since a folder of splits may be any of {', '.join(FORMATS)}")
    fitting = [name for name, form in FORMATS.items() if any(_last(one) == _last(target) for one in form.endings)]
    raise UsageError(f"--to is needed, since by its name {target} may be any of {', '.join(fitting or FORMATS)}")


def _last(name: str | Path) -> str:
    return str(name).rpartition(".")[2].lower()


def check_target(target: Path, form: Format, several: bool) -> None:
    """Refuses places that are taken, or cannot be what is to be written there.

    Raises:
        UsageError: the place and why.
    """
    if form.folder or several:
        if why := why_not_new(target):
            raise UsageError(f"{target}: {why}; name a folder that is new or empty")
    elif target.exists():
        raise UsageError(f"{target}: is there already; remove it, or name another file")
    elif target.name.lower().endswith(".gz"):
        raise UsageError(f"{target}: files are written plain; leave .gz out")
    elif not target.absolute().parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.parent}")


def written(documents: Sequence[Document], target: Path, form: Format) -> tuple[Documents, Counter[str]]:
    """Writes documents; what is read again there, and what is not kept of them."""
    lost: Counter[str] = Counter()
    if form.folder:
        with new_folder(target) as folder:
            form.write(documents, folder, lost)
    else:
        text = StringIO()
        form.write(documents, text, lost)
        replace_file(target, text.getvalue())
    try:
        again = read_documents(target, form=form)
    except InputError:  # there is nothing in it, say
        if target.is_file():
            target.unlink()
        raise
    by_id = {document.id: document for document in again}
    if by_id.keys() >= {document.id for document in documents}:
        pairs = [(document, by_id[document.id]) for document in documents]
    else:
        pairs = list(zip(documents, again, strict=True)) if len(documents) == len(again) else []
    cut = sum(_sentences(one) != _sentences(other) for one, other in pairs)
    lost["documents whose sentences will be cut in other places"] += cut
    return again, +lost


def _sentences(document: Document) -> list[str]:
    return [re.sub(r"\s+", "", document.text[start:end]) for start, end in document.sentences]


def account(corpora: dict[str, Documents], outcomes: dict[str, tuple[Documents, Counter[str]]]) -> str:
    """What was read and written, as a table with a column for each split, and below it what was not taken or kept."""
    rows = [["", *corpora]] if len(corpora) > 1 or "" not in corpora else []
    before = [corpus_statistics(documents) for documents in corpora.values()]
    after = [corpus_statistics(again) for again, _ in outcomes.values()]
    rows.append(["documents", *(f"{counts['documents']:,}" for counts in before)])
    for label in label_order(label for documents in corpora.values() for label in labels_of(documents)):
        rows.append([f"{label} mentions", *(f"{counts['mentions'].get(label, 0):,}" for counts in before)])
    totals = [[sum(counts["mentions"].values()) for counts in side] for side in (before, after)]
    rows.append(["mentions", *(f"{total:,}" for total in totals[0])])
    if totals[0] != totals[1]:
        rows.append(["of them written", *(f"{total:,}" for total in totals[1])])
    notes = []
    for name, documents in corpora.items():
        split = f"{name}, " if name else ""
        notes += [f"{split}read: {note}" for note in told(documents.notes)]
        notes += [f"{split}not kept: {note}" for note in told(outcomes[name][1])]
    return "\n".join([aligned(rows), *notes])
