"""The list of the files that a run has written into its folder: nothing else there is ever removed or replaced."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.files import (
    FULL_DISK,
    PARTIAL,
    REMOVED,
    DiskFullError,
    remove_whole,
    write_text,
    written_beside,
)
from sprite_diffusion.common.run_files import LIST_FILE, MANIFEST_FILE

LOCK_FILE, LOCK_OWNER_FILE = ".run.lock", ".run.lock.json"


class OwnedFiles:
    """A run's files in its folder, kept in `LIST_FILE`.

    A name is added before the file is there, so that a killed process leaves none of its files unlisted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = {*(read_list(folder) or ()), *_list_checkpoint_files(folder)}

    def others(self, path: Path) -> list[Path]:
        """Returns the files at or below `path` that the run has not written. Links count as files."""
        files = [path] if path.is_symlink() or not path.is_dir() else [p for p in path.rglob("*") if _is_file(p)]
        return [file for file in files if _is_file(file) and not self._is_listed(file)]

    def claim(self, *paths: Path) -> None:
        """Adds files, or the files of folders, to the list before they are written.

        Raises `UserInputError` if one of them is there and is not the run's.
        """
        for path in paths:
            if others := self.others(path):
                raise UserInputError(
                    f"{others[0]} is in the way and was not written by this run: move it, or name another --output_dir"
                )
        self._add(*(self._name(path) for path in paths if not path.is_dir()))

    def claim_all_but(self, folder: Path, earlier: set[Path]) -> None:
        """Adds the files below `folder` that came after `earlier`: those of libraries, which choose the names."""
        with _reports_lost_folder(self.folder), suppress(DiskFullError):  # of a full disk, the next call adds them
            self._add(*(self._name(file) for file in folder.rglob("*") if _is_file(file) and file not in earlier))

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """Yields a name to write a file or folder under, as `written_beside` does, and adds what was written."""
        partial, removed = (f"{self._name(path)}{ending}/" for ending in (PARTIAL, REMOVED))
        with _reports_lost_folder(self.folder):
            self.claim(path, path.with_name(path.name + PARTIAL))
            self._add(partial)
            with written_beside(path) as beside:
                yield beside
                written = [path / file.relative_to(beside) for file in beside.rglob("*") if _is_file(file)] or [path]
                self._add(removed, *(self._name(file) for file in written))
        with suppress(DiskFullError):  # what is gone may stay in the list for a while
            self._add()

    def remove_folder(self, path: Path) -> list[Path]:
        """Removes a folder with nothing but the run's files in it, else returns those that are not the run's."""
        with _reports_lost_folder(self.folder):
            others = self.others(path)
            if not others:
                with suppress(DiskFullError):  # removing makes room
                    self._add(f"{self._name(path)}{REMOVED}/")
                remove_whole(path)
                with suppress(DiskFullError):
                    self._add()
        return others

    def write_text(self, path: Path, text: str) -> None:
        """Writes a text file, whole or not at all, and adds its name."""
        with self.writing(path) as partial:
            partial.write_text(text)

    def append_text(self, path: Path, text: str) -> None:
        """Adds to the end of a text file that the run has written. Raises `DiskFullError` where there is no room."""
        with _reports_lost_folder(self.folder):
            try:
                with path.open("a") as file:
                    file.write(text)
            except OSError as error:
                if error.errno in FULL_DISK:
                    raise DiskFullError(f"{path}: the disk is full") from error
                raise

    def remove(self, path: Path) -> None:
        """Removes what the run has written at or below `path`; leaves the rest, and follows no link."""
        prefix = self._name(path)
        for name in sorted(self._names):
            if prefix in ("", ".") or name == prefix or name.startswith(f"{prefix}/"):
                self._remove(name)
        self._add()

    def remove_leftovers(self) -> None:
        """Removes what an interrupted write has left."""
        for name in sorted(self._names):
            if name.rstrip("/").endswith(PARTIAL):
                self._remove(name)
        self._add()

    def _remove(self, name: str) -> None:
        path = self.folder / name
        if any(parent.is_symlink() for parent in path.parents if self.folder in parent.parents):
            return
        if name.endswith("/") and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif _is_file(path):
            path.unlink()
        for parent in path.parents:
            if parent == self.folder or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()

    def _is_listed(self, file: Path) -> bool:
        name = self._name(file)
        if name in (LIST_FILE, f"{LIST_FILE}{PARTIAL}", LOCK_FILE, LOCK_OWNER_FILE):
            return True
        parents = (f"{parent.as_posix()}/" for parent in Path(name).parents)
        return name in self._names or any(parent in self._names for parent in parents)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _add(self, *names: str) -> None:
        """Writes the list with these names, and without those whose file is gone. Raises `DiskFullError`."""
        there = {name for name in self._names if (self.folder / name).exists() or (self.folder / name).is_symlink()}
        wanted = there | set(names)
        if wanted != self._names or not (self.folder / LIST_FILE).exists():
            with _reports_lost_folder(self.folder):
                write_text(self.folder / LIST_FILE, "".join(f"{name}\n" for name in sorted(wanted)))
            self._names = wanted


@contextmanager
def _reports_lost_folder(folder: Path) -> Iterator[None]:
    """Turns the error inside into a line if a run's folder was moved, replaced or protected while the run lasts."""
    try:
        yield
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if not Path(str(error.filename)).is_relative_to(folder):
            raise
        raise UserInputError(
            f"{error.filename} can't be written ({error.strerror}), and what the run did since its last "
            f"checkpoint is lost: make {folder} a folder that can be written to, and give the same command"
        ) from error


def read_list(folder: Path) -> list[str] | None:
    """Returns the names in a folder's list; None if there is no list, as in a folder that is somebody else's."""
    try:
        names = (folder / LIST_FILE).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return [name for name in names if name and not Path(name).is_absolute() and ".." not in Path(name).parts]


def _list_checkpoint_files(folder: Path) -> Iterator[str]:
    """Yields the files that checkpoints list as theirs: a checkpoint may have been copied here from another folder."""
    for manifest in folder.glob(f"checkpoint-*/{MANIFEST_FILE}"):
        checkpoint = manifest.parent.name
        yield f"{checkpoint}/{MANIFEST_FILE}"
        with suppress(OSError, ValueError, TypeError):
            names = [name for name in json.loads(manifest.read_text()) if ".." not in Path(name).parts]
            yield from (f"{checkpoint}/{name}" for name in names)


def _is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()
