"""Corpora: embedded data, data sets of the hub or a mirror of it, and the reader's own files."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .own_files import own_texts
from .tokens import BYTES, Tokens, tokens_from

ID_TYPES = (torch.uint8, torch.int32, torch.int64)


class CorpusError(ValueError):
    """A corpus that is unknown or out of reach; the message says what can be done."""


def check_documents(documents: Sequence[Tensor], start: int) -> None:
    """Raise unless documents are rows `(N,)` of ids in `[0, start)`, not all of them empty.

    `TypeError` for another rank or dtype, `ValueError` for an id out of range or no token.
    """
    for document in documents:
        if document.ndim != 1 or document.dtype not in ID_TYPES:
            kind = f"{document.dtype} {tuple(document.shape)}"
            raise TypeError(f"a document is {kind}; a row of integers is expected")
    if not any(len(document) for document in documents):
        raise ValueError("there are no tokens; at least one is needed")
    for document in documents:
        for end in document.aminmax() if len(document) else ():
            if not 0 <= int(end) < start:
                raise ValueError(f"documents hold id {int(end)}; ids must be in [0, {start})")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as token ids, with one extra id, `start`, that opens every document.

    Single documents may be empty. Raises as `check_documents` does, naming the corpus.
    """

    name: str  # what was asked for
    split: str
    documents: tuple[Tensor, ...]  # each (N,), stored small: bytes and pixels are uint8
    start: int  # the id that opens a document: the largest
    tokens: Tokens | None = None  # how text became ids; None where it was no text

    def __post_init__(self) -> None:
        try:
            check_documents(self.documents, self.start)
        except (TypeError, ValueError) as error:
            raise type(error)(f"corpus {self.name!r} ({self.split}): {error}") from None

    @property
    def vocab_size(self) -> int:
        return self.start + 1

    @property
    def num_tokens(self) -> int:
        return sum(len(document) for document in self.documents)

    def sha256(self) -> str:
        """A digest of every id and every document border, to name the data in a record."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "little"))
            digest.update(document.numpy().astype("<u4").tobytes())
        return digest.hexdigest()


def load_corpus(
    name: str | Path,
    split: str = "train",
    *,
    limit: int | None = None,
    tokens: str | Tokens = BYTES,
) -> Corpus:
    """One split of a corpus as token ids; `limit` keeps the first so many documents.

    A corpus is, in this order:

    - `digits` or `python-reference`, which come with scikit-learn and Python;
    - **your own text**: a `Path`, or a name that begins with `./`, `../`, `/` or `~`, ends in
      `.txt` or `.md`, or holds a `*`: a file, a folder (all text files in it), or a pattern.
      Every file is a document, newlines and all. Of several, every tenth is held out as
      "test"; of a single one, its last tenth;
    - a data set with a `text` or `image` column, by its hub id `owner/name` or
      `owner/name:configuration` or one of the short names in `HUB`: from
      `$MEMFORMER_DATA_DIR/<hub id>` where that folder exists, else from the hub. A folder
      that happens to lie in the working directory under that name is not looked at.

    Text becomes bytes, or what `tokens` says: "bpe:4096" learns that many pieces from the
    training split; a `Tokens` is used as it is. Images become pixels.

    Raises `CorpusError` for an unknown name or split, for data that cannot be reached, and for
    text without content; `ValueError` for a limit below 1 or unknown tokens.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 (None keeps every document)")
    if not isinstance(name, str | Path):
        raise CorpusError(f"a corpus is named by text or a Path, not a {type(name).__name__}")
    own = isinstance(name, Path) or names_files(name)
    if split not in ("train", "test") and (own or name in EMBEDDED):
        raise CorpusError(f"corpus {str(name)!r} has no split {split!r}; use 'train' or 'test'")
    source = _Source(str(name), own)
    pieces = source.read(split, limit)
    if pieces and isinstance(pieces[0], Tensor):
        documents = tuple(piece for piece in pieces if isinstance(piece, Tensor))
        return Corpus(source.name, split, documents, PIXELS.get(source.name, 256))
    texts = [piece for piece in pieces if isinstance(piece, str)]
    read = tokens
    if isinstance(read, str):
        training = (
            (lambda: texts) if split == "train" else (lambda: source.texts("train", limit))
        )
        read = tokens_from(read, training)
    return Corpus(source.name, split, tuple(map(read.encode, texts)), read.size, read)


def names_files(name: str) -> bool:
    """Whether a name means files of the reader's and not a data set; see `load_corpus`."""
    return (
        name.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or name in (".", "..")
        or name.lower().endswith((".txt", ".md"))
        or any(sign in name for sign in "*?[")
        or (len(name) > 1 and name[1] == ":" and name[0].isalpha())  # a drive of Windows
    )


@dataclass(frozen=True)
class _Source:
    """Where the documents of a corpus come from."""

    name: str
    own: bool

    def read(self, split: str, limit: int | None) -> list[Any]:
        """Documents: texts, or rows of pixels."""
        if self.own:
            try:
                return own_texts(self.name, split)[:limit]
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise CorpusError(f"corpus {self.name!r}: {why}") from None
        if self.name in EMBEDDED:
            return list(itertools.islice(EMBEDDED[self.name](split), limit))
        if self.name not in HUB and "/" not in self.name:
            known = ", ".join(sorted([*EMBEDDED, *HUB]))
            raise CorpusError(
                f"unknown corpus {self.name!r}; known are {known}, a hub id owner/name, or "
                "files of yours: ./folder, notes.txt, 'books/*.txt'"
            )
        return _hub(self.name, split, limit)

    def texts(self, split: str, limit: int | None) -> list[str]:
        return [piece for piece in self.read(split, limit) if isinstance(piece, str)]


