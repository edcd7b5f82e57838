"""The random numbers of a training: a function of the seed and the step."""

from typing import NamedTuple

import numpy as np
import torch

from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.training.augmentation import NUM_UNIFORM
from sprite_diffusion.training.steps import Batch


class Draws(NamedTuple):
    """The random numbers of a micro-batch, a row for each image."""

    noise: torch.Tensor  # (B, C, H, W), standard normal, float32
    timesteps: torch.Tensor  # (B,) in 0..T-1
    uniform: torch.Tensor  # (B,) in [0, 1), to drop labels by
    augmentation: torch.Tensor  # (B, 8) in [0, 1), to change images by


def draw_randomness(entropy: tuple[int, int], batch: Batch, config: TrainingConfig, step_size: int) -> Draws:
    """Returns the random numbers of a micro-batch.

    They are a function of `entropy` = (seed, step) and the image's row among the `step_size` images of the step: all
    rows are drawn and those of the batch are kept, so that it does not matter how a step is divided among processes
    and micro-batches. The density of the timesteps t grows as t^(`config.timestep_power` - 1): with a power of 1 they
    are uniform (Ho et al. 2020, algorithm 1), and with 2 three quarters of them are in the noisier half.
    """
    seed, model_seed = (int(s) for s in np.random.SeedSequence(entropy).generate_state(2, np.uint64))
    device = batch.images.device
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn((step_size, *batch.images.shape[1:]), generator=generator, device=device)  # float32
    share = torch.rand(step_size, generator=generator, device=device) ** (1 / config.timestep_power)
    last = config.ddpm_num_steps - 1
    timesteps = (config.ddpm_num_steps * share).long().clamp(max=last)  # a root of nearly 1 may be rounded to 1
    uniform = torch.rand(step_size, generator=generator, device=device)
    augmentation = torch.rand(step_size, NUM_UNIFORM, generator=generator, device=device)
    torch.manual_seed((model_seed >> 1) + batch.first_row)  # dropout inside the network
    rows = slice(batch.first_row, batch.first_row + len(batch.images))
    return Draws(noise[rows], timesteps[rows], uniform[rows], augmentation[rows])
