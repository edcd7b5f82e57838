"""Class labels: from the values of a column or an array to ids 0..K-1 and the names of the K classes."""

from typing import Any

import numpy as np

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import DataConfig


def to_class_ids(
    labels: list[Any], known_names: list[str] | None, config: DataConfig, source: str
) -> tuple[np.ndarray, list[str]]:
    """Returns the ids (N,) int64 of labels, and the names of the classes.

    Args:
        labels: Integers or strings (N,).
        known_names: The names of the classes, in order, if the data has names.
        config: `class_names` of the user, if given.
        source: The column, file or argument of the labels, for messages.

    Raises:
        UserInputError: If a label is of no class, or the names do not fit the labels.
    """
    class_names = choose_class_names(known_names, labels, config, source)
    ids = [to_class_id(label, class_names, f"{source}, row {row}") for row, label in enumerate(labels)]
    return np.array(ids, dtype=np.int64), class_names


def choose_class_names(known_names: list[str] | None, labels: list[Any], config: DataConfig, source: str) -> list[str]:
    """Returns the names of the classes: the user's, the data's, or names made from the labels.

    Strings are classes in alphabetical order; integers make the classes '0' to the largest. The arguments and errors
    are those of `to_class_ids`.
    """
    if config.class_names is not None:
        if known_names is not None and len(known_names) != len(config.class_names):
            raise UserInputError(
                f"--class_names gives {len(config.class_names)} names: {source} has {len(known_names)} classes"
            )
        return config.class_names
    if known_names is not None:
        return known_names
    values = [label for label in labels if label is not None]
    if all(isinstance(value, str) for value in values):
        return sorted(set(values))
    if all(isinstance(value, int) for value in values):
        return [str(k) for k in range(max(values, default=-1) + 1)]
    raise UserInputError(f"{source}: labels must be integers or strings")


def to_class_id(label: Any, class_names: list[str], source: str) -> int:
    """Returns the id of one label. Raises `UserInputError`, which names `source`, if the label is of no class."""
    if isinstance(label, str):
        if label in class_names:
            return class_names.index(label)
        raise UserInputError(f"{source}: label '{label}' is not one of the classes {', '.join(class_names)}")
    if isinstance(label, int) and 0 <= label < len(class_names):
        return int(label)
    raise UserInputError(
        f"{source}: label {label} is outside of the {len(class_names)} classes, 0 to {len(class_names) - 1}"
    )
