"""A saved pipeline as this project's classes, so that loading runs no code from the folder or the Hub."""

from importlib.util import find_spec
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from models import BasicUNet2DModel, ContextUNet2DModel
from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from training.errors import UserInputError, first_line

OWN_CLASSES = {
    "BasicUNet2DModel": BasicUNet2DModel,
    "ContextUNet2DModel": ContextUNet2DModel,
    "ClosedFormDDPMScheduler": ClosedFormDDPMScheduler,
    "LinearCorruptionScheduler": LinearCorruptionScheduler,
    "ConditionalDDPMPipeline": ConditionalDDPMPipeline,
    "UnconditionalDDPMPipeline": UnconditionalDDPMPipeline,
    # the stock folder that an unconditional model is saved as: the same configs, our classes
    "DDPMPipeline": UnconditionalDDPMPipeline,
    "DDPMScheduler": ClosedFormDDPMScheduler,
}


def load_pipeline(model: str) -> UnconditionalDDPMPipeline | ConditionalDDPMPipeline:
    """Loads a pipeline of the kinds that this project writes.

    `model` is an output folder, a checkpoint or a snapshot inside one, the id of a repository on the Hub, or
    `wandb:ENTITY/PROJECT/ARTIFACT:ALIAS`.
    """
    if model.startswith("wandb:"):
        model = _download_artifact(model)
    try:
        index = DiffusionPipeline.load_config(model)
        pipeline_class = _find_class(model, index["_class_name"], DiffusionPipeline)
        if pipeline_class not in (UnconditionalDDPMPipeline, ConditionalDDPMPipeline):
            raise UserInputError(f"{model} holds a {pipeline_class.__name__}: not a pipeline of this project")
        components = {
            name: _find_class(model, index[name][1], kind).from_pretrained(model, subfolder=name)
            for name, kind in (("unet", ModelMixin), ("scheduler", SchedulerMixin))
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserInputError(
            f"{model} is not a pipeline folder or repository that can be loaded: {first_line(error)}"
        ) from None
    missing = [name for name, weight in components["unet"].named_parameters() if weight.is_meta]
    if missing:
        raise UserInputError(f"{model} lacks weights of its network: {', '.join(missing[:3])}; save or load it again")
    options = {"id2label": index["id2label"]} if "id2label" in index else {}
    if not isinstance(options.get("id2label", {}), dict):
        raise UserInputError(f"{model}/model_index.json: id2label must give each class id a name")
    return pipeline_class(**components, **options)


def _download_artifact(model: str) -> str:
    if find_spec("wandb") is None:
        raise UserInputError(f"{model}: run 'pip install wandb' first")
    import wandb

    try:
        return wandb.Api().artifact(model.removeprefix("wandb:"), type="model").download()
    except Exception as error:  # its own, those of its network library, and of the disk
        raise UserInputError(f"{model}: W&B does not give this artifact ({first_line(error)})") from None


def _find_class(model: str, name: Any, kind: type) -> Any:
    name = name[1] if isinstance(name, list) else name  # [file, class] for classes shipped as code
    found = OWN_CLASSES.get(name) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserInputError(f"{model} holds a {name}, which neither diffusers nor this project has")
    return found
