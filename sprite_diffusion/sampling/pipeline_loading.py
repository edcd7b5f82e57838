"""A saved pipeline as this project's classes, so that loading runs no code from the folder or the Hub."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import logging

from models import BasicUNet2DModel, ContextUNet2DModel
from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.machine import prepare_cpu
from sprite_diffusion.common.run_files import INDEX_FILE, list_checkpoints

# Limits of the numbers in a configuration: far above those of any model, and low enough to build the model's shapes.
MAX_TIMESTEPS = 10**6
MAX_NUMBER_OF_LAYERS = 64
MAX_LENGTH = 64  # of a list, such as the channels of all levels
MAX_NUMBER = 2**20  # of a number that is not named in LIMITS, such as the channels of a level
LIMITS = {
    "num_train_timesteps": MAX_TIMESTEPS,
    "sample_size": 4096,
    "num_class_embeds": 2**16,
    "context_dim": 2**16,
}
MAY_BE_INFINITE = ("lambda_min_clipped",)  # as diffusers' DPM-Solvers save it
TRIED_STEPS = 10  # the process is set up for so many steps, of which the first is tried


class Pipeline(Protocol):
    """The part of this project's two pipelines that other modules use."""

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

    Returns:
        The pipeline on the CPU. Its process and its network fit each other and its images, and its weights are finite.

    Raises:
        UserInputError: If `model` is something else, or is damaged.
    """
    if model.startswith("wandb:"):
        model = _download_artifact(model)
    folder = Path(model)
    if folder.is_dir() and not (folder / INDEX_FILE).exists():
        checkpoints = [path for path in list_checkpoints(folder) if (path / INDEX_FILE).exists()]
        if checkpoints:
            raise UserInputError(f"{model} holds no pipeline yet: name its newest checkpoint, {checkpoints[-1]}")
    try:
        return _open_pipeline(model, dtype)
    except UserInputError:
        raise
    except Exception as error:  # the values in the model's files can lead diffusers and torch to raise anything
        raise UserInputError(
            f"{model} is not a pipeline folder or repository that can be loaded: {first_line(error)}"
        ) from None


def _open_pipeline(model: str, dtype: torch.dtype) -> Pipeline:
    """Loads a pipeline in an order that finds what is wrong before anything large is allocated.

    Raises `UserInputError`, or whatever error the values in the model's files lead to.
    """
    with _naming(INDEX_FILE):
        index = DiffusionPipeline.load_config(model)
        pipeline_class = _find_class(model, index["_class_name"], DiffusionPipeline)
        if pipeline_class not in (UnconditionalDDPMPipeline, ConditionalDDPMPipeline):
            raise UserInputError(f"{model} holds a {pipeline_class.__name__}: not a pipeline of this project")
        unet_class = _find_class(model, index["unet"], ModelMixin)
        scheduler_class = _find_class(model, index["scheduler"], SchedulerMixin)
    with _naming("scheduler/scheduler_config.json"):
        scheduler = scheduler_class.from_config(_read_config(model, "scheduler", scheduler_class))
    with _naming("unet/config.json"):
        config = _read_config(model, "unet", unet_class)
        with torch.device("meta"):  # tensors there have shapes and take no memory
            weightless = pipeline_class(unet=unet_class.from_config(config), scheduler=scheduler)
        _check_network(weightless)
    with _naming("scheduler/scheduler_config.json"):
        _check_process(weightless)
    with _naming(INDEX_FILE):
        options = _read_names(index, weightless.num_classes)
    return pipeline_class(unet=_load_network(model, unet_class, dtype), scheduler=scheduler, **options)


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Puts the name of a file before the message of an error that its values have led to."""
    try:
        yield
    except UserInputError:
        raise
    except Exception as error:
        raise ValueError(f"{file}: {first_line(error)}") from None


def _read_config(model: str, name: str, part_class: Any) -> dict[str, Any]:
    """Returns the configuration of a pipeline's part. Raises ValueError for a number that no part can have."""
    config = part_class.load_config(model, subfolder=name)
    if not isinstance(config, dict):
        raise ValueError("it has no names and values")
    _check_numbers("", config)
    return config


def _check_numbers(name: str, value: Any) -> None:
    """Raises ValueError for a number that is not finite, and for sizes and lists beyond `LIMITS`, at any depth.

    A part is made of its configuration before its weights can be compared with it, so that a damaged number could
    cost any time and memory.
    """
    limit = LIMITS.get(name, MAX_NUMBER_OF_LAYERS if "layers" in name else MAX_NUMBER)
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(key, item)
    elif isinstance(value, list):
        if len(value) > (MAX_TIMESTEPS if name == "trained_betas" else MAX_LENGTH):
            raise ValueError(f"{name} has {len(value):,} values")
        for item in value:
            _check_numbers(name, item)
    # Written so that NaN, which compares as False, is refused as well.
    elif isinstance(value, int | float) and not abs(value) <= limit and name not in MAY_BE_INFINITE:
        raise ValueError(f"{name} is {value}: it must be finite and not exceed {limit:,}")


