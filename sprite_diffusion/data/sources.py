"""Where images come from: the built-in sprites, arrays, folders, parquet files and datasets of the Hub."""

import glob
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.data.config import BUILT_IN_DATASET, DataConfig
from sprite_diffusion.data.decoding import SkippedImage, name_image, skip_image
from sprite_diffusion.data.labels import choose_class_names, to_class_ids
from sprite_diffusion.data.sprites import CLASS_NAMES, draw_sprites

BUILT_IN_SIZE = 8000


@dataclass(frozen=True)
class Source:
    """Images that are not decoded yet."""

    name: str
    identity: tuple[Any, ...]  # changes if an image does
    num_images: int
    images: Iterable[tuple[str, Any]]  # what errors call the image, and an array, file name or encoded image
    class_labels: np.ndarray | None = None  # int64, of these images or more
    class_names: list[str] | None = None
    license: str | None = None


def draw_built_in(config: DataConfig, with_labels: bool | None) -> Source:
    images, class_labels, _ = draw_sprites(config.max_train_samples or BUILT_IN_SIZE)
    return Source(
        f"{BUILT_IN_DATASET} (built in)",
        ("sprites", hashlib.sha256(images.tobytes()).hexdigest()),
        len(images),
        ((f"sprite {row}", image) for row, image in enumerate(images)),
        None if with_labels is False else class_labels,
        None if with_labels is False else choose_class_names(list(CLASS_NAMES), [], config, "the built-in sprites"),
        license="apache-2.0",
    )


def open_arrays(config: DataConfig, with_labels: bool | None) -> Source:
    path = config.dataset_name
    assert path is not None
    images = _load_array(path, "dataset_name")  # (N, H, W, C)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3, 4) or images.size == 0:
        raise UserInputError(
            f"--dataset_name {path} holds {images.dtype} {images.shape}: "
            "it must be uint8 (N, H, W, C) with 1, 3 or 4 channels"
        )
    class_labels = class_names = None
    if with_labels and config.labels_file is None:
        raise UserInputError(f"{path} has no labels: name their .npy file by --labels_file")
    if config.labels_file is not None and with_labels is not False:
        class_labels, class_names = _read_label_array(config.labels_file, len(images), config)
    images = images[: config.max_train_samples]
    status = os.stat(path)
    return Source(
        path,
        (os.path.realpath(path), status.st_size, status.st_mtime_ns),
        len(images),
        ((f"image {row} of {path}", image) for row, image in enumerate(images)),
        class_labels,
        class_names,
    )


def _read_label_array(path: str, num_images: int, config: DataConfig) -> tuple[np.ndarray, list[str]]:
    labels = _load_array(path, "labels_file")  # (N,) or (N, K)
    where = f"--labels_file {path}"
    if len(labels.shape) not in (1, 2) or labels.dtype.kind not in "biuf":
        raise UserInputError(
            f"{where} holds {labels.dtype} {labels.shape}: it must be integers (N,) or one-hot (N, K)"
        )
    if len(labels) != num_images:
        raise UserInputError(f"{where} has {len(labels)} labels for the {num_images} images of {config.dataset_name}")
    known_names = None
    if labels.ndim == 2:
        is_one_hot = ((labels == 0) | (labels == 1)).all(axis=1) & (labels.sum(axis=1) == 1)
        if not is_one_hot.all():
            row = is_one_hot.argmin()
            raise UserInputError(f"{where}, row {row}: {labels[row].tolist()} is not one-hot: a single 1, the rest 0")
        known_names = [str(k) for k in range(labels.shape[1])]
        labels = labels.argmax(axis=1)
    return to_class_ids(labels.tolist(), known_names, config, where)


