"""The flags of calculate_metrics.py, checked before torch is imported."""

import argparse
import sys
from pathlib import Path

from sprite_diffusion.common.files import check_output_folder
from sprite_diffusion.common.flags import SEED_RANGE, THREADS_RANGE, ArgumentParser, Range
from sprite_diffusion.sampling.flags import (
    GUIDANCE_RANGE,
    MODEL_HELP,
    SAMPLERS,
    UP_TO_A_MILLION,
    add_guidance_flags,
    add_process_flags,
    add_speed_flags,
    check_sampler,
    read_process_flags,
    with_underscores,
)

EXTRACTORS = ("classifier", "inception", "clip")
RANGES = {
    "num_images": Range(at_least=10, at_most=10**6),
    "num_inference_steps": UP_TO_A_MILLION,
    "batch_size": UP_TO_A_MILLION,
    "seed": SEED_RANGE,
    "guidance_scale": GUIDANCE_RANGE,
    "num_threads": THREADS_RANGE,
}
CLIP_MODEL = "openai/clip-vit-large-patch14-336"  # that of CMMD


def parse_args(description: str | None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and, unparsed, the flags that are none of calculate_metrics.py's: those of the data.

    Raises `UserInputError` for a value out of range, and for an output folder that can't be written.
    """
    parser = ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("model", help=f"{MODEL_HELP} Or a folder of images.")
    parser.add_argument("--num_images", type=int, default=5000, help="At most; and at most half of the real images.")
    parser.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SAMPLERS)}; default: ddim.")
    parser.add_argument("--num_inference_steps", type=int, help="Default: 50; of the model's own scheduler, all.")
    add_guidance_flags(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="Images at a time; changes speed only.")
    add_speed_flags(parser)
    add_process_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="Image i is sampled from seed + i.")
    parser.add_argument("--extractor", choices=EXTRACTORS, default="classifier", help="What gives the features.")
    parser.add_argument("--clip_model", default=CLIP_MODEL, help="Of --extractor clip: a Hub id or a folder.")
    parser.add_argument("--output_dir", type=Path, help="Default: the folder of the model, else the current one.")
    args, data_flags = parser.parse_known_args(with_underscores(sys.argv[1:]))
    for name, limits in RANGES.items():
        limits.check(name, getattr(args, name))
    if args.scheduler is not None:
        check_sampler("--scheduler", args.scheduler)
    args.process = read_process_flags(args)
    check_output_folder("--output_dir", args.output_dir)
    return args, data_flags
