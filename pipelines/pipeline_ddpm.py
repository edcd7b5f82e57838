"""Image generation with a denoising diffusion model, from noise to pictures: of anything, by class, and by prompt."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

DEFAULT_STRENGTH = 0.6

# From linear sRGB to the responses of the eye's cones, and from their cube roots to OKLab: Ottosson 2020.
TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)

logger = logging.get_logger(__name__)

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


class _DDPMPipeline(DiffusionPipeline):
    """What generation by class, by prompt and without either has in common: the denoising loop, and saving."""

    model_cpu_offload_seq = "unet"
    is_conditional = False  # whether images can be asked for, by class or by prompt
    _callback_tensor_inputs = ("latents", "pred_original_sample")
    _model_kwargs: Mapping[str, torch.Tensor] = {}  # what the network is told of the images, besides the timestep
    _guidance_scale = 1.0
    _guide: ModelMixin | None = None

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for a model without classes."""
        return 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The channels, height and width of one image, in pixels."""
        config = self.unet.config
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels, height, width

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        r"""
        Saves weights, configs and the code files: `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`
        then loads them where this project is not installed. The arguments are those of
        [`~diffusers.DiffusionPipeline.save_pretrained`].
        """
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text())
        for name, part in {"_class_name": self, **self.components}.items():
            if part is None:
                continue
            subfolder = folder if part is self else folder / name
            module = _find_library(part) or _save_source(type(part), subfolder)
            # Of its own class transformers 4 would look for files that transformers 5 does not write.
            is_fast_tokenizer = getattr(part, "is_fast", False)
            index[name] = [module, "PreTrainedTokenizerFast" if is_fast_tokenizer else type(part).__name__]
        index_file.write_text(json.dumps(index, indent=2) + "\n")

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
        palette: Sequence[str] | None = None,
        image: Image.Image | Sequence[Image.Image] | torch.Tensor | None = None,
        strength: float | None = None,
        mask_image: Image.Image | Sequence[Image.Image] | torch.Tensor | None = None,
    ) -> Any:
        r"""
        Generates images by Algorithm 2 of Ho et al. 2020, or changes given ones.

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
                `"pt"` for a tensor `(batch_size, channels, height, width)` in [0, 1]. Images of four channels are
                RGBA with straight alpha, as image files are, although the network and the callback see the colours
                multiplied by alpha.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~diffusers.ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step with the pipeline, the timestep's index, the timestep and a dict of the tensors
                named by `callback_on_step_end_tensor_inputs`; it returns a dict that may hold changed `latents`.
            callback_on_step_end_tensor_inputs (`tuple[str]`, defaults to `("latents",)`):
                The tensors to pass to the callback: `"latents"` (x_{t-1}) and, for the schedulers that return it,
                `"pred_original_sample"` (the clean images predicted at this step).
            eta (`float`, defaults to 0):
                For [`~diffusers.DDIMScheduler`]: the share of DDPM's noise that each step adds, 0 to 1; equation 16
                of https://huggingface.co/papers/2010.02502. Other schedulers ignore it.
            palette (`Sequence[str]`, *optional*):
                Colours such as `"#d02c30"`, or without the `#` as in a `palette.hex`: every pixel takes the nearest,
                in OKLab. Alpha stays as it is.
            image (`PIL.Image`, a list of them, or a tensor `(1 or batch_size, channels, height, width)`, *optional*):
                Images to change, of the model's size; tensors in [0, 1], with straight alpha if the model has it.
                Noise is added to them up to the level of a timestep, and taken away again: SDEdit,
                https://huggingface.co/papers/2108.01073.
            strength (`float`, *optional*):
                The share of the steps that images are noised by: 0 returns the images themselves, 1 draws others. By
                default 0.6, and 1 with a mask.
            mask_image (`PIL.Image`, a list of them, or a tensor `(1 or batch_size, 1, height, width)`, *optional*):
                White (1) where `image` is drawn anew; elsewhere the result is `image` bit for bit. At each step that
                part is `image` at the noise level of the step, which the new part is fitted to: equation 8 of RePaint,
                https://huggingface.co/papers/2201.09865, with the same noise at all steps.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            ValueError: If an argument does not fit the others or the model.
        """
        self._check_inputs(batch_size, generator, latents, output_type, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        colours = None if palette is None else _read_colours(palette).to(device)
        edit = self._prepare_edit(image, strength, mask_image, batch_size)
        self.scheduler.set_timesteps(num_inference_steps or len(self.scheduler), device=device)

        # 1. x_T ~ N(0, I): float32 whatever the network's dtype, or bf16 noise would have 2^8 levels
        if latents is None:
            latents = randn_tensor((batch_size, *self.sample_shape), generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        if hasattr(self.scheduler, "transform_noise"):  # a process whose noise is not Gaussian
            latents = self.scheduler.transform_noise(latents)
        noise, latents = latents, latents * self.scheduler.init_noise_sigma
        timesteps, first_step = self.scheduler.timesteps, 0
        if edit is not None and edit.strength < 1:  # or x_t of the image at the first timestep that is not left out
            first_step = _find_first_step(self.scheduler, edit.strength)
            latents = edit.noised(self.scheduler, noise, timesteps[first_step:])
        accepted = inspect.signature(self.scheduler.step).parameters  # they differ among diffusers' schedulers
        step_kwargs = {k: v for k, v in {"generator": generator, "eta": eta}.items() if k in accepted}

        for i, t in enumerate(self.progress_bar(timesteps[first_step:]), first_step):
            # 2. the network's prediction from x_t
            model_input = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
            model_output = self.predict(model_input, t)  # (B, C, H, W) float32

            # 3. x_t -> x_{t-1}
            step_output = self.scheduler.step(model_output, t, latents, **step_kwargs)
            latents = step_output.prev_sample
            if edit is not None and edit.mask is not None:
                latents = torch.where(edit.mask, latents, edit.noised(self.scheduler, noise, timesteps[i + 1 :]))

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "pred_original_sample": step_output.get("pred_original_sample")}
                passed = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, i, t, passed).pop("latents", latents)

        # 4. [-1, 1] -> images
        images = to_straight_alpha((latents / 2 + 0.5).clamp(0, 1))
        if colours is not None:
            images = snap_colours(images, colours)
        if edit is not None:
            images = edit.keep(images)
        images = VaeImageProcessor(do_normalize=False).postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        r"""
        Returns the network's prediction as [`conditioned_on`] says, guided by equation 6 of Ho and Salimans 2022,
        https://huggingface.co/papers/2207.12598, with w = 1 + their w. With a guide, its prediction takes the place of
        the unconditional one: Karras et al. 2024, https://huggingface.co/papers/2406.02507.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Noisy images.
            timestep (`torch.Tensor` of shape `()`): Their timestep.

        Returns:
            `torch.Tensor`: The prediction, of the shape of `sample`, float32.
        """
        if self._guidance_scale == 1:
            return self.unet(sample, timestep, **self._model_kwargs).sample.float()  # (B, C, H, W)
        if self._guide is not None:
            prediction, weaker = (unet(sample, timestep).sample.float() for unet in (self.unet, self._guide))
            return weaker + self._guidance_scale * (prediction - weaker)
        model_input = torch.cat([sample, sample])  # with and without the condition: (2B, C, H, W)
        conditional, unconditional = self.unet(model_input, timestep, **self._model_kwargs).sample.float().chunk(2)
        return unconditional + self._guidance_scale * (conditional - unconditional)

    def _prepare_edit(self, image: Any, strength: float | None, mask_image: Any, batch_size: int) -> "_Edit | None":
        """Returns what is to be done to images, if there are any. Raises a ValueError for what does not fit."""
        if image is None:
            if strength is not None or mask_image is not None:
                raise ValueError("`strength` and `mask_image` need an `image`")
            return None
        if strength is None:
            strength = DEFAULT_STRENGTH if mask_image is None else 1.0
        if not 0 <= strength <= 1:
            raise ValueError(f"`strength` is {strength}: it must lie between 0 and 1")
        channels, height, width = self.sample_shape
        parts = {"image": (image, channels), "mask_image": (mask_image, 1)}
        tensors = {name: _to_tensor(value, number) for name, (value, number) in parts.items() if value is not None}
        for name, tensor in tensors.items():
            expected = (parts[name][1], height, width)
            if tuple(tensor.shape[1:]) != expected or len(tensor) not in (1, batch_size):
                shape = tuple(tensor.shape)
                raise ValueError(f"`{name}` has the shape {shape}: this model takes {(batch_size, *expected)}, or one")
        tensors = {name: tensor.to(self._execution_device, torch.float32) for name, tensor in tensors.items()}
        mask = tensors["mask_image"] >= 0.5 if mask_image is not None else None
        images = clean_images = tensors["image"].expand(batch_size, -1, -1, -1)
        if channels == 4:
            clean_images = torch.cat([images[:, :3] * images[:, 3:], images[:, 3:]], dim=1)
        return _Edit(images, 2 * clean_images - 1, strength, mask)

    def _check_inputs(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: tuple[str, ...],
    ) -> None:
        """Raises a ValueError for what the caller got wrong."""
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}: it must be at least 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but `batch_size` is {batch_size}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}: it must be 'pil', 'np' or 'pt'")
        if unknown := set(callback_tensor_inputs).difference(self._callback_tensor_inputs):
            known = list(self._callback_tensor_inputs)
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}: it can pass {known}")
        shape = (batch_size, *self.sample_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has the shape {tuple(latents.shape)}: this model takes {shape}")


class _Edit(NamedTuple):
    """Images to change, and how."""

    images: torch.Tensor  # (B, C, H, W) in [0, 1], with straight alpha
    clean_images: torch.Tensor  # the same as the network sees them: in [-1, 1], with colours multiplied by alpha
    strength: float
    mask: torch.Tensor | None  # (B or 1, 1, H, W): whether a pixel is drawn anew

    def noised(self, scheduler: Any, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the images as x_t (B, C, H, W) at the first of the timesteps; without noise if there is none."""
        if len(timesteps) == 0:
            return self.clean_images
        return scheduler.add_noise(self.clean_images, noise, timesteps[:1].expand(len(noise)))

    def keep(self, drawn: torch.Tensor) -> torch.Tensor:
        """Returns what was drawn, (B, C, H, W) in [0, 1], with the images themselves where they were to be kept."""
        if self.strength == 0:
            return self.images
        return drawn if self.mask is None else torch.where(self.mask, drawn, self.images)