def _load_array(path: str, flag: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except FileNotFoundError:
        raise UserInputError(f"--{flag} {path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserInputError(f"--{flag} {path} is not an .npy file of numbers ({first_line(error)})") from None
    if not isinstance(array, np.ndarray):
        raise UserInputError(f"--{flag} {path} is an .npz archive: save its array as .npy")
    return array


def open_dataset(
    config: DataConfig, streaming: bool
) -> tuple[datasets.Dataset | datasets.IterableDataset, str, list[SkippedImage]]:
    """The dataset, its name, and what can't be used of a folder of images."""
    name, split = config.dataset_name, config.dataset_split
    is_local = True
    skipped_images: list[SkippedImage] = []
    files: dict[str, str] | None = None
    if name is None:
        assert config.train_data_dir is not None
        folder, split = _find_image_folder(Path(config.train_data_dir), split), "train"
        skipped_images = _check_image_files(folder, config)
        builder, flag, source_name = "imagefolder", "train_data_dir", str(folder)
        # A pattern, as `data_dir` drops the files whose names don't hold "train" where some names do.
        files = {"train": glob.escape(str(folder)) + "/**"}
    elif name.endswith(".parquet"):
        builder, flag, source_name = "parquet", "dataset_name", name
        files = {"train": glob.escape(name) if Path(name).is_file() else name}
    else:
        builder, flag, source_name = name, "dataset_name", name
        is_local = Path(name).is_dir()
        if not is_local:
            try:
                validate_repo_id(name)
            except HFValidationError:
                raise UserInputError(f"--dataset_name {name}: no such folder, nor a name on the Hub") from None
    if is_local:  # these bars would flash past; a download's is worth seeing
        datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(
            builder,
            config.dataset_config_name,
            data_files=files,
            split=split,
            cache_dir=config.cache_dir,
            streaming=streaming,
        )
    except Exception as error:  # builders raise whatever broken data, archives and the network lead them to
        where = f"--{flag} {source_name}" + ("" if split == "train" else f", --dataset_split {split}")
        reason = "" if is_local else "no such folder, and on the Hub: "
        raise UserInputError(f"{where}: {reason}{first_line(error.__cause__ or error)}") from None
    if dataset.features is None:
        raise UserInputError(f"--streaming: the columns of {source_name} are not known in advance: leave it out")
    return dataset, source_name, skipped_images


def _find_image_folder(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise UserInputError(f"--train_data_dir {folder}: no such folder")
    if (folder / split).is_dir():
        folder = folder / split
    elif split != "train":
        raise UserInputError(f"--dataset_split {split}: {folder} has no subfolder of this name")
    return folder


def _check_image_files(folder: Path, config: DataConfig) -> list[SkippedImage]:
    """Finds what `datasets` would pass over in silence: broken links, linked folders, folders that can't be read."""
    endings = Image.registered_extensions()
    errors: list[OSError] = []
    skipped_images = []
    has_images = False
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))  # as `datasets` does
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                skipped_images.append(skip_image(str(path), "is a link to a folder, which is not followed", config))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            try:
                str(path).encode()
            except UnicodeEncodeError:  # one such name, of whatever file, and `datasets` refuses the folder
                raise UserInputError(f"{path}: the name is not UTF-8, rename this file") from None
            if path.suffix.lower() not in endings:
                continue
            try:
                if stat.S_ISREG(path.stat().st_mode):
                    has_images = True
                else:
                    skipped_images.append(skip_image(str(path), "is not a file", config))
            except OSError as error:
                skipped_images.append(skip_image(str(path), f"can't be read ({error.strerror})", config))
    for unreadable in errors:
        skipped_images.append(skip_image(str(unreadable.filename), f"can't be read ({unreadable.strerror})", config))
    if not has_images:
        raise UserInputError(f"--train_data_dir {folder}: no image in this folder or below (such as .png or .jpg)")
    return skipped_images


def find_image_column(dataset: Any, given: str | None, source_name: str) -> str:
    """Returns the column of the images: `--image_column`, or the only one of images. Raises `UserInputError`."""
    column = _find_column(dataset, datasets.Image, "image_column", given, source_name)
    if column is None:
        raise UserInputError(
            f"{source_name} has no image column: name one by --image_column (columns: {', '.join(dataset.features)})"
        )
    return column


def find_label_column(dataset: Any, given: str | None, source_name: str, with_labels: bool | None) -> str | None:
    """Returns the column of the class labels: `--label_column`, or the only one of labels; None if none are wanted.

    Raises `UserInputError` if there is none and `with_labels` is True.
    """
    if with_labels is False:
        return None
    column = _find_column(dataset, datasets.ClassLabel, "label_column", given, source_name)
    if column is None and with_labels:
        raise UserInputError(
            f"{source_name} has no label column: name one by --label_column "
            f"(columns: {', '.join(dataset.features)}), or put the images of each class into a folder of its own"
        )
    return column


def _find_column(dataset: Any, feature_type: type, flag: str, given: str | None, source_name: str) -> str | None:
    columns = dataset.features
    if given is not None:
        if given not in columns:
            raise UserInputError(f"--{flag} {given}: {source_name} has the columns {', '.join(columns)}")
        return given
    found = [name for name, feature in columns.items() if isinstance(feature, feature_type)]
    if len(found) > 1:
        raise UserInputError(f"{source_name} has the columns {', '.join(found)}: name one of them by --{flag}")
    return found[0] if found else None


def open_table(
    dataset: datasets.Dataset,
    source_name: str,
    image_column: str,
    label_column: str | None,
    config: DataConfig,
) -> Source:
    class_labels = class_names = None
    if label_column is not None:
        known_names = getattr(dataset.features[label_column], "names", None)
        where = f"{source_name}, column '{label_column}'"
        # Of all rows, so that the ids don't depend on `max_train_samples`.
        class_labels, class_names = to_class_ids(dataset[label_column][:], known_names, config, where)
    num_images = min(len(dataset), config.max_train_samples or len(dataset))
    values = (row[image_column] for row in dataset.select_columns(image_column).select(range(num_images)))
    return Source(
        source_name,
        (dataset._fingerprint, image_column),
        num_images,
        ((name_image(value, f"row {row} of {source_name}"), value) for row, value in enumerate(values)),
        class_labels,
        class_names,
        dataset.info.license or None,
    )