# --- what comes with Python and scikit-learn ------------------------------------------------

PIXELS = {"digits": 17}  # levels of a pixel, where they are not 256


def _digits(split: str) -> Iterator[Tensor]:
    """scikit-learn's 1,797 scans of 64 pixels with 17 levels; every fifth is for testing."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().data).to(torch.uint8)
    held_out = torch.arange(len(pixels)) % 5 == 4
    yield from pixels[~held_out if split == "train" else held_out]


def _python_reference(split: str) -> Iterator[str]:
    """Topics of Python's reference, longest first, no paragraph in two of them.

    Every tenth is for testing. The text differs between versions of Python.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    count = 0
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        paragraphs = {" ".join(p.split()) for p in text.split("\n\n") if len(p) >= 40}
        if seen.isdisjoint(paragraphs):
            if (count % 10 == 4) == (split == "test"):
                yield text
            count += 1
            seen |= paragraphs


EMBEDDED: dict[str, Callable[[str], Iterator[Any]]] = {
    "digits": _digits,
    "python-reference": _python_reference,
}


# --- the hub, or its mirror on this machine -------------------------------------------------

HUB = {  # short name → hub id, and after the colon its configuration
    "mnist": "ylecun/mnist",
    "wikitext-2": "Salesforce/wikitext:wikitext-2-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-v1",
    "books": "books",  # without an owner: only ever a local copy
}


def _hub(name: str, split: str, limit: int | None) -> list[Any]:
    """Documents of a data set on the hub, or of its copy under `$MEMFORMER_DATA_DIR`."""
    import datasets

    hub_id, _, configuration = HUB.get(name, name).partition(":")
    mirror = os.environ.get("MEMFORMER_DATA_DIR")
    mirrored = bool(mirror) and Path(mirror or "", hub_id).is_dir()
    where = str(Path(mirror or "", hub_id).resolve()) if mirrored else hub_id
    remedy = f"set MEMFORMER_DATA_DIR to a folder that holds a copy as {hub_id}/"
    if "/" not in hub_id and not mirrored:
        raise CorpusError(f"corpus {name!r} is not on the hub; {remedy}")
    if not mirrored and Path(hub_id).exists():  # the library would read that folder instead
        raise CorpusError(
            f"corpus {name!r}: a folder {hub_id}/ lies here and would be read in place of the "
            f"data set. If you mean the folder, say ./{hub_id}; else call from another "
            f"directory, or {remedy}"
        )
    try:
        rows = datasets.load_dataset(where, configuration or None, split=split)
    except Exception as error:  # the library raises a dozen kinds; each names what went wrong
        hint = "the files there" if mirrored else f"the network, or {remedy}"
        raise CorpusError(
            f"corpus {name!r} could not be loaded from {where!r} ({type(error).__name__}: "
            f"{error}). Check its name, its split, and {hint}"
        ) from error
    for column, encode in (("image", _pixels), ("text", _texts)):
        if column in rows.column_names:
            batches = rows.select_columns(column).iter(batch_size=1000)
            values = (value for batch in batches for value in batch[column])
            try:
                return list(itertools.islice(encode(values, hub_id), limit))
            except (OSError, ValueError, TypeError) as error:
                raise CorpusError(
                    f"corpus {name!r}, column {column!r}: {error}. Text and images of 8 bits "
                    "a pixel can be read"
                ) from error
    raise CorpusError(f"corpus {name!r} has columns {rows.column_names}, no text and no image")


def _pixels(images: Iterable[Any], hub_id: str) -> Iterator[Tensor]:
    for number, image in enumerate(images):
        pixels = np.array(image)
        if pixels.dtype != np.uint8:
            raise ValueError(f"image {number} is of {pixels.dtype}, mode {image.mode!r}")
        yield torch.from_numpy(pixels).flatten()


def _texts(texts: Iterable[str | None], hub_id: str) -> Iterator[str]:
    """Every text that is not empty; the lines of WikiText are joined to articles."""

    def lines() -> Iterator[str]:
        for number, text in enumerate(texts):
            if text is not None and not isinstance(text, str):
                raise TypeError(f"row {number} holds a {type(text).__name__}, not text")
            yield text or ""

    for text in _articles(lines()) if "wikitext" in hub_id else lines():
        if text.strip():
            yield text


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Whole articles of WikiText, which comes line by line."""
    article: list[str] = []
    padded = ["", *lines, ""]
    for before, line, after in zip(padded, padded[1:], padded[2:], strict=False):
        alone = not before.strip() and not after.strip()
        if alone and line.startswith(" = ") and not line.startswith(" = ="):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


__all__ = [
    "EMBEDDED",
    "HUB",
    "ID_TYPES",
    "Corpus",
    "CorpusError",
    "Tokens",
    "check_documents",
    "load_corpus",
    "names_files",
]
