"""The work of calculate_metrics.py: measures a model, or a folder of images, against data."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipelines import TextToImageDDPMPipeline
from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.machine import join_processes
from sprite_diffusion.common.run_files import CONFIG_FILE, INDEX_FILE
from sprite_diffusion.data.config import IMAGE_MODES, DataConfig
from sprite_diffusion.data.dataset import load_image_data
from sprite_diffusion.data.sources import find_captions
from sprite_diffusion.metrics.evaluation import (
    choose_num_images,
    evaluate,
    generate,
    make_evaluation_sampler,
    match_conditions,
    read_in_order,
    sampling_facts,
)
from sprite_diffusion.metrics.extractors import make_extractor
from sprite_diffusion.metrics.obedience import choose_groups, measure_obedience
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.metrics.report import Report
from sprite_diffusion.sampling.guidance import choose_guidance
from sprite_diffusion.sampling.pipeline_loading import Pipeline, find_model_kind, load_pipeline, speed_up

SAMPLING_FLAGS = ("scheduler", "num_inference_steps", "guidance_scale", "guide")


def calculate(
    args: argparse.Namespace, config: DataConfig, data_flags: list[str], run_facts: dict[str, Any]
) -> tuple[Report, Image.Image, dict[str, Any]] | None:
    """Measures `args.model` against the images of `config`, at the model's resolution.

    Returns the report, the picture of the closest pairs, and facts about what was measured, `run_facts` among them;
    None but on the main process. Raises `UserInputError` if the model or the data can't be used.
    """
    state = join_processes()
    pipeline = None
    if is_image_folder(args.model):
        refuse_sampling_flags(args)
    else:
        pipeline = load_pipeline(args.model, getattr(torch, args.dtype), args.process).to(state.device)
        speed_up(pipeline, args.compile, args.num_threads)
        guide, guidance_scale = choose_guidance(args, pipeline)
    resolution = choose_resolution(pipeline, args.model, config, data_flags)
    config, table = replace(config, resolution=resolution), None
    if pipeline is not None:
        config = replace(config, image_mode=IMAGE_MODES[pipeline.sample_shape[0]])
        if isinstance(pipeline, TextToImageDDPMPipeline):
            config.caption_column, table = find_captions(config, streaming=False)
    real = RealImages(load_image_data(config, with_labels=None, table=table))
    num_images = choose_num_images(real, args.num_images)
    facts = {
        "model": Path(args.model).name,
        "data": Path(real.source).name,
        "num_training_images": len(real),
        **run_facts,
    }
    if pipeline is None:
        samples = read_image_folder(args.model, resolution, real.num_channels)
        num_images = min(num_images, len(samples))
        images = read_in_order(samples, num_images, args.batch_size)
        sampled_by = ""
    else:
        sampler = make_evaluation_sampler(pipeline, args.scheduler, args.num_inference_steps)
        draw = partial(
            generate,
            pipeline,
            sampler,
            batch_size=args.batch_size,
            guidance_scale=guidance_scale,
            seed=args.seed,
            guide=guide,
        )
        images = draw(match_conditions(pipeline, real, num_images))
        facts |= sampling_facts(pipeline, sampler, guidance_scale, args.seed, args.guide)
        sampled_by = f" by {sampler.label}"
    with state.local_main_process_first():
        extractor = make_extractor(args.extractor, args.clip_model, real, state.device)
    if state.is_main_process:
        print(
            f"measuring {num_images:,} images{sampled_by} of {args.model}\nagainst {real.source}: {len(real):,} images"
        )
    judge_classes = pipeline is not None and pipeline.is_conditional
    result = evaluate(real, extractor, images, num_images, judge_classes)
    obedience = {}
    if pipeline is not None:
        obedience = measure_obedience(draw, num_images, choose_groups(pipeline, real, config.leave_out_pairs))
    if result is None:
        return None
    report, closest_pairs = result
    report.figures |= obedience
    return report, closest_pairs, facts


def is_image_folder(model: str) -> bool:
    """Returns whether a name is that of a folder of images: one that holds no model, and no run to have one yet."""
    path = Path(model)
    return path.is_dir() and find_model_kind(path) is None and not (path / CONFIG_FILE).is_file()


def refuse_sampling_flags(args: argparse.Namespace) -> None:
    """Raises `UserInputError` if a flag says how to sample, of a folder whose images have been drawn already."""
    given = [name for name in SAMPLING_FLAGS if getattr(args, name) is not None] + [*args.process]
    if given:
        raise UserInputError(f"--{given[0]}: the images of {args.model} have been drawn already, leave the flag out")


def choose_resolution(pipeline: Pipeline | None, model: str, config: DataConfig, data_flags: list[str]) -> str:
    """Returns the resolution to measure at, as `--resolution` takes it.

    It is that of the model; for a folder of images, which has no pipeline, that of the flag or else of the first
    image. Raises `UserInputError` if the folder holds no images, or the first can't be decoded.
    """
    if pipeline is not None:
        _, height, width = pipeline.sample_shape
        return f"{width}x{height}"
    suffixes = Image.registered_extensions()
    files = sorted(path for path in Path(model).rglob("*") if path.suffix.lower() in suffixes)
    if not files:
        raise UserInputError(f"{model} holds neither a pipeline ({INDEX_FILE}) nor images")
    try:
        with Image.open(files[0]) as first:
            size = f"{first.width}x{first.height}"
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UserInputError(f"{files[0]} can't be decoded ({first_line(error)}): replace it") from None
    if not any(flag.split("=")[0] == "--resolution" for flag in data_flags):
        return size
    height, width = config.image_size
    if size != f"{width}x{height}":
        print(f"warning: images of {size} in {model} are resized to {width}x{height}, which changes the figures")
    return config.resolution


def read_image_folder(folder: str, resolution: str, num_channels: int) -> RealImages:
    """Reads the images of a folder, in the order of their names, cropped in the centre."""
    mode = IMAGE_MODES[num_channels]
    config = DataConfig(train_data_dir=folder, resolution=resolution, image_mode=mode, center_crop=True)
    return RealImages(load_image_data(config, with_labels=False))