class UnconditionalDDPMPipeline(_DDPMPipeline):
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

    @torch.no_grad()
    def __call__(self, *args: Any, guide: ModelMixin | None = None, guidance_scale: float = 1.0, **kwargs: Any) -> Any:
        r"""
        Generates images, or changes given ones.

        Args:
            guide ([`~diffusers.ModelMixin`], *optional*):
                A weaker network for the same images and the same process, such as that of an earlier checkpoint.
            guidance_scale (`float`, defaults to 1):
                `w` in `weaker + w * (prediction - weaker)`: above 1 each prediction goes on from the guide's through
                the network's own, which mends some of what both do badly; 2 is usual. At 1 the guide is not called.
            *args, **kwargs: The other arguments of `_DDPMPipeline`'s call.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            ValueError: For guidance without a guide, or an argument that does not fit the others or the model.
        """
        if guidance_scale != 1 and guide is None:
            raise ValueError(f"`guidance_scale` is {guidance_scale}: an unconditional model needs a `guide` for it")
        with self.conditioned_on(guide, guidance_scale):
            return super().__call__(*args, **kwargs)

    @contextmanager
    def conditioned_on(self, guide: ModelMixin | None = None, guidance_scale: float = 1.0) -> Iterator[None]:
        """Guides every prediction inside of the `with` away from that of a weaker network, if there is one."""
        self._guide, self._guidance_scale = guide, guidance_scale
        yield

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        r"""
        Saves weights and configs so that plain `DiffusionPipeline.from_pretrained` loads them.

        With a network of diffusers this is a stock `DDPMPipeline` folder, which needs no `trust_remote_code`: the
        config of `ClosedFormDDPMScheduler` is that of `DDPMScheduler`. It holds this pipeline and that scheduler as
        code too: `from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)` takes them. With another
        network the code is in the index, and loading takes `trust_remote_code=True`.

        The stock pipeline leaves the colours of RGBA images multiplied by alpha: they are the same where alpha is 255.
        The arguments are those of [`~diffusers.DiffusionPipeline.save_pretrained`].
        """
        scheduler = self.scheduler
        if type(scheduler).__name__ == "ClosedFormDDPMScheduler":
            scheduler = DDPMScheduler.from_config(scheduler.config)
        if _find_library(self.unet) is None or _find_library(scheduler) is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        DDPMPipeline(unet=self.unet, scheduler=scheduler).save_pretrained(save_directory, **kwargs)
        if scheduler is not self.scheduler:
            # The code lies beside the scheduler's config: from this folder alone diffusers downloads any file.
            folder = Path(save_directory, "scheduler")
            imports = [
                f"from .scheduler.{_save_source(cls, folder)} import {cls.__name__}"
                for cls in (UnconditionalDDPMPipeline, type(self.scheduler))
            ]
            Path(save_directory, "pipeline.py").write_text(CUSTOM_PIPELINE.format(imports="\n".join(imports)))


