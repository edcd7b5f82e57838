"""Draws images from a trained model, and looks at how it draws them: `python sample.py runs/sprites-conditional`."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sprite_diffusion.common.errors import UserInputError, exits_on_user_error
from sprite_diffusion.common.files import check_writable
from sprite_diffusion.common.flags import FROM_ONE, MAX_SEED, SEED_RANGE, ArgumentParser, Range, check_tracker
from sprite_diffusion.common.run_files import find_run, read_saved_config
from sprite_diffusion.sampling.conditions import choose_conditions
from sprite_diffusion.sampling.figures import (
    Figure,
    compare_samplers,
    comparison_table,
    find_snapshots,
    interpolate,
    load_clean_images,
    show_collapse,
    show_forward_process,
    show_learning,
)
from sprite_diffusion.sampling.generation import Request, Trajectory, sample_images
from sprite_diffusion.sampling.pictures import labelled_grid, make_picture, save_animation, save_json, save_png
from sprite_diffusion.sampling.pipeline_loading import Pipeline, add_speed_flags, load_pipeline, speed_up
from sprite_diffusion.sampling.samplers import SAMPLERS, Sampler, make_sampler, parse_samplers
from sprite_diffusion.sharing.trackers import Trackers

NUM_SAMPLES = 16  # for each class, where there are any
MAX_FRAMES = 60
FIGURES = ("compare", "snapshots", "forward", "no_noise", "interpolate")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "model",
        nargs="?",
        help="Output folder of a run, a checkpoint or snapshot in it, the id of a repository on the Hub, or "
        "wandb:ENTITY/PROJECT/ARTIFACT:ALIAS. Left out with --snapshots.",
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("--num_images", type=int, help="Images, for each class if there are any.")
    what.add_argument("--seed", type=int, default=0, help="Image i is drawn from seed + i.")
    what.add_argument("--class", dest="classes", action="append", help="Name or id; repeatable; default: all.")
    what.add_argument("--mix", dest="mixes", action="append", help="Class weights: hero=1,food=0.6; repeatable.")
    how = parser.add_argument_group("how")
    how.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SAMPLERS)}; default: the model's own.")
    how.add_argument("--num_inference_steps", type=int, help="Default: all of the model's process; else 50.")
    how.add_argument("--eta", type=float, default=0.0, help="DDIM: share of DDPM's noise at each step, 0 to 1.")
    how.add_argument("--guidance_scale", type=float, help="Classifier-free guidance; 1 = none, the default.")
    how.add_argument("--batch_size", type=int, default=64, help="Images at a time; changes speed only.")
    add_speed_flags(how)
    view = parser.add_argument_group("in place of plain samples").add_mutually_exclusive_group()
    view.add_argument("--animate", type=Path, metavar="FILE", help="Samples, and how they form: a .gif or .webp.")
    view.add_argument("--compare", metavar="LIST", help="Samplers beside each other: ddpm:500,ddim:25.")
    view.add_argument("--snapshots", type=Path, metavar="RUN_DIR", help="What a run had learned at each snapshot.")
    view.add_argument("--forward", metavar="DATA", help="An image, folder or dataset on its way to noise.")
    view.add_argument("--no-noise", action="store_true", help="DDPM with and without the noise of each step.")
    view.add_argument(
        "--interpolate", nargs=2, type=int, metavar="SEED", help="Between two seeds, and two classes if given; DDIM."
    )
    out = parser.add_argument_group("output")
    out.add_argument("--output", type=Path, help="A .png file for one grid, or a folder for single files.")
    out.add_argument("--scale", default="auto", help="Enlarge by this whole number; auto: to 64 pixels.")
    out.add_argument("--animate_prediction", action="store_true", help="Animate the clean images predicted.")
    out.add_argument(
        "--logger",
        choices=("tensorboard", "wandb", "trackio", "all", "none"),
        default="none",
        help="Also give --compare to the trackers, of the model's run if it is one.",
    )
    args = parser.parse_args()
    check_args(args)
    args.scale = None if args.scale == "auto" else int(args.scale)
    args.view = next((name for name in FIGURES if getattr(args, name)), "samples")
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raises for values out of range, and for flags that don't go together."""
    if (args.model is None) != (args.snapshots is not None):
        raise UserInputError("name a model (a run's folder or a Hub id), or a run by --snapshots RUN_DIR; one of them")
    for name in ("num_images", "num_inference_steps", "batch_size"):
        FROM_ONE.check(name, getattr(args, name))
    SEED_RANGE.check("seed", args.seed)
    Range().check("guidance_scale", args.guidance_scale)
    if args.scale != "auto" and not (args.scale.isdecimal() and int(args.scale) > 0):
        raise UserInputError(f"--scale {args.scale}: give 'auto' or a whole number from 1 on")
    if args.output is not None and args.output.suffix.lower() not in ("", ".png"):
        raise UserInputError(f"--output {args.output}: name a .png file or a folder")
    if args.animate is not None and args.animate.suffix.lower() not in (".gif", ".webp"):
        raise UserInputError(f"--animate {args.animate}: name a .gif or .webp file")
    if args.animate_prediction and args.animate is None:
        raise UserInputError("--animate_prediction belongs to --animate FILE")
    if args.interpolate is not None and (
        min(args.interpolate) < 0 or max(args.interpolate) > MAX_SEED or args.num_images == 1
    ):
        raise UserInputError(f"--interpolate takes two seeds, 0 to {MAX_SEED}, and --num_images from 2 on")
    for flag, given, own in (
        ("--compare", args.compare, None),
        ("--no-noise", args.no_noise, "ddpm"),
        ("--interpolate", args.interpolate, "ddim"),
    ):
        if given and args.scheduler not in (None, own):
            raise UserInputError(f"--scheduler {args.scheduler} does not go with {flag}")
    if not 0 <= args.eta <= 1:
        raise UserInputError(f"--eta is {args.eta}: it must be between 0 and 1")
    if args.eta and args.scheduler != "ddim" and "ddim" not in (args.compare or ""):
        raise UserInputError("--eta is for --scheduler ddim")
    if args.logger != "none" and args.compare is None:
        raise UserInputError("--logger belongs to --compare")
    check_tracker(args.logger)
    for flag, path in (("--output", args.output), ("--animate", args.animate)):
        check_writable(flag, path)
        if path is not None and path.exists() and path.is_dir() != (path.suffix == ""):
            raise UserInputError(f"{flag} {path} is there already, as a {'folder' if path.is_dir() else 'file'}")


