"""Draws images from a trained model: `python sample.py runs/sprites-unconditional`."""

import argparse
import math
from pathlib import Path
from typing import Any, NoReturn

import torch

from pipelines import ConditionalDDPMPipeline
from training.errors import UserInputError, exits_on_user_error
from training.grid import save_grid
from training.pipeline_loading import load_pipeline


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserInputError(message)


def parse_args() -> argparse.Namespace:
    parser = _Parser(description=__doc__)
    parser.add_argument("model", help="Output folder of a run, or the id of a repository on the Hub.")
    parser.add_argument("--num_images", type=int, default=16, help="Images, for each class if there are any.")
    parser.add_argument("--num_inference_steps", type=int, help="Denoising steps; all of the process by default.")
    parser.add_argument("--seed", type=int, default=0, help="Image i is drawn from seed + i.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time; changes speed only.")
    parser.add_argument("--class", dest="classes", action="append", help="Name or id; repeatable; default: all.")
    parser.add_argument("--guidance_scale", type=float, help="Classifier-free guidance; 1 = none, the default.")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="PNG file to write.")
    args = parser.parse_args()
    for name in ("num_images", "num_inference_steps", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserInputError(f"--{name} is {value}: it must be at least 1")
    if args.output.suffix.lower() != ".png":
        raise UserInputError(f"--output {args.output}: name a .png file")
    return args


def choose_conditioning(pipeline: Any, args: argparse.Namespace) -> tuple[list[int] | None, dict[str, Any]]:
    """The class of each image, and what else the pipeline is called with; None and nothing without classes."""
    if not isinstance(pipeline, ConditionalDDPMPipeline):
        for flag, value in (("--class", args.classes), ("--guidance_scale", args.guidance_scale)):
            if value is not None:
                raise UserInputError(f"{flag}: {args.model} is an unconditional model, it has no classes")
        return None, {}
    try:
        names = args.classes or range(pipeline.num_classes)
        classes = [pipeline.get_class_id(int(name) if str(name).isdecimal() else name) for name in names]
    except ValueError as error:
        raise UserInputError(f"--class: {error}") from None
    guidance_scale = 1.0 if args.guidance_scale is None else args.guidance_scale
    return [label for label in classes for _ in range(args.num_images)], {"guidance_scale": guidance_scale}


@exits_on_user_error
def main() -> None:
    args = parse_args()
    pipeline = load_pipeline(args.model)
    num_train_timesteps = len(pipeline.scheduler)
    if args.num_inference_steps is not None and args.num_inference_steps > num_train_timesteps:
        raise UserInputError(
            f"--num_inference_steps is {args.num_inference_steps}: this model's process has {num_train_timesteps}"
        )
    labels, pipeline_kwargs = choose_conditioning(pipeline, args)
    num_images = args.num_images if labels is None else len(labels)
    columns = math.ceil(math.sqrt(num_images)) if labels is None else args.num_images

    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(desc="sampling", unit="step")
    images = []
    for start in range(0, num_images, args.batch_size):
        rows = range(start, min(start + args.batch_size, num_images))
        if labels is not None:
            pipeline_kwargs["class_labels"] = [labels[i] for i in rows]
        output = pipeline(
            batch_size=len(rows),
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(args.seed + i) for i in rows],
            output_type="pt",
            **pipeline_kwargs,
        )
        images.append(output.images)
    save_grid(torch.cat(images), args.output, columns)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
