"""The flags that say which images there are and how an image is decoded, for every program that reads images."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.flags import as_flags, check_values, flag, make_parser, names_of, read_yaml, suggest

BUILT_IN_DATASET = "sprites"
FIND_CAPTIONS = "auto"  # as `--caption_column`
ImageMode = Literal["auto", "L", "RGB", "RGBA"]
IMAGE_MODES: dict[int, ImageMode] = {1: "L", 3: "RGB", 4: "RGBA"}  # by the channels of an image
MAX_SIDE = 2**14  # pixels; a network's activations of larger images would not fit into any memory


@dataclass
class DataConfig:
    """The images of a run, of a comparison or of a figure, and how each image is decoded."""

    dataset_name: str | None = flag(
        None,
        "'sprites' (built in), a dataset on the Hub, a local dataset folder, a .parquet or .npy file or, with `cell`, "
        "a .png file.",
    )
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, where it has several.")
    dataset_split: str = flag("train", "Split of the dataset.")
    train_data_dir: str | None = flag(
        None, "Folder of images; subfolder names are the classes. Ignored if `dataset_name` is given."
    )
    cache_dir: str | None = flag(None, "Folder in which `datasets` keeps its downloads.", changes="nothing")
    image_column: str | None = flag(None, "Column of the images; found from the features if not given.")
    label_column: str | None = flag(None, "Column of the class labels; found if not given.")
    caption_column: str | None = flag(
        None,
        "Column of captions to train on in place of classes (train_conditional.py), 'txt' for a .txt file beside each "
        "image, or 'auto' for whichever there is, which is also looked for if not given, where there are no classes.",
    )
    labels_file: str | None = flag(None, ".npy file of the labels, (N,) or one-hot (N, K), of a .npy dataset.")
    class_names: list[str] | None = flag(None, "Names of the classes, in order, where the data has none.")
    cell: str | None = flag(
        None,
        "Cut the images out of sprite sheets, whose cells are squares of this side or WIDTHxHEIGHT.",
        changes="pixels",
    )
    sheet_labels: list[str] | None = flag(None, "Class of each row of a sheet that `cell` cuts.")
    max_train_samples: int | None = flag(
        None,
        "Use N images, spread over the classes or, without classes, over the set; of a stream the first; "
        "for 'sprites', how many are drawn (8,000 if not given).",
        at_least=1,
        changes="pixels",
    )
    leave_out_pairs: bool = flag(
        False,
        "Draw no 'sprites' that have one of a tenth of the pairs of colour and part, such as a red cloak, to measure "
        "whether a model draws pairs that it never saw.",
        changes="pixels",
    )
    resolution: str = flag("64", "Side of the images, or WIDTHxHEIGHT.", changes="pixels")
    resize_mode: Literal["crop", "pad", "none"] = flag(
        "crop",
        "How an image of another shape is made to fit, its aspect kept: resize to cover and crop, "
        "resize to fit and pad with `background`, or 'none': refuse images that are not of the resolution.",
        changes="pixels",
    )
    center_crop: bool = flag(False, "Crop the centre, not a random place.", changes="pixels")
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = flag(
        "lanczos", "Resize filter; 'nearest' for pixel art.", changes="pixels"
    )
    image_mode: ImageMode = flag(
        "auto",
        "Channels to train on: grey, colour, colour with transparency, or 'auto': grey or colour, as the data has.",
        changes="pixels",
    )
    background: str = flag(
        "white",
        "Colour under transparent pixels and around padded images; of no use to 'RGBA', where both stay transparent.",
        changes="pixels",
    )
    on_bad_image: Literal["error", "skip"] = flag(
        "error", "What to do about an image that can't be decoded.", changes="pixels"
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_data_dir is None:
            self.dataset_name = BUILT_IN_DATASET
        if type(self.resolution) is int:  # from Python, where a side is a number
            self.resolution = str(self.resolution)
        check_values(self)
        if self.leave_out_pairs and self.dataset_name != BUILT_IN_DATASET:
            raise UserInputError(
                f"--leave_out_pairs is for the built-in sprites: --dataset_name {BUILT_IN_DATASET}, or leave it out"
            )
        class_names = self.class_names or []
        if len(set(class_names)) < len(class_names):
            raise UserInputError(f"--class_names {' '.join(class_names)} has a name twice: each class needs its own")
        self.image_size  # noqa: B018 - raises if --resolution can't be parsed
        if self.cell is not None:
            parse_size("cell", self.cell)
        elif self.sheet_labels is not None:
            raise UserInputError("--sheet_labels belongs to --cell, which says how large the cells of a sheet are")

    @property
    def image_size(self) -> tuple[int, int]:
        """Returns (height, width) in pixels. Raises `UserInputError` if `--resolution` is not a size."""
        return parse_size("resolution", self.resolution)


def parse_size(name: str, text: str) -> tuple[int, int]:
    """Returns the (height, width) in pixels that `--name` gives. Raises `UserInputError` if it is not a size."""
    match = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text)
    if match is None or not all(1 <= int(side) <= MAX_SIDE for side in match.groups(match[1])):
        raise UserInputError(f"--{name} is '{text}': give a side (32) or WIDTHxHEIGHT (24x16), 1 to {MAX_SIDE}")
    width, height = (int(side) for side in match.groups(match[1]))
    return height, width


def parse_data_flags(argv: list[str], run_config: Path | None) -> DataConfig:
    """Returns the data that flags name or, if the flags name none, the data of a run.

    Args:
        argv: Flags of `DataConfig`.
        run_config: The saved configuration of a run; None if there is none.

    Raises:
        UserInputError: For an unknown flag or a wrong value, or if neither names the data.
    """
    parser = make_parser(DataConfig)
    known = [flag.name for flag in fields(DataConfig)]
    names = names_of(argv)
    for name in names:
        if name not in known:
            raise UserInputError(f"unknown flag '--{name}'{suggest(name, known, prefix='--')}")
    run_argv: list[str] = []
    if not {"dataset_name", "train_data_dir"}.intersection(names):
        if run_config is None:
            raise UserInputError("name the images to compare with, by --dataset_name or --train_data_dir")
        values = read_yaml(run_config)
        if not {"dataset_name", "train_data_dir"}.intersection(values):
            raise UserInputError(f"{run_config} names no images: it has {', '.join(map(str, values))} alone")
        saved = {name: value for name, value in values.items() if name in known}
        run_argv = as_flags(saved, run_config, parser, known)
    return DataConfig(**vars(parser.parse_args(run_argv + argv)))
