"""Reads the checkpoints of the sprite course "How Diffusion Models Work": .pth files of its `ContextUnet`."""

from pathlib import Path

import numpy as np
import torch

from models import ContextUNet2DModel
from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.common.errors import UserInputError, first_line

COURSE_POOL_SIZE = 4  # of the course's `AvgPool2d(4)`, which for sides above 16 does not see all positions
# The course's `ContextUnet`, module by module. Its blocks wrap their layers in a `model`.
COURSE_NAMES = {
    "init_conv.": "conv_in.",
    "down1.model.": "down_blocks.0.",
    "down2.model.": "down_blocks.1.",
    "up0.": "unpool.",
    "timeembed1.model.": "time_embeddings.0.",
    "timeembed2.model.": "time_embeddings.1.",
    "contextembed1.model.": "context_embeddings.0.",
    "contextembed2.model.": "context_embeddings.1.",
    "up1.model.": "up_blocks.0.",
    "up2.model.": "up_blocks.1.",
    "out.": "conv_out.",
}


def convert_weights(course: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the state dict of a `ContextUNet2DModel` for that of the course's `ContextUnet`.

    The course makes its shortcut convolution anew at each call, with random weights, so that no checkpoint has it.
    Here the convolution is zero, the mean of those weights. Raises `UserInputError` for a name that a `ContextUnet`
    does not have.
    """
    weights = {}
    for name, tensor in course.items():
        prefix = next((prefix for prefix in COURSE_NAMES if name.startswith(prefix)), None)
        if prefix is None:
            raise UserInputError(f"'{name}' is not a weight of the course's ContextUnet")
        weights[COURSE_NAMES[prefix] + name.removeprefix(prefix)] = tensor
    out_channels, in_channels = weights["conv_in.conv1.0.weight"].shape[:2]
    if in_channels != out_channels:
        weights["conv_in.shortcut.weight"] = torch.zeros(out_channels, in_channels, 1, 1)
        weights["conv_in.shortcut.bias"] = torch.zeros(out_channels)
    return weights


def build_model(weights: dict[str, torch.Tensor]) -> ContextUNet2DModel:
    """Returns the network of a converted state dict, whose sizes are read from the shapes."""
    num_features, in_channels = weights["conv_in.conv1.0.weight"].shape[:2]
    bottom_sides = tuple(weights["unpool.0.weight"].shape[2:])
    height, width = (4 * side for side in bottom_sides)
    is_of_the_course = all(side // COURSE_POOL_SIZE == 1 for side in bottom_sides)
    model = ContextUNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=in_channels,
        out_channels=len(weights["conv_out.3.weight"]),
        num_features=num_features,
        context_dim=weights["context_embeddings.0.0.weight"].shape[1],
        norm_type="batch",
        num_train_timesteps=500,
        pool_size=COURSE_POOL_SIZE if is_of_the_course else None,
    )
    model.load_state_dict(weights)
    return model.eval()


def knows_classes(model: ContextUNet2DModel) -> bool:
    """Returns whether a network of the course was trained with context.

    The course's code gives a network without context zeros in its place. Then the first layer of each embedding gets
    no gradient, and keeps the random weights of a new layer, none of which exceeds 1 / sqrt(context_dim).
    """
    bound = model.config["context_dim"] ** -0.5
    first_layers = [model.get_parameter(f"context_embeddings.{i}.0.weight") for i in range(2)]
    return max(weight.abs().max().item() for weight in first_layers) > bound * (1 + 1e-6)  # a float32 rounds by 6e-8


def course_scheduler() -> ClosedFormDDPMScheduler:
    """Returns the course's process: T = 500, its betas, variance beta_t, and predicted images that are not clipped.

    The course counts t from 1 to T in a table of T + 1 betas, and its alpha_bar_t has the unused beta_0 as a factor:
    here the first step has both.
    """
    betas = np.linspace(1e-4, 0.02, 501)
    first_beta = 1 - (1 - betas[0]) * (1 - betas[1])
    return ClosedFormDDPMScheduler(
        num_train_timesteps=500,
        trained_betas=np.append(first_beta, betas[2:]),
        variance_type="fixed_large",
        clip_sample=False,
        timestep_spacing="trailing",  # the course's DDIM begins at t = 500, from noise alone
    )


def read_course_checkpoint(path: Path) -> ContextUNet2DModel:
    """Returns the network of a file, on which no code in the file runs.

    Raises `UserInputError` if the file is no state dict of the course's `ContextUnet`.
    """
    try:
        course = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserInputError(f"{path}: no such file") from None
    except Exception as error:  # unpickling a broken file can raise anything
        raise UserInputError(f"{path} is not a state dict of weights ({first_line(error)})") from None
    try:
        return build_model(convert_weights(course))
    except (
        UserInputError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise UserInputError(f"{path} is not a checkpoint of the course's ContextUnet: {first_line(error)}") from None
