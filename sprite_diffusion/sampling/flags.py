"""The flags of sample.py, without torch and diffusers: `--help` and a wrong flag need not wait for their imports."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.files import check_writable
from sprite_diffusion.common.flags import (
    MAX_SEED,
    MAX_TIMESTEPS,
    SEED_RANGE,
    THREADS_HELP,
    THREADS_RANGE,
    ArgumentParser,
    BetaSchedule,
    PredictionType,
    ProcessClass,
    Range,
    TimestepSpacing,
    VarianceType,
    check_tracker,
    parse_switch,
)

# The samplers by short name, each with its class, which is this project's or diffusers'.
SAMPLERS = {
    "ddpm": "ClosedFormDDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver++_singlestep": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
}
# Every class of diffusers knows these schedules by name; another one has to be given as betas.
SCHEDULES_OF_DIFFUSERS = ("linear", "scaled_linear", "squaredcos_cap_v2")
FIGURES = ("predict", "compare", "steps_shown", "forward", "no_noise", "interpolate", "snapshots")
# The --scheduler that a figure can be asked for with; None where the figure's own flag names the samplers.
SCHEDULERS_OF_FIGURES = {"compare": None, "no_noise": "ddpm", "interpolate": "ddim", "predict": None}
# Flags that change how a process is sampled, each with the name that schedulers have for it.
SAMPLING_OPTIONS = {
    "clip_sample": "clip_sample",
    "variance_type": "variance_type",
    "timestep_spacing": "timestep_spacing",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
}
# Flags that say how a network was trained, for a network that comes without its process.
PROCESS_OPTIONS = {
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "prediction_type": "prediction_type",
}
MODEL_HELP = (
    "Output folder of a run, a checkpoint or snapshot in it, a folder of a bare UNet2DModel, a .pth file of the "
    "sprite course, the id of a repository on the Hub, or wandb:ENTITY/PROJECT/ARTIFACT:ALIAS."
)
MAX_SCALE = 1024
MAX_DIGITS = 7  # a number of steps with more digits than this is a slip
UP_TO_A_MILLION = Range(at_least=1, at_most=10**6)  # a larger number is a slip, which would fill the memory
GUIDANCE_RANGE = Range(at_least=-1000, at_most=1000)
PALETTE_ENDINGS = (".gpl", ".hex", ".pal", ".png")
MIN_COLOURS, MAX_COLOURS = 2, 256  # of a palette: an indexed picture can have no more
RANGES = {
    "num_images": UP_TO_A_MILLION,
    "seed": SEED_RANGE,
    "num_inference_steps": UP_TO_A_MILLION,
    "eta": Range(at_least=0, at_most=1),
    "guidance_scale": GUIDANCE_RANGE,
    "batch_size": UP_TO_A_MILLION,
    "columns": UP_TO_A_MILLION,
    "steps_shown": UP_TO_A_MILLION,
    "num_threads": THREADS_RANGE,
    "colours_per_image": Range(at_least=MIN_COLOURS, at_most=MAX_COLOURS),
    "strength": Range(at_least=0, at_most=1),
}
EDITING_VIEWS = ("samples", "compare", "snapshots")  # those that --image changes


def parse_args(description: str | None) -> argparse.Namespace:
    """Reads the command line.

    Returns the flags, with `view` (one of `FIGURES`, or "samples") and `output` (a path in any case) besides.
    Raises `UserInputError` for values out of range, and for flags that don't go together.
    """
    parser = ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "model",
        nargs="?",
        help=f"{MODEL_HELP} Left out with --snapshots, and with --forward if there is none.",
    )
    images = parser.add_argument_group("what to sample")
    images.add_argument("--num_images", type=int, help="Images, for each class or prompt if there are any.")
    images.add_argument("--seed", type=int, default=0, help="Image i is sampled from seed + i.")
    images.add_argument("--class", dest="classes", action="append", help="Name or id; repeatable; default: all.")
    images.add_argument("--no_class", action="store_true", help="Of no class or prompt, from a model that takes any.")
    images.add_argument("--mix", dest="mixes", action="append", help="Class weights: hero=1,food=0.6; repeatable.")
    images.add_argument("--prompt", dest="prompts", action="append", help="What to draw; repeatable.")
    images.add_argument("--prompts", dest="prompts_file", type=Path, metavar="FILE", help="A prompt on each line.")
    images.add_argument("--negative_prompt", metavar="PROMPT", help="What guidance leads away from.")
    images.add_argument("--image", type=Path, metavar="FILE", help="Draw --num_images variants of this picture.")
    images.add_argument("--strength", type=float, help="Of --image: 0 to 1; default 0.6, with --mask 1.")
    images.add_argument("--mask", type=Path, metavar="FILE", help="White where --image is drawn anew, else kept.")
    _add_process_flags(parser)
    _add_view_flags(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--output", type=Path, help="A .png file for one grid, or a folder for single files.")
    out.add_argument(
        "--scale", type=parse_scale, default="auto", help="Enlarge by this whole number; auto: to 64 pixels."
    )
    out.add_argument("--columns", type=int, metavar="N", help="Of --sheet; default: a class per row, else a square.")
    out.add_argument(
        "--palette",
        metavar="auto|N|FILE",
        help="Snap samples to colours: those of the run's images, N of them, or a .gpl, .hex, .pal or .png.",
    )
    out.add_argument(
        "--colours_per_image", type=int, metavar="N", help="Of --palette: leave each sample the N that fit it best."
    )
    out.add_argument("--binary_alpha", action="store_true", help="Make each pixel of a sample opaque or transparent.")
    out.add_argument("--animate_prediction", action="store_true", help="Animate the clean images predicted.")
    out.add_argument("--tracker_project", help="Of W&B and trackio; default: that of the model's run.")
    out.add_argument("--tracker_job_type", help="Of W&B.")
    out.add_argument(
        "--logger",
        choices=("tensorboard", "wandb", "trackio", "all", "none"),
        default="none",
        help="Also give --compare to the trackers, of the model's run if it is one.",
    )
    args = parser.parse_args(with_underscores(sys.argv[1:]))
    args.view = next((name for name in FIGURES if getattr(args, name) not in (None, False)), "samples")
    args.process = read_process_flags(args)
    if args.prompts_file is not None:
        args.prompts = [*(args.prompts or []), *read_prompts(args.prompts_file)]
    args.output = args.output or args.sheet or Path(f"{args.view}.png")
    check_args(args)
    return args


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how to sample."""
    process = parser.add_argument_group("how to sample")
    process.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SAMPLERS)}; default: the model's own.")
    process.add_argument("--num_inference_steps", type=int, help="Default: all of the model's process; else 50.")
    process.add_argument("--eta", type=float, default=0.0, help="DDIM: share of DDPM's noise at each step, 0 to 1.")
    add_guidance_flags(process)
    process.add_argument("--batch_size", type=int, default=64, help="Images at a time; changes speed only.")
    add_speed_flags(process)
    add_process_flags(parser)


