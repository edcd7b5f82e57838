"""One image: from a file, bytes or an array to the pixels that a network is trained on."""

import sys
import warnings
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image, ImageColor, UnidentifiedImageError
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError, first_line, printable
from sprite_diffusion.data.config import DataConfig

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey of more than 8 bits
GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)


class SkippedImage(NamedTuple):
    """An image that can't be used, in a run that goes on without it."""

    name: str
    reason: str


class BadImageError(Exception):
    """An image that can't be decoded; the message is part of a line."""


def load_image_file(path: str, config: DataConfig) -> torch.Tensor:
    """One image, (C, H, W) float32 in [-1, 1], treated as those of a dataset."""
    try:
        return to_model_range(torch.from_numpy(prepare_image(open_image(path), path, config)))
    except BadImageError as error:
        raise UserInputError(f"{path} {error}") from None


def prepare_or_skip(value: Any, name: str, config: DataConfig) -> np.ndarray | SkippedImage:
    try:
        return prepare_image(open_image(value), name, config)
    except BadImageError as error:
        return skip_image(name, str(error), config)


def skip_image(name: str, reason: str, config: DataConfig) -> SkippedImage:
    """An image that can't be used, as it is listed; raises where that is to stop the run."""
    if config.on_bad_image == "error":
        raise UserInputError(f"{name} {reason}: replace it, or give --on_bad_image skip")
    tqdm.write(printable(f"skipped: {name} {reason}"), file=sys.stderr)
    return SkippedImage(name, reason)


def name_image(value: Any, where: str) -> str:
    """The file of an image; where it lies inside of a parquet file, `where` and the name that it had."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not value["path"]:
        return where
    return value["path"] if value["bytes"] is None else f"{where} ({value['path']})"


def open_image(value: Any) -> Image.Image:
    """A decoded image, upright, from an (H, W, C) array, a file name, a file's bytes or a `datasets` example."""
    if isinstance(value, np.ndarray):
        return Image.fromarray(value[..., 0] if value.shape[2] == 1 else value)
    if isinstance(value, str | bytes):
        value = {"path": value, "bytes": None} if isinstance(value, str) else {"path": None, "bytes": value}
    if not isinstance(value, dict):
        raise BadImageError(f"is not an image but {type(value).__name__}")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            return datasets.Image().decode_example(value)  # applies the EXIF orientation
    except UnidentifiedImageError:
        raise BadImageError("is not an image that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadImageError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        if isinstance(error, OSError) and error.strerror:
            raise BadImageError(f"can't be read ({error.strerror})") from None
        raise BadImageError(f"can't be decoded ({first_line(error)})") from None


def prepare_image(image: Image.Image, name: str, config: DataConfig) -> np.ndarray:
    """-> (C, H, W) uint8, or uint16 where the image has more than 8 bits.

    H and W are `config.image_size`, or one of them is larger where a random place is to be cropped.
    """
    height, width = config.image_size
    if 0 in image.size:
        raise BadImageError("has no pixels")
    if config.resize_mode == "none" and image.size != (width, height):
        raise UserInputError(
            f"{name} is {image.width}x{image.height}, --resolution {width}x{height}: give --resize_mode crop or pad"
        )
    mode = _choose_mode(image, config)
    # Before the resize, which would mix the hidden colour of transparent pixels into the edges.
    image = _flatten(image, mode, config.background)
    scale = (max if config.resize_mode == "crop" else min)(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise BadImageError(f"is {image.width}x{image.height}, too thin to be resized to {size[0]}x{size[1]}")
    pixels = np.asarray(image.resize(size, Image.Resampling[config.interpolation.upper()]))
    if pixels.dtype == np.float32:
        pixels = pixels.clip(0, 65535).round().astype(np.uint16)  # a resize may overshoot the range
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)
    if mode == "RGB":
        pixels = np.broadcast_to(pixels, (3, *pixels.shape[1:]))
    if config.resize_mode == "pad":
        return _pad(pixels, (height, width), ImageColor.getcolor(config.background, mode))
    if config.center_crop:
        top, left = np.subtract(pixels.shape[1:], (height, width)) // 2
        pixels = pixels[:, top : top + height, left : left + width]
    return np.ascontiguousarray(pixels)


def _choose_mode(image: Image.Image, config: DataConfig) -> str:
    if config.image_mode != "auto":
        return config.image_mode
    red, green, blue = ImageColor.getrgb(config.background)[:3]
    return "L" if image.mode in GREY_MODES and red == green == blue else "RGB"


def _flatten(image: Image.Image, mode: str, background: str) -> Image.Image:
    """Any mode -> `mode`, or 'F' in 0..65535 where it has more than 8 bits: Pillow resizes no other deep mode well."""
    if image.mode in DEEP_MODES:
        white = 1 if image.mode == "F" else 65535
        values = np.asarray(image, dtype=np.float32)  # (H, W)
        if not (values.min() >= 0 and values.max() <= white):
            raise BadImageError(
                f"has values of {values.min():g} to {values.max():g}, mode {image.mode} should hold 0 to {white}"
            )
        return Image.fromarray(values * (65535 / white))
    try:
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
            image = Image.alpha_composite(canvas, image.convert("RGBA"))
        return image.convert(mode)
    except ValueError as error:  # such as LAB
        raise BadImageError(f"can't be used ({first_line(error)})") from None


def _pad(pixels: np.ndarray, image_size: tuple[int, int], colour: int | tuple[int, ...]) -> np.ndarray:
    level = np.reshape(colour, (-1, 1, 1)) * (257 if pixels.dtype == np.uint16 else 1)  # 257 * 255 = 65535
    padded = np.empty((len(pixels), *image_size), pixels.dtype)
    padded[:] = level
    top, left = np.subtract(image_size, pixels.shape[1:]) // 2
    padded[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return padded


def crop_and_flip(pixels: np.ndarray, offsets: np.ndarray, flip: bool, image_size: tuple[int, int]) -> np.ndarray:
    top, left = offsets
    pixels = pixels[:, top : top + image_size[0], left : left + image_size[1]]
    return pixels[:, :, ::-1] if flip else pixels


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 or uint16 -> float32 in [-1, 1]; what is there already passes."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float().div_(torch.iinfo(pixels.dtype).max / 2).sub_(1)
