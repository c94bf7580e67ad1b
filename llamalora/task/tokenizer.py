"""Text to token ids and back: sentencepiece (`tokenizer.model`) or `tokenizer.json`, behind one interface."""

import codecs
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ..errors import InputError
from ..mistakes import wrong_folder


class TokenizerError(InputError):
    """A tokenizer that is missing, unreadable or does not fit the model; the message names the file."""


class Tokenizer(Protocol):
    vocab_size: int
    eos_id: int
    spellings: list[bytes | None]  # the bytes that each token stands for in the middle of a text; None: no text

    def encode(self, text: str) -> list[int]:
        """The ids that transformers gives for a whole text, bos in front where the model wants one."""

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that continues another one, starting at a space: no bos, nothing prepended."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids without special tokens; of a continuation, without its first space."""


class TextStream:
    """The text of a continuation, its first space included, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer):
        self._spellings = tokenizer.spellings
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        known = (self._spellings[token] for token in ids if token < len(self._spellings))
        return self._utf8.decode(b"".join(filter(None, known)))


class SentencePieceTokenizer:
    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self._pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path}: not a sentencepiece model ({error})") from None
        self.vocab_size = self._pieces.vocab_size()
        self.bos_id, self.eos_id = self._pieces.bos_id(), self._pieces.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise TokenizerError(f"{path}: has no bos or no eos token")

    @cached_property
    def spellings(self) -> list[bytes | None]:
        pieces = self._pieces
        spellings: list[bytes | None] = [None] * self.vocab_size
        for token in range(self.vocab_size):
            if not (pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_unused(token)):
                spellings[token] = _spelling(pieces.id_to_piece(token))
        return spellings

    def encode(self, text: str) -> list[int]:
        return [self.bos_id, *self._pieces.encode(text)]

    def encode_continuation(self, text: str) -> list[int]:
        # sentencepiece itself puts a space before what it encodes
        return self._pieces.encode(text.removeprefix(" "))

    def decode(self, ids: list[int]) -> str:
        return self._pieces.decode([i for i in ids if i < self.vocab_size])


class JsonTokenizer:
    def __init__(self, path: Path, eos_id: int | None):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise TokenizerError(f"{path}: reading it needs: pip install 'llamalora[tokenizers]'") from None
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"{path}: not a tokenizer.json ({error})") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        eos = _special_token(path.with_name("tokenizer_config.json"), "eos_token")
        if eos is not None and eos not in vocabulary:
            raise TokenizerError(f"{path}: lacks the eos token {eos!r} of tokenizer_config.json")
        self.eos_id = eos_id if eos is None else vocabulary[eos]
        if self.eos_id is None:
            raise TokenizerError(f"{path}: no eos token in tokenizer_config.json or config.json beside it")
        self._prepends_space = self._backend.encode("x", add_special_tokens=False).tokens[0].startswith("▁")

    @cached_property
    def spellings(self) -> list[bytes | None]:
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        spell = _byte_level_spelling if "Ġ" in vocabulary else _spelling
        spellings: list[bytes | None] = [None] * self.vocab_size
        for piece, token in vocabulary.items():
            spellings[token] = spell(piece)
        for token in self._backend.get_added_tokens_decoder():  # listed among the others as well
            spellings[token] = None
        return spellings

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def encode_continuation(self, text: str) -> list[int]:
        text = text.removeprefix(" ") if self._prepends_space else text
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        text = self._backend.decode(ids, skip_special_tokens=True)
        return text if self._prepends_space else text.removeprefix(" ")  # its decoder has taken it away


def _spelling(piece: str) -> bytes | None:
    """The bytes of a sentencepiece: `▁` is a space, `<0xE2>` a byte of a character that has no piece."""
    if piece == "<0x20>":
        return None  # no tokenizer writes it, and at the beginning a decoder would not take it for the first space
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


# GPT-2 writes a byte that prints as itself, and the others as the characters from 256 on
_PRINTING = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTES = {chr(byte): byte for byte in _PRINTING} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTING)
}


def _byte_level_spelling(piece: str) -> bytes:
    return bytes(_BYTES[character] for character in piece)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.model` if there is one, else `tokenizer.json`.

    Raises:
        TokenizerError: neither is there, or it cannot be read.
    """
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    if (folder / "tokenizer.json").is_file():
        eos = _read(folder / "config.json").get("eos_token_id")
        return JsonTokenizer(folder / "tokenizer.json", next(iter(eos), None) if isinstance(eos, list) else eos)
    missing = f"{folder}: has neither tokenizer.model nor tokenizer.json"
    raise TokenizerError(wrong_folder(folder, "model folder", missing))


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


def _special_token(path: Path, name: str) -> str | None:
    token = _read(path).get(name)
    return token["content"] if isinstance(token, dict) else token
