"""Files that are whole or not there: written beside, put on the disk, renamed."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

PARTIAL = ".partial"
NO_ROOM = 2**20  # bytes: with less than this free, a failed write is put down to the full disk


class DiskFullError(Exception):
    """There was no room for a file or folder, and nothing is left of it."""


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A name to write a file or a folder under, which then takes the place of `path`.

    A process that is killed leaves the earlier `path` as it was, or a folder under another name, and at most something
    with `PARTIAL` at the end of its name. Raises `DiskFullError` where there is no room.
    """
    partial = path.with_name(path.name + PARTIAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _sync(file)
        if path.is_dir():
            remove_whole(path)
        partial.replace(path)
        _sync(path.parent)
    except Exception as error:
        # Each library has an error of its own for a full disk: torch a RuntimeError, safetensors one of Rust's.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        full = full or shutil.disk_usage(path.parent).free < NO_ROOM
        remove(partial)
        if full:
            raise DiskFullError(f"{path}: the disk is full") from error
        raise
    except BaseException:
        remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """`path.write_text`, whole or not at all."""
    with written_beside(path) as partial:
        partial.write_text(text)


def remove(path: Path) -> None:
    """Removes a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """Removes a folder that has another name by then: a process that is killed leaves no half of it behind."""
    leaving = path.with_name(f"{path.name}.removed{PARTIAL}")
    remove(leaving)
    path.rename(leaving)
    remove(leaving)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FullDiskWarning:
    """Lets a run go on without what there is no room for: a warning for each kind of output, until it is written."""

    def __init__(self) -> None:
        self.unwritten: set[str] = set()

    @contextmanager
    def instead_of_error(self, kind: str) -> Iterator[None]:
        try:
            yield
            self.unwritten.discard(kind)
        except DiskFullError as error:
            if kind not in self.unwritten and os.environ.get("LOCAL_RANK", "0") == "0":
                message = f"warning: {error}; the run goes on without, and writes again when there is room"
                tqdm.write(message, file=sys.stderr)
            self.unwritten.add(kind)
