"""Sprite sheets: samples in cells without gaps, with the JSON file that Aseprite exports and game engines read."""

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from sprite_diffusion.sampling.pictures import save_json, save_png, to_pixels

FRAME_MS = 100  # as of a new frame in Aseprite
FORMATS = {"L": "I8", "RGB": "RGB888", "RGBA": "RGBA8888"}


def draw_sheet(images: torch.Tensor, columns: int, scale: int) -> Image.Image:
    """Draws images (N, C, H, W) in [0, 1] side by side, `columns` in a row; cells that are left over are empty.

    Empty is transparent or, without alpha, of the first pixel's colour, so that no colour is added to a palette.
    """
    pixels = to_pixels(images, scale)
    channels, height, width = pixels.shape[1:]
    rows = -(-len(pixels) // columns)
    nothing = torch.zeros_like(pixels[0]) if channels == 4 else pixels[0, :, :1, :1].expand_as(pixels[0])
    left_over = nothing.expand(rows * columns - len(pixels), -1, -1, -1)
    cells = torch.cat([pixels, left_over]).unflatten(0, (rows, columns))  # (R, K, C, H, W)
    return to_pil_image(cells.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width))


def write_sheet(images: torch.Tensor, path: Path, columns: int, scale: int, record: dict[str, Any]) -> None:
    """Writes images (N, C, H, W) in [0, 1] as a sheet, with `record` as its text chunks, and the JSON beside it."""
    sheet = draw_sheet(images, columns, scale)
    save_png(sheet, path, record)
    save_json(describe_sheet(sheet, path.name, len(images), columns, record), path.with_suffix(".json"))


def describe_sheet(
    sheet: Image.Image, name: str, num_images: int, columns: int, record: dict[str, Any]
) -> dict[str, Any]:
    """Returns the JSON of a sheet, in Aseprite's format "json-array": each frame's place, a tag for each condition.

    A frame is named by its number, by which engines find the frames of a tag. "seed" and "class" or "prompt" of a
    frame, and "generation", which says how all of them were sampled, are this project's additions.
    """
    rows = -(-num_images // columns)
    size = {"w": sheet.width // columns, "h": sheet.height // rows}
    frames: list[dict[str, Any]] = [
        {
            "filename": str(i),
            "frame": {"x": i % columns * size["w"], "y": i // columns * size["h"], **size},
            "rotated": False,
            "trimmed": False,
            "spriteSourceSize": {"x": 0, "y": 0, **size},
            "sourceSize": size,
            "duration": FRAME_MS,
            **image_record,
        }
        for i, image_record in enumerate(record["images"])
    ]
    asked_for = [image.get("prompt", image.get("class")) for image in record["images"]]
    tags = []
    for condition, group in groupby(range(num_images), asked_for.__getitem__):
        numbers = list(group)
        if condition:
            tags.append({"name": condition, "from": numbers[0], "to": numbers[-1], "direction": "forward"})
    meta = {
        "app": "sprite-diffusion",
        "version": "1.0",
        "image": name,
        "format": FORMATS[sheet.mode],
        "size": {"w": sheet.width, "h": sheet.height},
        "scale": "1",
        "frameTags": tags,
        "generation": {name: value for name, value in record.items() if name != "images"},
    }
    return {"frames": frames, "meta": meta}
