"""Samplers: the schedulers that can take the place of the one that a model was trained with."""

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.sampling.flags import SAMPLERS
from sprite_diffusion.sampling.pipeline_loading import OWN_CLASSES, Pipeline

FEW_STEPS = 50  # of a sampler that needs few, where their number is not given


class NoiselessDDPMScheduler(ClosedFormDDPMScheduler):
    """DDPM without the noise that each reverse step adds: only the mean of equation 7 of Ho et al. 2020.

    It is wrong, and shown for that: the samples collapse to the blurred mean of what they could become.
    """

    def _deviation_columns(self, beta: np.ndarray, posterior_variance: np.ndarray) -> list[np.ndarray]:
        return [np.zeros_like(beta)]


@dataclass(frozen=True)
class Sampler:
    """A scheduler, and the steps to take with it."""

    name: str
    scheduler: SchedulerMixin
    num_inference_steps: int

    @property
    def label(self) -> str:
        """The sampler in one word, such as ddim:25."""
        return f"{self.name}:{self.num_inference_steps}"

    @property
    def record(self) -> dict[str, Any]:
        """What the file of a picture says of the sampler."""
        return {"scheduler": self.name, "num_inference_steps": self.num_inference_steps}


def make_sampler(flag: str, pipeline: Pipeline, name: str | None, num_inference_steps: int | None) -> Sampler:
    """Returns a sampler on the noise process that the model was trained with.

    Args:
        flag: The flag that asks for the sampler, for messages.
        pipeline: The model.
        name: A name in `SAMPLERS`; None for the scheduler that the model was trained with.
        num_inference_steps: The number of steps. None for all of the process with the model's own scheduler, else
            for `FEW_STEPS`.

    Raises:
        UserInputError: For an unknown name, a sampler of another process, and a number of steps out of range.
    """
    model_scheduler = pipeline.scheduler
    if name is None or SAMPLERS.get(name) == type(model_scheduler).__name__:
        name, scheduler = name or short_name(model_scheduler), model_scheduler
    elif name not in SAMPLERS:
        raise UserInputError(f"{flag}: unknown sampler '{name}'; known are {', '.join(SAMPLERS)}")
    elif not model_scheduler.compatibles:
        process = type(model_scheduler).__name__
        raise UserInputError(f"{flag} {name}: this model's process, {process}, has no sampler but its own")
    else:
        scheduler = _from_config(SAMPLERS[name], model_scheduler.config)
    num_train_timesteps = len(model_scheduler)
    if num_inference_steps is None:
        few = min(FEW_STEPS, num_train_timesteps)
        num_inference_steps = num_train_timesteps if scheduler is model_scheduler else few
    if not 1 <= num_inference_steps <= num_train_timesteps:
        subject = "--num_inference_steps" if flag == "--scheduler" else f"{flag}, {name}"
        raise UserInputError(
            f"{subject}: {num_inference_steps} steps are out of the 1 to {num_train_timesteps} of this model's process"
        )
    return Sampler(name, scheduler, num_inference_steps)


def _from_config(class_name: str, config: FrozenDict) -> SchedulerMixin:
    """Makes a scheduler of another one's config, so that it clips as the model was trained to."""
    scheduler_class: Any = OWN_CLASSES.get(class_name) or getattr(diffusers, class_name)
    options = inspect.signature(scheduler_class).parameters
    if config.clip_sample and "clip_sample" not in options and "thresholding" in options:
        # These solvers know clipping as the case of dynamic thresholding whose threshold can't exceed the range.
        # Without it, what a long step overshoots by stays in the image as coloured specks.
        return scheduler_class.from_config(config, thresholding=True, sample_max_value=config.clip_sample_range)
    return scheduler_class.from_config(config)


def parse_samplers(pipeline: Pipeline, text: str) -> list[Sampler]:
    """Returns the samplers of `--compare`, such as 'ddpm:500,ddim:25'. Raises `UserInputError` as `make_sampler`."""
    samplers = []
    for item in text.split(","):
        name, colon, steps = item.strip().partition(":")
        if colon and not steps.isdecimal():
            raise UserInputError(f"--compare {text}: '{item}' is not NAME:STEPS, as in ddim:25")
        samplers.append(make_sampler("--compare", pipeline, name, int(steps) if colon else None))
    return samplers


def short_name(scheduler: SchedulerMixin) -> str:
    """Returns the short name of a scheduler; that of its class where it has none."""
    class_name = type(scheduler).__name__
    return next((name for name in SAMPLERS if SAMPLERS[name] == class_name), class_name)
