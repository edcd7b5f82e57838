"""A saved model as a pipeline of this project's classes, so that loading runs no code from the folder or the Hub."""

import inspect
import json
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import logging

from models import BasicUNet2DModel, ContextUNet2DModel
from pipelines import ConditionalDDPMPipeline, TextToImageDDPMPipeline, UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.common.errors import DAMAGED_JSON, UserInputError, first_line
from sprite_diffusion.common.machine import prepare_cpu
from sprite_diffusion.common.run_files import INDEX_FILE, list_checkpoints
from sprite_diffusion.data.sprites import CLASS_NAMES
from sprite_diffusion.sampling.course_checkpoint import course_scheduler, knows_classes, read_course_checkpoint
from sprite_diffusion.sampling.flags import PROCESS_OPTIONS, SAMPLING_OPTIONS
from sprite_diffusion.sampling.model_checks import (
    check_network,
    check_process,
    naming,
    read_config,
    read_examples,
    read_names,
)
from sprite_diffusion.sampling.text_encoders import load_text_parts

NETWORK_FILE = "config.json"  # of a network that is saved alone
PROCESS_FILE = "scheduler_config.json"
NO_SUCH_FILE = "does not appear to have a file named"  # diffusers' words for a repository that lacks a file
COURSE_ENDINGS = (".pth", ".pt")


class Pipeline(Protocol):
    """The part of this project's pipelines that other modules use."""

    unet: ModelMixin
    scheduler: SchedulerMixin
    is_conditional: bool  # whether images can be asked for, by class or by prompt
    id2label: dict[int, str]  # of a model with classes, as is `get_class_id`
    # Of a model with prompts, as is `encode_prompt`.
    example_prompts: list[str]
    text_encoder: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def num_classes(self) -> int: ...  # 0 without classes

    @property
    def sample_shape(self) -> tuple[int, int, int]: ...  # channels, height and width of an image

    def __call__(self, **kwargs: Any) -> Any: ...

    def conditioned_on(self, **kwargs: Any) -> AbstractContextManager[None]: ...

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor: ...

    def get_class_id(self, label: int | str) -> int: ...

    def encode_prompt(self, prompt: str) -> torch.Tensor: ...

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None: ...

    def set_progress_bar_config(self, **kwargs: Any) -> None: ...

    def to(self, device: torch.device | str) -> Self: ...


OWN_CLASSES = {
    "BasicUNet2DModel": BasicUNet2DModel,
    "ContextUNet2DModel": ContextUNet2DModel,
    "ClosedFormDDPMScheduler": ClosedFormDDPMScheduler,
    "LinearCorruptionScheduler": LinearCorruptionScheduler,
    "ConditionalDDPMPipeline": ConditionalDDPMPipeline,
    "TextToImageDDPMPipeline": TextToImageDDPMPipeline,
    "UnconditionalDDPMPipeline": UnconditionalDDPMPipeline,
    # the stock folder that an unconditional model is saved as: the same configs, our classes
    "DDPMPipeline": UnconditionalDDPMPipeline,
    "DDPMScheduler": ClosedFormDDPMScheduler,
}


ModelKind = Literal["pipeline", "network", "course checkpoint"]


def find_model_kind(path: Path) -> ModelKind | None:
    """Returns what kind of model a file or folder is, told by its content; None if it is none."""
    if path.is_file() and path.suffix in COURSE_ENDINGS:
        return "course checkpoint"
    if (path / INDEX_FILE).is_file() and ((path / "unet").is_dir() or not (path / NETWORK_FILE).is_file()):
        return "pipeline"  # early models of the Hub have the network beside the index, as google/ddpm-cifar10-32 does
    try:
        if "_class_name" in json.loads((path / NETWORK_FILE).read_text()):
            return "network"
    except DAMAGED_JSON:
        pass
    return "course checkpoint" if len(_list_course_files(path)) == 1 else None


def _list_course_files(folder: Path) -> list[Path]:
    return [path for ending in COURSE_ENDINGS for path in folder.glob(f"*{ending}")] if folder.is_dir() else []


