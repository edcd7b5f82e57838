"""Images to change: `sample.py --image` and `--mask`."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import IMAGE_MODES, DataConfig
from sprite_diffusion.data.decoding import BadImageError, load_image_file, open_image
from sprite_diffusion.sampling.generation import Edit, to_unit_range
from sprite_diffusion.sampling.pipeline_loading import Pipeline


def read_edit(pipeline: Pipeline, image: Path, strength: float | None, mask: Path | None) -> Edit:
    """Reads the files of `--image` and `--mask`; both are fitted to the model's size, as `read_picture` does.

    Of a mask no pixels are mixed. Raises `UserInputError` if a file can't be decoded.
    """
    white = None
    if mask is not None:
        options = replace(_make_config(pipeline), image_mode="L", interpolation="nearest", background="black")
        white = (load_image_file(str(mask), options)[None] >= 0).float()
    record = {"image": str(image), "strength": strength, "mask": None if mask is None else str(mask)}
    record = {name: value for name, value in record.items() if value is not None}
    return Edit(read_picture(pipeline, image), strength, white, record)


def read_picture(pipeline: Pipeline, path: Path) -> torch.Tensor:
    """Returns the image (1, C, H, W) in [0, 1] of a file, with straight alpha.

    One of the model's size is taken as it is, so that what is kept of it is kept bit for bit. Another is resized and
    cropped as those of a training are.

    Raises `UserInputError` if the file can't be decoded.
    """
    config = _make_config(pipeline)
    picture = _open(path, config)
    if picture.size == config.image_size[::-1] and picture.mode == config.image_mode:
        return pil_to_tensor(picture)[None] / 255
    return to_unit_range(load_image_file(str(path), config)[None])


def _make_config(pipeline: Pipeline) -> DataConfig:
    """Returns how images are treated that a pipeline is to change."""
    channels, height, width = pipeline.sample_shape
    return DataConfig(resolution=f"{width}x{height}", center_crop=True, image_mode=IMAGE_MODES[channels])


def _open(path: Path, config: DataConfig) -> Image.Image:
    try:
        return open_image(str(path), config)
    except BadImageError as error:
        raise UserInputError(f"--image {path} {error}") from None
