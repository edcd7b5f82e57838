"""Decodes one image: from a file, bytes or an array to the pixels that a network is trained on."""

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError, first_line, printable
from sprite_diffusion.data.config import DataConfig

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey of more than 8 bits
GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)
# A small file may hold a huge image, of which Pillow needs 4 to 26 bytes a pixel. A photograph has up to 50 million.
MAX_IMAGE_PIXELS = 2**26
MAX_TIMES_RESOLUTION = 2**8  # images may be larger if that many times the pixels of `--resolution` are more
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


class SkippedImage(NamedTuple):
    """An image that can't be used, and that a run goes on without."""

    name: str
    reason: str


class BadImageError(Exception):
    """An image that can't be decoded. The message goes on after the image's name: "is not an image ..."."""


def load_image_file(path: str, config: DataConfig) -> torch.Tensor:
    """Returns the image of a file, treated as those of a dataset are: (C, H, W) float32 in [-1, 1].

    C, H and W are as in `prepare_image`. Raises `UserInputError` if the file can't be decoded.
    """
    try:
        return to_model_range(torch.from_numpy(prepare_image(open_image(path, config), path, config)))
    except BadImageError as error:
        raise UserInputError(f"{path} {error}") from None


def prepare_or_skip(value: Any, name: str, config: DataConfig) -> np.ndarray | SkippedImage:
    """Returns an image's pixels, as `prepare_image` does, or what `skip_image` returns if it can't be decoded.

    Args:
        value: What `open_image` takes.
        name: The name of the image in messages.
        config: How to decode the image, and whether to go on without a bad one.

    Raises:
        UserInputError: For an image that can't be decoded, unless `--on_bad_image` is 'skip'.
    """
    try:
        return prepare_image(open_image(value, config), name, config)
    except BadImageError as error:
        return skip_image(name, str(error), config)


def skip_image(name: str, reason: str, config: DataConfig) -> SkippedImage:
    """Prints that an image can't be used, and returns its entry in the list of skipped images.

    Raises `UserInputError` instead if `--on_bad_image` is 'error'.
    """
    if config.on_bad_image == "error":
        raise UserInputError(f"{name} {reason}: replace it, or give --on_bad_image skip")
    tqdm.write(printable(f"skipped: {name} {reason}"), file=sys.stderr)
    return SkippedImage(name, reason)


