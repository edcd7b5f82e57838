"""Training by class, compared with unconditional.py: labels in the data, a share of them dropped, samples guided.

The network learns "no class" from the dropped labels, and samples are guided from there to their class.
"""

from typing import Any

import torch

from pipelines import ConditionalDDPMPipeline
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.dataset import ImageData, load_image_data
from sprite_diffusion.data.sources import Table
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.outputs import SampleGrid
from sprite_diffusion.sampling.conditions import Condition, one_hot
from sprite_diffusion.training.augmentation import augment_as_asked
from sprite_diffusion.training.build import build_model, build_noise_scheduler, check_without_captions
from sprite_diffusion.training.loss import ddpm_loss
from sprite_diffusion.training.randomness import Draws
from sprite_diffusion.training.steps import Batch
from sprite_diffusion.training.training_loop import begin_run, training_loop

MAX_GRID_ROWS = 16  # classes in a sample grid, one per row


def train(
    config: TrainingConfig, data: ImageData | None = None, table: Table | None = None
) -> ConditionalDDPMPipeline:
    """Trains a model on images by class, writes it into `config.output_dir`, and returns its pipeline.

    Args:
        config: The flags.
        data: Images with labels, such as those of `load_tensor`; None for those that `config` names.
        table: That of the latter, if it is open already.

    Raises:
        UserInputError: For a flag, file or column that has to be changed.
    """
    if config.noise_scheduler_class == "LinearCorruptionScheduler":
        raise UserInputError("--noise_scheduler_class LinearCorruptionScheduler: use train_unconditional.py")
    if config.model_class == "BasicUNet2DModel":
        raise UserInputError("--model_class BasicUNet2DModel takes no class labels: use train_unconditional.py")
    check_without_captions(config)
    base = begin_run(config)
    data = data or load_image_data(config, with_labels=True, streaming=config.streaming, table=table)
    id2label = data.id2label
    if id2label is None:
        raise UserInputError(f"{data.source} have no class labels: give them, or train without classes")
    null_class = len(id2label)  # "no class": the id after the last
    model = build_model(config, data.num_channels, id2label, base)
    noise_scheduler = build_noise_scheduler(config, base)

    def loss_fn(model: Any, batch: Batch, draws: Draws) -> torch.Tensor:
        assert batch.class_labels is not None  # `data` has them
        class_labels = torch.where(draws.uniform < config.label_dropout, null_class, batch.class_labels)
        images, kwargs = augment_as_asked(batch.images, draws.augmentation, config)
        kwargs["class_labels"] = class_labels
        return ddpm_loss(
            model, noise_scheduler, images, draws.noise, draws.timesteps, kwargs, config.snr_gamma, config.snr_floor
        )

    def make_pipeline(unet: Any) -> ConditionalDDPMPipeline:
        scheduler = type(noise_scheduler).from_config(noise_scheduler.config)
        return ConditionalDDPMPipeline(unet=unet, scheduler=scheduler, id2label=id2label)

    shown = list(id2label.items())[:MAX_GRID_ROWS]
    rows = [Condition.of_classes(name, one_hot(id, len(id2label))) for id, name in shown]
    grid = SampleGrid(
        conditions=[condition for condition in rows for _ in range(config.eval_batch_size)],
        columns=config.eval_batch_size,
        caption=f"{config.ddpm_num_inference_steps} inference steps, guidance {config.guidance_scale:g}, "
        f"rows: {', '.join(str(condition.name) for condition in rows)}",
        guidance_scale=config.guidance_scale,
    )
    return training_loop(config, data, model, loss_fn, make_pipeline, grid)
