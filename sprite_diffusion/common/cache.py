"""Folders of the cache: made once, for all runs and processes, checked when opened, removed when room is short."""

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import xxhash
from filelock import FileLock, Timeout

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.files import (
    PARTIAL,
    DiskFullError,
    cache_dir,
    make_private_folder,
    remove,
    written_beside,
)

Kind = Literal["images", "embeddings"]
KINDS: tuple[Kind, ...] = ("images", "embeddings")
DIGEST_FILE = "xxh3.txt"
CACHE_LIMIT = "SPRITE_DIFFUSION_CACHE_GB"  # an environment variable
DEFAULT_CACHE_GB = 20.0

Opened = TypeVar("Opened")


def make_once(kind: Kind, key: str, fill: Callable[[Path], None], open_folder: Callable[[Path], Opened]) -> Opened:
    """Returns what `open_folder` gives for the folder of `key`. If there is none or it is damaged, a new one is made.

    One process makes it while others wait for it.

    Args:
        kind: What the folder holds.
        key: A hash of all that its content follows from.
        fill: Fills an empty folder.
        open_folder: Raises OSError, ValueError or EOFError for a folder that is damaged or not there.

    Raises:
        UserInputError: If the cache can't be written.
    """
    cache_limit = _read_cache_limit()
    folder = cache_dir() / kind / key
    try:
        make_private_folder(folder.parent)
        with FileLock(folder.with_suffix(".lock")):
            with suppress(OSError, ValueError, EOFError):
                opened = open_folder(folder)
                os.utime(folder)  # used just now
                return opened
            _make_room(cache_limit)
            remove(folder)
            with written_beside(folder) as partial:
                partial.mkdir()
                fill(partial)
            return open_folder(folder)
    except (OSError, DiskFullError) as error:
        raise UserInputError(
            f"{folder.parent} can't take the {kind} ({first_line(error)}): set XDG_CACHE_HOME"
        ) from None


def write_digest(folder: Path, names: Iterable[str]) -> None:
    """Writes the hash of a folder's files, for `check_digest`."""
    (folder / DIGEST_FILE).write_text(_digest(folder, names))


def check_digest(folder: Path, names: Iterable[str]) -> str:
    """Returns the hash of a folder's files. Raises ValueError if it is not the one that was written with them."""
    digest = _digest(folder, names)  # also reads the files into the system's file cache
    if (folder / DIGEST_FILE).read_text() != digest:
        raise ValueError(f"{folder} is damaged")
    return digest


def _digest(folder: Path, names: Iterable[str]) -> str:
    """Returns a hash of files: against damage, so a fast one, as all of a folder is read at each start."""
    digest = xxhash.xxh3_128()
    for name in names:
        with open(folder / name, "rb") as file:  # read, as pages that are mapped count as memory of this process
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _read_cache_limit() -> float:
    """Returns how many bytes the folders may have together."""
    text = os.environ.get(CACHE_LIMIT, str(DEFAULT_CACHE_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1
    if not limit >= 0:
        raise UserInputError(f"{CACHE_LIMIT} is '{text}': give gigabytes, such as {DEFAULT_CACHE_GB:g}")
    return limit * 1e9


def _make_room(limit: float) -> None:
    """Removes what killed processes have left, and the folders that were not used for longest, down to the limit.

    What another process writes is locked and stays. A run whose folder is removed reads on: the system keeps a file
    for those that have it open.
    """
    folders = []
    for path in (path for kind in KINDS for path in (cache_dir() / kind).glob("*")):
        if path.suffix != ".lock":
            with suppress(FileNotFoundError):  # another process removes it
                size = sum(file.stat().st_size for file in path.rglob("*"))
                folders.append((not path.name.endswith(PARTIAL), path.stat().st_mtime, size, path))
    total = sum(size for _, _, size, _ in folders)
    for is_whole, _, size, path in sorted(folders):
        if is_whole and total <= limit:
            break
        lock = path.with_name(f"{path.name.partition('.')[0]}.lock")
        with suppress(Timeout), FileLock(lock).acquire(timeout=0):
            remove(path)
            total -= size
