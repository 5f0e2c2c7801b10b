"""The reader's own text: a file, a folder or a pattern, and a part of it held out."""

from __future__ import annotations

import glob
from pathlib import Path

LARGEST = 2**31  # bytes of one file; more is no text that is read whole


def own_texts(name: str, split: str) -> list[str]:
    """The texts of a split, a file each, in the order of their names.

    Of several files every tenth, from the fifth on, is held out as "test", at least one; of a
    single file its last tenth, from the start of a line where there is one near. Nothing is
    drawn at random, so both splits are the same on every call. Raises `ValueError` where there
    is no text, and `OSError` where it cannot be read.
    """
    texts = [text for text in map(read_text, files_of(name)) if text.strip()]
    if not texts:
        raise ValueError("there is no text in it")
    if len(texts) == 1:
        early, late = tail_apart(texts[0])
        return [early] if split == "train" else [late]
    first = min(4, len(texts) - 1)
    return [t for i, t in enumerate(texts) if (i % 10 == first) == (split == "test")]


def files_of(name: str) -> list[Path]:
    """The files that a name means: itself, the text files of a folder, or matches."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in (".txt", ".md")
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not found:
            raise ValueError("the folder holds no .txt or .md file; name others by a pattern")
        return found
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    found = [match for match in found if match.is_file()]
    if not found:
        raise ValueError("there is no such file or folder, and no file matches")
    return found


def read_text(path: Path) -> str:
    """A file as text, newlines as they are; `ValueError` where it is none."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST} are read")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out"
        ) from None


def tail_apart(text: str) -> tuple[str, str]:
    """A text without its last tenth, and that tenth; `ValueError` for less than 2 characters."""
    if len(text) < 2:
        raise ValueError("a single character cannot be shared between training and test")
    cut = min(len(text) - 1, max(1, len(text) * 9 // 10))
    line = text.find("\n", cut, cut + len(text) // 50) + 1
    cut = line if 0 < line < len(text) else cut
    return text[:cut], text[cut:]
