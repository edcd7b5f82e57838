"""What a set of images is, and flags that fit it: `python -m sprite_diffusion.data.advise my_pictures`."""

import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from sprite_diffusion.common.errors import UserInputError, exits_on_user_error, printable
from sprite_diffusion.common.flags import as_argv, names_of
from sprite_diffusion.data.config import DataConfig, parse_data_flags
from sprite_diffusion.data.dataset import StoredImages, load_image_data, open_images
from sprite_diffusion.data.decoding import DEEP_MODES, BadImageError, open_image
from sprite_diffusion.data.doubles import count_near_doubles
from sprite_diffusion.data.sources import Source, Table, find_captions

NUM_LOOKED_AT = 64  # photographs take 0.1 s each
MIN_SIDE, MAX_SIDE = 8, 64  # pixels that a network is advised for: smaller ones can't be halved, larger ones need days
MULTIPLE = 4  # of the sides: a network that halves them twice
SMALLEST_LEVEL = 4  # pixels of the sides that a network halves down to
CHANNELS = [32, 64, 128, 256]  # few where pixels are many: docs/quality.md
PIXEL_ART_COLOURS = 32  # of an image; photographs of as few pixels have hundreds
PRESET_SIDE = 16  # of the built-in sprites, for which the presets' number of steps was chosen
STEPS_OF_LARGER = 2000
FEW_IMAGES = 1000
MAX_NAMES = 10  # of classes that are printed


@dataclass(frozen=True)
class Facts:
    """What a set of images is, by at most `NUM_LOOKED_AT` of them."""

    name: str
    num_images: int | None  # of all of them; None for a stream
    size: tuple[int, int]  # the most frequent width and height
    is_one_size: bool
    short_side: float  # the median
    num_colours: float  # of an image, the median
    is_transparent: bool  # at least half of the images have transparent pixels

    @property
    def is_pixel_art(self) -> bool:
        """Returns whether the images have so few colours that mixing them would be seen."""
        return self.num_colours <= PIXEL_ART_COLOURS

    def describe(self) -> str:
        """Returns the facts as a line."""
        number = "a stream of images" if self.num_images is None else f"{self.num_images:,} images"
        sizes = f"of {self.size[0]}x{self.size[1]}" if self.is_one_size else f"of sizes around {self.short_side:g}"
        colours = f", pixel art of {self.num_colours:g} colours each" if self.is_pixel_art else ""
        transparency = ", with transparency" if self.is_transparent else ""
        return f"{self.name}: {number} {sizes}{colours}{transparency}"


def look_at_images(config: DataConfig, streaming: bool = False) -> Facts | None:
    """Returns what the images that `config` names are; None if none of those looked at can be decoded.

    Raises `UserInputError` if there is no such data.
    """
    limit = min(NUM_LOOKED_AT, config.max_train_samples or NUM_LOOKED_AT)
    opened = open_images(replace(config, max_train_samples=limit), with_labels=False, streaming=streaming)
    images = list(_decode(opened, config))
    if not images:
        return None
    (size, frequency), *_ = Counter(image.size for image in images).most_common()
    return Facts(
        opened.name,
        None if isinstance(opened, Table) else min(opened.num_available, config.max_train_samples or sys.maxsize),
        size,
        frequency == len(images),
        median(min(image.size) for image in images),
        median(_count_colours(image) for image in images),
        2 * sum(_has_transparent_pixels(image) for image in images) >= len(images),
    )


def choose_flags(facts: Facts, config: DataConfig, given: set[str]) -> dict[str, Any]:
    """Returns the flags of a training that follow from the images; the others are those of the script's preset.

    Args:
        facts: What the images are.
        config: Has the values of the `given` flags.
        given: The names of the flags that the user has chosen, which are none of those that are returned.
    """
    resolution = config.resolution if "resolution" in given else _choose_resolution(facts)
    height, width = replace(config, resolution=resolution).image_size
    num_levels = 1
    while (
        num_levels < len(CHANNELS)
        and height % 2**num_levels == width % 2**num_levels == 0
        and min(height, width) >= SMALLEST_LEVEL * 2**num_levels
    ):
        num_levels += 1
    flags: dict[str, Any] = {"resolution": resolution}
    if facts.is_transparent and "background" not in given:  # on which transparency is laid
        flags["image_mode"] = "RGBA"
    if facts.is_pixel_art and not (facts.is_one_size and facts.size == (width, height)):
        flags["interpolation"] = "nearest"
    if not given & {"model_class", "block_out_channels"}:  # whose levels are others
        flags |= {"block_out_channels": CHANNELS[:num_levels], "attention_levels": num_levels}
    if min(height, width) > PRESET_SIDE:
        flags["max_train_steps"] = STEPS_OF_LARGER
    flags["output_dir"] = f"runs/{_name_folder(config)}"
    return {name: value for name, value in flags.items() if name not in given}


