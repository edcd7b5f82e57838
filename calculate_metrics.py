"""Measures how good a model's images are, and whether it copies: `python calculate_metrics.py runs/sprites`.

A run is compared with what it was trained on, unless other data is named, by the data flags of the training scripts
(docs/data.md).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sprite_diffusion.common.errors import UserInputError, exits_on_user_error, first_line
from sprite_diffusion.common.files import check_writable
from sprite_diffusion.common.flags import SEED_RANGE, ArgumentParser, Range
from sprite_diffusion.common.machine import join_processes
from sprite_diffusion.common.run_files import CARD_FILE, CONFIG_FILE, SUMMARY_FILE
from sprite_diffusion.data.config import DataConfig, parse_data_flags
from sprite_diffusion.data.dataset import load_image_data
from sprite_diffusion.metrics.evaluation import (
    Report,
    choose_num_images,
    evaluate,
    generate,
    make_evaluation_sampler,
    read_in_order,
    sampling_facts,
)
from sprite_diffusion.metrics.extractors import CLIP_MODEL, EXTRACTORS, make_extractor
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.metrics.report import format_table, write_report
from sprite_diffusion.sampling.flags import SAMPLERS, add_speed_flags
from sprite_diffusion.sampling.pipeline_loading import Pipeline, load_pipeline, speed_up
from sprite_diffusion.sharing.card import make_card


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The flags, and those of the data."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="Folder of a run, checkpoint or snapshot; a Hub id; or a folder of images.")
    parser.add_argument("--num_images", type=int, default=5000, help="At most; and at most half of the real images.")
    parser.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SAMPLERS)}; default: ddim.")
    parser.add_argument("--num_inference_steps", type=int, help="Default: 50; of the model's own scheduler, all.")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="Classifier-free guidance; 1 = none.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time; changes speed only.")
    add_speed_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="Image i is drawn from seed + i.")
    parser.add_argument("--extractor", choices=EXTRACTORS, default="classifier", help="What gives the features.")
    parser.add_argument("--clip_model", default=CLIP_MODEL, help="Of --extractor clip: a Hub id or a folder.")
    parser.add_argument("--output_dir", type=Path, help="Default: the folder of the model, else the current one.")
    args, data_flags = parser.parse_known_args()
    for name, minimum in (("num_images", 10), ("num_inference_steps", 1), ("batch_size", 1)):
        Range(at_least=minimum).check(name, getattr(args, name))
    SEED_RANGE.check("seed", args.seed)
    Range().check("guidance_scale", args.guidance_scale)
    check_writable("--output_dir", args.output_dir)
    if args.output_dir is not None and args.output_dir.exists() and not args.output_dir.is_dir():
        raise UserInputError(f"--output_dir {args.output_dir} is a file: name a folder")
    return args, data_flags


def find_run(model: str) -> Path | None:
    """The run that a model is from, which says what it was trained on: its folder, or one above a checkpoint's."""
    folders = [Path(model), *Path(model).absolute().parents[:2]]
    return next((folder for folder in folders if (folder / CONFIG_FILE).is_file()), None)


def is_image_folder(model: str) -> bool:
    return Path(model).is_dir() and not (Path(model) / "model_index.json").is_file()


def choose_image_size(pipeline: Pipeline | None, model: str, config: DataConfig, data_flags: list[str]) -> str:
    """The resolution to measure at: the model's; of a folder of images the one asked for, else that of the first."""
    if pipeline is not None:
        side = pipeline.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return f"{width}x{height}"
    endings = Image.registered_extensions()
    files = sorted(path for path in Path(model).rglob("*") if path.suffix.lower() in endings)
    if not files:
        raise UserInputError(f"{model} holds neither a pipeline (model_index.json) nor images")
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


def read_run_facts(summary: Path) -> dict[str, Any]:
    """At which step the weights of a run are; nothing of what is not a run."""
    if not summary.is_file():
        return {}
    try:
        return {"global_step": int(json.loads(summary.read_text())["global_step"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserInputError(f"{summary} is not the summary of a run: {first_line(error)}") from None


def write_outputs(args: argparse.Namespace, report: Report, picture: Image.Image, facts: dict[str, Any]) -> None:
    """The table, the files, and the card of the run if the model is one."""
    print(format_table(report))
    is_run = "global_step" in facts
    is_model = Path(args.model).is_dir() and not is_image_folder(args.model)
    folder = args.output_dir or (Path(args.model) if is_model else Path())
    written = write_report(report, picture, folder, facts)
    if is_run and args.output_dir is None:
        card = Path(args.model) / CARD_FILE
        card.write_text(make_card(Path(args.model), None, None))
        written.append(card)
    print("\n".join(f"wrote {path}" for path in written))


@exits_on_user_error
def main() -> None:
    args, data_flags = parse_args()
    state = join_processes()
    run_facts = read_run_facts(Path(args.model) / SUMMARY_FILE)
    run_dir = find_run(args.model)
    config = parse_data_flags(data_flags, None if run_dir is None else run_dir / CONFIG_FILE)
    pipeline: Pipeline | None = None
    if not is_image_folder(args.model):
        pipeline = load_pipeline(args.model, getattr(torch, args.dtype)).to(state.device)
        speed_up(pipeline, args.compile)
    resolution = choose_image_size(pipeline, args.model, config, data_flags)
    config = replace(config, resolution=resolution)
    if pipeline is not None:
        if args.guidance_scale != 1 and pipeline.num_classes == 0:
            raise UserInputError(f"--guidance_scale: {args.model} is unconditional, it has no classes")
        config = replace(config, image_mode="L" if pipeline.unet.config.in_channels == 1 else "RGB")

    real = RealImages(load_image_data(config, with_labels=None))
    num_images = choose_num_images(real, args.num_images)
    facts = {
        "model": Path(args.model).name,
        "data": Path(real.source).name,
        "num_training_images": len(real),
        **run_facts,
    }
    if pipeline is None:
        mode: Any = "L" if real.num_channels == 1 else "RGB"
        folder = DataConfig(train_data_dir=args.model, resolution=resolution, image_mode=mode, center_crop=True)
        generated = RealImages(load_image_data(folder, with_labels=False))
        num_images = min(num_images, len(generated))
        images = read_in_order(generated, num_images, args.batch_size)
    else:
        sampler = make_evaluation_sampler(pipeline, args.scheduler, args.num_inference_steps)
        images = generate(pipeline, sampler, real, num_images, args.batch_size, args.guidance_scale, args.seed)
        facts |= sampling_facts(pipeline, sampler, args.guidance_scale, args.seed)
    with state.local_main_process_first():
        extractor = make_extractor(args.extractor, args.clip_model, real, state.device)
    if state.is_main_process:
        how = "" if pipeline is None else f" by {sampler.label}"
        print(f"measuring {num_images:,} images{how} of {args.model}\nagainst {real.source}: {len(real):,} images")
    judge_classes = pipeline is not None and pipeline.num_classes > 0
    result = evaluate(real, extractor, images, num_images, judge_classes)
    if result is not None:
        write_outputs(args, *result, facts)


if __name__ == "__main__":
    main()
