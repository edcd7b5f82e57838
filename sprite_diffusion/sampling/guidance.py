"""Guidance: towards a class or a prompt or, where a model knows none, away from a weaker network."""

import argparse
from typing import Any

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.sampling.flags import PROCESS_OPTIONS
from sprite_diffusion.sampling.pipeline_loading import Pipeline, load_pipeline, speed_up

USUAL_SCALE = 2.0  # of a guide: what was measured to help most, docs/quality.md
SAME_IN_BOTH = (*PROCESS_OPTIONS.values(), "beta_start", "beta_end", "trained_betas")  # of a model and its guide


def choose_guidance(args: argparse.Namespace, pipeline: Pipeline) -> tuple[Any, float]:
    """Returns the network of `--guide`, None if it is not given, and the scale of the guidance.

    Raises `UserInputError` for guidance that the model can't have, and for a guide that is no such network as its own.
    """
    model, scale = args.model or args.snapshots, args.guidance_scale
    if args.guide is None:
        if scale is not None and not pipeline.is_conditional:
            raise UserInputError(f"--guidance_scale: {model} is unconditional, it has no classes: it needs a --guide")
        return None, 1.0 if scale is None else scale
    if pipeline.is_conditional:
        raise UserInputError(f"--guide: {model} is guided by its classes or prompts, leave the flag out")
    guide = load_pipeline(args.guide, pipeline.unet.dtype).to(pipeline.device)
    if guide.is_conditional:
        raise UserInputError(f"--guide {args.guide}: it has classes or prompts, which {model} does not know")
    if guide.sample_shape != pipeline.sample_shape:
        raise UserInputError(f"--guide {args.guide}: it draws images of another size or mode than {model}")
    for name in SAME_IN_BOTH:
        own, other = (part.scheduler.config.get(name) for part in (pipeline, guide))
        if own != other:
            raise UserInputError(f"--guide {args.guide}: its {name} is {other}, that of {model} is {own}")
    speed_up(guide, args.compile, args.num_threads)
    return guide.unet, USUAL_SCALE if scale is None else scale
