"""What the studio draws: the settings of its page become images, shown on their way, and files of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from pipelines import DEFAULT_STRENGTH, TextToImageDDPMPipeline, check_prompt
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.flags import SEED_RANGE, Range
from sprite_diffusion.sampling.conditions import Condition, choose_conditions, example_conditions
from sprite_diffusion.sampling.flags import SAMPLERS as SHORT_NAMES
from sprite_diffusion.sampling.generation import Edit, Request, Trajectory, sample_images, to_unit_range
from sprite_diffusion.sampling.palettes import Finish, Palette, find_saved_palette, read_palette
from sprite_diffusion.sampling.pictures import make_single_picture, save_animation, save_png
from sprite_diffusion.sampling.pipeline_loading import Pipeline, load_pipeline
from sprite_diffusion.sampling.samplers import Sampler, make_sampler, short_name
from sprite_diffusion.sampling.sheets import write_sheet
from sprite_diffusion.sampling.views import MAX_FRAMES

MAX_IMAGES = 32
MAX_STEPS = 250
MAX_GUIDANCE = 10
MAX_SECONDS = 120  # of one drawing: nobody waits longer for somebody else's
MAX_PROMPT = 1000  # letters
PREVIEW_SECONDS = 0.25
FEW_STEPS = 20
SAMPLERS = ("unipc", "dpmsolver++", "ddim", "ddpm")
EVERY_CLASS, NO_CLASS, MIX = "every class", "no class", "a mix"  # what can be asked for besides the id of a class
LIMITS = {
    "num_images": Range(at_least=1, at_most=MAX_IMAGES),
    "seed": SEED_RANGE,
    "num_inference_steps": Range(at_least=1, at_most=MAX_STEPS),
    "guidance_scale": Range(at_least=0, at_most=MAX_GUIDANCE),
    "strength": Range(at_least=0, at_most=1),
    "colours_per_image": Range(at_least=0, at_most=256),
}


@dataclass(frozen=True)
class Model:
    """A model to draw with."""

    name: str
    pipeline: Pipeline
    samplers: list[str]  # those that take `num_inference_steps`, which a page begins with
    num_inference_steps: int
    palette: Palette | None  # of a model of pixel art
    lock: Lock = field(default_factory=Lock)  # a pipeline holds the scheduler and the classes of one drawing at a time

    @property
    def takes_prompts(self) -> bool:
        """Whether images are asked for by prompt."""
        return isinstance(self.pipeline, TextToImageDDPMPipeline)

    def check_prompts(self, settings: "Settings") -> list[str]:
        """Returns what the model does not take of the prompts."""
        prompts = (settings.prompt, settings.negative_prompt) if self.takes_prompts else ()
        return [note for prompt in prompts for note in check_prompt(self.pipeline.tokenizer, prompt)]


@dataclass(frozen=True)
class Settings:
    """What the controls of the page say; a model has some of them."""

    class_id: str = EVERY_CLASS
    weights: tuple[float, ...] = ()  # of the classes, for `MIX`
    prompt: str = ""
    negative_prompt: str = ""
    num_images: int = 8
    seed: int = 0  # of the first image; each has the next
    sampler: str = SAMPLERS[0]
    num_inference_steps: int = FEW_STEPS
    guidance_scale: float = 1.0
    strength: float = DEFAULT_STRENGTH  # of the change of a picture
    uses_palette: bool = False
    colours_per_image: int = 0  # of the palette; 0 for all
    binary_alpha: bool = False

    @property
    def sampler_name(self) -> str | None:
        """The sampler as `make_sampler` takes it: None for a process whose sampler has no name."""
        return self.sampler if self.sampler in SHORT_NAMES else None


@dataclass(frozen=True)
class Drawing:
    """Images that were drawn, and how."""

    images: torch.Tensor  # (N, C, H, W) in [0, 1], at 8 bits, with straight alpha
    request: Request
    sampler: Sampler
    finish: Finish
    frames: list[torch.Tensor]  # (N, C, H, W) in [0, 1], from noise on; none where a picture was left as it is


class Stopped(Exception):
    """Ends a drawing that nobody waits for any more."""


@dataclass
class Watcher:
    """Shows what is drawn at each step, and ends a drawing that is to stop."""

    show: Callable[[torch.Tensor], None]  # called with clean images (N, C, H, W) in [0, 1]
    stopped: Event
    trajectory: Trajectory = field(default_factory=lambda: Trajectory(MAX_FRAMES))
    tensor_names: tuple[str, ...] = ("latents", "pred_original_sample")
    _deadline: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)

    def begin_batch(self, noise: torch.Tensor | None) -> None:
        """Begins the frames of a batch with its noise (B, C, H, W), if there is some."""
        self.trajectory.begin_batch(noise)

    def record(self, pipeline: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """Shows a step; the pipeline calls this after each one.

        Raises `Stopped` if it is to stop, and `UserInputError` if it has taken too long.
        """
        if self.stopped.is_set():
            raise Stopped
        if time.monotonic() > self._deadline:
            raise UserInputError(f"stopped after {MAX_SECONDS} seconds: draw fewer sprites, or take fewer steps")
        self.trajectory.record(pipeline, step, timestep, tensors)
        clean_images = tensors["pred_original_sample"]
        self.show(to_unit_range(tensors["latents"] if clean_images is None else clean_images))
        return {}


def open_model(name: str, dtype: torch.dtype) -> Model:
    """Loads a model, with the samplers that its process has and the palette that lies beside it.

    Raises `UserInputError` if it is no model, or a damaged one.
    """
    pipeline = load_pipeline(name, dtype)
    pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    num_steps = max(1, min(FEW_STEPS, len(pipeline.scheduler) - 1))  # some samplers take fewer than all
    samplers = []
    for sampler in dict.fromkeys([*SAMPLERS, short_name(pipeline.scheduler)]):
        with suppress(UserInputError):
            make_sampler("sampler", pipeline, sampler if sampler in SHORT_NAMES else None, num_steps)
            samplers.append(sampler)
    saved = find_saved_palette(name)
    return Model(name, pipeline, samplers, num_steps, None if saved is None else Palette(read_palette(saved), "auto"))


def choose_images(model: Model, settings: Settings) -> list[Condition]:
    """Returns what each image is to show. Raises `UserInputError` for what the model can't be asked for."""
    pipeline, count = model.pipeline, settings.num_images
    if not pipeline.is_conditional:
        return [Condition()] * count
    if model.takes_prompts:
        if len(settings.prompt) > MAX_PROMPT or len(settings.negative_prompt) > MAX_PROMPT:
            raise UserInputError(f"a prompt has at most {MAX_PROMPT:,} letters")
        return choose_conditions(pipeline, prompts=[settings.prompt], no_class=not settings.prompt) * count
    if settings.class_id == EVERY_CLASS:
        return example_conditions(pipeline, count)
    if settings.class_id == NO_CLASS:
        return choose_conditions(pipeline, no_class=True) * count
    if settings.class_id == MIX:
        mix = ",".join(f"{id}={weight:g}" for id, weight in enumerate(settings.weights) if weight)
        if not mix:
            raise UserInputError("a mix needs weights: move a slider of the classes")
        [condition] = choose_conditions(pipeline, mixes=[mix])
        named = [(pipeline.id2label.get(id, str(id)), weight) for id, weight in enumerate(settings.weights) if weight]
        return [replace(condition, name=",".join(f"{name}={weight:g}" for name, weight in named))] * count
    return choose_conditions(pipeline, classes=[settings.class_id]) * count


