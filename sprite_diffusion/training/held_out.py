"""The loss of images that are not trained on, beside that of images that are: a network that learns by heart shows."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from sprite_diffusion.data.dataset import ImageData, StoredImages
from sprite_diffusion.data.decoding import to_model_range
from sprite_diffusion.metrics.report import Losses
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.training.randomness import Draws, draw_randomness
from sprite_diffusion.training.steps import Batch

NUM_BATCHES, BATCH_SIZE = 32, 32  # of each of the two losses


def measure_losses(
    model: Any, data: ImageData, config: TrainingConfig, loss_fn: Callable[[Any, Batch, Draws], torch.Tensor]
) -> Losses | None:
    """Returns the losses of images that `model` is trained on and of those held out; None if none are.

    Both are of the same noise and timesteps, the same at each call, with labels and without augmentation, so that
    what differs is the images. Of few images each stands there with several timesteps.
    """
    if data.held_out is None:
        return None
    device = next(model.parameters()).device
    losses = [
        [_measure(model, batch, config, loss_fn, number) for number, batch in enumerate(_batches(images, device))]
        for images in (data.dataset, data.held_out)
    ]
    training, held_out = np.array(losses)  # (NUM_BATCHES,) each
    error = (held_out - training).std(ddof=1) / np.sqrt(NUM_BATCHES)
    return Losses(float(training.mean()), float(held_out.mean()), float(error))


@torch.no_grad()
def _measure(model: Any, batch: Batch, config: TrainingConfig, loss_fn: Any, number: int) -> float:
    draws = draw_randomness((config.seed, number), batch, config.ddpm_num_steps, BATCH_SIZE)
    kept = torch.ones_like(draws.uniform)  # is no less than any probability: no label is dropped, no image changed
    return loss_fn(model, batch, draws._replace(uniform=kept, augmentation=torch.ones_like(draws.augmentation))).item()


def _batches(images: Any, device: torch.device) -> Iterator[Batch]:
    """Yields `NUM_BATCHES` batches of images, cropped in the centre, the first ones again when there are no more."""
    assert isinstance(images, StoredImages)  # as a stream has none held out
    for number in range(NUM_BATCHES):
        rows = np.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE) % len(images)
        pixels = images.read_centred(rows).to(device)
        ids = {name: values.to(device) for name, values in images.read_ids(rows).items()}
        yield Batch(to_model_range(pixels), ids.get("class_labels"), ids.get("caption_ids"), 0, BATCH_SIZE, BATCH_SIZE)
