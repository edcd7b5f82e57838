"""Whether the files of a model fit each other, found out before anything large is allocated for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipelines import ConditionalDDPMPipeline, TextToImageDDPMPipeline, UnconditionalDDPMPipeline
from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.flags import MAX_TIMESTEPS
from sprite_diffusion.data.config import IMAGE_MODES

# Limits of the numbers in a configuration: far above those of any model, and low enough to build the model's shapes.
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

# Of a network on the meta device.
WeightlessPipeline = UnconditionalDDPMPipeline | ConditionalDDPMPipeline | TextToImageDDPMPipeline


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Puts the name of a file before the message of an error that its values have led to."""
    try:
        yield
    except UserInputError:
        raise
    except Exception as error:
        raise ValueError(f"{file}: {first_line(error)}") from None


def read_config(model: str, name: str | None, part_class: Any) -> dict[str, Any]:
    """Returns the configuration of a pipeline's part. Raises ValueError for a number that no part can have."""
    config = part_class.load_config(model, subfolder=name)
    if not isinstance(config, dict):
        raise ValueError("it has no names and values")
    check_numbers("", config)
    return config


def check_numbers(name: str, value: Any) -> None:
    """Raises ValueError for a number that is not finite, and for sizes and lists beyond `LIMITS`, at any depth.

    A part is made of its configuration before its weights can be compared with it, so that a damaged number could
    cost any time and memory.
    """
    limit = LIMITS.get(name, MAX_NUMBER_OF_LAYERS if "layers" in name else MAX_NUMBER)
    if isinstance(value, dict):
        for key, item in value.items():
            check_numbers(key, item)
    elif isinstance(value, list):
        if len(value) > (MAX_TIMESTEPS if name == "trained_betas" else MAX_LENGTH):
            raise ValueError(f"{name} has {len(value):,} values")
        for item in value:
            check_numbers(name, item)
    # Written so that NaN, which compares as False, is refused as well.
    elif isinstance(value, int | float) and not abs(value) <= limit and name not in MAY_BE_INFINITE:
        raise ValueError(f"{name} is {value}: it must be finite and not exceed {limit:,}")


def check_network(pipeline: WeightlessPipeline) -> None:
    """Raises an error unless the network takes images of the model's shape, and gives predictions of that shape.

    The network of `pipeline` is on the meta device: a forward pass there costs no memory and next to no time.
    """
    config = pipeline.unet.config
    if isinstance(pipeline, ConditionalDDPMPipeline) and not ("context_dim" in config or config["num_class_embeds"]):
        raise ValueError("its network takes no classes, its pipeline is conditional")
    channels, height, width = pipeline.sample_shape
    if channels not in IMAGE_MODES:
        raise ValueError(f"its images have {channels} channels: grey has 1, colour 3, colour with transparency 4")
    by_labels = pipeline.num_classes > 0 and "context_dim" not in config
    kwargs = {"class_labels": torch.zeros(1, dtype=torch.long, device="meta")} if by_labels else {}
    if isinstance(pipeline, TextToImageDDPMPipeline):
        features = pipeline.text_encoder.config.hidden_size
        if config["cross_attention_dim"] != features:
            raise ValueError(
                f"its network attends to {config['cross_attention_dim']} features, its text has {features}"
            )
        kwargs = {"encoder_hidden_states": torch.empty(1, 1, features, device="meta")}
    with torch.no_grad():
        image = torch.empty(1, channels, height, width, device="meta")
        prediction = pipeline.unet(image, 0, **kwargs).sample
    expected = (1, _num_predicted_channels(pipeline), height, width)
    if tuple(prediction.shape) != expected:
        raise ValueError(f"its network gives the shape {tuple(prediction.shape)} where {expected} is needed")


def check_process(pipeline: WeightlessPipeline) -> None:
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


def _num_predicted_channels(pipeline: WeightlessPipeline) -> int:
    """Returns the channels that a prediction has: those of an image, and as many of the variance if it is learned."""
    learned = str(pipeline.scheduler.config.get("variance_type")).startswith("learned")
    return pipeline.sample_shape[0] * (2 if learned else 1)


def read_examples(index: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the example prompts as an argument of the pipeline. Raises ValueError unless they are texts."""
    prompts = index.get("example_prompts") or []
    if not (isinstance(prompts, list) and all(isinstance(prompt, str) and prompt for prompt in prompts)):
        raise ValueError("example_prompts must be a list of texts")
    return {"example_prompts": prompts}


def read_names(index: dict[str, Any], num_classes: int) -> dict[str, dict[str, str]]:
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
