"""Captions: from the texts of a column, or of files beside the images, to the distinct ones, each with its id."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from sprite_diffusion.common.errors import UserInputError, first_line

CAPTION_NAMES = ("caption", "captions", "text", "prompt", "description")
TEXT_FILES = "txt"  # as `--caption_column`: a .txt file beside each image
STRING_TYPES = ("string", "large_string")
NO_CAPTION = 0  # the id of the empty caption, which stands for an image of anything


@dataclass(frozen=True)
class Captions:
    """The distinct captions of some images, of which the first is the empty one, and the caption of each image."""

    texts: list[str]
    ids: np.ndarray  # int64, of each image

    @classmethod
    def of(cls, captions: Iterable[str]) -> "Captions":
        """Numbers the captions of images in the order in which they appear first."""
        ids: dict[str, int] = {"": NO_CAPTION}
        numbers = [ids.setdefault(caption, len(ids)) for caption in captions]
        return cls(list(ids), np.array(numbers, np.int64))


def clean_caption(value: Any, source: str) -> str:
    """Returns a caption without space around it; the empty one for None.

    Raises `UserInputError`, which names `source`, if the value is no text.
    """
    if not isinstance(value, str | None):
        raise UserInputError(f"{source}: the caption is {value!r}, which is no text: name another --caption_column")
    return (value or "").strip()


def find_text_column(features: datasets.Features, source: str) -> str | None:
    """Returns the only column of texts that has the name of captions; None if there is none.

    Raises `UserInputError` if there are several.
    """
    found = [
        name
        for name, feature in features.items()
        if name.lower() in CAPTION_NAMES and getattr(feature, "dtype", None) in STRING_TYPES
    ]
    if len(found) > 1:
        raise UserInputError(f"{source} has the columns {', '.join(found)}: name one of them by --caption_column")
    return found[0] if found else None


def read_text_beside(image: Any) -> str | None:
    """Returns the text of the .txt file beside an image; None if there is no such file.

    `image` is an example of `datasets` that is not decoded. Raises `UserInputError` if the file can't be read.
    """
    path = image["path"] if isinstance(image, dict) and image["bytes"] is None else None
    if path is None or not (file := Path(path).with_suffix(".txt")).is_file():
        return None
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"{file} can't be read ({first_line(error)}): mend or remove it") from None