def load_pipeline(
    model: str, dtype: torch.dtype = torch.float32, process: Mapping[str, Any] | None = None
) -> Pipeline:
    """Loads a model as a pipeline.

    Args:
        model: An output folder, a checkpoint or a snapshot inside one, the output of diffusers' official script, the
            folder of a bare `UNet2DModel`, a .pth file of the sprite course or the folder of one, the id of a
            repository on the Hub, or `wandb:ENTITY/PROJECT/ARTIFACT:ALIAS` of any of these.
        dtype: The number format of the network.
        process: Flags in place of what the model was trained with, by name: those of `SAMPLING_OPTIONS`; for a bare
            network, those of `PROCESS_OPTIONS` as well.

    Returns:
        The pipeline on the CPU. Its process and its network fit each other and its images, and its weights are finite.

    Raises:
        UserInputError: If `model` is something else, or is damaged; if `process` does not fit it.
    """
    if model.startswith("wandb:"):
        model = _download_artifact(model)
    path, process = Path(model), process or {}
    kind = find_model_kind(path)
    if path.suffix in COURSE_ENDINGS and not path.exists():
        raise UserInputError(f"{model}: no such file")
    if kind is None and path.is_dir():
        _explain_folder(path)
    try:
        if kind == "course checkpoint":
            return _open_course_checkpoint(path, dtype, process)
        if kind == "network":
            return _open_network(model, dtype, process)
        try:
            return _open_pipeline(model, dtype, process)
        except Exception as error:
            if not _is_network_on_hub(model, error):
                raise
        return _open_network(model, dtype, process)
    except UserInputError:
        raise
    except Exception as error:  # the values in the model's files can lead diffusers and torch to raise anything
        raise UserInputError(f"{model} is not a model that can be loaded: {first_line(error)}") from None


def _is_network_on_hub(model: str, error: Exception) -> bool:
    """Returns whether a pipeline could not be loaded, by this error, since a repository holds a network alone."""
    if NO_SUCH_FILE in str(error) and not Path(model).exists():
        with suppress(OSError):
            return "_class_name" in UNet2DModel.load_config(model)
    return False


def _check_process_is_asked_for(model: str, process: Mapping[str, Any]) -> None:
    """Raises `UserInputError` if `process` says how a model was trained that says so itself."""
    for name in process:
        if name not in SAMPLING_OPTIONS:
            raise UserInputError(f"--{name}: {model} says itself how it was trained, leave the flag out")


def _explain_folder(folder: Path) -> None:
    """Raises `UserInputError` for a folder without a model, if it is known which one is meant."""
    checkpoints = [path for path in list_checkpoints(folder) if (path / INDEX_FILE).exists()]
    if checkpoints:
        raise UserInputError(f"{folder} holds no pipeline yet: name its newest checkpoint, {checkpoints[-1]}")
    networks = [folder / name for name in ("unet_ema", "unet") if find_model_kind(folder / name) == "network"]
    if networks and not (folder / "scheduler").is_dir():  # a checkpoint of the official script
        raise UserInputError(f"{folder} holds no pipeline: name its network, {networks[0]}")
    if files := _list_course_files(folder):
        raise UserInputError(f"{folder} holds {len(files)} checkpoints of weights: name one, such as {files[0]}")


def _open_pipeline(model: str, dtype: torch.dtype, process: Mapping[str, Any]) -> Pipeline:
    """Loads the folder of a pipeline. Raises `UserInputError`, or whatever error its files lead to."""
    with naming(INDEX_FILE):
        index = DiffusionPipeline.load_config(model)
        pipeline_class = _find_class(model, index["_class_name"], DiffusionPipeline)
        if pipeline_class not in (UnconditionalDDPMPipeline, ConditionalDDPMPipeline, TextToImageDDPMPipeline):
            raise UserInputError(f"{model} holds a {pipeline_class.__name__}: not a pipeline of this project")
        unet_class = _find_class(model, index["unet"], ModelMixin)
        _check_process_is_asked_for(model, process)
        scheduler_class = _find_class(model, index["scheduler"], SchedulerMixin)
    with naming(f"scheduler/{PROCESS_FILE}"):
        scheduler = make_process(scheduler_class, read_config(model, "scheduler", scheduler_class), process)
    return _assemble(model, "unet", dtype, pipeline_class, unet_class, scheduler, index)


def _open_network(folder: str, dtype: torch.dtype, process: Mapping[str, Any]) -> Pipeline:
    """Loads a network that is saved alone, with the process of `process` or of a file beside it, else DDPM's defaults.

    Raises `UserInputError`, or whatever error its files lead to.
    """
    parent = Path(folder).absolute().parent
    if (parent / INDEX_FILE).is_file() or (parent / "scheduler").is_dir():
        raise UserInputError(f"{folder} is a part of a pipeline, which knows its process: name {parent}")
    config = UNet2DModel.load_config(folder)
    unet_class = _find_class(folder, config["_class_name"], ModelMixin)
    with naming(PROCESS_FILE):
        try:
            process_config = read_config(folder, None, ClosedFormDDPMScheduler)
        except OSError:  # there is none, here or on the Hub
            if Path(folder, PROCESS_FILE).exists():
                raise
            process_config = {}
        scheduler = make_process(None, process_config, process)
    has_classes = config.get("num_class_embeds") or config.get("context_dim")
    pipeline_class = ConditionalDDPMPipeline if has_classes else UnconditionalDDPMPipeline
    return _assemble(folder, None, dtype, pipeline_class, unet_class, scheduler, {})