def _add_view_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that each ask for another view than plain samples."""
    group = parser.add_argument_group("in place of plain samples")
    view = group.add_mutually_exclusive_group()
    view.add_argument("--animate", type=Path, metavar="FILE", help="Samples, and how they form: a .gif or .webp.")
    view.add_argument("--sheet", type=Path, metavar="FILE", help="Samples as a sprite sheet: a .png, and its .json.")
    view.add_argument("--compare", metavar="LIST", help="Samplers beside each other: ddpm:500,ddim:25.")
    view.add_argument("--steps_shown", type=int, metavar="N", help="Every Nth step: its noisy image, its prediction.")
    view.add_argument("--forward", metavar="DATA", help="An image, folder or dataset on its way to noise.")
    view.add_argument("--predict", metavar="DATA", help="Noisy images as the network would clean them in one step.")
    view.add_argument(
        "--no-noise", "--no_noise", action="store_true", help="DDPM with and without the noise of each step."
    )
    view.add_argument(
        "--interpolate",
        nargs=2,
        type=int,
        metavar="SEED",
        help="Between two seeds, and two classes or prompts if given; DDIM.",
    )
    group.add_argument(
        "--snapshots",
        type=Path,
        metavar="RUN_DIR",
        help="What a run had learned at each snapshot: samples or, with --predict, predictions.",
    )
    group.add_argument("--resolution", help="Of --forward without a model; default: 16 for 'sprites', else 64.")


def add_guidance_flags(parser: argparse._ActionsContainer) -> None:
    """Adds `--guidance_scale` and `--guide`, for `choose_guidance`."""
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="By class, prompt or --guide; 1 = none; default: 1, with a guide 2.",
    )
    parser.add_argument(
        "--guide", metavar="MODEL", help="Of a model without classes: a weaker one, such as an earlier checkpoint."
    )


def add_speed_flags(parser: argparse._ActionsContainer) -> None:
    """Adds `--dtype`, for `load_pipeline`, and `--compile` and `--num_threads`, for `speed_up`."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="Of the network; bfloat16 is faster."
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: pays for many steps.")
    parser.add_argument("--num_threads", type=int, metavar="N", help=THREADS_HELP)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that change how a model's process is sampled, and those of a network that comes without one."""
    changed = parser.add_argument_group("in place of what the model was trained with")
    switch: dict[str, Any] = {"type": parse_switch, "metavar": "true|false"}
    changed.add_argument("--clip_sample", help="Whether to clip the predicted image to [-1, 1].", **switch)
    changed.add_argument("--variance_type", choices=get_args(VarianceType), help="Of the noise of DDPM's steps.")
    changed.add_argument("--timestep_spacing", choices=get_args(TimestepSpacing), help="Of fewer steps than T.")
    changed.add_argument("--rescale_betas_zero_snr", help="Whether the process ends in pure noise.", **switch)
    process = parser.add_argument_group("the process of a network that comes without one")
    process.add_argument("--noise_scheduler_class", choices=get_args(ProcessClass), help="Default: DDPM's.")
    process.add_argument("--ddpm_num_steps", type=int, help="T; default: 1000.")
    process.add_argument("--ddpm_beta_schedule", choices=get_args(BetaSchedule), help="Default: linear.")
    process.add_argument("--prediction_type", choices=get_args(PredictionType), help="Default: epsilon.")


