"""Files: one way to write them whole, where the package's data are, and who uses a folder."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: runs are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # the file that says who trains in a folder


class FileError(RuntimeError):
    """A file that cannot be written, or a folder that cannot be used; the message says why."""


def replace_file(path: str | Path, content: bytes) -> None:
    """Put a file in place of another at once: at any moment there is one, and it is whole.

    Raises `FileError` where it cannot be written; then the old one is as it was.
    """
    path = Path(path)
    # A name of its own, so that two writers of one file never share a half-written one.
    partial = path.with_name(f".{path.name[:80]}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)  # the new name too must survive a loss of power
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        there = f"; {path.name} as it was before is still there" if _is_file(path) else ""
        raise FileError(f"{_shown(path)} could not be written: {why}{there}") from error


def probe_writable(folder: str | Path) -> None:
    """Make a folder, write a file in it and remove it again; `FileError` where that fails.

    Called before long work whose results are to go there.
    """
    probe = Path(folder) / f".probe.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"probe")
        probe.unlink()
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            probe.unlink(missing_ok=True)
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FileError(f"nothing can be written in {_shown(folder)}: {why}") from error


_held: dict[Path, int] = {}  # folders that this process holds, and how often


@contextmanager
def holding(folder: str | Path) -> Iterator[None]:
    """Hold a folder, proven writable, for this process alone; it may hold it several times.

    Raises `FileError` where another process holds it, and where nothing can be written. The
    lock goes with the process, however that ends. Folders that were made for it, and that are
    still empty at the end, are removed again.
    """
    made = _missing(Path(folder))
    probe_writable(folder)
    try:
        with _holding(folder):
            yield
    finally:
        for empty in made:
            with suppress(OSError):
                empty.rmdir()


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, the innermost first."""
    try:
        return [path for path in (folder, *folder.parents) if not path.exists()]
    except (OSError, ValueError):  # no name that a folder can have; the probe will say so
        return []


@contextmanager
def _holding(folder: str | Path) -> Iterator[None]:
    path = Path(folder).resolve() / LOCK
    if fcntl is None or path in _held:
        _held[path] = _held.get(path, 0) + 1
        try:
            yield
        finally:
            _release(path)
        return
    file = _locked(path)
    _held[path] = 1
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while it is ours
        os.close(file)
        _release(path)


def _release(path: Path) -> None:
    _held[path] -= 1
    if not _held[path]:
        del _held[path]


def _locked(path: Path) -> int:
    """The file descriptor of a lock that is now ours; `FileError` where it is another's."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with suppress(OSError):
                owner = os.read(file, 32).decode(errors="replace").strip()
            os.close(file)
            raise FileError(
                f"{path.parent} is in use by process {owner or 'unknown'}; wait for its end, "
                "or choose another folder"
            ) from None
        with suppress(OSError):
            if os.fstat(file).st_ino == os.stat(path).st_ino:
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        os.close(file)  # its owner removed it between our two calls: look again


def data_folder() -> Path:
    """Where records, recipes and weights are: inside an installed package, beside it in a clone."""
    package = Path(__file__).parent
    inside = package / "data"
    return inside if inside.is_dir() else package.parent / "data"


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_file(path: Path) -> bool:
    with suppress(OSError, ValueError):
        return path.is_file()
    return False


def _shown(path: str | Path) -> str:
    text = str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:197]}…"
