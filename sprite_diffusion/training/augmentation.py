"""Images that are moved, turned and recoloured at random, which the network is told, so that samples are not.

Karras et al. 2022, appendix F.2: what was done to an image is a vector, zero for nothing, of which a linear layer
without bias makes an embedding that is added to that of the time. The embedding of "nothing" is zero, so that the
network without the layer, as it is saved, draws images like those of the data.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from sprite_diffusion.common.flags import AugmentationSet
from sprite_diffusion.runs.config import TrainingConfig

NUM_UNIFORM = 8  # random numbers that an image is changed by
NUM_LABELS = 11  # numbers that say how
# The five other orders of red, green and blue: red becomes green, and so on.
COLOUR_ORDERS = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
LARGEST_SHIFT = 1 / 8  # of the side
LARGEST_SCALE = 0.3  # in powers of two


class AugmentedNetwork(torch.nn.Module):
    """A `UNet2DModel` with the layer that tells it how its images were changed."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.augmentation = torch.nn.Linear(NUM_LABELS, unet.time_embedding.linear_2.out_features, bias=False)
        torch.nn.init.zeros_(self.augmentation.weight)
        self._embedding: torch.Tensor | None = None
        unet.time_embedding.register_forward_hook(self._add_embedding)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, augmentation: torch.Tensor, **kwargs: Any) -> Any:
        """Returns the prediction for noisy images (B, C, H, W) that were changed as `augmentation` (B, 11) says."""
        self._embedding = self.augmentation(augmentation)
        try:
            return self.unet(sample, timestep, **kwargs)
        finally:
            self._embedding = None

    def _add_embedding(self, module: torch.nn.Module, args: Any, time_embedding: torch.Tensor) -> torch.Tensor:
        return time_embedding if self._embedding is None else time_embedding + self._embedding


def augment_as_asked(
    images: torch.Tensor, uniform: torch.Tensor, config: TrainingConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns images (B, C, H, W), changed if `--augmentation` asks for it, and what the network is told of it."""
    if config.augmentation == "none":
        return images, {}
    images, labels = augment(images, uniform, config.augmentation, config.augmentation_probability)
    return images, {"augmentation": labels}


def augment(
    images: torch.Tensor, uniform: torch.Tensor, kind: AugmentationSet, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes images, and says how.

    Args:
        images: (B, C, H, W) in [-1, 1].
        uniform: (B, 8) in [0, 1).
        kind: "pixel_art" keeps pixels whole: it mirrors, turns by quarters, shifts by whole pixels, and swaps colours.
            "photo" mirrors left to right, and turns, shifts and scales by any amount.
        probability: That of each of the changes.

    Returns:
        The images, and (B, 11) numbers, which are zero for an image that nothing was done to: whether it is mirrored,
        cosine less 1 and sine of the angle, both shifts, the scale, the order of the colours.
    """
    height, width = images.shape[-2:]
    is_pixel_art = kind == "pixel_art"
    draws = uniform.unbind(dim=1)
    signed = [2 * draw - 1 for draw in draws]
    mirrored = draws[0] < probability / 2
    if is_pixel_art:  # of images that are not square, half turns alone
        quarters = 1 + (3 * draws[2]).floor() if height == width else 2 * torch.ones_like(draws[2])
        angle = quarters * (math.pi / 2)
    else:
        angle = signed[2] * math.pi
    angle = angle * (draws[1] < probability)
    is_shifted = draws[3] < probability
    shift_x, shift_y = (is_shifted * draw * LARGEST_SHIFT for draw in signed[4:6])
    if is_pixel_art:
        shift_x, shift_y = (shift_x * width).round() / width, (shift_y * height).round() / height
    is_chosen = draws[6] < probability  # for the change that one of the two sets has alone: colours, or scale
    power = signed[7] * LARGEST_SCALE * (is_chosen & (not is_pixel_art))
    orders = torch.zeros_like(draws[7], dtype=torch.long)
    if is_pixel_art and images.shape[1] >= 3:
        orders = (1 + (5 * draws[7]).floor()).long() * is_chosen
    changed = _move(images, 1 - 2.0 * mirrored, angle, shift_x, shift_y, power, is_pixel_art)
    if images.shape[1] >= 3:
        index = COLOUR_ORDERS.to(images.device)[orders][..., None, None].expand(-1, -1, height, width)
        changed = torch.cat((changed[:, :3].gather(1, index), changed[:, 3:]), dim=1)
    geometry = (mirrored.float(), angle.cos() - 1, angle.sin(), shift_x / LARGEST_SHIFT, shift_y / LARGEST_SHIFT)
    labels = torch.stack([*geometry, power / LARGEST_SCALE], dim=1)
    labels = torch.cat((labels, F.one_hot(orders, len(COLOUR_ORDERS))[:, 1:].float()), dim=1)
    is_changed = (labels != 0).any(dim=1)  # others are left as they are, to the last bit
    return torch.where(is_changed[:, None, None, None], changed, images), labels


def _move(
    images: torch.Tensor,
    sign: torch.Tensor,
    angle: torch.Tensor,
    shift_x: torch.Tensor,
    shift_y: torch.Tensor,
    power: torch.Tensor,
    is_pixel_art: bool,
) -> torch.Tensor:
    """Returns images that are mirrored where `sign` is -1, then turned, scaled by 2**power, and shifted."""
    height, width = images.shape[-2:]
    scale = 2.0**-power
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    # Where each pixel of the result comes from, in coordinates of [-1, 1] across the image.
    rows = torch.stack((sign * cosine, sign * sine * (height / width)), dim=1)
    columns = torch.stack((-sine * (width / height), cosine), dim=1)
    matrix = torch.stack((rows, columns), dim=1)  # (B, 2, 2)
    offset = -matrix @ torch.stack((2 * shift_x, 2 * shift_y), dim=1)[..., None]
    grid = F.affine_grid(torch.cat((matrix, offset), dim=2), list(images.shape), align_corners=False)
    if is_pixel_art:
        return F.grid_sample(images, grid, mode="nearest", padding_mode="border", align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
