"""Many small images as one picture."""

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

MIN_SIDE = 64  # pixels at which a person can look at a sprite


def save_grid(images: torch.Tensor, path: Path, columns: int) -> Image.Image:
    """Writes images (N, C, H, W) in [0, 1] as a PNG of `columns`, enlarged by a whole number where small."""
    scale = max(1, MIN_SIDE // max(images.shape[-2:]))
    levels = (images.float().cpu() * 255).round().to(torch.uint8)  # [0, 1] -> uint8, rounded
    enlarged = levels.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    grid = to_pil_image(make_grid(enlarged, nrow=columns, padding=scale, pad_value=255))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return grid
