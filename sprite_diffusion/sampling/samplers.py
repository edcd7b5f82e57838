"""Samplers by short name: the schedulers that can take the place of the one that a model was trained with."""

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np

from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.common.errors import UserInputError

SAMPLERS: dict[str, Any] = {
    "ddpm": ClosedFormDDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    "dpmsolver++_singlestep": diffusers.DPMSolverSinglestepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "kdpm2_ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
}
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
    scheduler: Any
    num_inference_steps: int

    @property
    def label(self) -> str:
        return f"{self.name}:{self.num_inference_steps}"

    @property
    def record(self) -> dict[str, Any]:
        return {"scheduler": self.name, "num_inference_steps": self.num_inference_steps}


def make_sampler(flag: str, pipeline: Any, name: str | None, num_inference_steps: int | None) -> Sampler:
    """The sampler called `name`, or the pipeline's own, on the noise process that the model was trained with."""
    own = pipeline.scheduler
    if name is None or SAMPLERS.get(name) is type(own):
        name, scheduler = name or own_name(own), own
    elif name not in SAMPLERS:
        raise UserInputError(f"{flag}: unknown sampler '{name}'; known are {', '.join(SAMPLERS)}")
    elif not own.compatibles:
        raise UserInputError(f"{flag} {name}: this model's process, {type(own).__name__}, has no sampler but its own")
    else:
        scheduler = _from_config(SAMPLERS[name], own.config)
    num_train_timesteps = len(own)
    if num_inference_steps is None:
        num_inference_steps = num_train_timesteps if scheduler is own else min(FEW_STEPS, num_train_timesteps)
    if not 1 <= num_inference_steps <= num_train_timesteps:
        where = "--num_inference_steps" if flag == "--scheduler" else f"{flag}, {name}"
        raise UserInputError(
            f"{where}: {num_inference_steps} steps are out of the 1 to {num_train_timesteps} of this model's process"
        )
    return Sampler(name, scheduler, num_inference_steps)


def _from_config(scheduler_class: Any, config: Any) -> Any:
    options = inspect.signature(scheduler_class.__init__).parameters
    if config.clip_sample and "clip_sample" not in options and "thresholding" in options:
        # These solvers know clipping as the case of dynamic thresholding whose threshold can't exceed the range.
        # Without it, what a long step overshoots by stays in the image as coloured specks.
        return scheduler_class.from_config(config, thresholding=True, sample_max_value=config.clip_sample_range)
    return scheduler_class.from_config(config)


def parse_samplers(pipeline: Any, text: str) -> list[Sampler]:
    """'ddpm:500,ddim:25' -> samplers."""
    samplers = []
    for item in text.split(","):
        name, colon, steps = item.strip().partition(":")
        if colon and not steps.isdecimal():
            raise UserInputError(f"--compare {text}: '{item}' is not NAME:STEPS, as in ddim:25")
        samplers.append(make_sampler("--compare", pipeline, name, int(steps) if colon else None))
    return samplers


def own_name(scheduler: Any) -> str:
    """The short name of a scheduler; that of its class where it has none."""
    names = {scheduler_class: name for name, scheduler_class in SAMPLERS.items()}
    return names.get(type(scheduler), type(scheduler).__name__)
