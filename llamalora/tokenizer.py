"""Text to token ids and back: sentencepiece (`tokenizer.model`) or `tokenizer.json`, behind one interface."""

import json
from pathlib import Path
from typing import Protocol


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable or does not fit the model; the message names the file."""


class Tokenizer(Protocol):
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """The ids that transformers gives for a whole text, bos in front where the model wants one."""

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that continues another one, starting at a space: no bos, nothing prepended."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids without special tokens; of a continuation, without its first space."""


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

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def encode_continuation(self, text: str) -> list[int]:
        text = text.removeprefix(" ") if self._prepends_space else text
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        text = self._backend.decode(ids, skip_special_tokens=True)
        return text if self._prepends_space else text.removeprefix(" ")  # its decoder has taken it away


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
    raise TokenizerError(f"{folder}: has neither tokenizer.model nor tokenizer.json")


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
