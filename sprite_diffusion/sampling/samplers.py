"""Samplers: the schedulers that can take the place of the one that a model was trained with."""

import inspect
from dataclasses import dataclass
from functools import wraps
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin

from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.sampling.flags import SAMPLERS, SCHEDULES_OF_DIFFUSERS, check_sampler, split_comparison
from sprite_diffusion.sampling.pipeline_loading import OWN_CLASSES, Pipeline

FEW_STEPS = 50  # taken by the samplers that need few where no number is given
# These classes divide a process of T steps by one more than they take, and fail for all T.
SAMPLERS_OF_T_MINUS_1 = ("dpmsolver++", "unipc", "deis")
# These classes raise an error for predicted clean images, or average velocities of different timesteps.
NOISE_SAMPLERS = ("pndm", "euler_ancestral", "kdpm2", "kdpm2_ancestral")


class NoiselessDDPMScheduler(ClosedFormDDPMScheduler):
    """DDPM without the noise that each reverse step adds: only the mean of equation 7 of Ho et al. 2020.

    Leaving the noise out is a mistake, and shown as one: the samples collapse to the blurred mean of what they could
    become.
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
        """The name and the number of steps in one word, such as ddim:25."""
        return f"{self.name}:{self.num_inference_steps}"

    @property
    def record(self) -> dict[str, Any]:
        """The entries about the sampler in the record of a picture."""
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
        UserInputError: For an unknown name, a sampler of another process, and a number of steps that the process does
            not have or the sampler can't take.
    """
    model_scheduler = pipeline.scheduler
    if name is not None:
        check_sampler(flag, name)
    if name is None or SAMPLERS[name] == type(model_scheduler).__name__:
        name, scheduler = name or short_name(model_scheduler), model_scheduler
    elif not model_scheduler.compatibles:
        process = type(model_scheduler).__name__
        raise UserInputError(f"{flag} {name}: this model's process, {process}, has no sampler but its own")
    else:
        scheduler = _make_scheduler(flag, name, model_scheduler)
    num_train_timesteps = len(model_scheduler)
    fewest, most = _limit_steps(name, num_train_timesteps)
    if most < fewest:
        raise UserInputError(f"{flag} {name}: this model's process of {num_train_timesteps} steps is too short for it")
    if num_inference_steps is None:
        num_inference_steps = num_train_timesteps if scheduler is model_scheduler else min(FEW_STEPS, most)
    subject = "--num_inference_steps" if flag == "--scheduler" else f"{flag}, {name}"
    if not fewest <= num_inference_steps <= most:
        by_sampler = "" if (fewest, most) == (1, num_train_timesteps) else f" by {name}"
        raise UserInputError(
            f"{subject}: {num_inference_steps} steps are out of the {fewest} to {most} of this model's process"
            f"{by_sampler}"
        )
    if scheduler is not model_scheduler:
        _try_steps(subject, name, scheduler, num_inference_steps)
    return Sampler(name, scheduler, num_inference_steps)


def _limit_steps(name: str, num_train_timesteps: int) -> tuple[int, int]:
    """Returns the fewest and the most steps that a sampler takes on a process of so many."""
    if name == "pndm":  # it begins with four Runge-Kutta steps, each through a timestep halfway
        return 4, num_train_timesteps // 2
    if name in SAMPLERS_OF_T_MINUS_1:
        return 1, max(1, num_train_timesteps - 1)
    return 1, num_train_timesteps


