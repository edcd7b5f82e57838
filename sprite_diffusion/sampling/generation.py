"""From seeds to images, a batch at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor

from pipelines import to_straight_alpha
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.sampling.conditions import Condition, join_arguments
from sprite_diffusion.sampling.pipeline_loading import Pipeline
from sprite_diffusion.sampling.samplers import Sampler


@dataclass(frozen=True)
class Edit:
    """An image to change, and how."""

    image: torch.Tensor  # (1, C, H, W) in [0, 1], with straight alpha
    strength: float | None  # None for the pipeline's default
    mask: torch.Tensor | None  # (1, 1, H, W), 1 where the image is drawn anew, else 0
    record: dict[str, Any]  # of the flags

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a pipeline."""
        return {"image": self.image, "strength": self.strength, "mask_image": self.mask}

    def keep(self, drawn: torch.Tensor) -> torch.Tensor:
        """Returns images (N, C, H, W) with the image itself where nothing was to be drawn, whatever came after it."""
        if self.strength == 0:
            return self.image.expand_as(drawn)
        return drawn if self.mask is None else torch.where(self.mask == 1, drawn, self.image)


@dataclass(frozen=True)
class Request:
    """The images to sample: image i has `seeds[i]` and `conditions[i]`."""

    seeds: list[int]
    conditions: list[Condition]
    batch_size: int = 64
    guidance_scale: float = 1.0
    eta: float = 0.0  # of DDIM
    negative: Condition | None = None  # a prompt that guidance leads away from
    guide: Any = None  # the network that it leads away from where there are neither classes nor prompts
    edit: Edit | None = None  # of an image, which all of these are then variants of

    @property
    def record(self) -> dict[str, Any]:
        """The entries about these images in the record of a picture; "images" is a new list at each call."""
        images = [{"seed": s, c.kind: c.name} for s, c in zip(self.seeds, self.conditions, strict=True)]
        negative = {} if self.negative is None else {"negative_prompt": self.negative.name}
        edit = {} if self.edit is None else self.edit.record
        return {"guidance_scale": self.guidance_scale, **negative, "eta": self.eta, **edit, "images": images}


class Recorder(Protocol):
    """What `sample_images` shows the way from noise to samples to."""

    @property
    def tensor_names(self) -> tuple[str, ...]: ...  # the pipeline's names for the images of a step

    def begin_batch(self, noise: torch.Tensor | None) -> None: ...

    def record(
        self, pipeline: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]: ...