def read_process_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags of `add_process_flags` that were given, by name.

    Raises `UserInputError` for a T out of range.
    """
    Range(at_least=1, at_most=MAX_TIMESTEPS).check("ddpm_num_steps", args.ddpm_num_steps)
    values = {name: getattr(args, name) for name in ("noise_scheduler_class", *SAMPLING_OPTIONS, *PROCESS_OPTIONS)}
    return {name: value for name, value in values.items() if value is not None}


def read_prompts(path: Path) -> list[str]:
    """Returns the prompts of a file, one on each line. Raises `UserInputError` if there are none."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"--prompts {path} can't be read: {first_line(error)}") from None
    if not prompts:
        raise UserInputError(f"--prompts {path} holds no prompt: write one on each line")
    return prompts


def with_underscores(argv: list[str]) -> list[str]:
    """Returns a command line with `--num-images` as `--num_images`: the training scripts' parser knows both too."""
    flags = [argument.partition("=") if argument.startswith("--") else (argument, "", "") for argument in argv]
    return [
        f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else name
        for name, equals, value in flags
    ]


def parse_scale(text: str) -> int | None:
    """Returns the number of `--scale`; None for 'auto'. Raises `UserInputError` if it is neither."""
    if text == "auto":
        return None
    if not (text.isdecimal() and len(text) <= len(str(MAX_SCALE)) and 1 <= int(text) <= MAX_SCALE):
        raise UserInputError(f"--scale {text}: give 'auto' or a whole number from 1 to {MAX_SCALE}")
    return int(text)


def check_sampler(flag: str, name: str) -> None:
    """Raises `UserInputError`, about `flag`, if `name` is none of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise UserInputError(f"{flag}: unknown sampler '{name}'; known are {', '.join(SAMPLERS)}")


def split_comparison(text: str) -> list[tuple[str, int | None]]:
    """Returns the name and the number of steps, None if not given, of each sampler of `--compare`.

    Raises `UserInputError` for an unknown sampler, and for steps that are no number.
    """
    samplers = []
    for item in text.split(","):
        name, colon, steps = item.strip().partition(":")
        check_sampler("--compare", name)
        if colon and not (steps.isdecimal() and len(steps) <= MAX_DIGITS):
            raise UserInputError(f"--compare {text}: '{item}' is not NAME:STEPS, as in ddim:25")
        samplers.append((name, int(steps) if colon else None))
    return samplers


def check_args(args: argparse.Namespace) -> None:
    """Raises `UserInputError` for values out of range, and for flags that don't go together."""
    for name, limits in RANGES.items():
        limits.check(name, getattr(args, name))
    if args.scheduler is not None:
        check_sampler("--scheduler", args.scheduler)
    if args.compare is not None:
        split_comparison(args.compare)
    if args.palette is not None:
        _check_palette(args.palette)
    for message, applies in _contradictions(args).items():
        if applies:
            raise UserInputError(message)
    check_tracker(args.logger)
    if args.sheet is not None:
        _check_path("--sheet", args.sheet, (".png",), "a .png file")
    _check_path("--output", args.output, ("", ".png"), "a .png file or a folder")
    if args.animate is not None:
        _check_path("--animate", args.animate, (".gif", ".webp"), "a .gif or .webp file")


