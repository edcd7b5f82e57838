"""Decoded images in a file that is mapped into memory: each image is decoded once, for all runs and processes."""

import json
from array import array
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.files import DiskFullError, cache_dir, written_beside
from sprite_diffusion.data.decoding import SkippedImage

PIXELS_FILE, TABLE_FILE, SKIPPED_FILE = "pixels.bin", "table.npy", "skipped.json"


class ImageStore:
    """Images (C, H, W) of any sizes, uint8 or uint16, in a folder that `write` has filled, or in memory.

    An image of a folder is read when it is asked for. Its pages lie in the system's file cache, which drops pages when
    memory is short, and which all processes of a machine share.
    """

    def __init__(self, table: np.ndarray, pixels: np.ndarray, skipped: list[tuple[int, SkippedImage]]) -> None:
        self.table = table  # (N, 5) int64: first byte, C, H, W, bytes of a value
        self.pixels = pixels  # uint8, the bytes of all images
        self.skipped = skipped  # each with its row in the source

    @classmethod
    def open(cls, folder: Path) -> "ImageStore":
        """Opens a folder that `write` has filled. Raises OSError, ValueError or EOFError if it is damaged."""
        table = np.load(folder / TABLE_FILE)
        size = int(table[:, 1:].prod(axis=1).sum())
        if (folder / PIXELS_FILE).stat().st_size != size:
            raise ValueError(f"{folder / PIXELS_FILE} does not have the {size} bytes of its images")
        pixels = np.memmap(folder / PIXELS_FILE, np.uint8, "r") if size else np.empty(0, np.uint8)
        rows = json.loads((folder / SKIPPED_FILE).read_text())
        return cls(table, pixels, [(row, SkippedImage(name, reason)) for row, name, reason in rows])

    @classmethod
    def from_array(cls, images: np.ndarray) -> "ImageStore":
        """Returns a store of images (N, C, H, W), uint8 or uint16, that are in memory."""
        table = np.empty((len(images), 5), np.int64)
        table[:, 0] = np.arange(len(images)) * images[0].nbytes
        table[:, 1:] = (*images.shape[1:], images.itemsize)
        return cls(table, np.ascontiguousarray(images).reshape(-1).view(np.uint8), [])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns an image (C, H, W), uint8 or uint16."""
        start, *shape, value_size = self.table[row].tolist()
        pixels = self.pixels[start : start + shape[0] * shape[1] * shape[2] * value_size]
        return pixels.view(np.uint16 if value_size == 2 else np.uint8).reshape(shape)

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


def decode_once(key: str, images: Iterable[np.ndarray | SkippedImage]) -> ImageStore:
    """Returns the store of `key`. If there is none or it is damaged, `images` are decoded into a new one.

    One process decodes while others wait for it. Raises `UserInputError` if the cache can't be written.
    """
    folder = cache_dir() / "images" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            with suppress(OSError, ValueError, EOFError):
                return ImageStore.open(folder)
            with written_beside(folder) as partial:
                partial.mkdir()
                ImageStore.write(partial, images)
            return ImageStore.open(folder)
    except (OSError, DiskFullError) as error:
        raise UserInputError(
            f"{folder.parent} can't take the decoded images ({first_line(error)}): set XDG_CACHE_HOME"
        ) from None