def _try_steps(subject: str, name: str, scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raises `UserInputError`, about `subject`, if a scheduler fails at any of its steps; takes them on one pixel.

    diffusers' schedulers fail for some numbers of steps without a word about them, and some of them at the last step.
    """
    pixel = torch.zeros(1, 1, 1, 1)
    try:
        scheduler.set_timesteps(num_inference_steps)
        with torch.random.fork_rng(devices=[]):  # a step may take random numbers, which are the caller's
            for timestep in scheduler.timesteps:
                scheduler.scale_model_input(pixel, timestep)
                scheduler.step(torch.zeros_like(pixel), timestep, pixel)
    except Exception as error:
        raise UserInputError(
            f"{subject}: {name} can't take {num_inference_steps} steps of this model's process ({first_line(error)}); "
            "give another number"
        ) from None


def _make_scheduler(flag: str, name: str, model_scheduler: SchedulerMixin) -> SchedulerMixin:
    """Returns the scheduler of a name in `SAMPLERS` on a model's process, which clips as the model was trained to.

    Raises `UserInputError` if the model predicts its variance and the scheduler has no use for that, or if the process
    is too short.
    """
    scheduler_class: Any = OWN_CLASSES.get(SAMPLERS[name]) or getattr(diffusers, SAMPLERS[name])
    config = model_scheduler.config
    options = inspect.signature(scheduler_class).parameters
    changes: dict[str, Any] = {}
    if str(config.get("variance_type")).startswith("learned") and "variance_type" not in options:
        raise UserInputError(f"{flag} {name}: this model predicts its variance as well, take ddpm or dpmsolver++")
    if config.get("clip_sample") and "clip_sample" not in options and "thresholding" in options:
        # These solvers know clipping as the case of dynamic thresholding whose threshold can't exceed the range.
        # Without it, what a long step overshoots by stays in the image as coloured specks.
        changes = {"thresholding": True, "sample_max_value": config["clip_sample_range"]}
    if name in NOISE_SAMPLERS:
        changes["prediction_type"] = "epsilon"
    if config["beta_schedule"] not in SCHEDULES_OF_DIFFUSERS:
        changes["trained_betas"] = model_scheduler.betas.tolist()
    try:
        scheduler = scheduler_class.from_config(config, **changes)
    except Exception as error:  # some classes fail for very short processes, and do not say so
        raise UserInputError(
            f"{flag} {name}: diffusers can't make it for this model's process ({first_line(error)})"
        ) from None
    if name in NOISE_SAMPLERS and config["prediction_type"] != "epsilon":
        _give_noise(scheduler, config["prediction_type"])
    return scheduler


def _give_noise(scheduler: SchedulerMixin, prediction_type: str) -> None:
    """Lets a scheduler of predicted noise take predictions of a clean image ("sample") or a velocity.

    Each prediction is turned into the noise that it implies: with the network's input
    z = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, a clean image x_0 into (z - sqrt(alpha_bar) x_0) /
    sqrt(1 - alpha_bar) (Ho et al. 2020, equation 9), and a velocity v into sqrt(1 - alpha_bar) z + sqrt(alpha_bar) v
    (Salimans and Ho 2022, section 4).
    """
    step_from_noise = scheduler.step

    @wraps(step_from_noise)  # pipelines look at the arguments that `step` takes
    def step(model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **kwargs: Any) -> Any:
        network_input = scheduler.scale_model_input(sample, timestep)
        if hasattr(scheduler, "sigmas"):  # x = x_0 + sigma eps, and z = x / sqrt(sigma^2 + 1)
            signal = float(scheduler.scale_model_input(torch.ones(()), timestep))
        else:
            signal = float(scheduler.alphas_cumprod[int(timestep)]) ** 0.5
        noise_rate = (1 - signal**2) ** 0.5
        if prediction_type == "sample":
            noise = (network_input - signal * model_output) / noise_rate
        else:
            noise = noise_rate * network_input + signal * model_output
        return step_from_noise(noise, timestep, sample, **kwargs)

    scheduler.step = step


def parse_samplers(pipeline: Pipeline, text: str) -> list[Sampler]:
    """Returns the samplers of `--compare`, such as 'ddpm:500,ddim:25'. Raises `UserInputError` as `make_sampler`."""
    return [make_sampler("--compare", pipeline, name, num_steps) for name, num_steps in split_comparison(text)]


def short_name(scheduler: SchedulerMixin) -> str:
    """Returns the name of a scheduler in `SAMPLERS`; the name of its class where it is not one of them."""
    class_name = type(scheduler).__name__
    return next((name for name in SAMPLERS if SAMPLERS[name] == class_name), class_name)
