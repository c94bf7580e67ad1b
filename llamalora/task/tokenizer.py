"""Text to token ids and back: sentencepiece (`tokenizer.model`) or `tokenizer.json`, behind one interface."""

import codecs
import json
import re
from collections.abc import Iterable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from ..errors import InputError
from ..mistakes import file_instead, wrong_folder

PROBES = ("Input: a", "x  y", " lead", "a\nb", "[Disease]é[/Disease].")  # texts that tokenizers cut in different ways


class TokenizerError(InputError):
    """A tokenizer that is missing, unreadable or does not fit the model; the message names the file."""


class Tokenizer:
    """What both kinds have in common. A subclass sets the attributes and says how a text without bos is cut."""

    vocab_size: int
    eos_id: int  # ends an answer in training
    vocabulary: dict[str, int]  # what each token is called
    spellings: list[bytes | None]  # the bytes that each token stands for in the middle of a text; None: no text

    def encode(self, text: str) -> list[int]:
        """The ids that transformers gives for a whole text, bos in front where the model wants one."""
        raise NotImplementedError

    def _cut(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that continues another one, starting at a space: no bos, nothing prepended."""
        return self._cut(text.removeprefix(" ") if self._prepends_space else text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special tokens; of a continuation, without its first space."""
        return self.spell(ids).decode(errors="replace").removeprefix(" ")

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special tokens and the rows that a model has beyond its tokenizer have none."""
        return b"".join(filter(None, (self.spellings[token] for token in ids if token < self.vocab_size)))

    @cached_property
    def _prepends_space(self) -> bool:
        """Whether a space comes even before a text that begins with one."""
        return self.spell(self._cut(" x")).startswith(b"  ")


class TextStream:
    """The text of a continuation, its first space included, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer):
        self._spell = tokenizer.spell
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        return self._utf8.decode(self._spell(ids))


class SentencePieceTokenizer(Tokenizer):
    """
    Args:
        path: of `tokenizer.model`.
        adds_bos: in front of a whole text.
    """

    def __init__(self, path: Path, adds_bos: bool = True):
        from sentencepiece import SentencePieceProcessor

        try:
            self._pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path}: not a sentencepiece model ({error})") from None
        self._adds_bos = adds_bos
        self.vocab_size = self._pieces.vocab_size()
        self.bos_id, self.eos_id = self._pieces.bos_id(), self._pieces.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise TokenizerError(f"{path}: has no bos or no eos token")
        pieces = [self._pieces.id_to_piece(token) for token in range(self.vocab_size)]
        self.vocabulary = {piece: token for token, piece in enumerate(pieces)}
        self.spellings = [
            None if self._marks(token) or self._pieces.is_unused(token) else _spelling(piece)
            for token, piece in enumerate(pieces)
        ]

    @property
    def transformers_config(self) -> dict:
        """A `tokenizer_config.json` with which transformers cuts texts alike; without one it leaves out bos."""
        unknown = self._pieces.id_to_piece(self._pieces.unk_id())
        bos, eos = (self._pieces.id_to_piece(token) for token in (self.bos_id, self._pieces.eos_id()))
        names = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
        return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": self._adds_bos, "add_eos_token": False, **names}

    def _marks(self, token: int) -> bool:
        return self._pieces.is_control(token) or self._pieces.is_unknown(token)

    def holds_all_of(self, path: Path) -> bool:
        """Whether a `tokenizer.json` has the same tokens and adds none that it would look for in a text."""
        content = _read(path)
        try:
            added = {token["content"]: token["id"] for token in content["added_tokens"]}
            words = content["model"]["vocab"]  # by id where they have scores
            known = words if isinstance(words, dict) else {piece: token for token, (piece, _) in enumerate(words)}
        except (KeyError, TypeError, ValueError):
            return False
        return known | added == self.vocabulary and all(map(self._marks, added.values()))

    def encode(self, text: str) -> list[int]:
        return [self.bos_id, *self._cut(text)] if self._adds_bos else self._cut(text)

    def _cut(self, text: str) -> list[int]:
        return self._pieces.encode(text)


