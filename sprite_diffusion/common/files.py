"""Files that are whole or not there (written under another name, synced, renamed), and where the cache is."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sprite_diffusion.common.errors import UserInputError, warn

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
PARTIAL = ".partial"
REMOVED = f".removed{PARTIAL}"  # a folder on its way out
NO_ROOM = 2**20  # bytes: with less than this free, a failed write is put down to the full disk


class DiskFullError(Exception):
    """There was no room for a file or folder, and nothing is left of it."""


def cache_dir() -> Path:
    """Returns the folder in which this project keeps what it would otherwise calculate again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sprite-diffusion"


def make_private_folder(path: Path) -> None:
    """Makes a folder of the cache, which others than the user can't read: it holds pixels of private images."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_relative_to(cache_dir()):
        with suppress(PermissionError):  # somebody else's, who decides
            cache_dir().chmod(0o700)  # also one that an earlier version made


def check_writable(flag: str, path: Path | None) -> None:
    """Raises `UserInputError` if `path`, None for some file of the current folder, can't be made. Makes nothing."""
    path = (path or Path("file")).absolute()
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is in the way, if anything, is found below
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise UserInputError(
            f"{flag} {path}: {getattr(error, 'strerror', None) or error}; give another name"
        ) from None
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise UserInputError(f"{flag} {path}: {place} is a link that leads nowhere; remove it, or name another")
    existing = next(folder for folder in path.parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserInputError(f"{flag} {path}: {existing} is not a folder that can be written to")


def check_output_folder(flag: str, path: Path | None) -> None:
    """Raises `UserInputError` if `path`, None for the current folder, is a file or can't be made. Makes nothing."""
    check_writable(flag, path)
    if path is not None and path.exists() and not path.is_dir():
        raise UserInputError(f"{flag} {path} is a file: name a folder")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yields a name to write a file or a folder under, which then takes the place of `path`.

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
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        full = full or shutil.disk_usage(path.parent).free < NO_ROOM
        remove(partial)
        if full:
            raise DiskFullError(f"{path}: the disk is full") from error
        raise
    except BaseException:
        remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with written_beside(path) as partial:
        partial.write_text(text)


def remove(path: Path) -> None:
    """Removes a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """Renames a folder and removes it under the new name: a killed process leaves no half of a folder behind."""
    renamed = path.with_name(path.name + REMOVED)
    remove(renamed)
    path.rename(renamed)
    remove(renamed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FullDiskWarning:
    """Lets a run go on without what there is no room for: one warning for each kind of output until it is written."""

    def __init__(self) -> None:
        self.unwritten: set[str] = set()

    @contextmanager
    def instead_of_error(self, kind: str) -> Iterator[None]:
        """Turns a `DiskFullError` inside into a warning, and lists `kind` as unwritten."""
        try:
            yield
            self.unwritten.discard(kind)
        except DiskFullError as error:
            if kind not in self.unwritten:
                warn(f"{error}; the run goes on without, and writes again when there is room")
            self.unwritten.add(kind)
