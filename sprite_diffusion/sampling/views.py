"""The views of sample.py: each samples images, arranges them in a picture and writes it."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipelines import TextToImageDDPMPipeline
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import BUILT_IN_DATASET, IMAGE_MODES
from sprite_diffusion.sampling.conditions import Condition, choose_conditions
from sprite_diffusion.sampling.editing import read_edit
from sprite_diffusion.sampling.figures import (
    NOISE_LEVELS,
    Figure,
    compare_samplers,
    find_snapshots,
    interpolate,
    load_clean_images,
    show_collapse,
    show_forward_process,
    show_learning,
    show_predictions,
    show_steps,
)
from sprite_diffusion.sampling.generation import Request, Trajectory, sample_images
from sprite_diffusion.sampling.guidance import choose_guidance
from sprite_diffusion.sampling.palettes import Finish, choose_palette
from sprite_diffusion.sampling.pictures import (
    check_size,
    labelled_grid,
    make_picture,
    make_single_picture,
    save_animation,
    save_json,
    save_png,
)
from sprite_diffusion.sampling.pipeline_loading import Pipeline, make_process
from sprite_diffusion.sampling.samplers import make_sampler, parse_samplers
from sprite_diffusion.sampling.sheets import write_sheet

NUM_CLEAN_IMAGES = 4  # that noise is added to
NUM_SAMPLES = 16  # for each class or prompt, where there are any
MAX_FRAMES = 60


def write_samples(args: argparse.Namespace, pipeline: Pipeline) -> None:
    """Writes samples as a grid, as a sheet or as single files, and their animation if asked for.

    A grid has a class or prompt per row. Raises `UserInputError` for what the model or the formats can't do, before
    anything is sampled.
    """
    request = make_request(args, pipeline)
    sampler = make_sampler("--scheduler", pipeline, args.scheduler, args.num_inference_steps)
    trajectory = None if args.animate is None else Trajectory(MAX_FRAMES, args.animate_prediction)
    columns = (args.num_images or NUM_SAMPLES) if pipeline.is_conditional else math.ceil(math.sqrt(len(request.seeds)))
    columns = args.columns or columns
    rows = math.ceil(len(request.seeds) / columns)
    if args.animate is not None:
        frames = min(MAX_FRAMES, sampler.num_inference_steps + 1)
        check_size(args.animate, rows, columns, pipeline.sample_shape, args.scale, frames)
    grid = (rows, columns) if args.output.suffix else (1, 1)  # a folder gets a file for each image
    scale = args.scale if args.sheet is None else args.scale or 1
    check_size(args.output, *grid, pipeline.sample_shape, scale, frames=1)
    finish = choose_finish(args, pipeline)
    images = finish(sample_images(pipeline, sampler, request, trajectory=trajectory))
    if request.edit is not None:
        images = request.edit.keep(images)
    record = {**sampler.record, **finish.record, **request.record}
    if args.sheet is not None:
        write_sheet(images, args.sheet, columns, scale, {**_record_of_model(args), **record})
        print(f"wrote {args.sheet}\nwrote {args.sheet.with_suffix('.json')}")
    elif not args.output.suffix:
        _write_single_files(args, images, record)
    elif pipeline.is_conditional:
        labels = [condition.label for condition in request.conditions[::columns]]
        write_picture(args, labelled_grid(list(images.split(columns)), labels, [], args.scale), record)
    else:
        write_picture(args, make_picture(images, columns, args.scale), record)
    if trajectory is not None:
        save_animation(trajectory.frames, args.animate, columns, args.scale)
        print(f"wrote {args.animate}")


def choose_finish(args: argparse.Namespace, pipeline: Pipeline) -> Finish:
    """Returns what `--palette` and `--binary_alpha` ask for.

    Raises `UserInputError` if there is no such palette, or no alpha.
    """
    num_channels = pipeline.sample_shape[0]
    if args.binary_alpha and num_channels != 4:
        raise UserInputError(f"--binary_alpha: {args.model} draws no transparency (see --image_mode of the training)")
    if args.palette is None:
        return Finish(binary_alpha=args.binary_alpha)
    return Finish(choose_palette(args.palette, args.model, num_channels, args.colours_per_image), args.binary_alpha)


def make_figure(args: argparse.Namespace, pipeline: Pipeline) -> Figure:
    """Makes the figure of a model that a flag asks for.

    Raises `UserInputError` for what the model can't do, before anything is sampled.
    """

    def check_grid(rows: int, columns: int) -> None:
        check_size(_picture_path(args), rows, columns, pipeline.sample_shape, args.scale, frames=1)

    if args.view in ("forward", "predict"):
        return _make_noise_figure(args, pipeline)
    request = make_request(args, pipeline)
    if args.view == "compare":
        samplers = parse_samplers(pipeline, args.compare)
        check_grid(1 + len(samplers), len(request.seeds))
        return compare_samplers(pipeline, samplers, request)
    name = "ddim" if args.view == "interpolate" else args.scheduler
    sampler = make_sampler("--scheduler", pipeline, name, args.num_inference_steps)
    if args.view == "interpolate":
        asked = (args.classes, args.mixes, args.prompts)
        ends = choose_conditions(pipeline, *asked) if any(asked) else []
        size = args.num_images or 7
        check_grid(size if len(ends) == 2 else 1, size)
        return interpolate(pipeline, sampler, args.interpolate, ends, size, request)
    if args.view == "no_noise":
        check_grid(2, len(request.seeds))
        return show_collapse(pipeline, sampler, request)
    if args.view == "steps_shown":
        check_grid(2 + sampler.num_inference_steps // args.steps_shown, 2 * len(request.seeds))
        return show_steps(pipeline, sampler, request, args.steps_shown)
    snapshots = find_snapshots(args.snapshots)
    check_grid(len(snapshots), len(request.seeds))
    return show_learning(pipeline, snapshots, sampler, request)


def make_forward_figure(args: argparse.Namespace) -> Figure:
    """Makes the figure of `--forward` on a process that no model is needed for: the one that the flags name."""
    resolution = args.resolution or ("16" if args.forward == BUILT_IN_DATASET else "64")
    process = make_process(None, {}, args.process)
    images = load_clean_images("--forward", args.forward, args.num_images or NUM_CLEAN_IMAGES, resolution, "auto")
    check_size(_picture_path(args), len(images), NOISE_LEVELS + 1, images.shape[1:], args.scale, frames=1)
    return show_forward_process(process, images, args.seed)


def _make_noise_figure(args: argparse.Namespace, pipeline: Pipeline) -> Figure:
    """Makes the figure of `--forward` or `--predict`, whose columns are levels of noise, on a model's process."""
    forward = args.view == "forward"
    snapshots = [] if args.snapshots is None else find_snapshots(args.snapshots)
    num_images = args.num_images or (NUM_CLEAN_IMAGES if forward else 1)
    rows = 1 if forward else 1 + (len(snapshots) or 2)
    check_size(_picture_path(args), rows * num_images, NOISE_LEVELS + 1, pipeline.sample_shape, args.scale, frames=1)
    channels, height, width = pipeline.sample_shape
    source = args.forward if forward else args.predict
    images = load_clean_images(f"--{args.view}", source, num_images, f"{width}x{height}", IMAGE_MODES[channels])
    if forward:
        return show_forward_process(pipeline.scheduler, images, args.seed)
    no_class = pipeline.is_conditional and not args.classes and not args.prompts
    [condition] = choose_conditions(pipeline, args.classes, None, args.prompts, no_class)
    return show_predictions(pipeline, snapshots, images, condition, args.seed)


