"""Trains a diffusion model on images, without classes: `accelerate launch train_unconditional.py`."""

import math
import sys
from functools import partial
from typing import Any

from accelerate.utils import set_seed

from pipelines import UnconditionalDDPMPipeline
from training.build import build_model, build_noise_scheduler
from training.checkpoint import check_output_dir
from training.config import parse_config
from training.dataset import load_image_data
from training.errors import exits_on_user_error
from training.loss import corruption_loss, ddpm_loss
from training.outputs import SampleGrid
from training.tracking import check_tracker
from training.training_loop import training_loop


@exits_on_user_error
def main() -> None:
    config = parse_config(sys.argv[1:], default_preset="sprites_unconditional.yaml")
    check_output_dir(config)
    check_tracker(config.logger)
    set_seed(config.seed)

    # The network takes no labels, but images can be judged better where there are some.
    data = load_image_data(config, with_labels=False if config.evaluate_every is None else None)
    model = build_model(config, data.num_channels)
    noise_scheduler = build_noise_scheduler(config)
    if config.noise_scheduler_class == "LinearCorruptionScheduler":
        loss_fn: Any = corruption_loss
    else:
        loss_fn = partial(ddpm_loss, snr_gamma=config.snr_gamma)

    def make_pipeline(model: Any) -> UnconditionalDDPMPipeline:
        scheduler = type(noise_scheduler).from_config(noise_scheduler.config)
        return UnconditionalDDPMPipeline(unet=model, scheduler=scheduler)

    training_loop(
        config,
        data,
        model,
        noise_scheduler,
        loss_fn,
        get_model_kwargs=lambda batch, uniform: {},
        make_pipeline=make_pipeline,
        grid=SampleGrid(
            num_images=config.eval_batch_size,
            columns=math.ceil(math.sqrt(config.eval_batch_size)),
            caption=f"{config.ddpm_num_inference_steps} inference steps",
        ),
    )


if __name__ == "__main__":
    main()
