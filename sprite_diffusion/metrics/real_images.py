"""The real images that a model is judged by: two halves of the data, and the nearest of all to a given image."""

import hashlib
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.dataset import ImageData, StoredImages

MIN_IMAGES = 20  # in a half of fewer images there are no neighbourhoods
SEARCHED_AT_ONCE = 4096  # images that are in memory at a time


class RealImages:
    """The images of a dataset as uint8 (B, C, H, W), in order, cropped in the centre, never flipped.

    As in training, the colours of images with transparency are multiplied by alpha, the fourth channel: what nobody
    sees makes no difference to a metric.

    A random half is the reference, which generated images are compared with and a classifier is trained on. The other
    half is held out: measured against the reference, it shows what a perfect model would get.

    Raises `UserInputError` if the images are streamed, or fewer than `MIN_IMAGES`.
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
        """Returns the images (B, C, H, W) at `indices` (B,), uint8; levels of 16 bits are rounded to 8."""
        return self._dataset.read_centred(indices)

    def in_batches(self, indices: np.ndarray, batch_size: int) -> Iterator[torch.Tensor]:
        """Yields the images at `indices` (N,), `batch_size` at a time and fewer in the last batch."""
        for start in range(0, len(indices), batch_size):
            yield self[indices[start : start + batch_size]]

    @cached_property
    def class_labels(self) -> torch.Tensor | None:
        """The class ids (N,), int64; None where the data has no classes, or one for all."""
        labels = self._dataset.class_labels
        if labels is None or len(np.unique(labels)) < 2:
            return None
        return torch.from_numpy(labels[: len(self)])

    @cached_property
    def captions(self) -> list[str] | None:
        """The caption of each image; None where the data has no captions."""
        captions = self._dataset.captions
        return None if captions is None else [captions.texts[id] for id in captions.ids]

    @cached_property
    def key(self) -> str:
        """A hash of every pixel and label, so that of the resolution and the way of resizing too."""
        digest = hashlib.sha256(repr((len(self), self.num_channels, self.image_size)).encode())
        for images in self.in_batches(np.arange(len(self)), SEARCHED_AT_ONCE):
            digest.update(images.numpy().tobytes())
        if self.class_labels is not None:
            digest.update(self.class_labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def find_nearest(
        self, images: torch.Tensor, exclude: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the distance from each image to the nearest image of the dataset, and the index of the latter.

        The distance is the root mean square difference of pixels, as a share of their range: that of a copy is 0, that
        of black from white 1.

        Args:
            images: uint8 (B, C, H, W).
            exclude: For each image the index (B,) of one in the dataset that it must not find, such as the image's.

        Returns:
            Distances (B,), float32, and indices (B,), int64, on the device of `images`.
        """
        device = images.device
        flat = images.flatten(1).float() / 255  # (B, D)
        best = torch.full((len(images),), torch.inf, device=device)
        index = torch.zeros(len(images), dtype=torch.long, device=device)
        for start in range(0, len(self), SEARCHED_AT_ONCE):
            real = self[np.arange(start, min(start + SEARCHED_AT_ONCE, len(self)))].to(device).flatten(1).float() / 255
            # |image|^2 is left out, as it is the same for all. Cancellation costs little where only the order counts.
            squares = real.square().sum(1) - 2 * flat @ real.T  # (B, N)
            if exclude is not None:
                is_excluded = torch.arange(start, start + len(real), device=device) == exclude.to(device)[:, None]
                squares = squares.masked_fill(is_excluded, torch.inf)
            smallest, position = squares.min(dim=1)
            is_nearer = smallest < best
            best = torch.where(is_nearer, smallest, best)
            index = torch.where(is_nearer, position + start, index)
        nearest = self[index.cpu().numpy()].to(device).flatten(1).float() / 255
        return (flat - nearest).square().mean(1).sqrt(), index