class ConditionalDDPMPipeline(_DDPMPipeline):
    r"""
    Pipeline for image generation by class, with classifier-free guidance and mixes of classes.

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

    is_conditional = True

    # `Optional`, as diffusers 0.35 fails to load a pipeline with `dict | None` among its types.
    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: Optional[dict] = None):  # noqa: UP045
        super().__init__(unet, scheduler)
        if id2label is not None:  # JSON turns the ids into strings
            self.register_to_config(id2label={str(id): label for id, label in id2label.items()})
        self.id2label = {int(id): label for id, label in (id2label or {}).items()}

    @property
    def num_classes(self) -> int:
        """The number K of classes, without the null class."""
        config = self.unet.config
        return config.context_dim if "context_dim" in config else config.num_class_embeds - 1

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # the classes come first
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        context: torch.Tensor | Mapping[int | str, float] | Sequence[Mapping[int | str, float]] | None = None,
        guidance_scale: float = 1.0,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Generates images of classes.

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
            **kwargs: The other arguments of `_DDPMPipeline`'s call.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            ValueError: For an unknown class, or an argument that does not fit the others or the model.
        """
        context = self._prepare_context(class_labels, context, batch_size).to(self._execution_device)  # (B, K)
        with self.conditioned_on(context, guidance_scale):
            return super().__call__(len(context), **kwargs)

    def get_class_id(self, label: int | str) -> int:
        r"""
        Returns the id of a class.

        Args:
            label (`int` or `str`): An id or a name.

        Raises:
            ValueError: If the model has no such class.
        """
        ids = {name: id for id, name in self.id2label.items()}
        id = ids.get(label, label) if isinstance(label, str) else int(label)
        if isinstance(id, str) or not 0 <= id < self.num_classes:
            names = ", ".join(ids) or f"0 to {self.num_classes - 1}"
            raise ValueError(f"unknown class {label!r}: this model's classes are {names}")
        return id

    def _prepare_context(self, class_labels: Any, context: Any, batch_size: int | None) -> torch.Tensor:
        """Returns the class weights (B, K) of `class_labels` or `context`, in whichever form they were given."""
        if class_labels is not None and context is not None:
            raise ValueError("pass `class_labels` or `context`, not both")
        if class_labels is not None:
            many = isinstance(class_labels, (Sequence, torch.Tensor)) and not isinstance(class_labels, str)
            context = [{label: 1.0} for label in (class_labels if many else [class_labels])]
        elif context is None:
            context = torch.zeros(1, self.num_classes)
        if not isinstance(context, torch.Tensor):
            mixes = [context] if isinstance(context, Mapping) else context
            weights = torch.zeros(len(mixes), self.num_classes)
            for row, mix in zip(weights, mixes, strict=True):
                for label, weight in mix.items():
                    row[self.get_class_id(label)] = weight
            context = weights
        context = torch.atleast_2d(context)
        if context.ndim != 2 or context.shape[1] != self.num_classes:
            raise ValueError(f"`context` has the shape {tuple(context.shape)}: it must be (B, {self.num_classes})")
        if batch_size is None or batch_size == len(context):
            return context
        if len(context) != 1:
            raise ValueError(f"{len(context)} classes for a `batch_size` of {batch_size}: give one, or one per image")
        return context.expand(max(batch_size, 0), -1)

    @contextmanager
    def conditioned_on(self, context: torch.Tensor, guidance_scale: float = 1.0) -> Iterator[None]:
        """Conditions every prediction on class weights (B, K), and guides it there from no class."""
        if guidance_scale != 1:
            context = torch.cat([context, torch.zeros_like(context)])  # (2B, K)
        self._guidance_scale = guidance_scale
        if "context_dim" in self.unet.config:
            self._model_kwargs = {"context": context}
            yield
            return
        # UNet2DModel looks labels up in a table. A mix of classes is the same mix of their rows, as offsets from the
        # null class's; for a one-hot context that is the class's own row.
        table = self.unet.class_embedding.weight.to(context.device, torch.float32)
        classes, null = table[:-1], table[-1]  # (K, D), (D,)
        embedding = null + context @ (classes - null)  # (B, D)
        one_hot = (context == 1).any(dim=1) & (context != 0).sum(dim=1).eq(1)
        embedding = torch.where(one_hot[:, None], classes[context.argmax(dim=1)], embedding)  # free of rounding
        self._model_kwargs = {"class_labels": torch.zeros(len(context), dtype=torch.long, device=context.device)}
        hook = self.unet.class_embedding.register_forward_hook(lambda module, args, output: embedding.to(output.dtype))
        try:
            yield
        finally:
            hook.remove()


