"""Images to change: `sample.py --image` and `--mask`."""

from pathlib import Path

from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import IMAGE_MODES, DataConfig
from sprite_diffusion.data.decoding import BadImageError, load_image_file, open_image
from sprite_diffusion.sampling.generation import Edit, to_unit_range
from sprite_diffusion.sampling.pipeline_loading import Pipeline


def read_edit(pipeline: Pipeline, image: Path, strength: float | None, mask: Path | None) -> Edit:
    """Reads the files of `--image` and `--mask`.

    An image of the model's size is taken as it is, so that what is kept of it is kept bit for bit. Another is resized
    and cropped as those of a training are; a mask too, but without mixing its pixels.

    Raises `UserInputError` if a file can't be decoded.
    """
    channels, height, width = pipeline.sample_shape
    config = DataConfig(resolution=f"{width}x{height}", center_crop=True, image_mode=IMAGE_MODES[channels])
    picture = _open(image, config)
    if picture.size == (width, height) and picture.mode == IMAGE_MODES[channels]:
        pixels = pil_to_tensor(picture)[None] / 255
    else:
        pixels = to_unit_range(load_image_file(str(image), config)[None])
    white = None
    if mask is not None:
        options = DataConfig(
            resolution=config.resolution, center_crop=True, image_mode="L", interpolation="nearest", background="black"
        )
        white = (load_image_file(str(mask), options)[None] >= 0).float()
    record = {"image": str(image), "strength": strength, "mask": None if mask is None else str(mask)}
    return Edit(pixels, strength, white, {name: value for name, value in record.items() if value is not None})


def _open(path: Path, config: DataConfig) -> Image.Image:
    try:
        return open_image(str(path), config)
    except BadImageError as error:
        raise UserInputError(f"--image {path} {error}") from None
