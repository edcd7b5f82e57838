"""The real images that a model is judged by: two halves of the data, and the nearest of all to a given image."""

import hashlib
from functools import cached_property

import numpy as np
import torch

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.dataset import ImageData, StoredImages

MIN_IMAGES = 20  # of which half is compared with: fewer have no neighbourhoods
SEARCHED_AT_ONCE = 4096  # images


class RealImages:
    """The images of a dataset as uint8 (B, C, H, W), in order, cropped in the centre, never flipped.

    A random half is the reference, which generated images are compared with, and which a classifier is trained on. The
    other half is held out: compared with the reference it shows what figures a perfect model would get.
    """

    def __init__(self, data: ImageData) -> None:
        if not isinstance(data.dataset, StoredImages):
            raise UserInputError("metrics need all images at hand: leave --streaming out")
        if len(data.dataset) < MIN_IMAGES:
            raise UserInputError(f"metrics need at least {MIN_IMAGES} images: {data.source} has {len(data.dataset)}")
        self.source = data.source
        self.id2label = data.id2label
        self.num_channels = data.num_channels
        self.image_size = data.dataset.image_size
        self._dataset = data.dataset
        half = len(self) // 2
        order = np.random.default_rng(0).permutation(len(self))
        self.reference, self.held_out = order[:half], order[half : 2 * half]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        pixels = self._dataset.gather(indices, self._dataset.max_offsets // 2)
        if pixels.dtype == np.uint16:
            pixels = (pixels / 257).round().astype(np.uint8)  # 257 * 255 = 65535
        return torch.from_numpy(pixels)

    @cached_property
    def class_labels(self) -> torch.Tensor | None:
        """(N,) int64; None where the data has none, or has one for all."""
        labels = self._dataset.class_labels
        if labels is None or len(np.unique(labels)) < 2:
            return None
        return torch.from_numpy(labels[: len(self)])

    @cached_property
    def key(self) -> str:
        """A hash of every pixel and label: of the data, its resolution, and the way it was resized."""
        digest = hashlib.sha256(repr((len(self), self.num_channels, self.image_size)).encode())
        for start in range(0, len(self), SEARCHED_AT_ONCE):
            digest.update(self[np.arange(start, min(start + SEARCHED_AT_ONCE, len(self)))].numpy().tobytes())
        if self.class_labels is not None:
            digest.update(self.class_labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def find_nearest(self, images: torch.Tensor, but: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """For each of `images`, uint8 (B, C, H, W), the distance to the nearest of the dataset's, and its index.

        The distance is the root mean square difference of pixels, as a share of their range: 0 is a copy, black is 1
        from white. `but` (B,) are indices that each image must not find, as its own.
        """
        device = images.device
        flat = images.flatten(1).float() / 255  # (B, D)
        best = torch.full((len(images),), torch.inf, device=device)
        index = torch.zeros(len(images), dtype=torch.long, device=device)
        for start in range(0, len(self), SEARCHED_AT_ONCE):
            real = self[np.arange(start, min(start + SEARCHED_AT_ONCE, len(self)))].to(device).flatten(1).float() / 255
            # Squares without |image|^2, which is the same for all: cancellation costs little where only order counts.
            squares = real.square().sum(1) - 2 * flat @ real.T  # (B, N)
            if but is not None:
                own = torch.arange(start, start + len(real), device=device) == but.to(device)[:, None]
                squares = squares.masked_fill(own, torch.inf)
            smallest, where = squares.min(dim=1)
            nearer = smallest < best
            best, index = torch.where(nearer, smallest, best), torch.where(nearer, where + start, index)
        nearest = self[index.cpu().numpy()].to(device).flatten(1).float() / 255
        return (flat - nearest).square().mean(1).sqrt(), index
