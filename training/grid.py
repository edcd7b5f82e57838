"""Many small images as one picture."""

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

MIN_SIDE = 64  # pixels at which a person can look at a sprite


def choose_scale(images: torch.Tensor) -> int:
    """The whole number by which images (N, C, H, W) are enlarged to be looked at."""
    return max(1, MIN_SIDE // max(images.shape[-2:]))


def to_pixels(images: torch.Tensor, scale: int) -> torch.Tensor:
    """Images (N, C, H, W) in [0, 1] -> uint8 (N, C, scale * H, scale * W): rounded, and each pixel a square."""
    levels = (images.float().cpu() * 255).round().to(torch.uint8)
    return levels.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def make_picture(images: torch.Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """Images (N, C, H, W) in [0, 1], `columns` in a row, enlarged by `scale`, else by `choose_scale`."""
    scale = scale or choose_scale(images)
    return to_pil_image(make_grid(to_pixels(images, scale), nrow=columns, padding=scale, pad_value=255))
