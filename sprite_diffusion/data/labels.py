"""Class labels: from the values of a column or an array to ids 0..K-1 and the names of the K classes."""

from typing import Any

import numpy as np

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import DataConfig

SURELY_FITTING_CLASSES = 10_000


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
        largest = max(values, default=-1)
        if largest >= max(len(values), SURELY_FITTING_CLASSES):  # the names of so many might fill the memory
            raise UserInputError(
                f"{source}: integer labels are 0 to K-1 for K classes, and {len(values):,} images can't have a class "
                f"{largest}: number the classes anew"
            )
        return [str(k) for k in range(largest + 1)]
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


def check_each_has_images(class_labels: np.ndarray, class_names: list[str], source: str) -> None:
    """Raises `UserInputError` if a class is without images: a model would have its name, and know nothing of it."""
    counts = np.bincount(class_labels, minlength=len(class_names))
    if empty := [name for name, count in zip(class_names, counts, strict=True) if count == 0]:
        raise UserInputError(
            f"{source}: no image is of the class {', '.join(empty)}: give it some, leave its name out, raise "
            "--max_train_samples, or number the classes without gaps"
        )


def rank_in_class(class_labels: np.ndarray) -> np.ndarray:
    """Returns the place (N,) of each image among those of the same class, from 0 on, in their order."""
    order = np.argsort(class_labels, kind="stable")
    sorted_labels = class_labels[order]
    rank = np.empty(len(class_labels), np.int64)
    rank[order] = np.arange(len(class_labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return rank


def spread_over_classes(class_labels: np.ndarray | None, num_images: int, limit: int | None) -> np.ndarray:
    """Returns the rows (n,) of at most `limit` images: of each class the first, as many of each as there are.

    Without labels the rows are spread evenly: files are often sorted by what they show.
    """
    if limit is None or limit >= num_images:
        return np.arange(num_images)
    if class_labels is None:
        return np.arange(limit) * num_images // limit
    return np.sort(np.lexsort((class_labels, rank_in_class(class_labels)))[:limit])
