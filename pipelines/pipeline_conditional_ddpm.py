"""Class-conditional image generation with classifier-free guidance and mixes of classes."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class ConditionalDDPMPipeline(DiffusionPipeline):
    r"""
    Pipeline for image generation by class.

    A model of K classes was trained with a null class beside them, which stands for "no class": id K. Its
    prediction is the unconditional one that classifier-free guidance (https://huggingface.co/papers/2207.12598)
    needs. A *context* is a vector of K class weights: one-hot for a class, zero for none, anything between for a mix.

    Args:
        unet ([`~diffusers.ModelMixin`]):
            A [`~diffusers.UNet2DModel`] with `num_class_embeds = K + 1`, or a network called as
            `unet(sample, timestep, context=context).sample` with `context_dim = K` in its config.
        scheduler ([`~diffusers.SchedulerMixin`]):
            `ClosedFormDDPMScheduler`, or any scheduler of diffusers that is made from its config.
        id2label (`dict[int, str]`, *optional*):
            The names of the classes, saved with the pipeline.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "pred_original_sample")

    # `Optional`, as diffusers 0.35 fails to load a pipeline with `dict | None` among its types.
    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: Optional[dict] = None):  # noqa: UP045
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        if id2label is not None:  # JSON turns the ids into strings
            self.register_to_config(id2label={str(id): label for id, label in id2label.items()})
        config = unet.config
        self.num_classes = config.context_dim if "context_dim" in config else config.num_class_embeds - 1
        self.id2label = {int(id): label for id, label in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        context: torch.Tensor | Mapping[int | str, float] | Sequence[Mapping[int | str, float]] | None = None,
        guidance_scale: float = 1.0,
        batch_size: int | None = None,
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
            class_labels (`int`, `str`, or a sequence of them, *optional*):
                Ids in 0..K-1 or names of classes: one for all images, or one for each image. Neither this nor
                `context`: images of no particular class.
            context (`torch.Tensor` of shape `(K,)` or `(batch_size, K)`, or mapping(s), *optional*):
                Class weights, so that classes can be mixed: `{"hero": 1, "food": 0.6}`.
            guidance_scale (`float`, defaults to 1):
                `w` in `uncond + w * (cond - uncond)`; above 1 the images are more typical of their class. At 1 the
                unconditional half is not computed.
            batch_size (`int`, *optional*):
                The number of images; that of the classes if not given.
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
            ValueError: for an unknown class, or an argument that does not fit the others or the model.
        """
        context = self._prepare_context(class_labels, context, batch_size)  # (B, K)
        batch_size = len(context)
        latents_shape = _check_inputs(
            self, batch_size, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        device = self._execution_device
        context = context.to(device)
        guided = guidance_scale != 1
        if guided:
            context = torch.cat([context, torch.zeros_like(context)])  # (2B, K)
        self.scheduler.set_timesteps(num_inference_steps or len(self.scheduler), device=device)

        # 1. x_T ~ N(0, I): float32 whatever the network's dtype, or bf16 noise would have 2^8 levels
        if latents is None:
            latents = randn_tensor(latents_shape, generator=generator, device=device, dtype=torch.float32)
        latents = _scale_initial_noise(self.scheduler, latents.to(device, torch.float32))
        step_kwargs = _accepted_by(self.scheduler.step, generator=generator, eta=eta)

        with self._conditioned_on(context) as model_kwargs:
            for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
                # 2. the network's prediction from x_t, with and without the class in one batch
                model_input = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
                if guided:
                    model_input = torch.cat([model_input, model_input])
                model_output = self.unet(model_input, t, **model_kwargs).sample.float()
                if guided:  # Ho and Salimans 2022, equation 6, with w = 1 + their w
                    conditional, unconditional = model_output.chunk(2)
                    model_output = unconditional + guidance_scale * (conditional - unconditional)

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
        Saves weights, configs and the code files: `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`
        then loads them where this project is not installed.

        Args:
            save_directory (`str`): The folder, made if missing.
            **kwargs: As for [`~diffusers.DiffusionPipeline.save_pretrained`].
        """
        super().save_pretrained(save_directory, **kwargs)
        _save_code(self, Path(save_directory))

    def get_class_id(self, label: int | str) -> int:
        r"""
        The id of a class.

        Args:
            label (`int` or `str`): An id or a name.

        Raises:
            ValueError: if the model has no such class.
        """
        ids = {name: id for id, name in self.id2label.items()}
        id = ids.get(label, label) if isinstance(label, str) else int(label)
        if isinstance(id, str) or not 0 <= id < self.num_classes:
            names = ", ".join(ids) or f"0 to {self.num_classes - 1}"
            raise ValueError(f"unknown class {label!r}: this model's classes are {names}")
        return id

    def _prepare_context(self, class_labels: Any, context: Any, batch_size: int | None) -> torch.Tensor:
        """Any of the ways to say what to draw -> class weights (B, K)."""
        if class_labels is not None and context is not None:
            raise ValueError("pass `class_labels` or `context`, not both")
        if class_labels is not None:
            many = isinstance(class_labels, (Sequence, torch.Tensor)) and not isinstance(class_labels, str)
            context = [{label: 1.0} for label in (class_labels if many else [class_labels])]
        if context is None:
            context = torch.zeros(1, self.num_classes)
        if not isinstance(context, torch.Tensor):
            mixes = [context] if isinstance(context, Mapping) else context
            weights = torch.zeros(len(mixes), self.num_classes)
            for row, mix in zip(weights, mixes, strict=True):
                for label, weight in mix.items():
                    row[self.get_class_id(label)] = weight
            context = weights
        if context.ndim == 1:
            context = context[None]
        if context.ndim != 2 or context.shape[1] != self.num_classes:
            raise ValueError(f"`context` has the shape {tuple(context.shape)}: it must be (B, {self.num_classes})")
        if batch_size is None or batch_size == len(context):
            return context
        if len(context) != 1:
            raise ValueError(f"{len(context)} classes for a `batch_size` of {batch_size}: give one, or one per image")
        return context.expand(max(batch_size, 0), -1)

    @contextmanager
    def _conditioned_on(self, context: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """Yields what the network is to be called with to be conditioned on class weights (B, K)."""
        if "context_dim" in self.unet.config:
            yield {"context": context}
            return
        # UNet2DModel looks labels up in a table. A mix of classes is the same mix of their rows, as offsets from the
        # null class's; for a one-hot context that is the class's own row.
        table = self.unet.class_embedding.weight.float()
        classes, null = table[:-1], table[-1]  # (K, D), (D,)
        embedding = null + context @ (classes - null)  # (B, D)
        one_hot = (context == 1).any(dim=1) & (context != 0).sum(dim=1).eq(1)
        embedding = torch.where(one_hot[:, None], classes[context.argmax(dim=1)], embedding)  # free of rounding
        hook = self.unet.class_embedding.register_forward_hook(lambda module, args, output: embedding.to(output.dtype))
        try:
            yield {"class_labels": torch.zeros(len(context), dtype=torch.long, device=context.device)}
        finally:
            hook.remove()


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
