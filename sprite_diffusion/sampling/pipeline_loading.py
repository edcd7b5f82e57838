"""A saved pipeline as this project's classes, so that loading runs no code from the folder or the Hub."""

import warnings
from importlib.util import find_spec
from typing import Any, Protocol, Self

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from models import BasicUNet2DModel, ContextUNet2DModel
from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.machine import prepare_cpu


class Pipeline(Protocol):
    """What is used of this project's two pipelines."""

    unet: ModelMixin
    scheduler: SchedulerMixin
    id2label: dict[int, str]  # of a model with classes, as is `get_class_id`

    @property
    def device(self) -> torch.device: ...

    @property
    def num_classes(self) -> int: ...  # 0 without classes

    @property
    def sample_shape(self) -> tuple[int, int, int]: ...  # channels, height and width of an image

    def __call__(self, **kwargs: Any) -> Any: ...

    def get_class_id(self, label: int | str) -> int: ...

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None: ...

    def set_progress_bar_config(self, **kwargs: Any) -> None: ...

    def to(self, device: torch.device | str) -> Self: ...


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


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Loads a pipeline of the kinds that this project writes.

    Args:
        model: An output folder, a checkpoint or a snapshot inside one, the id of a repository on the Hub, or
            `wandb:ENTITY/PROJECT/ARTIFACT:ALIAS`.
        dtype: The number format of the network.

    Raises:
        UserInputError: If `model` is something else, or is damaged.
    """
    if model.startswith("wandb:"):
        model = _download_artifact(model)
    try:
        index = DiffusionPipeline.load_config(model)
        pipeline_class = _find_class(model, index["_class_name"], DiffusionPipeline)
        if pipeline_class not in (UnconditionalDDPMPipeline, ConditionalDDPMPipeline):
            raise UserInputError(f"{model} holds a {pipeline_class.__name__}: not a pipeline of this project")
        unet_class = _find_class(model, index["unet"][1], ModelMixin)
        unet = unet_class.from_pretrained(model, subfolder="unet", torch_dtype=dtype)
        scheduler_class = _find_class(model, index["scheduler"][1], SchedulerMixin)
        scheduler = scheduler_class.from_pretrained(model, subfolder="scheduler")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserInputError(
            f"{model} is not a pipeline folder or repository that can be loaded: {first_line(error)}"
        ) from None
    missing = [name for name, weight in unet.named_parameters() if weight.is_meta]
    if missing:
        raise UserInputError(f"{model} lacks weights of its network: {', '.join(missing[:3])}; save or load it again")
    for name, weight in unet.state_dict().items():
        if not weight.isfinite().all():
            raise UserInputError(
                f"{model}: the weights of its network are not finite ({name}): take another checkpoint"
            )
    options = {"id2label": index["id2label"]} if "id2label" in index else {}
    if not isinstance(options.get("id2label", {}), dict):
        raise UserInputError(f"{model}/model_index.json: id2label must give each class id a name")
    return pipeline_class(unet=unet, scheduler=scheduler, **options)


def speed_up(pipeline: Pipeline, compiles: bool) -> None:
    """Sets the machine up for the pipeline's device and, if `compiles`, compiles the network."""
    on_cuda = pipeline.device.type == "cuda"
    if not on_cuda:
        prepare_cpu()
    if compiles:
        # diffusers asks for torch's version while it upsamples, and the answer can't change.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`-wrapped function")
        # Nothing is trained, so that weights are constants: the CPU compiler lays them out for its convolutions. On a
        # GPU a call of the network is launched as one graph.
        pipeline.unet.compile(**({"mode": "reduce-overhead"} if on_cuda else {"options": {"freezing": True}}))


def _download_artifact(model: str) -> str:
    """Downloads an artifact of W&B, and returns its folder."""
    if find_spec("wandb") is None:
        raise UserInputError(f"{model}: run 'pip install wandb' first")
    import wandb

    try:
        return wandb.Api().artifact(model.removeprefix("wandb:"), type="model").download()
    except Exception as error:  # W&B's errors, those of its network library, and of the disk
        raise UserInputError(f"{model}: W&B does not give this artifact ({first_line(error)})") from None


def _find_class(model: str, name: str | list[str], base: type) -> Any:
    """Returns the class that an index names, ours before diffusers'. Raises `UserInputError` if it is no `base`."""
    name = name[1] if isinstance(name, list) else name  # [file, class] for classes shipped as code
    found = OWN_CLASSES.get(name) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserInputError(f"{model} holds a {name}, which neither diffusers nor this project has")
    return found