def prepare(
    model: Model, settings: Settings, picture: torch.Tensor | None, mask: torch.Tensor | None
) -> tuple[Sampler, Request, Finish]:
    """Returns how settings are drawn: anew, or as a change of a picture (1, C, H, W) where a mask (1, 1, H, W) is 1.

    Raises `UserInputError` for values that are out of range or that the model does not take.
    """
    for name, limits in LIMITS.items():
        limits.check(name, getattr(settings, name))
    if settings.sampler not in model.samplers:
        raise UserInputError(f"unknown sampler '{settings.sampler}'; this model has {', '.join(model.samplers)}")
    sampler = make_sampler("sampler", model.pipeline, settings.sampler_name, settings.num_inference_steps)
    conditions = choose_images(model, settings)
    edit = None if picture is None else Edit(picture, settings.strength, mask, {"strength": settings.strength})
    request = Request(
        seeds=[settings.seed + i for i in range(settings.num_images)],
        conditions=conditions,
        guidance_scale=settings.guidance_scale if model.pipeline.is_conditional else 1.0,
        negative=Condition.of_prompt(settings.negative_prompt) if settings.negative_prompt else None,
        edit=edit,
    )
    if edit is not None and settings.strength == 0:
        return sampler, request, Finish()  # the picture itself
    palette = model.palette if settings.uses_palette else None
    if palette is not None and settings.colours_per_image:
        palette = replace(palette, colours_per_image=settings.colours_per_image)
    return sampler, request, Finish(palette, settings.binary_alpha and model.pipeline.sample_shape[0] == 4)