@dataclass
class Trajectory:
    """The images of some steps on the way from noise to samples, in [0, 1]."""

    max_frames: int
    predicted: bool = False  # whether a step shows the clean image that it predicts, not the noisy one
    _batches: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The pipeline's name for the images of a step."""
        return ("pred_original_sample",) if self.predicted else ("latents",)

    @property
    def frames(self) -> list[torch.Tensor]:
        """The images (N, C, H, W) of each recorded step, in order, those of all batches together."""
        return [torch.cat(parts) for parts in zip(*self._batches, strict=True)]

    def begin_batch(self, noise: torch.Tensor | None) -> None:
        """Begins the frames of a batch with its noise (B, C, H, W), if there is some and no prediction is shown."""
        self._batches.append([] if self.predicted or noise is None else [to_unit_range(noise)])

    def record(self, pipeline: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """Records a step; the pipeline calls this after each one.

        Raises `UserInputError` if predictions are to be recorded and the scheduler returns none.
        """
        timesteps = pipeline.scheduler.timesteps
        images = get_prediction("--animate_prediction", pipeline, tensors) if self.predicted else tensors["latents"]
        if step in frame_indices(len(timesteps), self.max_frames):
            if not self.predicted and step + 1 < len(timesteps):
                # Some samplers let x grow with the noise; their model's input has the variance of an image.
                images = pipeline.scheduler.scale_model_input(images, timesteps[step + 1])
            self._batches[-1].append(to_unit_range(images))
        return {}


@dataclass
class StepStills:
    """The noisy images that every Nth step begins with, and the clean images that it predicts, in [0, 1]."""

    interval: int
    steps: list[tuple[int, int]] = field(default_factory=list)  # number and timestep of each one shown
    _batches: list[list[torch.Tensor]] = field(default_factory=list)  # each step (2, B, C, H, W)
    tensor_names: tuple[str, ...] = ("latents", "pred_original_sample")

    @property
    def rows(self) -> list[torch.Tensor]:
        """For each step that is shown, the noisy images of all batches and then their predictions (2 N, C, H, W)."""
        return [torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*self._batches, strict=True)]

    def begin_batch(self, noise: torch.Tensor | None) -> None:
        """Begins a batch with its noise (B, C, H, W)."""
        assert noise is not None  # as no image is changed in this view
        self.steps.clear()
        self._batches.append([])
        self._noisy = noise

    def record(self, pipeline: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """Records a step if it is shown; the pipeline calls this after each one.

        Raises `UserInputError` if the scheduler does not return its predictions.
        """
        prediction = get_prediction("--steps_shown", pipeline, tensors)
        timesteps = pipeline.scheduler.timesteps
        if step % self.interval == 0 or step == len(timesteps) - 1:
            self.steps.append((step + 1, int(timestep)))
            self._batches[-1].append(torch.stack([to_unit_range(self._noisy), to_unit_range(prediction)]))
        self._noisy = tensors["latents"]
        if step + 1 < len(timesteps):  # some samplers let x grow with the noise; their model's input does not
            self._noisy = pipeline.scheduler.scale_model_input(self._noisy, timesteps[step + 1])
        return {}


def get_prediction(flag: str, pipeline: Pipeline, tensors: dict[str, Any]) -> torch.Tensor:
    """Returns the clean images that a step has predicted. Raises `UserInputError` if its scheduler does not tell."""
    images = tensors["pred_original_sample"]
    if images is None:
        name = type(pipeline.scheduler).__name__
        raise UserInputError(f"{flag}: {name} does not tell its prediction: try --scheduler ddim")
    return images


def sample_images(
    pipeline: Pipeline,
    sampler: Sampler,
    request: Request,
    noise: torch.Tensor | None = None,
    trajectory: Recorder | None = None,
    show_progress: bool = True,
) -> torch.Tensor:
    """Samples images. Each depends on its own seed and condition alone.

    Args:
        pipeline: The model; afterwards it has its own scheduler again, however sampling ends.
        sampler: The scheduler to sample with.
        request: The images to sample.
        noise: x_T, (N, C, H, W), in place of the noise of the seeds; what a sampler adds on its way is still theirs.
        trajectory: Records the steps.
        show_progress: Whether to show a bar.

    Returns:
        The images (N, C, H, W) in [0, 1] on the CPU, float32; those of four channels have straight alpha.

    Raises:
        UserInputError: If an image is not finite.
    """
    pipeline.set_progress_bar_config(
        desc=sampler.label, unit="step", dynamic_ncols=True, leave=False, disable=not show_progress
    )
    model_scheduler, pipeline.scheduler = pipeline.scheduler, sampler.scheduler
    try:
        images = []
        for start in range(0, len(request.seeds), request.batch_size):
            batch = slice(start, start + request.batch_size)
            batch_noise = None if noise is None else noise[batch]
            images.append(_sample_batch(pipeline, sampler, request, batch, batch_noise, trajectory))
    finally:
        pipeline.scheduler = model_scheduler
    return torch.cat(images)


def _sample_batch(
    pipeline: Pipeline,
    sampler: Sampler,
    request: Request,
    batch: slice,
    noise: torch.Tensor | None,
    trajectory: Recorder | None,
) -> torch.Tensor:
    """Samples the images (B, C, H, W) of a slice of the request, from `noise` (B, C, H, W) if it is given."""
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds[batch]]
    # The noise is drawn even where other noise is given, or the generators would give it again at the first step.
    latents = sample_noise(pipeline.sample_shape, generators)
    if noise is not None:
        latents = noise
    kwargs = join_arguments(request.conditions[batch])
    if request.guide is not None:
        kwargs["guide"] = request.guide
    if kwargs:
        kwargs["guidance_scale"] = request.guidance_scale
    if request.negative is not None:
        kwargs |= {f"negative_{name}": value for name, value in join_arguments([request.negative]).items()}
    if request.edit is not None:
        kwargs |= request.edit.arguments
    if trajectory is not None:
        trajectory.begin_batch(latents if request.edit is None else None)
        kwargs["callback_on_step_end"] = trajectory.record
        kwargs["callback_on_step_end_tensor_inputs"] = trajectory.tensor_names
    output = pipeline(
        batch_size=len(latents),
        num_inference_steps=sampler.num_inference_steps,
        eta=request.eta,
        generator=generators,
        latents=latents,
        output_type="pt",
        **kwargs,
    )
    images = output.images.float().cpu()
    if not images.isfinite().all():
        raise UserInputError(
            f"the images that the model samples with {sampler.label} are not finite: take another checkpoint, sampler "
            "or number of steps, or a smaller guidance scale"
        )
    return images


def sample_noise(shape: Sequence[int], generators: list[torch.Generator]) -> torch.Tensor:
    """Returns x_T (N, C, H, W), standard normal: the first numbers of each generator, as in the pipeline itself.

    Args:
        shape: The channels, height and width of an image.
        generators: One for each image.
    """
    return randn_tensor((len(generators), *shape), generator=generators)


def frame_indices(num_steps: int, max_frames: int) -> list[int]:
    """Returns at most `max_frames` of the steps 0..num_steps-1: each of the last ones, and ever fewer before.

    Counted from the end, the steps grow as a square: in the first half there is little to be seen, as the picture
    appears late.
    """
    squares = (round((num_steps - 1) * (k / max(1, max_frames - 1)) ** 2) for k in range(max_frames))
    steps_left = {min(num_steps - 1, max(k, square)) for k, square in enumerate(squares)}
    return sorted(num_steps - 1 - left for left in steps_left)


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Returns images in [-1, 1], or noise, as [0, 1] on the CPU, clipped, and with straight alpha if any."""
    return to_straight_alpha((images / 2 + 0.5).clamp(0, 1).float().cpu())
