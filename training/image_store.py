"""Decoded images in a file that is mapped into memory: decoded once, and shared by all processes."""

import json
import os
import shutil
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from filelock import FileLock

from training.errors import UserInputError, first_line

PIXELS_FILE, TABLE_FILE, SKIPPED_FILE = "pixels.bin", "table.npy", "skipped.json"


def cache_dir() -> Path:
    """Where this project keeps what it would otherwise calculate again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sprite-diffusion"


class ImageStore:
    """Images (C, H, W) of any sizes, uint8 or uint16, read from a folder that `write` has filled.

    Nothing is read before it is asked for. The pages are the system's file cache: it drops them where memory is
    short, and all processes of a machine share them.
    """

    def __init__(self, folder: Path) -> None:
        self.table = np.load(folder / TABLE_FILE)  # (N, 5) int64: first byte, C, H, W, bytes of a value
        size = int(self.table[:, 1:].prod(axis=1).sum())
        if (folder / PIXELS_FILE).stat().st_size != size:
            raise ValueError(f"{folder / PIXELS_FILE} has not the {size} bytes of its images")
        self.pixels = np.memmap(folder / PIXELS_FILE, np.uint8, "r") if size else np.empty(0, np.uint8)
        self.skipped: list[tuple[int, str, str]] = [  # row in the source, name, reason
            (row, name, reason) for row, name, reason in json.loads((folder / SKIPPED_FILE).read_text())
        ]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> np.ndarray:
        start, *shape, value_size = self.table[row].tolist()
        pixels = self.pixels[start : start + shape[0] * shape[1] * shape[2] * value_size]
        return pixels.view(np.uint16 if value_size == 2 else np.uint8).reshape(shape)

    @staticmethod
    def write(folder: Path, images: Iterable[np.ndarray | tuple[str, str]]) -> None:
        """Fills the folder, one image at a time; a (name, reason) stands for an image that can't be used."""
        table, skipped, start = array("q"), [], 0  # not a list: of a million images it would weigh 200 MB
        with open(folder / PIXELS_FILE, "wb") as file:
            for row, image in enumerate(images):
                if isinstance(image, tuple):
                    skipped.append((row, *image))
                    continue
                table.extend((start, *image.shape, image.itemsize))
                file.write(image.tobytes())
                start += image.nbytes
        np.save(folder / TABLE_FILE, np.frombuffer(table, np.int64).reshape(-1, 5))
        (folder / SKIPPED_FILE).write_text(json.dumps(skipped))


def decode_once(key: str, images: Iterable[np.ndarray | tuple[str, str]]) -> ImageStore:
    """The store of this key; if there is none yet, or a damaged one, `images` are written into it.

    One process writes while others wait for it. Raises `UserInputError` if the cache can't be written.
    """
    folder = cache_dir() / "images" / key
    partial = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            try:
                return ImageStore(folder)
            except (OSError, ValueError, EOFError):
                for leftover in (folder, partial):
                    shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            try:
                ImageStore.write(partial, images)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return ImageStore(folder)
    except OSError as error:
        raise UserInputError(
            f"{folder.parent} can't take the decoded images ({first_line(error)}): set XDG_CACHE_HOME"
        ) from None
