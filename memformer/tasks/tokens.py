"""How text becomes token ids and ids become text again: bytes, or pieces that were learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

BYTES = "bytes"
NOTHING = torch.zeros(0, dtype=torch.uint8)  # frombuffer refuses an empty buffer


class Tokens(Protocol):
    """Text to ids and back. Ids are in `[0, size)`; the id `size` opens every document."""

    size: int

    def encode(self, text: str) -> Tensor:
        """`(N,)` ids of a text."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of text that ids stand for; the opening id is a new line."""

    def to_json(self) -> str:
        """All there is to know, for `tokens_from_json`."""


class ByteTokens:
    """The 256 bytes of UTF-8."""

    size = 256

    def encode(self, text: str) -> Tensor:
        content = bytearray(text.encode())
        return torch.frombuffer(content, dtype=torch.uint8) if content else NOTHING

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(id if id < 256 else ord("\n") for id in ids)

    def to_json(self) -> str:
        return json.dumps({"kind": BYTES})


class PieceTokens:
    """Pieces of words, learned by byte-pair encoding (Sennrich et al. 2016) over bytes.

    Every text can be written, as the 256 bytes are pieces too.
    """

    def __init__(self, vocabulary: str) -> None:
        from tokenizers import Tokenizer

        self.vocabulary = vocabulary
        self.tokenizer = Tokenizer.from_str(vocabulary)
        self.size: int = self.tokenizer.get_vocab_size()

    @classmethod
    def learned(cls, texts: Iterable[str], size: int) -> PieceTokens:
        """At most `size` pieces, the likeliest of `texts`."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> Tensor:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Bytes piece by piece, so that a character cut between two pieces comes out whole."""
        marks = _byte_of_mark()
        out = bytearray()
        for id in ids:
            piece = self.tokenizer.id_to_token(id) if id < self.size else "Ċ"  # a new line
            out += bytes(marks[sign] for sign in piece or "")
        return bytes(out)

    def to_json(self) -> str:
        return json.dumps({"kind": "bpe", "vocabulary": self.vocabulary})


def _byte_of_mark() -> dict[str, int]:
    """Byte-level pieces are written with one printable sign a byte (as GPT-2 does)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


def check_tokens_name(name: str) -> int | None:
    """The number of pieces in "bpe:4096", None for "bytes"; `ValueError` for all else."""
    kind, _, size = name.partition(":")
    if name == BYTES:
        return None
    if kind == "bpe" and size.isdecimal() and size.isascii() and 256 < int(size) <= 2**20:
        return int(size)
    raise ValueError(
        f"tokens is {name!r}; it must be 'bytes', or 'bpe:N' with N in 257…{2**20}"
    )


def tokens_from(name: str, texts: Callable[[], Iterable[str]]) -> Tokens:
    """The tokens that a name means, learned from `texts` where they are to be learned."""
    size = check_tokens_name(name)
    return ByteTokens() if size is None else PieceTokens.learned(texts(), size)


def tokens_from_json(text: str) -> Tokens:
    """What `to_json` wrote; `ValueError` for all else."""
    try:
        about = json.loads(text)
        if about["kind"] == BYTES:
            return ByteTokens()
        return PieceTokens(about["vocabulary"])
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"no tokens can be made of it: {error}") from None