def _open_course_checkpoint(path: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> Pipeline:
    """Loads a checkpoint of the sprite course: by class if it was trained with context, else without classes.

    Raises `UserInputError`, or whatever error the file leads to.
    """
    _check_process_is_asked_for(str(path), process)
    file = path if path.is_file() else _list_course_files(path)[0]
    unet = _check_finite(str(file), read_course_checkpoint(file))
    torch.nn.Module.to(unet, dtype)  # diffusers' own `to` warns of float32 even where nothing changes
    with naming("the process"):
        scheduler = make_process(ClosedFormDDPMScheduler, course_scheduler().config, process)
    if not knows_classes(unet):
        return UnconditionalDDPMPipeline(unet=unet, scheduler=scheduler)
    names = dict(enumerate(CLASS_NAMES)) if unet.config["context_dim"] == len(CLASS_NAMES) else None
    return ConditionalDDPMPipeline(unet=unet, scheduler=scheduler, id2label=names)


def make_process(scheduler_class: Any | None, config: Mapping[str, Any], process: Mapping[str, Any]) -> SchedulerMixin:
    """Returns the process of a configuration with the changes of `process`.

    Without a class, the process is that of `--noise_scheduler_class` in `process`, or DDPM's. Raises `UserInputError`
    if a change is none of the scheduler's options, or does not fit the others.
    """
    process = dict(process)
    name = process.pop("noise_scheduler_class", "ClosedFormDDPMScheduler")
    scheduler_class = scheduler_class or OWN_CLASSES[name]
    changes = {(SAMPLING_OPTIONS | PROCESS_OPTIONS)[flag]: value for flag, value in process.items()}
    options = inspect.signature(scheduler_class).parameters
    for flag in process:
        if (SAMPLING_OPTIONS | PROCESS_OPTIONS)[flag] not in options:
            raise UserInputError(f"--{flag}: the model's process, {scheduler_class.__name__}, has no such option")
    try:
        return scheduler_class.from_config(config, **changes)
    except ValueError as error:
        if not changes:
            raise
        raise UserInputError(f"--{', --'.join(process)}: {first_line(error)}") from None


def _assemble(
    model: str,
    unet_folder: str | None,
    dtype: torch.dtype,
    pipeline_class: Any,
    unet_class: Any,
    scheduler: SchedulerMixin,
    index: dict[str, Any],
) -> Pipeline:
    """Loads the network of a pipeline last, when all else has been found to fit: before, nothing large is allocated.

    Raises `UserInputError`, or whatever error the values in the model's files lead to.
    """
    prefix = "" if unet_folder is None else f"{unet_folder}/"
    text_parts = {}
    if pipeline_class is TextToImageDDPMPipeline:
        text_parts = load_text_parts(model, index)
        _check_finite(model, text_parts["text_encoder"], "text_encoder")
    with naming(f"{prefix}{NETWORK_FILE}"):
        config = read_config(model, unet_folder, unet_class)
        # Tensors there have shapes and take no memory; torch warns of those without elements, an error says it better.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            unet = unet_class.from_config(config)
        weightless = pipeline_class(unet=unet, scheduler=scheduler, **text_parts)
        check_network(weightless)
    with naming(f"scheduler/{PROCESS_FILE}"):
        check_process(weightless)
    with naming(INDEX_FILE):
        options = read_examples(index) if text_parts else read_names(index, weightless.num_classes)
    with naming(unet_folder) if unet_folder else nullcontext():
        unet = _load_network(model, unet_folder, unet_class, dtype)
    return pipeline_class(unet=unet, scheduler=scheduler, **text_parts, **options)


def _load_network(model: str, unet_folder: str | None, unet_class: Any, dtype: torch.dtype) -> ModelMixin:
    """Returns a model's network. Raises `UserInputError` if it lacks weights, has others, or they are not finite."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # diffusers would log the problems that raise an error below
    try:
        unet, found = unet_class.from_pretrained(
            model, subfolder=unet_folder, torch_dtype=dtype, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise UserInputError(f"{model} lacks weights of its network: {', '.join(missing[:3])}; save or load it again")
    if unexpected := sorted(found["unexpected_keys"]):
        raise UserInputError(
            f"{model} has weights that its network has no place for: {', '.join(unexpected[:3])}; save it again"
        )
    return _check_finite(model, unet)


def _check_finite(model: str, network: Any, part: str = "network") -> Any:
    """Returns a network. Raises `UserInputError` if its weights are not finite."""
    for name, weight in network.state_dict().items():
        if not weight.isfinite().all():
            raise UserInputError(
                f"{model}: the weights of its {part} are not finite ({name}): take another checkpoint"
            )
    return network


def speed_up(pipeline: Pipeline, compiles: bool, num_threads: int | None) -> None:
    """Sets the machine up for the pipeline's device and, if `compiles`, compiles the network.

    `num_threads` is the value of `--num_threads`.
    """
    on_cuda = pipeline.device.type == "cuda"
    if not on_cuda:
        prepare_cpu(num_threads)
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