def name_image(value: Any, position: str) -> str:
    """Returns the name of an image for messages: its file, or its position in a table and the name of its file.

    Args:
        value: A file name, a file's bytes or a `datasets` example.
        position: What to call the image if `value` holds no file name, such as "row 3 of data.parquet".
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not value["path"]:
        return position
    return value["path"] if value["bytes"] is None else f"{position} ({value['path']})"


def open_image(value: Any, config: DataConfig) -> Image.Image:
    """Decodes an image, and turns it upright as its EXIF orientation says.

    Args:
        value: An (H, W, C) uint8 array of 1, 3 or 4 channels, a file name, a file's bytes, a `datasets` example or an
            image, which is returned as it is.
        config: `resolution`, which bounds how large an image may be.

    Raises:
        BadImageError: If `value` is nothing of these, or can't be decoded.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        return Image.fromarray(value[..., 0] if value.shape[2] == 1 else value)
    if isinstance(value, str | bytes):
        value = {"path": value, "bytes": None} if isinstance(value, str) else {"path": None, "bytes": value}
    if not isinstance(value, dict):
        raise BadImageError(f"is not an image but {type(value).__name__}")
    max_pixels = _max_pixels(config)
    try:
        with _pixel_limit(max_pixels):
            return datasets.Image().decode_example(value)  # which turns the image upright
    except UnidentifiedImageError:
        raise BadImageError("is not an image that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadImageError(f"has more than {max_pixels:,} pixels, the most for this --resolution") from None
    except Exception as error:  # Pillow's decoders raise errors of many types on broken files
        if isinstance(error, OSError) and error.strerror:
            raise BadImageError(f"can't be read ({error.strerror})") from None
        raise BadImageError(f"can't be decoded ({first_line(error)})") from None


def _max_pixels(config: DataConfig) -> int:
    """Returns how many pixels an image may have, in its file and after its resize."""
    return max(MAX_IMAGE_PIXELS, MAX_TIMES_RESOLUTION * math.prod(config.image_size))


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Lets Pillow raise an error for an image of more pixels, before it decodes the image."""
    former = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = former


def prepare_image(image: Image.Image, name: str, config: DataConfig) -> np.ndarray:
    """Returns an image's pixels (C, H, W), resized as `config` says.

    Transparency is composed with the background or, in mode 'RGBA', kept: the channels are then the colours times
    alpha, and alpha, so that what lies hidden under transparent pixels is neither mixed into their neighbours nor
    learned. The pixels are uint8 or, if the image has more than 8 bits, uint16. H and W are `config.image_size`,
    except that H or W is larger if training is to crop the image at a random place.

    Args:
        image: An image of any mode.
        name: The name of the image in messages.
        config: How to resize the image, its channels and its background.

    Raises:
        BadImageError: If the image can't be converted.
        UserInputError: If the image is not of the resolution and `--resize_mode` is 'none'.
    """
    height, width = config.image_size
    if 0 in image.size:
        raise BadImageError("has no pixels")
    if config.resize_mode == "none" and image.size != (width, height):
        raise UserInputError(
            f"{name} is {image.width}x{image.height}, --resolution {width}x{height}: give --resize_mode crop or pad"
        )
    mode = choose_mode(image.mode, config)
    image = _to_srgb(image)
    # Before the resize, which would mix the hidden colour of transparent pixels into the edges.
    layers = _premultiply(image) if mode == "RGBA" else [_flatten(image, mode, config.background)]
    scale = (max if config.resize_mode == "crop" else min)(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if math.prod(size) > _max_pixels(config):
        raise BadImageError(f"is {image.width}x{image.height}, too thin to be resized to {size[0]}x{size[1]}")
    pixels = np.concatenate([_resize(layer, size, config.interpolation) for layer in layers])
    if mode == "RGB":
        pixels = np.broadcast_to(pixels, (3, *pixels.shape[1:]))
    elif mode == "RGBA":
        if len(pixels) == 2:
            pixels = pixels[[0, 0, 0, 1]]  # grey and its alpha
        pixels = np.minimum(pixels, pixels[3])  # a resize that overshoots leaves colours above their alpha
    if config.resize_mode == "pad":
        colour = (0, 0, 0, 0) if mode == "RGBA" else ImageColor.getcolor(config.background, mode)
        return _pad(pixels, (height, width), colour)
    if config.center_crop:
        top, left = np.subtract(pixels.shape[1:], (height, width)) // 2
        pixels = pixels[:, top : top + height, left : left + width]
    return np.ascontiguousarray(pixels)


def choose_mode(image_mode: str, config: DataConfig) -> str:
    """Returns 'L', 'RGB' or 'RGBA', the mode to train on, for an image of one of Pillow's modes."""
    if config.image_mode != "auto":
        return config.image_mode
    red, green, blue = ImageColor.getrgb(config.background)[:3]
    return "L" if image_mode in GREY_MODES and red == green == blue else "RGB"


def _to_srgb(image: Image.Image) -> Image.Image:
    """Converts the colours of an image that names another colour space by its ICC profile.

    Images of more than 8 bits are grey, and Pillow can't convert them. A profile that can't be read, or that is of
    another mode, is ignored, as browsers do.
    """
    profile_bytes = image.info.get("icc_profile")
    if not profile_bytes or image.mode in DEEP_MODES:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(profile_bytes))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image
        grey = image.mode in GREY_MODES
        if image.mode == "P" or "transparency" in image.info:  # which the conversion would lose
            image = image.convert(("LA" if grey else "RGBA") if image.has_transparency_data else "RGB")
        alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
        opaque = image.convert({"RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode))
        converted = ImageCms.profileToProfile(opaque, profile, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None  # a new image, as it is not converted in place
    if alpha is not None:
        converted.putalpha(alpha)
    return converted.convert("LA" if alpha is not None else "L") if grey else converted


def _flatten(image: Image.Image, mode: str, background: str) -> Image.Image:
    """Lays an image of any mode on the background. Returns it in `mode` or, if it has more than 8 bits, in 'F'."""
    if image.mode in DEEP_MODES:
        return Image.fromarray(_read_deep(image))
    try:
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
            image = Image.alpha_composite(canvas, image.convert("RGBA"))
        return image.convert(mode)
    except ValueError as error:  # Pillow converts some modes, such as LAB, to few others
        raise BadImageError(f"can't be used ({first_line(error)})") from None


def _premultiply(image: Image.Image) -> list[Image.Image]:
    """Multiplies the colours of an image of any mode by its alpha.

    Returns the image as 'RGBa', which is Pillow's name for this, or two images in 'F' if it has more than 8 bits: grey
    and alpha.
    """
    if image.mode in DEEP_MODES:
        values = _read_deep(image)
        alpha = np.full_like(values, 65535)
        alpha[values == image.info.get("transparency", -1)] = 0  # the level that a PNG file names as transparent
        return [Image.fromarray(np.minimum(values, alpha)), Image.fromarray(alpha)]
    try:
        return [image.convert("RGBA").convert("RGBa")]
    except ValueError as error:  # Pillow converts some modes, such as La, to few others
        raise BadImageError(f"can't be used ({first_line(error)})") from None


def _read_deep(image: Image.Image) -> np.ndarray:
    """Returns the levels (H, W), 0 to 65535, of a grey image of more than 8 bits, as float32.

    Of them Pillow makes an image in 'F', the only mode of more than 8 bits that it resizes well.
    """
    white = 1 if image.mode == "F" else 65535
    values = np.asarray(image, dtype=np.float32)
    if not (values.min() >= 0 and values.max() <= white):
        raise BadImageError(
            f"has values of {values.min():g} to {values.max():g}, mode {image.mode} should hold 0 to {white}"
        )
    return values * (65535 / white)


def _resize(image: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Returns the pixels (C, H, W) of an image that is resized to (width, height): uint8 or, of mode 'F', uint16."""
    pixels = np.asarray(image.resize(size, Image.Resampling[interpolation.upper()]))
    if pixels.dtype == np.float32:
        pixels = pixels.clip(0, 65535).round().astype(np.uint16)  # a resize may overshoot the range
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _pad(pixels: np.ndarray, image_size: tuple[int, int], colour: int | tuple[int, ...]) -> np.ndarray:
    """Puts pixels (C, h, w) into the middle of a canvas (C, H, W) of `colour`, in levels of 0 to 255."""
    level = np.reshape(colour, (-1, 1, 1)) * (257 if pixels.dtype == np.uint16 else 1)  # 257 * 255 = 65535
    padded = np.empty((len(pixels), *image_size), pixels.dtype)
    padded[:] = level
    top, left = np.subtract(image_size, pixels.shape[1:]) // 2
    padded[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return padded


def crop_and_flip(pixels: np.ndarray, offsets: np.ndarray, flip: bool, image_size: tuple[int, int]) -> np.ndarray:
    """Returns a view of pixels (C, >= H, >= W): (C, H, W) from `offsets`, top and left, on, mirrored if `flip`."""
    top, left = offsets
    pixels = pixels[:, top : top + image_size[0], left : left + image_size[1]]
    return pixels[:, :, ::-1] if flip else pixels


def premultiply(pixels: torch.Tensor) -> torch.Tensor:
    """Returns uint8 images (N, C, H, W) with the colours of four channels multiplied by alpha, as Pillow does it."""
    if pixels.shape[1] != 4:
        return pixels
    colours, alpha = pixels[:, :3].int(), pixels[:, 3:]
    return torch.cat([((colours * alpha + 127) // 255).to(torch.uint8), alpha], dim=1)


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """Maps all levels of uint8 or uint16 to float32 in [-1, 1]; floating-point pixels are returned as they are."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float().div_(torch.iinfo(pixels.dtype).max / 2).sub_(1)
