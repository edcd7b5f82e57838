"""The classes, mixes of classes and prompts to sample images of."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from pipelines import TextToImageDDPMPipeline
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.sampling.pipeline_loading import Pipeline

MAX_CLASSES = 1000  # the most that are sampled without being named
LABEL_WIDTH = 28  # letters in a line of a picture


@dataclass(frozen=True)
class Condition:
    """What an image is to show: a class, a mix of classes or a prompt; nothing where a model can't be asked."""

    name: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline, for this image alone

    @classmethod
    def of_classes(cls, name: str, weights: torch.Tensor) -> Self:
        """Returns the condition of class weights (K,)."""
        return cls(name, {"context": weights})

    @classmethod
    def of_prompt(cls, prompt: str) -> Self:
        """Returns the condition of a prompt, which the pipeline encodes whenever it is called."""
        return cls(prompt, {"prompt": prompt})

    @property
    def kind(self) -> str:
        """Returns what the condition is called in a record."""
        return "class" if "context" in self.arguments or not self.arguments else "prompt"

    @property
    def label(self) -> str:
        """Returns the name in lines for a picture: one for each class of a mix; empty without a name."""
        if self.kind == "class":
            return (self.name or "").replace(",", "\n")
        return textwrap.fill(self.name or "no prompt", LABEL_WIDTH)

    def encoded(self, pipeline: Pipeline) -> "Condition":
        """Returns the condition with tensors alone, which the pipeline makes of a prompt."""
        if "prompt" not in self.arguments:
            return self
        return Condition(self.name, {"prompt_embeds": pipeline.encode_prompt(self.arguments["prompt"])[0]})

    def between(self, last: "Condition", fraction: float) -> "Condition":
        """Returns a condition on the straight way from this one to `last`, both encoded, at a fraction of 0 to 1."""
        arguments = {name: torch.lerp(value, last.arguments[name], fraction) for name, value in self.arguments.items()}
        return Condition(f"{fraction:.0%}", arguments)


def join_arguments(conditions: Sequence[Condition]) -> dict[str, Any]:
    """Returns the arguments of a pipeline for images of these conditions, which are all of one kind."""
    names = conditions[0].arguments
    values = {name: [condition.arguments[name] for condition in conditions] for name in names}
    return {name: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for name, v in values.items()}


def choose_conditions(
    pipeline: Pipeline,
    classes: list[str] | None = None,
    mixes: list[str] | None = None,
    prompts: list[str] | None = None,
    no_class: bool = False,
) -> list[Condition]:
    """Returns the conditions of `--class`, `--mix`, `--prompt` or `--no_class`.

    Where none is given, they are every class of the model, or its example prompts. Raises `UserInputError` for what
    the model can't be asked for, and for too many classes to sample each of them.
    """
    flags = {"--class": classes, "--mix": mixes, "--prompt": prompts, "--no_class": [""] if no_class else None}
    given = [f"{flag} {values[0]}".strip() for flag, values in flags.items() if values]
    if not pipeline.is_conditional:
        for flag in given:
            raise UserInputError(f"{flag}: this is an unconditional model, it has no classes and takes no prompts")
        return [Condition()]
    if isinstance(pipeline, TextToImageDDPMPipeline):
        if classes or mixes:
            raise UserInputError(f"{given[0]}: this model has no classes, it takes a --prompt")
        if no_class:
            return [Condition.of_prompt("")]
        if not prompts and not pipeline.example_prompts:
            raise UserInputError("--prompt: this model has no example prompts, say what to draw")
        return [Condition.of_prompt(prompt) for prompt in prompts or pipeline.example_prompts]
    if prompts:
        raise UserInputError(f"{given[-1]}: this model takes no prompts, it has classes: name one by --class")
    if no_class:
        return [Condition.of_classes("no class", torch.zeros(pipeline.num_classes))]
    if not classes and not mixes:
        if pipeline.num_classes > MAX_CLASSES:
            raise UserInputError(f"--class: this model has {pipeline.num_classes:,} classes, name those to be sampled")
        classes = [str(id) for id in range(pipeline.num_classes)]
    single = [_read_class(pipeline, name) for name in classes or []]
    return single + [_read_mix(pipeline, text) for text in mixes or []]


def example_conditions(pipeline: Pipeline, count: int) -> list[Condition]:
    """Returns conditions of some images: the first classes or example prompts, and from the first on again."""
    if not pipeline.is_conditional:
        return [Condition()] * count
    if pipeline.num_classes == 0:
        prompts = pipeline.example_prompts or [""]
        return [Condition.of_prompt(prompts[i % len(prompts)]) for i in range(count)]
    return [_read_class(pipeline, str(i % pipeline.num_classes)) for i in range(count)]


def _read_class(pipeline: Pipeline, name: str) -> Condition:
    id = _class_id(pipeline, "--class", name)
    return Condition.of_classes(pipeline.id2label.get(id, str(id)), one_hot(id, pipeline.num_classes))


def one_hot(id: int, num_classes: int) -> torch.Tensor:
    """Returns the weights (num_classes,) of a single class, float32."""
    return torch.nn.functional.one_hot(torch.tensor(id), num_classes).float()


def _read_mix(pipeline: Pipeline, text: str) -> Condition:
    weights: dict[int, float] = {}
    for item in text.split(","):
        name, _, number = item.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name.strip() or not math.isfinite(weight):
            raise UserInputError(f"--mix {text}: '{item}' is not NAME=WEIGHT, as in hero=1,food=0.6")
        id = _class_id(pipeline, "--mix", name.strip())
        if id in weights:
            raise UserInputError(f"--mix {text}: '{name.strip()}' stands there twice")
        weights[id] = weight
    context = torch.zeros(pipeline.num_classes)
    context[list(weights)] = torch.tensor(list(weights.values()))
    return Condition.of_classes(text, context)


def _class_id(pipeline: Pipeline, flag: str, name: str) -> int:
    try:
        return pipeline.get_class_id(int(name) if name.isdecimal() else name)
    except ValueError as error:
        raise UserInputError(f"{flag}: {error}") from None
