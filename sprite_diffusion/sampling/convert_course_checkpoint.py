"""Makes a pipeline folder of a checkpoint of the sprite course "How Diffusion Models Work".

python -m sprite_diffusion.sampling.convert_course_checkpoint context_model_trained.pth runs/course
"""

from pathlib import Path

import numpy as np
import torch

from models import ContextUNet2DModel
from pipelines import ConditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.common.errors import UserInputError, exits_on_user_error, first_line, printable
from sprite_diffusion.common.flags import ArgumentParser
from sprite_diffusion.data.sprites import CLASS_NAMES

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
    height, width = (4 * side for side in weights["unpool.0.weight"].shape[2:])
    model = ContextUNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=in_channels,
        out_channels=len(weights["conv_out.3.weight"]),
        num_features=num_features,
        context_dim=weights["context_embeddings.0.0.weight"].shape[1],
        norm_type="batch",
        num_train_timesteps=500,
    )
    model.load_state_dict(weights)
    return model.eval()


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
    )


def convert(checkpoint: Path, output_dir: Path) -> None:
    """Writes the pipeline folder of a course checkpoint.

    Raises `UserInputError` if the checkpoint is not one, or the folder is not new or empty.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserInputError(f"{output_dir} is there already: name a folder that is new or empty")
    try:
        course = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserInputError(f"{checkpoint}: no such file") from None
    except Exception as error:  # unpickling a broken file can raise anything
        raise UserInputError(f"{checkpoint} is not a state dict of weights ({first_line(error)})") from None
    try:
        model = build_model(convert_weights(course))
    except (
        UserInputError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise UserInputError(
            f"{checkpoint} is not a checkpoint of the course's ContextUnet: {first_line(error)}"
        ) from None
    num_classes = model.config["context_dim"]
    id2label = dict(enumerate(CLASS_NAMES)) if num_classes == len(CLASS_NAMES) else None
    pipeline = ConditionalDDPMPipeline(unet=model, scheduler=course_scheduler(), id2label=id2label)
    pipeline.save_pretrained(str(output_dir))


@exits_on_user_error
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="Such as context_model_trained.pth: a state dict.")
    parser.add_argument("output_dir", type=Path, help="Folder to write; new or empty.")
    args = parser.parse_args()
    convert(args.checkpoint, args.output_dir)
    print(f"wrote {printable(str(args.output_dir))}")


if __name__ == "__main__":
    main()