def _name_folder(config: DataConfig) -> str:
    """Returns the name of the folder or file of the images, without what a name of a folder should not have."""
    source = Path(config.dataset_name or config.train_data_dir or "").resolve().name
    return re.sub(r"[^\w.-]+", "-", re.sub(r"\.(npy|parquet|png)$", "", source)).strip("-.") or "images"


def _choose_resolution(facts: Facts) -> str:
    """Returns the images' own size where a network can have it, else the power of two below their shorter side."""
    width, height = facts.size
    if facts.is_one_size and all(MIN_SIDE <= side <= MAX_SIDE and side % MULTIPLE == 0 for side in facts.size):
        return str(width) if width == height else f"{width}x{height}"
    side = MIN_SIDE
    while 2 * side <= min(facts.short_side, MAX_SIDE):
        side *= 2
    return str(side)


def _decode(opened: Source | Table, config: DataConfig) -> Iterator[Image.Image]:
    """Yields the images that can be decoded; of the others the training says what is wrong with them."""
    if isinstance(opened, Table):
        values = (row[opened.image_column] for row in islice(opened.rows, NUM_LOOKED_AT))
    else:
        values = (value for _, value in opened.images)
    for value in values:
        with suppress(BadImageError):
            yield open_image(value, config)


def _count_colours(image: Image.Image) -> int:
    """Returns how many colours an image has, up to one more than pixel art has."""
    if image.mode in DEEP_MODES:
        return PIXEL_ART_COLOURS + 1
    colours: list[tuple[int, Any]] | None = image.convert("RGBA").getcolors(PIXEL_ART_COLOURS + 1)
    return PIXEL_ART_COLOURS + 1 if colours is None else sum(colour[3] > 0 for _, colour in colours)


def _has_transparent_pixels(image: Image.Image) -> bool:
    """Returns whether a pixel's alpha is below 255."""
    return image.has_transparency_data and bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)


@exits_on_user_error
def main() -> None:
    argv = sys.argv[1:]
    if not argv or "--help" in argv or "-h" in argv:
        print(f"{__doc__}\n\nTakes a folder, a file or a dataset's name, and the data flags of docs/data.md.")
        return
    if not argv[0].startswith("--"):
        argv[0] = f"--{'train_data_dir' if Path(argv[0]).is_dir() else 'dataset_name'}={argv[0]}"
    config = parse_data_flags(argv, None)
    facts = look_at_images(config)
    if facts is None:
        raise UserInputError(f"{argv[0]}: none of the images looked at can be decoded, replace them")
    print(printable(facts.describe()))
    chosen = choose_flags(facts, config, {*names_of(argv)})
    of_images = {flag.name for flag in fields(DataConfig)} & chosen.keys()
    column, table = find_captions(config, streaming=False)
    fitting = replace(config, **{name: chosen[name] for name in of_images})
    data = load_image_data(fitting, with_labels=None, table=table)
    images, class_names = data.dataset, data.class_names or []
    assert isinstance(images, StoredImages)  # as they are not streamed
    script = "train_unconditional.py"
    if column is not None:
        script = "train_conditional.py"
        print(printable(f"they have captions: {column}"))
    elif len(class_names) > 1:
        script = "train_conditional.py"
        print(printable(f"they are in {len(class_names)} classes: {', '.join(class_names[:MAX_NAMES])}"))
    if near := count_near_doubles(images):
        print(f"{near:,} of them are doubles, or nearly so, of others, which a model copies first")
    if len(images) < FEW_IMAGES:
        print(
            "they are few: --init_from MODEL, in place of --max_train_steps and the network's flags, begins with a "
            "network that knows other images (docs/finetuning.md)"
        )
    flags = as_argv(chosen)
    command = ["accelerate", "launch", script, *argv, *flags]
    print(printable(shlex.join(command)))


if __name__ == "__main__":
    main()