def _check_network(pipeline: Pipeline) -> None:
    """Raises an error unless the network takes images of the model's shape, and gives predictions of that shape.

    The network of `pipeline` is on the meta device: a forward pass there costs no memory and next to no time.
    """
    config = pipeline.unet.config
    if isinstance(pipeline, ConditionalDDPMPipeline) and not ("context_dim" in config or config["num_class_embeds"]):
        raise ValueError("its network takes no classes, its pipeline is conditional")
    channels, height, width = pipeline.sample_shape
    if channels not in (1, 3):
        raise ValueError(f"its images have {channels} channels: grey images have 1, colour images have 3")
    by_labels = pipeline.num_classes > 0 and "context_dim" not in config
    kwargs = {"class_labels": torch.zeros(1, dtype=torch.long, device="meta")} if by_labels else {}
    with torch.no_grad():
        image = torch.empty(1, channels, height, width, device="meta")
        prediction = pipeline.unet(image, 0, **kwargs).sample
    expected = (1, _num_predicted_channels(pipeline), height, width)
    if tuple(prediction.shape) != expected:
        raise ValueError(f"its network gives the shape {tuple(prediction.shape)} where {expected} is needed")


def _check_process(pipeline: Pipeline) -> None:
    """Raises an error unless the process has finite betas and takes a step; tries it on one pixel."""
    scheduler = pipeline.scheduler
    num_steps = len(scheduler)
    betas = getattr(scheduler, "betas", torch.ones(num_steps))
    if len(betas) != num_steps or not betas.isfinite().all():
        raise ValueError(f"{num_steps} betas are needed that are finite numbers")
    scheduler.set_timesteps(min(TRIED_STEPS, num_steps))
    pixel, timestep = torch.zeros(1, pipeline.sample_shape[0], 1, 1), scheduler.timesteps[0]
    scheduler.scale_model_input(pixel, timestep)
    with torch.random.fork_rng(devices=[]):  # a step may take random numbers, which are the caller's
        scheduler.step(torch.zeros(1, _num_predicted_channels(pipeline), 1, 1), timestep, pixel)


def _num_predicted_channels(pipeline: Pipeline) -> int:
    """Returns the channels that a prediction has: those of an image, and as many of the variance if it is learned."""
    learned = str(pipeline.scheduler.config.get("variance_type")).startswith("learned")
    return pipeline.sample_shape[0] * (2 if learned else 1)


def _read_names(index: dict[str, Any], num_classes: int) -> dict[str, dict[str, str]]:
    """Returns the names of the classes as an argument of the pipeline; no argument where the index has none.

    Raises ValueError unless each class has a name of its own.
    """
    names = index.get("id2label")
    if names is None:
        return {}
    ids = [str(id) for id in range(num_classes)]
    if not (isinstance(names, dict) and names.keys() == set(ids) and all(isinstance(n, str) for n in names.values())):
        raise ValueError(f"id2label must give a name to each of the network's {num_classes} classes")
    if not all(names.values()) or len(set(names.values())) < num_classes:
        raise ValueError("id2label must give each class a name of its own")
    return {"id2label": {id: names[id] for id in ids}} if num_classes else {}


def _load_network(model: str, unet_class: Any, dtype: torch.dtype) -> ModelMixin:
    """Returns a model's network. Raises `UserInputError` if it lacks weights, has others, or they are not finite."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # diffusers would log the problems that raise an error below
    try:
        unet, found = unet_class.from_pretrained(model, subfolder="unet", torch_dtype=dtype, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise UserInputError(f"{model} lacks weights of its network: {', '.join(missing[:3])}; save or load it again")
    if unexpected := sorted(found["unexpected_keys"]):
        raise UserInputError(
            f"{model} has weights that its network has no place for: {', '.join(unexpected[:3])}; save it again"
        )
    for name, weight in unet.state_dict().items():
        if not weight.isfinite().all():
            raise UserInputError(
                f"{model}: the weights of its network are not finite ({name}): take another checkpoint"
            )
    return unet


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
    """Returns the class that an index names: this project's or, where it has none of that name, diffusers'.

    Raises `UserInputError` if the class is no `base`.
    """
    name = name[1] if isinstance(name, list) else name  # [file, class] for classes shipped as code
    found = OWN_CLASSES.get(name) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserInputError(f"{model} holds a {name}, which neither diffusers nor this project has")
    return found