def make_request(args: argparse.Namespace, pipeline: Pipeline) -> Request:
    """The images to draw: as many for each class and mix as asked for."""
    has_classes = pipeline.num_classes > 0
    if args.guidance_scale is not None and not has_classes:
        raise UserInputError(f"--guidance_scale: {args.model or args.snapshots} is unconditional, it has no classes")
    conditions = choose_conditions(pipeline, args.classes, args.mixes)
    default = NUM_SAMPLES if args.view == "samples" else 2 if has_classes else 8
    repeated = [condition for condition in conditions for _ in range(args.num_images or default)]
    return Request(
        seeds=[args.seed + i for i in range(len(repeated))],
        conditions=repeated,
        batch_size=args.batch_size,
        guidance_scale=1.0 if args.guidance_scale is None else args.guidance_scale,
        eta=args.eta,
    )


def draw_samples(args: argparse.Namespace, pipeline: Pipeline) -> None:
    """Single files or a grid, a class per row; and an animation of the same."""
    request = make_request(args, pipeline)
    sampler = make_sampler("--scheduler", pipeline, args.scheduler, args.num_inference_steps)
    trajectory = None if args.animate is None else Trajectory(MAX_FRAMES, args.animate_prediction)
    images = sample_images(pipeline, sampler, request, trajectory=trajectory)
    has_classes = request.conditions[0].name is not None
    columns = (args.num_images or NUM_SAMPLES) if has_classes else math.ceil(math.sqrt(len(images)))
    record = {"model": args.model, "dtype": args.dtype, **sampler.record, **request.record}
    if args.output is None or args.output.suffix:
        picture = make_picture(images, columns, args.scale)
        if has_classes:
            labels = [str(condition.name) for condition in request.conditions[::columns]]
            picture = labelled_grid(list(images.split(columns)), labels, [], args.scale)
        write_view(args, picture, record)
    else:
        for i, (image, own) in enumerate(zip(images, record["images"], strict=True)):
            own["file"] = f"{i:05d}.png"
            alone = {name: value for name, value in {**record, **own}.items() if name not in ("images", "file")}
            save_png(make_picture(image[None], 1, args.scale), args.output / own["file"], alone)
        print(f"wrote {len(images)} images into {args.output}")
        save_json(record, args.output / "samples.json")
        print(f"wrote {args.output / 'samples.json'}")
    if trajectory is not None:
        save_animation(trajectory.frames, args.animate, columns, args.scale)
        print(f"wrote {args.animate}")