def make_request(args: argparse.Namespace, pipeline: Pipeline) -> Request:
    """Returns the images to sample: for each class, mix and prompt as many as asked for.

    Raises `UserInputError` for what the model can't be asked for.
    """
    guide, guidance_scale = choose_guidance(args, pipeline)
    conditions = choose_conditions(pipeline, args.classes, args.mixes, args.prompts, args.no_class)
    negative = None
    if args.negative_prompt is not None:
        if not isinstance(pipeline, TextToImageDDPMPipeline):
            raise UserInputError(f"--negative_prompt: {args.model or args.snapshots} takes no prompts")
        negative = Condition.of_prompt(args.negative_prompt)
    default = NUM_SAMPLES if args.view == "samples" else 2 if pipeline.is_conditional else 8
    if args.view == "steps_shown":
        default = 1 if pipeline.is_conditional else 4
    repeated = [condition for condition in conditions for _ in range(args.num_images or default)]
    return Request(
        seeds=[args.seed + i for i in range(len(repeated))],
        conditions=repeated,
        batch_size=args.batch_size,
        guidance_scale=guidance_scale,
        eta=args.eta,
        negative=negative,
        guide=guide,
        edit=None if args.image is None else read_edit(pipeline, args.image, args.strength, args.mask),
    )


def write_picture(args: argparse.Namespace, picture: Image.Image, record: dict[str, Any]) -> None:
    """Writes a picture, with the model and `record` as its text chunks, and both as JSON beside it."""
    path = _picture_path(args)
    record = {**_record_of_model(args), **record}
    save_png(picture, path, record)
    save_json(record, path.with_suffix(".json"))
    print(f"wrote {path}\nwrote {path.with_suffix('.json')}")


def _write_single_files(args: argparse.Namespace, images: torch.Tensor, record: dict[str, Any]) -> None:
    """Writes images (N, C, H, W) in [0, 1] into the folder `--output`, and the record of them as JSON beside them."""
    record = {**_record_of_model(args), **record}
    common = {name: value for name, value in record.items() if name != "images"}
    for i, (image, image_record) in enumerate(zip(images, record["images"], strict=True)):
        file = f"{i:05d}.png"
        save_png(make_single_picture(image, args.scale), args.output / file, {**common, **image_record})
        image_record["file"] = file
    print(f"wrote {len(images)} images into {args.output}")
    save_json(record, args.output / "samples.json")
    print(f"wrote {args.output / 'samples.json'}")


def _picture_path(args: argparse.Namespace) -> Path:
    """Returns the file of a view that is one picture; `--output` may name its folder."""
    return args.output if args.output.suffix else args.output / f"{args.view}.png"


def _record_of_model(args: argparse.Namespace) -> dict[str, str]:
    model = args.model or args.snapshots
    guide = {} if args.guide is None else {"guide": args.guide}
    return {} if model is None else {"model": str(model), **guide, "dtype": args.dtype}