class JsonTokenizer(Tokenizer):
    """
    Args:
        path: of `tokenizer.json`.
        rows: of the model's embedding. Special tokens beyond it, like one for padding that was added later, are left
            out.
    """

    def __init__(self, path: Path, rows: int | None = None):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise TokenizerError(f"{path}: reading it needs: pip install 'llamalora[tokenizers]'") from None
        parts = _read(path)
        try:
            added = parts.get("added_tokens") or []
            fitting = [one for one in added if rows is None or not one["special"] or one["id"] < rows]
            if len(fitting) < len(added):
                self._backend = Backend.from_str(json.dumps(parts | {"added_tokens": fitting}))
            else:
                self._backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"{path}: not a tokenizer.json ({error})") from None
        self._backend.encode_special_tokens = True  # what a text spells like one is text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if not self.vocabulary:
            raise TokenizerError(f"{path}: has no tokens")
        self.vocab_size = max(self.vocabulary.values()) + 1
        pieces = self._backend.get_vocab(with_added_tokens=False)
        # Llama-2's pieces hold an ordinary Ġ, too
        byte_level = "ByteLevel" in json.dumps([parts.get(part) for part in ("pre_tokenizer", "decoder")])
        spell = _byte_level_spelling if byte_level else _spelling
        self.spellings = [None] * self.vocab_size
        for piece, token in pieces.items():
            self.spellings[token] = spell(piece)
        for token, added in self._backend.get_added_tokens_decoder().items():  # listed among the others as well
            self.spellings[token] = None if added.special else added.content.encode()

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def _cut(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def _spelling(piece: str) -> bytes:
    """The bytes of a sentencepiece: `▁` is a space, `<0xE2>` a byte of a character that has no piece."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


# GPT-2 writes a byte that prints as itself, and the others as the characters from 256 on
_PRINTING = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTES = {chr(byte): byte for byte in _PRINTING} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTING)
}


def _byte_level_spelling(piece: str) -> bytes:
    return bytes(_BYTES[character] for character in piece) if _BYTES.keys() >= set(piece) else piece.encode()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.model`, or `tokenizer.json` if that is alone, stands beside one that
    is not sentencepiece's (Llama-3's is tiktoken's), has other tokens, or cuts texts otherwise (to see which, the
    package tokenizers must be installed).

    Raises:
        TokenizerError: neither is there or it cannot be read, it lacks tokens that other files of the folder name, or
            it does not keep the spaces of an answer.
    """
    folder = Path(folder)
    path, beside = folder / "tokenizer.model", folder / "tokenizer.json"
    rows = _read(folder / "config.json").get("vocab_size")
    rows = rows if isinstance(rows, int) else None
    if not path.is_file() and not beside.is_file():
        missing = f"{folder}: has neither tokenizer.model nor tokenizer.json"
        raise TokenizerError(wrong_folder(folder, "model folder", missing))
    pieces = None
    if path.is_file():
        adds_bos = _read(folder / "tokenizer_config.json").get("add_bos_token") is not False
        try:
            pieces = SentencePieceTokenizer(path, adds_bos)
        except TokenizerError as error:
            if not beside.is_file():
                raise TokenizerError(file_instead(path) or str(error)) from None
    tokenizer: Tokenizer
    if pieces is None or beside.is_file() and not pieces.holds_all_of(beside):
        tokenizer = JsonTokenizer(beside, rows)
    elif beside.is_file() and find_spec("tokenizers"):
        other = JsonTokenizer(beside, rows)
        tokenizer = other if any(pieces.encode(text) != other.encode(text) for text in PROBES) else pieces
    else:
        tokenizer = pieces
    _check_added(folder, tokenizer)
    written = tokenizer.spell(tokenizer.encode_continuation(" x y"))
    if written != b" x y" and written.replace(b" ", b"") == b"xy":
        raise TokenizerError(f"{folder}: its tokenizer moves spaces: it gives ' x y' back as {written.decode()!r}")
    tokenizer.eos_id = _end_token(folder, tokenizer)
    tokenizer.spellings[tokenizer.eos_id] = None
    return tokenizer


def _check_added(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuses ordinary tokens that only the files beside the tokenizer add. A special one is no part of a text."""
    config = _read(folder / "tokenizer_config.json")
    roles = _read(folder / "special_tokens_map.json") | config
    try:
        entries = (config.get("added_tokens_decoder") or {}).items()
        added = _read(folder / "added_tokens.json") | {entry["content"]: int(token) for token, entry in entries}
        special = [entry["content"] for _, entry in entries if entry.get("special")]
        special += map(_content, (*roles.values(), *(roles.get("additional_special_tokens") or ())))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{folder}: its added tokens cannot be read ({error!r})") from None
    held = {(piece.replace("▁", " "), token) for piece, token in tokenizer.vocabulary.items()}
    lacking = [text for text, token in added.items() if (text.replace("▁", " "), token) not in held]
    if lacking := [text for text in lacking if text not in special]:
        raise TokenizerError(
            f"{folder}: its tokenizer lacks {lacking[0]!r} ({len(lacking)} such tokens), which tokenizer_config.json "
            "or added_tokens.json adds; transformers can save it as a tokenizer.json that has them"
        )


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _end_token(folder: Path, tokenizer: Tokenizer) -> int:
    """What `tokenizer_config.json` names, else a sentencepiece model itself, else the first that the model ends at."""
    named = _content(_read(folder / "tokenizer_config.json").get("eos_token"))
    ends = [_read(folder / name).get("eos_token_id") for name in ("config.json", "generation_config.json")]
    if named is not None:
        if not isinstance(named, str) or named not in tokenizer.vocabulary:
            raise TokenizerError(f"{folder}: its tokenizer lacks the eos token {named!r} of tokenizer_config.json")
        return tokenizer.vocabulary[named]
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.eos_id
    for end in (token for tokens in ends for token in (tokens if isinstance(tokens, list) else [tokens])):
        if isinstance(end, int) and 0 <= end < tokenizer.vocab_size:
            return end
    raise TokenizerError(f"{folder}: no eos token in tokenizer_config.json, config.json or generation_config.json")


def check_fit(tokenizer: Tokenizer, vocab_size: int, folder: str | Path) -> None:
    """Refuses a tokenizer that names tokens the model lacks, or far fewer than it has.

    Some models round their vocabulary up, so a tenth of unused rows passes.

    Raises:
        TokenizerError: the sizes do not fit.
    """
    if not 0.9 * vocab_size <= tokenizer.vocab_size <= vocab_size:
        raise TokenizerError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model {vocab_size}: "
            "it belongs to another model"
        )


def _read(path: Path) -> dict:
    """A JSON object from a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: holds {type(content).__name__}, not an object")
    return content
