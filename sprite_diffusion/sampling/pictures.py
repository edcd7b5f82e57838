"""Pictures for people: labelled grids, animations, and PNG files that say how they were made."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from sprite_diffusion.common.errors import UserInputError

FONT_SIZE = 13  # pixels
GAP = 4  # pixels between images, and around text
FRAME_MS = 80
HOLD_MS = 2500  # of the last frame
MIN_SIDE = 64  # pixels: smaller sprites are enlarged to be looked at
CHECK_SIDE = 8  # pixels, of a square of the board that transparent images lie on
CHECK_LEVELS = (255, 204)  # white and light grey
MAX_PIXELS = 2**27  # of a picture, in memory 400 MB
MAX_SIDES = {".webp": 16383, ".gif": 65535}  # in pixels: the formats have no room for more


def choose_scale(images: torch.Tensor) -> int:
    """Returns the whole number by which images (..., H, W) are enlarged to be looked at."""
    return max(1, MIN_SIDE // max(images.shape[-2:]))


def check_size(path: Path, rows: int, columns: int, shape: Sequence[int], scale: int | None, frames: int) -> None:
    """Raises `UserInputError` if a grid of images is more than `path` can hold, before its images are sampled.

    Args:
        path: The file.
        rows: The rows of the grid.
        columns: The images in a row.
        shape: The channels, height and width of an image.
        scale: The whole number by which images are enlarged; None for that of `choose_scale`.
        frames: How many such grids the file holds.
    """
    scale = scale or choose_scale(torch.empty(0, *shape))
    height, width = rows * scale * shape[1], columns * scale * shape[2]
    max_side = MAX_SIDES.get(path.suffix.lower(), MAX_PIXELS)
    if frames * height * width > MAX_PIXELS or max(height, width) > max_side:
        raise UserInputError(
            f"{path} would have {frames} x {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} or, on a side, "
            f"{max_side:,} that are possible: give a smaller --scale or --num_images"
        )


def to_pixels(images: torch.Tensor, scale: int) -> torch.Tensor:
    """Returns images (..., H, W) in [0, 1] as uint8 (..., scale * H, scale * W), each pixel a square."""
    levels = (images.float().cpu() * 255).round().to(torch.uint8)
    return levels.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def make_picture(images: torch.Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """Draws images (N, C, H, W) in [0, 1], `columns` in a row, enlarged by `scale` or else by `choose_scale`.

    Those with transparency lie on a checkerboard.
    """
    scale = scale or choose_scale(images)
    pixels = _lay_on_checkerboard(to_pixels(images, scale))
    return to_pil_image(make_grid(pixels, nrow=columns, padding=scale, pad_value=255))


def make_single_picture(image: torch.Tensor, scale: int | None = None) -> Image.Image:
    """Returns an image (C, H, W) in [0, 1], with its transparency, enlarged as by `make_picture`."""
    return to_pil_image(to_pixels(image, scale or choose_scale(image)))


def _lay_on_checkerboard(pixels: torch.Tensor) -> torch.Tensor:
    """Returns uint8 images (N, C, H, W) without transparency: those of four channels lie on a checkerboard."""
    if pixels.shape[1] != 4:
        return pixels
    rows, columns = (torch.arange(side) // CHECK_SIDE for side in pixels.shape[2:])
    board = torch.tensor(CHECK_LEVELS)[(rows[:, None] + columns) % 2]  # (H, W)
    colours, alpha = pixels[:, :3].int(), pixels[:, 3:].int()
    return ((colours * alpha + board * (255 - alpha)) / 255).round().to(torch.uint8)


def labelled_grid(
    rows: list[torch.Tensor], row_labels: list[str], column_labels: list[str], scale: int | None = None
) -> Image.Image:
    """Draws rows of images with a label before each row; those with transparency lie on a checkerboard.

    Args:
        rows: The images of each row, (N, C, H, W) in [0, 1].
        row_labels: A text for each row, of one or more lines.
        column_labels: A text for each column, under the last row; none for a picture without.
        scale: The whole number by which images are enlarged; None for that of `choose_scale`.
    """
    scale = scale or choose_scale(rows[0])
    font = ImageFont.load_default(FONT_SIZE)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def measure(label: str) -> tuple[int, int]:
        """Returns the width and height of a text and the gap around it, in pixels."""
        left, top, right, bottom = ruler.multiline_textbbox((0, 0), label, font=font)
        return round(right - left) + 2 * GAP, round(bottom - top) + 2 * GAP

    row_sizes = [measure(label) for label in row_labels]
    column_sizes = [measure(label) for label in column_labels]
    height, width = (scale * side for side in rows[0].shape[-2:])
    margin = max(size[0] for size in row_sizes)
    column_width = max([width + GAP, *(size[0] for size in column_sizes)])
    row_heights = [max(height + GAP, size[1]) for size in row_sizes]
    footer = max((size[1] for size in column_sizes), default=0)
    canvas = Image.new("RGB", (margin + column_width * len(rows[0]), sum(row_heights) + footer), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for images, label, row_height in zip(rows, row_labels, row_heights, strict=True):
        draw.multiline_text((GAP, top + row_height / 2), label, fill="black", font=font, anchor="lm")
        for column, pixels in enumerate(_lay_on_checkerboard(to_pixels(images, scale))):
            left = margin + column * column_width + (column_width - width) // 2
            canvas.paste(to_pil_image(pixels), (left, top + (row_height - height) // 2))
        top += row_height
    for column, label in enumerate(column_labels):
        centre = margin + (column + 0.5) * column_width
        draw.multiline_text((centre, top + GAP), label, fill="black", font=font, anchor="ma", align="center")
    return canvas


def save_png(picture: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Writes a PNG with a text chunk for each of `metadata`; values other than strings as JSON."""
    text = PngInfo()
    for name, value in metadata.items():
        text.add_text(name, value if isinstance(value, str) else json.dumps(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=text)


def save_json(record: dict[str, Any], path: Path) -> None:
    """Writes how a picture was made, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def save_animation(frames: list[torch.Tensor], path: Path, columns: int, scale: int | None = None) -> None:
    """Writes a grid that moves, as a .gif or .webp that repeats; each frame is images (N, C, H, W) in [0, 1]."""
    pictures = [make_picture(images, columns, scale) for images in frames]
    durations = [FRAME_MS] * (len(pictures) - 1) + [HOLD_MS]
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"lossless": True} if path.suffix.lower() == ".webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options)
