"""Decoded images in a file that is mapped into memory: each image is decoded once, for all runs and processes."""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
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
from sprite_diffusion.data.decoding import SkippedImage

PIXELS_FILE, TABLE_FILE, SKIPPED_FILE, DIGEST_FILE = "pixels.bin", "table.npy", "skipped.json", "xxh3.txt"
CACHE_LIMIT = "SPRITE_DIFFUSION_CACHE_GB"  # an environment variable
DEFAULT_CACHE_GB = 20.0
HASHED_AT_ONCE = 1024  # images


class ImageStore:
    """Images (C, H, W) of any sizes, uint8 or uint16, in a folder that `write` has filled, or in memory.

    An image of a folder is read when it is asked for. Its pages lie in the system's file cache, which drops pages when
    memory is short, and which all processes of a machine share.
    """

    def __init__(
        self,
        table: np.ndarray,
        read: Callable[[int], np.ndarray],
        digest: str,
        skipped: list[tuple[int, SkippedImage]],
    ) -> None:
        self.table = table  # (N, 5) int64: first byte, C, H, W, bytes of a value
        self._read = read
        self.digest = digest  # of all pixels: the identity of the images
        self.skipped = skipped  # each with its row in the source

    @classmethod
    def open(cls, folder: Path) -> "ImageStore":
        """Opens a folder that `write` has filled. Raises OSError, ValueError or EOFError if it is damaged."""
        digest = _digest(folder)  # also reads the pixels into the system's file cache
        if (folder / DIGEST_FILE).read_text() != digest:
            raise ValueError(f"{folder} is damaged")
        table = np.load(folder / TABLE_FILE)
        pixels = _map(folder / PIXELS_FILE)
        rows = json.loads((folder / SKIPPED_FILE).read_text())

        def read(row: int) -> np.ndarray:
            start, *shape, value_size = table[row].tolist()
            image = pixels[start : start + shape[0] * shape[1] * shape[2] * value_size]
            return image.view(np.uint16 if value_size == 2 else np.uint8).reshape(shape)

        return cls(table, read, digest, [(row, SkippedImage(name, reason)) for row, name, reason in rows])

    @classmethod
    def from_array(cls, images: np.ndarray) -> "ImageStore":
        """Returns a store of images (N, C, H, W), uint8 or uint16, that are in memory or mapped into it."""
        table = np.empty((len(images), 5), np.int64)
        table[:, 0] = np.arange(len(images)) * images[0].nbytes
        table[:, 1:] = (*images.shape[1:], images.itemsize)
        digest = xxhash.xxh3_128(repr((images.shape, images.dtype.str)).encode())
        for start in range(0, len(images), HASHED_AT_ONCE):
            # Channels last, as arrays in files are: these are then hashed where they are.
            digest.update(np.ascontiguousarray(images[start : start + HASHED_AT_ONCE].transpose(0, 2, 3, 1)).data)
        return cls(table, images.__getitem__, digest.hexdigest(), [])

    def select(self, rows: np.ndarray) -> "ImageStore":
        """Returns a store of some of the rows, which reads them where they are."""
        digest = xxhash.xxh3_128(self.digest.encode() + rows.tobytes()).hexdigest()
        return ImageStore(self.table[rows], lambda row: self._read(int(rows[row])), digest, self.skipped)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns an image (C, H, W), uint8 or uint16."""
        return self._read(row)

    @staticmethod
    def write(folder: Path, images: Iterable[np.ndarray | SkippedImage]) -> None:
        """Fills an empty folder, one image at a time; a `SkippedImage` stands for an image that can't be used."""
        table, skipped, start = array("q"), [], 0  # a list of a million images' numbers would weigh 200 MB
        with open(folder / PIXELS_FILE, "wb") as file:
            for row, image in enumerate(images):
                if isinstance(image, SkippedImage):
                    skipped.append((row, *image))
                    continue
                table.extend((start, *image.shape, image.itemsize))
                file.write(image.tobytes())
                start += image.nbytes
        np.save(folder / TABLE_FILE, np.frombuffer(table, np.int64).reshape(-1, 5))
        (folder / SKIPPED_FILE).write_text(json.dumps(skipped))
        (folder / DIGEST_FILE).write_text(_digest(folder))


def _map(path: Path) -> np.ndarray:
    """Maps the bytes of a file into memory."""
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


def _digest(folder: Path) -> str:
    """Returns a hash of a store's files: against damage, so a fast one, as the whole store is read at each start."""
    digest = xxhash.xxh3_128()
    for name in (PIXELS_FILE, TABLE_FILE, SKIPPED_FILE):
        with open(folder / name, "rb") as file:  # read, as pages that are mapped count as memory of this process
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def decode_once(key: str, images: Iterable[np.ndarray | SkippedImage]) -> ImageStore:
    """Returns the store of `key`. If there is none or it is damaged, `images` are decoded into a new one.

    One process decodes while others wait for it. Raises `UserInputError` if the cache can't be written.
    """
    cache_limit = _read_cache_limit()
    folder = cache_dir() / "images" / key
    try:
        make_private_folder(folder.parent)
        with FileLock(folder.with_suffix(".lock")):
            store = None
            with suppress(OSError, ValueError, EOFError):
                store = ImageStore.open(folder)
            if store is None:
                _make_room(folder.parent, cache_limit)
                remove(folder)
                with written_beside(folder) as partial:
                    partial.mkdir()
                    ImageStore.write(partial, images)
                store = ImageStore.open(folder)
            os.utime(folder)  # used just now
            return store
    except (OSError, DiskFullError) as error:
        raise UserInputError(
            f"{folder.parent} can't take the decoded images ({first_line(error)}): set XDG_CACHE_HOME"
        ) from None


def _read_cache_limit() -> float:
    """Returns how many bytes of decoded images are kept."""
    text = os.environ.get(CACHE_LIMIT, str(DEFAULT_CACHE_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1
    if not limit >= 0:
        raise UserInputError(f"{CACHE_LIMIT} is '{text}': give gigabytes, such as {DEFAULT_CACHE_GB:g}")
    return limit * 1e9


def _make_room(cache: Path, limit: float) -> None:
    """Removes what killed processes have left, and the stores that were not used for longest, down to the limit.

    What another process writes is locked and stays. A run whose store is removed reads on: the system keeps a file
    for those that have it open.
    """
    stores = []
    for path in cache.iterdir():
        if path.suffix != ".lock":
            with suppress(FileNotFoundError):  # another process removes it
                size = sum(file.stat().st_size for file in path.rglob("*"))
                stores.append((not path.name.endswith(PARTIAL), path.stat().st_mtime, size, path))
    total = sum(size for _, _, size, _ in stores)
    for is_whole, _, size, path in sorted(stores):
        if is_whole and total <= limit:
            break
        with suppress(Timeout), FileLock(cache / f"{path.name.partition('.')[0]}.lock").acquire(timeout=0):
            remove(path)
            total -= size
