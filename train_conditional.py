"""Trains a diffusion model on images by class: `accelerate launch train_conditional.py`.

Against train_unconditional.py: the data has labels, the network takes them, a share of them is dropped in training
so that the network learns the unconditional case too, and samples are guided from that to their class.
"""

import sys
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed

from pipelines import ConditionalDDPMPipeline
from training.build import build_model, build_noise_scheduler
from training.checkpoint import check_output_dir
from training.config import parse_config
from training.dataset import load_image_data
from training.errors import UserInputError, exits_on_user_error
from training.loss import ddpm_loss
from training.outputs import SampleGrid
from training.tracking import check_tracker
from training.training_loop import Batch, training_loop

MAX_GRID_ROWS = 16  # classes in a sample grid, one per row


@exits_on_user_error
def main() -> None:
    config = parse_config(sys.argv[1:], default_preset="sprites_conditional.yaml")
    if config.noise_scheduler_class == "LinearCorruptionScheduler":
        raise UserInputError("--noise_scheduler_class LinearCorruptionScheduler: use train_unconditional.py")
    check_output_dir(config)
    check_tracker(config.logger)
    set_seed(config.seed)

    data = load_image_data(config, with_labels=True)
    id2label = data.id2label
    assert id2label is not None  # asked for with `with_labels`
    null_class = len(id2label)  # "no class": the id after the last
    model = build_model(config, data.num_channels, num_classes=len(id2label))
    noise_scheduler = build_noise_scheduler(config)

    def get_model_kwargs(batch: Batch, uniform: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = batch["class_labels"]
        return {"class_labels": torch.where(uniform < config.label_dropout, null_class, labels)}

    def make_pipeline(model: Any) -> ConditionalDDPMPipeline:
        scheduler = type(noise_scheduler).from_config(noise_scheduler.config)
        return ConditionalDDPMPipeline(unet=model, scheduler=scheduler, id2label=id2label)

    columns = config.eval_batch_size
    rows = list(id2label)[:MAX_GRID_ROWS]
    labels = [label for label in rows for _ in range(columns)]
    row_names = ", ".join(id2label[label] for label in rows)
    training_loop(
        config,
        data,
        model,
        noise_scheduler,
        loss_fn=partial(ddpm_loss, snr_gamma=config.snr_gamma),
        get_model_kwargs=get_model_kwargs,
        make_pipeline=make_pipeline,
        grid=SampleGrid(
            num_images=len(labels),
            columns=columns,
            caption=f"{config.ddpm_num_inference_steps} inference steps, guidance {config.guidance_scale:g}, "
            f"rows: {row_names}",
            pipeline_kwargs={"class_labels": labels, "guidance_scale": config.guidance_scale},
        ),
    )


if __name__ == "__main__":
    main()
