"""Images that are not trained on, and their loss beside that of the others: a network that learns by heart shows."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.dataset import ImageData, StoredImages
from sprite_diffusion.data.decoding import to_model_range
from sprite_diffusion.data.labels import rank_in_class
from sprite_diffusion.metrics.report import Losses
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.training.randomness import Draws, draw_randomness
from sprite_diffusion.training.steps import Batch

NUM_BATCHES, BATCH_SIZE = 32, 32  # of each of the two losses


def hold_out(data: ImageData, fraction: float) -> ImageData:
    """Returns images without a share of them, by chance but always the same, which are its `held_out`.

    Of each class the share is held out, rounded down, so that no class is without images. Raises `UserInputError` if
    no image would be held out.
    """
    if fraction == 0:
        return data
    assert isinstance(data.dataset, StoredImages)  # as --evaluate_every does not go with a stream
    num_images = len(data.dataset)
    labels = data.dataset.class_labels if data.class_names is not None else None
    labels = np.zeros(num_images, np.int64) if labels is None else labels
    order = np.random.default_rng(0).permutation(num_images)
    labels = labels[order]
    is_held_out = np.zeros(num_images, bool)
    is_held_out[order] = rank_in_class(labels) < np.floor(fraction * np.bincount(labels)[labels])
    if not is_held_out.any():
        raise UserInputError(
            f"--validation_fraction {fraction:g} is less than one image of each class of {data.source}: give more"
        )
    kept, held_out = (data.dataset.select(np.flatnonzero(rows)) for rows in (~is_held_out, is_held_out))
    return replace(data, dataset=kept, held_out=held_out)


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
    draws = draw_randomness((config.seed, number), batch, config, BATCH_SIZE)
    kept = torch.ones_like(draws.uniform)  # is no less than any probability: no label is dropped, no image changed
    return loss_fn(model, batch, draws._replace(uniform=kept, augmentation=torch.ones_like(draws.augmentation))).item()


def _batches(images: Any, device: torch.device) -> Iterator[Batch]:
    """Yields `NUM_BATCHES` batches of images, cropped in the centre, the first ones again when there are no more.

    They are drawn by chance, always the same: the first of a folder are of one class.
    """
    assert isinstance(images, StoredImages)  # as a stream has none held out
    order = np.resize(np.random.default_rng(0).permutation(len(images)), NUM_BATCHES * BATCH_SIZE)
    for rows in np.split(order, NUM_BATCHES):
        pixels = images.read_centred(rows).to(device)
        ids = {name: values.to(device) for name, values in images.read_ids(rows).items()}
        yield Batch(to_model_range(pixels), ids.get("class_labels"), ids.get("caption_ids"), 0, BATCH_SIZE, BATCH_SIZE)