def draw_figure(args: argparse.Namespace, pipeline: Pipeline) -> Figure:
    """The view that a flag asks for."""
    if args.view == "forward":
        images = load_clean_images(args.forward, args.num_images or 4, pipeline)
        return show_forward_process(pipeline, images, args.seed)
    request = make_request(args, pipeline)
    if args.view == "compare":
        samplers = parse_samplers(pipeline, args.compare)
        figure = compare_samplers(pipeline, samplers, request)
        log_comparison(args, figure, samplers)
        return figure
    name = "ddim" if args.view == "interpolate" else args.scheduler
    sampler = make_sampler("--scheduler", pipeline, name, args.num_inference_steps)
    if args.view == "interpolate":
        ends = choose_conditions(pipeline, args.classes, args.mixes) if args.classes or args.mixes else []
        return interpolate(pipeline, sampler, args.interpolate, ends, args.num_images or 7, request)
    if args.view == "no_noise":
        return show_collapse(pipeline, sampler, request)
    return show_learning(pipeline, find_snapshots(args.snapshots), sampler, request)


def log_comparison(args: argparse.Namespace, figure: Figure, samplers: list[Sampler]) -> None:
    """Gives the comparison to the trackers: of the run that the model is from, if it is in its folder."""
    if args.logger == "none":
        return
    run_dir = find_run(Path(args.model))
    logging_dir = Path("logs")
    if run_dir is not None:
        logging_dir = run_dir / (read_saved_config(run_dir) or {}).get("logging_dir", "logs")
    trackers = Trackers(args.logger, logging_dir, {"compare": args.compare})
    trackers.log_image("comparison", figure.render(args.scale), caption=args.compare)
    trackers.log_table("comparison_table", *comparison_table(figure, samplers))
    trackers.finish()


def write_view(args: argparse.Namespace, picture: Image.Image, record: dict[str, Any]) -> None:
    """Writes a picture, which says how it was made, and the same as JSON beside it."""
    path = args.output or Path()
    path = path if path.suffix else path / f"{args.view}.png"
    save_png(picture, path, record)
    save_json(record, path.with_suffix(".json"))
    print(f"wrote {path}\nwrote {path.with_suffix('.json')}")


@exits_on_user_error
def main() -> None:
    args = parse_args()
    model = args.model or str(find_snapshots(args.snapshots)[-1])
    pipeline = load_pipeline(model, getattr(torch, args.dtype)).to("cuda" if torch.cuda.is_available() else "cpu")
    speed_up(pipeline, args.compile)
    if args.view == "samples":
        draw_samples(args, pipeline)
    else:
        figure = draw_figure(args, pipeline)
        write_view(
            args,
            figure.render(args.scale),
            {"model": args.model or str(args.snapshots), "dtype": args.dtype, **figure.record},
        )


if __name__ == "__main__":
    main()
