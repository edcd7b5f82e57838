"""Decoded images in a file that is mapped into memory: each image is decoded once, for all runs and processes."""

import json
from array import array
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from sprite_diffusion.common.cache import check_digest, make_once, write_digest
from sprite_diffusion.data.decoding import SkippedImage

PIXELS_FILE, TABLE_FILE, SKIPPED_FILE = STORE_FILES = ("pixels.bin", "table.npy", "skipped.json")
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
        digest = check_digest(folder, STORE_FILES)
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
        write_digest(folder, STORE_FILES)


def _map(path: Path) -> np.ndarray:
    """Maps the bytes of a file into memory."""
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


def decode_once(key: str, images: Iterable[np.ndarray | SkippedImage]) -> ImageStore:
    """Returns the store of `key`. If there is none or it is damaged, `images` are decoded into a new one.

    Raises `UserInputError` if the cache can't be written.
    """
    return make_once("images", key, partial(ImageStore.write, images=images), ImageStore.open)
