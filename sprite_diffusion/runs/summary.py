"""What a run says of itself: the lines at its start, and the summary beside the pipeline at its end."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sprite_diffusion.common.errors import mask_secrets, printable
from sprite_diffusion.common.machine import count_free_cores, describe_device
from sprite_diffusion.data.dataset import ImageData, StoredImages
from sprite_diffusion.data.doubles import count_doubles
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.state import TrainState

RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets")


def print_summary(
    accelerator: Accelerator,
    config: TrainingConfig,
    data: ImageData,
    model: torch.nn.Module,
    total_steps: int,
    start: str,
) -> None:
    """Prints what is about to be trained, on what and for how long; `start` names the checkpoint if there is one."""
    height, width = config.image_size
    available = data.num_available or 0
    num_held_out = 0 if data.held_out is None else len(data.held_out)
    is_limited = data.num_images is not None and data.num_images + num_held_out + len(data.skipped_images) < available
    of_all = f" of {available:,}" if is_limited else ""
    images = "a stream of images" if data.num_images is None else f"{data.num_images:,}{of_all} images"
    others = f", {len(data.skipped_images)} skipped" if data.skipped_images else ""
    if num_held_out:
        others += f", {num_held_out:,} held out"
    if isinstance(data.dataset, StoredImages) and (doubles := count_doubles(data.dataset)):
        others += f", {doubles:,} doubles of others"
    classes = "" if data.id2label is None else f", {len(data.id2label)} classes"
    if data.captions is not None:
        classes += f", {len(data.captions) - 1:,} different captions"
    total_batch_size = config.total_batch_size(accelerator.num_processes)
    for line in (
        f"data       {data.source}: {images} of {width}x{height}, {data.num_channels} channel(s){classes}{others}",
        f"model      {config.model_class}, {count_parameters(model) / 1e6:.2f} M parameters",
        f"device     {accelerator.device}, {accelerator.num_processes} process(es), "
        f"precision {accelerator.mixed_precision}",
        f"training   {total_steps:,} steps of {total_batch_size} images, seed {config.seed}, {start}",
        f"output     {config.output_dir}",
    ):
        print(printable(mask_secrets(line)))
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        free = count_free_cores()
        if free < torch.get_num_threads():
            print(
                f"note       other programs use cores: --num_threads {free} is faster than threads that have to wait"
            )


def make_summary(
    accelerator: Accelerator,
    data: ImageData,
    model: torch.nn.Module,
    state: TrainState,
    total_steps: int,
    base: dict[str, Any],
) -> dict[str, Any]:
    """Returns how a pipeline came to be: for its card, and for the next start of the same run.

    `base` is what `describe_base` returns.
    """
    return {
        **state.record(is_end=state.global_step >= total_steps),
        "total_steps": total_steps,
        "script": Path(sys.argv[0]).name,
        "num_parameters": count_parameters(model),
        "num_images": data.num_images,
        "data_source": mask_secrets(data.source),
        "data_license": data.license,
        **base,
        "num_processes": accelerator.num_processes,
        "device": describe_device(accelerator.device),
        "precision": accelerator.mixed_precision,
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
    }


def count_parameters(model: torch.nn.Module) -> int:
    """Returns the number of a network's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