class TextToImageDDPMPipeline(_DDPMPipeline):
    r"""
    Pipeline for image generation by prompt, with classifier-free guidance.

    The text encoder turns each prompt into as many vectors as the tokenizer's `model_max_length`, and the
    cross-attention of the network reads them. A share of the captions was empty while the model was trained, so that
    its prediction for the empty prompt is the unconditional one that guidance
    (https://huggingface.co/papers/2207.12598) needs.

    Args:
        unet ([`~diffusers.UNet2DConditionModel`]):
            The network, called as `unet(sample, timestep, encoder_hidden_states=...).sample`.
        scheduler ([`~diffusers.SchedulerMixin`]):
            `ClosedFormDDPMScheduler`, or any scheduler of diffusers that is made from its config.
        text_encoder ([`~transformers.PreTrainedModel`]):
            The text encoder, such as a [`~transformers.CLIPTextModel`]: its last hidden states are what the network
            is given.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        example_prompts (`list[str]`, *optional*):
            Some prompts like those that the model was trained on, saved with the pipeline.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    is_conditional = True

    # Neither type is transformers', which a folder without a text encoder must do without.
    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        text_encoder: torch.nn.Module,
        tokenizer: object,
        example_prompts: Optional[list] = None,  # noqa: UP045  # as for `id2label` above
    ):
        super().__init__(unet, scheduler)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        self.example_prompts = list(example_prompts or [])
        self.register_to_config(example_prompts=self.example_prompts)
        self._seen_prompts: set[str] = set()  # what there is to say of a prompt is said once

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        r"""
        Saves what the other pipelines of this file do, and text encoder and tokenizer as transformers has them.

        The arguments are those of [`~diffusers.DiffusionPipeline.save_pretrained`].
        """
        is_clip = type(self.text_encoder).__name__ == "CLIPTextModel"
        with self.text_encoder.register_state_dict_post_hook(_rename_for_clip) if is_clip else nullcontext():
            super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # the prompt comes first
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Generates images of prompts.

        Args:
            prompt (`str` or a sequence of them, *optional*):
                What the images are to show: one prompt for all images, or one for each. Neither this nor
                `prompt_embeds`: images of anything.
            negative_prompt (`str` or a sequence of them, *optional*):
                What guidance leads away from, in place of images of anything; of use where `guidance_scale` is not 1.
            guidance_scale (`float`, defaults to 1):
                `w` in `uncond + w * (cond - uncond)`; above 1 the images obey their prompt more. At 1 the
                unconditional half is not computed.
            num_images_per_prompt (`int`, defaults to 1):
                The number of images of each prompt; they stand beside each other.
            batch_size (`int`, *optional*):
                The number of images in all; that of the prompts times `num_images_per_prompt` if not given.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, features)`, *optional*):
                What [`encode_prompt`] returns, in place of `prompt`.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, features)`, *optional*):
                The same in place of `negative_prompt`.
            **kwargs: The other arguments of `_DDPMPipeline`'s call.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            ValueError: If an argument does not fit the others or the model.
        """
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` is {num_images_per_prompt}: it must be at least 1")
        embeds = self._prepare_embeds("prompt", prompt, prompt_embeds)
        embeds = embeds.repeat_interleave(num_images_per_prompt, dim=0)  # (B, L, D)
        if len(embeds) == 1 and batch_size is not None:
            embeds = embeds.expand(max(batch_size, 0), -1, -1)
        if batch_size not in (None, len(embeds)):
            raise ValueError(f"{len(embeds)} prompts for a `batch_size` of {batch_size}: give one, or one per image")
        negative = self._prepare_embeds("negative_prompt", negative_prompt, negative_prompt_embeds)
        if len(negative) not in (1, len(embeds)):
            negative = negative.repeat_interleave(num_images_per_prompt, dim=0)
        if len(negative) not in (1, len(embeds)):
            raise ValueError(f"{len(negative)} negative prompts for {len(embeds)} images: give one, or one per image")
        if guidance_scale == 1 and (negative_prompt is not None or negative_prompt_embeds is not None):
            logger.warning("`negative_prompt` has no effect at a `guidance_scale` of 1")
        with self.conditioned_on(embeds, guidance_scale, negative):
            return super().__call__(len(embeds), **kwargs)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        r"""
        Returns the embeddings of prompts, and warns of words that the model has never seen, and of prompts that are
        longer than it takes.

        Args:
            prompt (`str` or a sequence of them): The prompts.

        Returns:
            `torch.Tensor` of shape `(prompts, tokens, features)`: What the cross-attention of the network is given.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("the list of prompts is empty")
        for text in dict.fromkeys(prompts):
            if text not in self._seen_prompts:
                self._seen_prompts.add(text)
                for note in check_prompt(self.tokenizer, text):
                    logger.warning(note)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        device = self._execution_device
        return self.text_encoder(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))[0]

    @contextmanager
    def conditioned_on(
        self,
        prompt_embeds: torch.Tensor,
        guidance_scale: float = 1.0,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> Iterator[None]:
        """Conditions every prediction on embeddings (B, L, D), and guides it there from others, the empty prompt's."""
        if guidance_scale != 1:
            negative = self.encode_prompt("") if negative_prompt_embeds is None else negative_prompt_embeds
            if negative.shape[1:] != prompt_embeds.shape[1:]:
                shapes = f"{tuple(prompt_embeds.shape[1:])} and {tuple(negative.shape[1:])}"
                raise ValueError(f"the prompts' embeddings have the shapes {shapes}: they must agree")
            prompt_embeds = torch.cat([prompt_embeds, negative.expand_as(prompt_embeds)])  # (2B, L, D)
        self._guidance_scale = guidance_scale
        self._model_kwargs = {"encoder_hidden_states": prompt_embeds.to(self._execution_device, self.unet.dtype)}
        yield

    def _prepare_embeds(self, name: str, prompt: Any, embeds: torch.Tensor | None) -> torch.Tensor:
        """Returns the embeddings (P, L, D) of prompts, if not given as such; of the empty prompt if neither is."""
        if embeds is None:
            return self.encode_prompt("" if prompt is None else prompt)
        if prompt is not None:
            raise ValueError(f"pass `{name}` or `{name}_embeds`, not both")
        features = self.unet.config["cross_attention_dim"]
        if embeds.ndim != 3 or embeds.shape[2] != features:
            raise ValueError(f"`{name}_embeds` has the shape {tuple(embeds.shape)}: it must be (B, L, {features})")
        return embeds


def check_prompt(tokenizer: Any, prompt: str) -> list[str]:
    """Returns what a model does not take of a prompt: its end if that is cut off, and words without a token."""
    encoding = tokenizer(prompt, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids, limit, notes = encoding.input_ids, tokenizer.model_max_length, []
    if len(ids) > limit:
        begin = limit - 1  # the end has a token too
        rest = prompt[encoding.offset_mapping[begin][0] :] if tokenizer.is_fast else tokenizer.decode(ids[begin:-1])
        notes.append(f"the prompt has {len(ids)} tokens, this model takes {limit}: '{rest}' is left out")
    known = tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}
    for word in find_unknown_words(tokenizer, prompt):
        nearest = ", ".join(get_close_matches(word, sorted(known))) or "none"
        notes.append(f"this model has never seen the word '{word}'; words like it that it has seen: {nearest}")
    return notes


def _rename_for_clip(text_encoder: torch.nn.Module, weights: dict[str, torch.Tensor], *args: Any) -> None:
    """Gives weights that are about to be saved the names of transformers 4, in place.

    transformers 5 has shorter ones and takes these as well; 4 would find none of its own.
    """
    for name in list(weights):
        weights[f"text_model.{name.removeprefix('text_model.')}"] = weights.pop(name)


def find_unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Returns the words of a text that a tokenizer has no token for, each once, in lower case.

    There are none for a tokenizer that takes any word apart into tokens which it has.
    """
    unknown = tokenizer.unk_token_id
    if not tokenizer.is_fast or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, None):
        return []
    encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
    spans = [span for id, span in zip(encoding.input_ids, encoding.offset_mapping, strict=True) if id == unknown]
    return list(dict.fromkeys(text[start:end].lower() for start, end in spans))


def _find_first_step(scheduler: Any, strength: float) -> int:
    """Returns the index of the timestep that a share of the steps, at least one of them, begins at.

    Raises a ValueError for a scheduler that has to begin at the first.
    """
    if strength == 0:
        return len(scheduler.timesteps)
    if hasattr(scheduler, "counter"):  # of its calls, from the first step on
        raise ValueError(f"{type(scheduler).__name__} can't begin midway: take another, or a `strength` of 1")
    order = getattr(scheduler, "order", 1)  # calls of the network for each step
    return (scheduler.num_inference_steps - max(1, round(strength * scheduler.num_inference_steps))) * order


def _to_tensor(images: Any, num_channels: int) -> torch.Tensor:
    """Returns images as a tensor (B, C, H, W) in [0, 1]; those of PIL in other channels are converted, on white."""
    if isinstance(images, torch.Tensor):
        return images
    converted = []
    for image in [images] if isinstance(images, Image.Image) else images:
        if num_channels != 4 and image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        converted.append(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[num_channels]))
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(converted))


def to_straight_alpha(images: torch.Tensor) -> torch.Tensor:
    """Returns images (..., C, H, W) in [0, 1]: the colours of RGBA, which are multiplied by alpha, divided by it.

    Where alpha is 0 as one of 256 levels, the image is black. Those of other than four channels stay as they are.
    """
    if images.shape[-3] != 4:
        return images
    alpha = images[..., 3:, :, :]
    return clear_hidden(torch.cat([(images[..., :3, :, :] / alpha).clamp(max=1), alpha], dim=-3))


def to_oklab(colours: torch.Tensor) -> torch.Tensor:
    """Returns sRGB colours (..., 3) in [0, 1] in OKLab, where equal distances look about equally far."""
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    cones, oklab = (
        torch.tensor(matrix, dtype=colours.dtype, device=colours.device) for matrix in (TO_CONES, TO_OKLAB)
    )
    return (linear @ cones.T) ** (1 / 3) @ oklab.T


def snap_colours(images: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    """Returns images (B, C, H, W) in [0, 1], each pixel's colour the nearest of a palette (K, 3) in [0, 1], in OKLab.

    The first channel or the first three are the colour, as one of 256 levels. Alpha stays as it is; where it is 0, the
    image is black.
    """
    num_channels = 1 if images.shape[1] == 1 else 3
    pixels = (255 * images[:, :num_channels]).round().expand(-1, 3, -1, -1).movedim(1, -1) / 255  # (B, H, W, 3)
    found, index = pixels.flatten(0, 2).unique(dim=0, return_inverse=True)
    nearest = palette[find_nearest(to_oklab(found), to_oklab(palette))]
    colours = nearest[index].view_as(pixels).movedim(-1, 1)
    return clear_hidden(torch.cat([colours[:, :num_channels], images[:, num_channels:]], dim=1))


def clear_hidden(images: torch.Tensor) -> torch.Tensor:
    """Returns images (..., C, H, W) in [0, 1], black where alpha is 0 as one of 256 levels.

    What filters an image, as a game does, would mix colours that nobody is to see into the edges.
    """
    if images.shape[-3] != 4:
        return images
    alpha = images[..., 3:, :, :]
    return torch.cat([torch.where((255 * alpha).round() > 0, images[..., :3, :, :], 0), alpha], dim=-3)


def find_nearest(points: torch.Tensor, palette: torch.Tensor) -> torch.Tensor:
    """Returns for each of the points (N, 3) the index (N,) of the nearest row of a palette (K, 3)."""
    return torch.cdist(points, palette, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def _read_colours(palette: Sequence[str]) -> torch.Tensor:
    """Returns colours (K, 3) in [0, 1] from their hexadecimal digits. Raises a ValueError for what are none."""
    for colour in palette:
        if re.fullmatch("#?[0-9a-fA-F]{6}", colour) is None:
            raise ValueError(f"`palette` has {colour!r}: a colour is written as '#d02c30'")
    if len(palette) == 0:
        raise ValueError("`palette` has no colours")
    return torch.tensor([list(bytes.fromhex(colour.removeprefix("#"))) for colour in palette]) / 255


def _find_library(part: Any) -> str | None:
    """Returns the library that has the class of a part, so that a folder needs no code of it; None if none has."""
    library = type(part).__module__.split(".")[0]
    return library if library in ("diffusers", "transformers") else None


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
