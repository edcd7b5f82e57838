"""Unconditional image generation with a denoising diffusion model, from noise to pictures."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

# The `pipeline.py` of a stock folder. diffusers takes the one pipeline class in it, hence the name is used again.
CUSTOM_PIPELINE = '''"""This model with its own pipeline and scheduler in place of the stock ones that its index names:

    DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)
"""

from pathlib import Path

{imports}

# diffusers runs this file of every repository under one name: the bytecode of one must not serve the next.
Path(__spec__.cached).unlink(missing_ok=True)


class UnconditionalDDPMPipeline(UnconditionalDDPMPipeline):
    def __init__(self, unet, scheduler):
        super().__init__(unet, ClosedFormDDPMScheduler.from_config(scheduler.config))
'''


class UnconditionalDDPMPipeline(DiffusionPipeline):
    r"""
    Pipeline for unconditional image generation (Algorithm 2 of https://huggingface.co/papers/2006.11239).

    It takes more schedulers and options than [`diffusers.DDPMPipeline`] and, for the same seed, network and
    scheduler, draws the same random numbers.

    Args:
        unet ([`~diffusers.ModelMixin`]):
            The network, called as `unet(sample, timestep).sample`, with `in_channels` and `sample_size` (a side or
            (height, width), in pixels) in its config.
        scheduler ([`~diffusers.SchedulerMixin`]):
            `ClosedFormDDPMScheduler`, `LinearCorruptionScheduler`, or any scheduler of diffusers that is made from
            their config.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    num_classes = 0

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        eta: float = 0.0,
    ) -> Any:
        r"""
        Generates images.

        Args:
            batch_size (`int`, defaults to 1):
                The number of images.
            num_inference_steps (`int`, *optional*):
                The number of denoising steps; all timesteps of the training process if not given.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator for the batch, or one for each image: an image then depends on its own seed only.
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                The starting noise x_T, standard normal; drawn with `generator` if not given.
            output_type (`str`, defaults to `"pil"`):
                `"pil"` for `PIL.Image`s, `"np"` for an array `(batch_size, height, width, channels)` in [0, 1],
                `"pt"` for a tensor `(batch_size, channels, height, width)` in [0, 1].
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~diffusers.ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step with the pipeline, the step's index, the timestep and a dict of the tensors
                named by `callback_on_step_end_tensor_inputs`; it returns a dict that may hold changed `latents`.
            callback_on_step_end_tensor_inputs (`tuple[str]`, defaults to `("latents",)`):
                The tensors to pass to the callback: `"latents"` (x_{t-1}) and, for the schedulers that return it,
                `"pred_original_sample"` (the clean images predicted at this step).
            eta (`float`, defaults to 0):
                For [`~diffusers.DDIMScheduler`]: the share of DDPM's noise that each step adds, 0 to 1; equation 16
                of https://huggingface.co/papers/2010.02502. Other schedulers ignore it.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            ValueError: if an argument does not fit the others or the model.
        """
        latents_shape = _check_inputs(
            self, batch_size, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps or len(self.scheduler), device=device)

        # 1. x_T ~ N(0, I): float32 whatever the network's dtype, or bf16 noise would have 2^8 levels
        if latents is None:
            latents = randn_tensor(latents_shape, generator=generator, device=device, dtype=torch.float32)
        latents = _scale_initial_noise(self.scheduler, latents.to(device, torch.float32))
        step_kwargs = _accepted_by(self.scheduler.step, generator=generator, eta=eta)

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            # 2. the network's prediction from x_t
            model_input = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
            model_output = self.unet(model_input, t).sample.float()  # (B, C, H, W)

            # 3. x_t -> x_{t-1}
            step_output = self.scheduler.step(model_output, t, latents, **step_kwargs)
            latents = step_output.prev_sample

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "pred_original_sample": step_output.get("pred_original_sample")}
                outputs = callback_on_step_end(
                    self, i, t, {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                )
                latents = outputs.pop("latents", latents)

        # 4. [-1, 1] -> images
        images = VaeImageProcessor().postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        r"""
        Saves weights and configs so that plain `DiffusionPipeline.from_pretrained` loads them.

        With a network of diffusers this is a stock `DDPMPipeline` folder, which needs no `trust_remote_code`: the
        config of `ClosedFormDDPMScheduler` is that of `DDPMScheduler`. It holds this pipeline and that scheduler as
        code too: `from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` takes them. With another
        network the code is in the index, and loading takes `trust_remote_code=True`.

        Args:
            save_directory (`str`): The folder, made if missing.
            **kwargs: As for [`~diffusers.DiffusionPipeline.save_pretrained`].
        """
        scheduler = self.scheduler
        if type(scheduler).__name__ == "ClosedFormDDPMScheduler":
            scheduler = DDPMScheduler.from_config(scheduler.config)
        if all(type(part).__module__.startswith("diffusers.") for part in (self.unet, scheduler)):
            DDPMPipeline(unet=self.unet, scheduler=scheduler).save_pretrained(save_directory, **kwargs)
            if scheduler is not self.scheduler:
                # Beside the scheduler's config: the only folder from which any file is downloaded.
                folder = Path(save_directory, "scheduler")
                imports = [
                    f"from .scheduler.{_save_source(cls, folder)} import {cls.__name__}"
                    for cls in (UnconditionalDDPMPipeline, type(self.scheduler))
                ]
                Path(save_directory, "pipeline.py").write_text(CUSTOM_PIPELINE.format(imports="\n".join(imports)))
        else:
            super().save_pretrained(save_directory, **kwargs)
            _save_code(self, Path(save_directory))


# The functions below stand in both pipelines: each file is shipped alone. A test holds them equal.


def _check_inputs(
    pipeline: Any,
    batch_size: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    output_type: str,
    callback_tensor_inputs: tuple[str, ...],
) -> tuple[int, ...]:
    """Raises a ValueError for what the caller got wrong, else returns the shape of the latents."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}: it must be at least 1")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"`generator` is a list of {len(generator)}, `batch_size` is {batch_size}: they must match")
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"`output_type` is {output_type!r}: it must be 'pil', 'np' or 'pt'")
    known = list(pipeline._callback_tensor_inputs)
    if unknown := set(callback_tensor_inputs) - set(known):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}: it can pass {known}")
    config = pipeline.unet.config
    side = config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    shape = (batch_size, config.in_channels, height, width)
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"`latents` has the shape {tuple(latents.shape)}: this model takes {shape}")
    return shape


def _scale_initial_noise(scheduler: Any, noise: torch.Tensor) -> torch.Tensor:
    """Standard normal noise -> the noise that the scheduler's process starts from."""
    if hasattr(scheduler, "transform_noise"):  # a process whose noise is not Gaussian
        noise = scheduler.transform_noise(noise)
    return noise * scheduler.init_noise_sigma


def _accepted_by(function: Callable, **kwargs: Any) -> dict[str, Any]:
    """The arguments that the function has: diffusers' schedulers differ in what `step` takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in kwargs.items() if name in parameters}


def _save_code(pipeline: DiffusionPipeline, directory: Path) -> None:
    """Puts the source files of classes that diffusers does not have beside what they load, and into the index."""
    index_file = directory / pipeline.config_name
    index = json.loads(index_file.read_text())

    def locate(cls: type, folder: Path) -> list[str]:
        if cls.__module__.startswith("diffusers."):
            return ["diffusers", cls.__name__]
        return [_save_source(cls, folder), cls.__name__]

    index["_class_name"] = locate(type(pipeline), directory)
    for name, component in pipeline.components.items():
        index[name] = locate(type(component), directory / name)
    index_file.write_text(json.dumps(index, indent=2) + "\n")


def _save_source(cls: type, folder: Path) -> str:
    """Copies the file of a class, named after its content, and returns that name without the ending.

    diffusers imports the code of all repositories by file name alone. Two versions of a file under one name would
    overwrite each other in a program that loads both.
    """
    path = Path(inspect.getfile(cls))
    source, stem = path.read_bytes(), re.sub(r"_[0-9a-f]{8}$", "", path.stem)
    for old in folder.glob(f"{stem}_????????.py"):
        old.unlink()
    name = f"{stem}_{hashlib.sha256(source).hexdigest()[:8]}"
    (folder / f"{name}.py").write_bytes(source)
    return name
