"""The random numbers of a training: a function of the seed and the step."""

from typing import NamedTuple

import numpy as np
import torch

from sprite_diffusion.training.augmentation import NUM_UNIFORM
from sprite_diffusion.training.steps import Batch


class Draws(NamedTuple):
    """The random numbers of a micro-batch, a row for each image."""

    noise: torch.Tensor  # (B, C, H, W), standard normal, float32
    timesteps: torch.Tensor  # (B,) in 0..T-1
    uniform: torch.Tensor  # (B,) in [0, 1), to drop labels by
    augmentation: torch.Tensor  # (B, 8) in [0, 1), to change images by


def draw_randomness(
    entropy: tuple[int, int], batch: Batch, num_train_timesteps: int, step_size: int, timestep_power: float = 1.0
) -> Draws:
    """Returns the random numbers of a micro-batch.

    They are a function of `entropy` = (seed, step) and the image's row among the `step_size` images of the step: all
    rows are drawn and those of the batch are kept, so that it does not matter how a step is divided among processes
    and micro-batches. The density of the timesteps grows as t^(`timestep_power` - 1): at 1 they are uniform (Ho et al.
    2020, algorithm 1), and at 2 three quarters of them are in the noisier half.
    """
    seed, model_seed = (int(s) for s in np.random.SeedSequence(entropy).generate_state(2, np.uint64))
    device = batch.images.device
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn((step_size, *batch.images.shape[1:]), generator=generator, device=device)  # float32
    share = torch.rand(step_size, generator=generator, device=device) ** (1 / timestep_power)
    timesteps = (num_train_timesteps * share).long().clamp(max=num_train_timesteps - 1)  # a share rounds to 1 at times
    uniform = torch.rand(step_size, generator=generator, device=device)
    augmentation = torch.rand(step_size, NUM_UNIFORM, generator=generator, device=device)
    torch.manual_seed((model_seed >> 1) + batch.first_row)  # dropout inside the network
    rows = slice(batch.first_row, batch.first_row + len(batch.images))
    return Draws(noise[rows], timesteps[rows], uniform[rows], augmentation[rows])