def _contradictions(args: argparse.Namespace) -> dict[str, bool]:
    """Returns each message about flags that don't go together, and whether it applies."""
    figure_flag = f"--{args.view.replace('_', '-')}"
    allowed_schedulers = (None, SCHEDULERS_OF_FIGURES.get(args.view, args.scheduler))
    samples_with_ddim = args.scheduler == "ddim" or "ddim" in (args.compare or "")
    seeds = args.interpolate or []
    chosen = bool(args.classes or args.mixes or args.prompts)
    is_guided = args.guidance_scale not in (None, 1)
    return {
        "name a model (a run's folder or a Hub id), or a run by --snapshots RUN_DIR; one of them": (
            (args.model is None) != (args.snapshots is not None) and args.view != "forward"
        ),
        f"--snapshots does not go with {figure_flag}": (
            args.snapshots is not None and args.view not in ("snapshots", "predict")
        ),
        "--no_class does not go with --class, --mix and --prompt": args.no_class and chosen,
        "--predict takes one --class or --prompt, and no --mix": (
            args.view == "predict" and (len([*(args.classes or []), *(args.prompts or [])]) > 1 or bool(args.mixes))
        ),
        "--negative_prompt needs --guidance_scale above 1, which leads away from it": (
            args.negative_prompt is not None and not is_guided
        ),
        "--resolution belongs to --forward without a model": (
            args.resolution is not None and (args.view != "forward" or args.model is not None)
        ),
        "--animate_prediction belongs to --animate FILE": args.animate_prediction and args.animate is None,
        f"--interpolate takes two seeds, 0 to {MAX_SEED}, and --num_images from 2 on": (
            any(not 0 <= seed <= MAX_SEED for seed in seeds) or (args.view == "interpolate" and args.num_images == 1)
        ),
        f"--scheduler {args.scheduler} does not go with {figure_flag}": args.scheduler not in allowed_schedulers,
        "--sheet FILE takes no --output: the sheet is what is written": (
            args.sheet is not None and args.output != args.sheet
        ),
        "--columns belongs to --sheet FILE": args.columns is not None and args.sheet is None,
        "--colours_per_image N belongs to --palette": args.colours_per_image is not None and args.palette is None,
        f"--palette and --binary_alpha are for samples, not for {'--animate' if args.animate else figure_flag}": (
            (args.palette is not None or args.binary_alpha) and (args.view != "samples" or args.animate is not None)
        ),
        "--strength and --mask need an --image": args.image is None and (args.strength, args.mask) != (None, None),
        "--image does not go with the sampler pndm, which can't begin midway": (
            args.image is not None and "pndm" in (args.scheduler or args.compare or "")
        ),
        "--animate has nothing to show at a strength of 0: give --image more --strength than 0": (
            args.animate is not None and args.strength == 0
        ),
        f"--image does not go with {figure_flag}": args.image is not None and args.view not in EDITING_VIEWS,
        f"--guidance_scale and --guide are for samples, not for {figure_flag}": (
            args.view in ("forward", "predict") and (args.guidance_scale, args.guide) != (None, None)
        ),
        "--eta is for --scheduler ddim": args.eta > 0 and not samples_with_ddim,
        "--logger belongs to --compare": args.logger != "none" and args.compare is None,
    }


def _check_palette(text: str) -> None:
    """Raises `UserInputError` if the value of `--palette` is neither 'auto' nor a number nor a file of colours."""
    if text.isdecimal() and len(text) <= MAX_DIGITS:
        Range(at_least=MIN_COLOURS, at_most=MAX_COLOURS).check("palette", int(text))
    elif text != "auto" and Path(text).suffix.lower() not in PALETTE_ENDINGS:
        raise UserInputError(f"--palette {text}: give 'auto', a number or a {', '.join(PALETTE_ENDINGS)} file")
    elif text != "auto" and not Path(text).is_file():
        raise UserInputError(f"--palette {text}: no such file")


def _check_path(flag: str, path: Path, endings: tuple[str, ...], kinds: str) -> None:
    """Raises `UserInputError` for a path that has none of the endings ("" is a folder's) or can't be made."""
    if path.suffix.lower() not in endings:
        raise UserInputError(f"{flag} {path}: name {kinds}")
    check_writable(flag, path)
    if path.exists() and path.is_dir() != (path.suffix == ""):
        raise UserInputError(f"{flag} {path} is there already, as a {'folder' if path.is_dir() else 'file'}")
