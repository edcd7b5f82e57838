"""Training without classes: the data, the network, the process, the loss and the pipeline, handed to the loop."""

import math
from typing import Any

import torch

from pipelines import UnconditionalDDPMPipeline
from sprite_diffusion.data.dataset import ImageData, load_image_data
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.outputs import SampleGrid
from sprite_diffusion.sampling.conditions import Condition
from sprite_diffusion.training.augmentation import augment_as_asked
from sprite_diffusion.training.build import build_model, build_noise_scheduler, check_without_captions
from sprite_diffusion.training.loss import corruption_loss, ddpm_loss
from sprite_diffusion.training.randomness import Draws
from sprite_diffusion.training.steps import Batch
from sprite_diffusion.training.training_loop import begin_run, training_loop


def train(config: TrainingConfig, data: ImageData | None = None) -> UnconditionalDDPMPipeline:
    """Trains a model on images, writes it into `config.output_dir`, and returns its pipeline.

    Args:
        config: The flags.
        data: The images, such as those of `load_tensor`; None for those that `config` names.

    Raises:
        UserInputError: For a flag, file or column that has to be changed.
    """
    check_without_captions(config)
    base = begin_run(config)
    if data is None:
        # The network takes no labels, but images can be judged better where there are some.
        with_labels = False if config.evaluate_every is None else None
        data = load_image_data(config, with_labels, config.streaming)
    model = build_model(config, data.num_channels, base=base)
    noise_scheduler = build_noise_scheduler(config, base)

    def loss_fn(model: Any, batch: Batch, draws: Draws) -> torch.Tensor:
        if config.noise_scheduler_class == "LinearCorruptionScheduler":
            return corruption_loss(model, noise_scheduler, batch.images, draws.noise, draws.timesteps)
        images, kwargs = augment_as_asked(batch.images, draws.augmentation, config)
        return ddpm_loss(
            model, noise_scheduler, images, draws.noise, draws.timesteps, kwargs, config.snr_gamma, config.snr_floor
        )

    def make_pipeline(unet: Any) -> UnconditionalDDPMPipeline:
        scheduler = type(noise_scheduler).from_config(noise_scheduler.config)
        return UnconditionalDDPMPipeline(unet=unet, scheduler=scheduler)

    grid = SampleGrid(
        conditions=[Condition()] * config.eval_batch_size,
        columns=math.ceil(math.sqrt(config.eval_batch_size)),
        caption=f"{config.ddpm_num_inference_steps} inference steps",
    )
    return training_loop(config, data, model, loss_fn, make_pipeline, grid)