def draw(
    model: Model, settings: Settings, picture: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> Iterator[torch.Tensor | Drawing]:
    """Yields the images (N, C, H, W) as they are predicted at some of the steps, and then the drawing.

    Closing the iterator ends the drawing at its next step. Raises `UserInputError` as `prepare` does, and for a
    drawing that takes too long.
    """
    shown: SimpleQueue[torch.Tensor | Drawing | Exception] = SimpleQueue()
    stopped = Event()

    def run() -> None:
        try:
            with model.lock:  # until the last step of a drawing that was stopped
                if stopped.is_set():
                    return
                sampler, request, finish = prepare(model, settings, picture, mask)
                watcher = Watcher(shown.put, stopped)
                images = sample_images(model.pipeline, sampler, request, trajectory=watcher, show_progress=False)
            images = finish(images)
            if request.edit is not None:
                images = request.edit.keep(images)
            images = (images * 255).round() / 255
            shown.put(Drawing(images, request, sampler, finish, watcher.trajectory.frames))
        except Exception as error:  # raised below, where somebody waits for it
            shown.put(error)

    Thread(target=run, daemon=True).start()
    try:
        next_time = 0.0
        while True:
            item = shown.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Drawing):
                yield item
                return
            if time.monotonic() >= next_time:
                next_time = time.monotonic() + PREVIEW_SECONDS
                yield item
    finally:
        stopped.set()


def write_files(model: Model, drawing: Drawing, folder: Path) -> list[Path]:
    """Writes a drawing as PNG files, as a sheet with its JSON and as an animation, and returns these files.

    A picture that was changed, and its mask, are among them.
    """
    columns = ceil(sqrt(len(drawing.images)))
    record = {
        "model": model.name,
        **drawing.sampler.record,
        **drawing.finish.record,
        **drawing.request.record,
    }
    common = {name: value for name, value in record.items() if name != "images"}
    for i, (image, image_record) in enumerate(zip(drawing.images, record["images"], strict=True)):
        save_png(make_single_picture(image, 1), folder / f"sprite-{i:02d}.png", {**common, **image_record})
    write_sheet(drawing.images, folder / "sheet.png", columns, 1, record)
    if len(drawing.frames) > 1:
        save_animation(drawing.frames, folder / "animation.webp", columns)
    edit = drawing.request.edit
    if edit is not None:
        save_png(make_single_picture(edit.image[0], 1), folder / "image.png", {})
        if edit.mask is not None:
            save_png(to_pil_image(edit.mask[0]), folder / "mask.png", {})
    return sorted(folder.iterdir())
