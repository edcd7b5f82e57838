"""The classes, and mixes of classes, to sample images of."""

import math
from dataclasses import dataclass

import torch

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.sampling.pipeline_loading import Pipeline

MAX_CLASSES = 1000  # the most that are sampled without being named


@dataclass(frozen=True)
class Condition:
    """A class or a mix of classes; without a name and weights where the model has no classes."""

    name: str | None = None
    weights: torch.Tensor | None = None  # (K,)


def choose_conditions(
    pipeline: Pipeline, classes: list[str] | None, mixes: list[str] | None, no_class: bool = False
) -> list[Condition]:
    """Returns the conditions of `--class`, `--mix` or `--no_class`; every class of the model where none is given.

    Raises `UserInputError` for a class that the model does not have, and for too many classes to sample each of them.
    """
    if pipeline.num_classes == 0:
        given = [f"--class {classes[0]}"] if classes else [f"--mix {mixes[0]}"] if mixes else []
        for flag in ["--no_class"] if no_class else given:
            raise UserInputError(f"{flag}: this is an unconditional model, it has no classes")
        return [Condition()]
    if no_class:
        return [Condition("no class", torch.zeros(pipeline.num_classes))]
    if not classes and not mixes:
        if pipeline.num_classes > MAX_CLASSES:
            raise UserInputError(f"--class: this model has {pipeline.num_classes:,} classes, name those to be sampled")
        classes = [str(id) for id in range(pipeline.num_classes)]
    single = [_read_class(pipeline, name) for name in classes or []]
    return single + [_read_mix(pipeline, text) for text in mixes or []]


def _read_class(pipeline: Pipeline, name: str) -> Condition:
    id = _class_id(pipeline, "--class", name)
    return Condition(pipeline.id2label.get(id, str(id)), one_hot(id, pipeline.num_classes))


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
    return Condition(text, context)


def _class_id(pipeline: Pipeline, flag: str, name: str) -> int:
    try:
        return pipeline.get_class_id(int(name) if name.isdecimal() else name)
    except ValueError as error:
        raise UserInputError(f"{flag}: {error}") from None
