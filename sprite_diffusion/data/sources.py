"""Sources of images: the built-in sprites, arrays, folders, parquet files and datasets of the Hub."""

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub.utils import HFValidationError, validate_repo_id

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.data.attributes import has_left_out_pair
from sprite_diffusion.data.captions import TEXT_FILES, Captions, clean_caption, find_text_column, read_text_beside
from sprite_diffusion.data.config import BUILT_IN_DATASET, FIND_CAPTIONS, IMAGE_MODES, DataConfig
from sprite_diffusion.data.decoding import SkippedImage, name_image
from sprite_diffusion.data.image_folder import LocalFiles, find_local_files, list_image_folder
from sprite_diffusion.data.labels import choose_class_names, spread_over_classes, to_class_ids
from sprite_diffusion.data.sprites import CLASS_NAMES, draw_sprites

BUILT_IN_SOURCE = f"{BUILT_IN_DATASET} (built in)"
BUILT_IN_SIZE = 8000
BUILT_IN_CAPTIONS = "caption"
MAX_BUILT_IN_SIZE = 10**6  # which take 0.8 GB of memory
STREAM_SHARDS = 64  # of which each reading process takes some


@dataclass(frozen=True)
class Source:
    """Images that are not decoded yet."""

    name: str
    identity: tuple[Any, ...]  # another one if an image changes
    rows: np.ndarray  # of the images, among `num_available`
    num_available: int
    images: Iterable[tuple[str, Any]]  # an image's name in messages, and what `open_image` takes
    array: np.ndarray | None = None  # (N, H, W, C) uint8, where the images are the rows of one
    class_labels: np.ndarray | None = None  # int64, of these images
    class_names: list[str] | None = None
    captions: Captions | None = None  # of these images; None if none are wanted
    license: str | None = None
    skipped_images: Sequence[SkippedImage] = ()  # those that are known before any image is decoded


@dataclass(frozen=True)
class Table:
    """Rows of a dataset that is read by the `datasets` library, at once or as a stream."""

    name: str
    rows: datasets.Dataset | datasets.IterableDataset
    image_column: str
    label_column: str | None  # None if no labels are wanted, or there are none
    caption_column: str | None  # or `TEXT_FILES`; None if no captions are wanted
    skipped_images: list[SkippedImage]  # files of a folder that are in no row
    files: LocalFiles | None  # None if the rows are not on this machine

    @property
    def labels_name(self) -> str:
        """Returns the name of the labels, for messages."""
        return f"{self.name}, column '{self.label_column}'"

    @property
    def text_column(self) -> str:
        """Returns the column that says which caption an image has: that of the image itself for files beside it."""
        column = self.caption_column
        return self.image_column if column is None or column not in self.rows.features else column

    def caption_of(self, row: dict[str, Any], name: str) -> str:
        """Returns the caption of a row, whose image is called `name`. Raises `UserInputError` if it is no text."""
        value = row[self.text_column]
        if self.text_column == self.image_column:
            return read_text_beside(value) or ""
        return clean_caption(value, f"{name}, column '{self.text_column}'")

    @property
    def known_class_names(self) -> list[str] | None:
        """Returns the names of the classes if the label column's type records them, else None."""
        return getattr(self.rows.features[self.label_column], "names", None)


def draw_built_in(config: DataConfig, with_labels: bool | None) -> Source:
    """Draws the built-in sprites. `with_labels` is as in `load_image_data`."""
    if (config.max_train_samples or 0) > MAX_BUILT_IN_SIZE:
        raise UserInputError(f"--max_train_samples {config.max_train_samples}: draw {MAX_BUILT_IN_SIZE:,} at most")
    if config.caption_column not in (None, FIND_CAPTIONS, BUILT_IN_CAPTIONS):
        raise UserInputError(f"--caption_column {config.caption_column}: that of '{BUILT_IN_DATASET}' is caption")
    num_images = config.max_train_samples or BUILT_IN_SIZE
    leave_out = has_left_out_pair if config.leave_out_pairs else None
    images, class_labels, captions = draw_sprites(
        num_images, transparent=config.image_mode == "RGBA", leave_out=leave_out
    )
    return Source(
        BUILT_IN_SOURCE,
        ("sprites", hashlib.sha256(images.tobytes()).hexdigest()),
        np.arange(len(images)),
        len(images),
        ((f"sprite {row}", image) for row, image in enumerate(images)),
        class_labels=None if with_labels is False else class_labels,
        class_names=None
        if with_labels is False
        else choose_class_names(list(CLASS_NAMES), [], config, "the built-in sprites"),
        captions=None if config.caption_column is None else Captions.of(captions),
        license="apache-2.0",
    )


def open_arrays(config: DataConfig, with_labels: bool | None) -> Source:
    """Opens the .npy files of images (N, H, W, C) uint8 and of labels, (N,) or one-hot (N, K).

    `with_labels` is as in `load_image_data`. Raises `UserInputError` if a file is missing or holds something else.
    """
    path = config.dataset_name
    assert path is not None
    images = _load_array(path, "dataset_name")  # (N, H, W, C)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in IMAGE_MODES or images.size == 0:
        raise UserInputError(
            f"--dataset_name {path} holds {images.dtype} {images.shape}: "
            "it must be uint8 (N, H, W, C) with 1, 3 or 4 channels"
        )
    class_labels = class_names = None
    if with_labels and config.labels_file is None:
        raise UserInputError(f"{path} has no labels: name their .npy file by --labels_file")
    if config.labels_file is not None and with_labels is not False:
        class_labels, class_names = _read_label_array(config.labels_file, len(images), config)
    rows = spread_over_classes(class_labels, len(images), config.max_train_samples)
    files = LocalFiles()
    files.add(os.path.realpath(path), os.stat(path))
    return Source(
        path,
        (files.identity,),
        rows,
        len(images),
        ((f"image {row} of {path}", images[row]) for row in rows),
        images,
        None if class_labels is None else class_labels[rows],
        class_names,
    )


def _read_label_array(path: str, num_images: int, config: DataConfig) -> tuple[np.ndarray, list[str]]:
    """Returns what `to_class_ids` does, for the labels (N,) or one-hot (N, K) of an .npy file."""
    labels = _load_array(path, "labels_file")
    source = f"--labels_file {path}"
    if len(labels.shape) not in (1, 2) or labels.dtype.kind not in "biuf":
        raise UserInputError(
            f"{source} holds {labels.dtype} {labels.shape}: it must be integers (N,) or one-hot (N, K)"
        )
    if len(labels) != num_images:
        raise UserInputError(f"{source} has {len(labels)} labels for the {num_images} images of {config.dataset_name}")
    known_names = None
    if labels.ndim == 2:
        is_one_hot = ((labels == 0) | (labels == 1)).all(axis=1) & (labels.sum(axis=1) == 1)
        if not is_one_hot.all():
            row = is_one_hot.argmin()
            raise UserInputError(f"{source}, row {row}: {labels[row].tolist()} is not one-hot: a single 1, the rest 0")
        known_names = [str(k) for k in range(labels.shape[1])]
        labels = labels.argmax(axis=1)
    return to_class_ids(labels.tolist(), known_names, config, source)


def _load_array(path: str, flag: str) -> np.ndarray:
    """Maps the array of an .npy file, named by `--flag`, into memory."""
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except FileNotFoundError:
        raise UserInputError(f"--{flag} {path}: no such file") from None
    except Exception as error:  # NumPy parses the header as Python code, whose errors are of many types
        raise UserInputError(f"--{flag} {path} is not an .npy file of numbers ({first_line(error)})") from None
    if not isinstance(array, np.ndarray):
        raise UserInputError(f"--{flag} {path} is an .npz archive: save its array as .npy")
    return array


def open_table(config: DataConfig, with_labels: bool | None, streaming: bool) -> Table:
    """Opens a folder of images, a parquet file, a local dataset or one of the Hub.

    Without `with_labels=False`, the column of labels is found if there is one. `streaming` is as in `load_image_data`.
    Raises `UserInputError` if the dataset can't be read, or its columns can't be found.
    """
    name, rows, skipped_images, files = _open_dataset(config, streaming)
    if rows.features is None:
        raise UserInputError(f"--streaming: the columns of {name} are not known in advance: leave it out")
    image_column = _find_column(rows.features, datasets.Image, "image_column", config.image_column, name)
    if image_column is None:
        raise UserInputError(
            f"{name} has no image column: name one by --image_column (columns: {', '.join(rows.features)})"
        )
    label_column = None
    if with_labels is not False:
        label_column = _find_column(rows.features, datasets.ClassLabel, "label_column", config.label_column, name)
    if isinstance(rows.features[image_column], datasets.Image):
        # `datasets` would decode the images too, but not name the image that it can't decode.
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    table = Table(name, rows, image_column, label_column, None, skipped_images, files)
    return replace(table, caption_column=_choose_caption_column(table, config))


def find_captions(config: DataConfig, streaming: bool) -> tuple[str | None, Table | None]:
    """Returns the `--caption_column` of the images that `config` names, found if it is not given; None without one.

    It is not looked for where images have classes. Also returns the table of the images, if it was opened to find it.
    Raises `UserInputError` if that can't be read.
    """
    name = config.dataset_name or ""
    if config.caption_column is not None or name == BUILT_IN_DATASET or name.endswith(".npy") or config.cell:
        return config.caption_column, None
    table = open_table(config, with_labels=None, streaming=streaming)
    if table.label_column is None:
        table = replace(table, caption_column=_find_caption_column(table, config))
    return table.caption_column, table


def _choose_caption_column(table: Table, config: DataConfig) -> str | None:
    """Returns the `--caption_column` of a table. Raises `UserInputError` if there is none such."""
    chosen, columns = config.caption_column, ", ".join(table.rows.features)
    if chosen == FIND_CAPTIONS:
        chosen = _find_caption_column(table, config)
        if chosen is None:
            raise UserInputError(
                f"{table.name} has no captions (columns: {columns}): name their --caption_column, or give another "
                "--config to train by class"
            )
    elif chosen not in (None, TEXT_FILES, *table.rows.features):
        raise UserInputError(
            f"--caption_column {chosen}: {table.name} has the columns {columns}; 'txt' is for .txt files beside the "
            "images"
        )
    return chosen


def _find_caption_column(table: Table, config: DataConfig) -> str | None:
    """Returns the `--caption_column` that a table seems to have, None if it has no captions.

    Raises `UserInputError` if it has several.
    """
    found = find_text_column(table.rows.features, table.name)
    if found is None and config.dataset_name is None:  # a folder
        images = table.rows.select_columns(table.image_column)
        found = TEXT_FILES if any(read_text_beside(row[table.image_column]) for row in images) else None
    return found


def _open_dataset(
    config: DataConfig, streaming: bool
) -> tuple[str, datasets.Dataset | datasets.IterableDataset, list[SkippedImage], LocalFiles | None]:
    """Returns the name of a dataset, the dataset, files that can't be used, and all files."""
    if config.dataset_name is None:
        assert config.train_data_dir is not None
        folder = find_image_folder(Path(config.train_data_dir), config.dataset_split)
        found = list_image_folder(folder, config)
        if found.has_only_images:
            rows = found.as_rows()
            shards = min(len(rows), STREAM_SHARDS)  # of which each reading process takes some
            return (
                str(folder),
                rows.to_iterable_dataset(shards) if streaming else rows,
                found.skipped_images,
                found.files,
            )
        # Not by `data_dir`: if some names hold "train", `datasets` would drop the files whose names don't.
        pattern = glob.escape(str(folder)) + "/**"
        rows = _load("imagefolder", f"--train_data_dir {folder}", pattern, "train", config, streaming, found.files)
        return str(folder), rows, found.skipped_images, found.files
    name = config.dataset_name
    flag = f"--dataset_name {name}"
    if name.endswith(".parquet"):
        pattern = glob.escape(name) if Path(name).is_file() else name
        files = find_local_files(glob.glob(pattern))
        return name, _load("parquet", flag, pattern, config.dataset_split, config, streaming, files), [], files
    if Path(name).is_file():
        raise UserInputError(f"{flag} is neither a .npy nor a .parquet: name its folder or, of a sheet, --cell 16x16")
    files = None
    if Path(name).is_dir():
        files = find_local_files(glob.glob(f"{glob.escape(name)}/**", recursive=True))
    else:
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise UserInputError(f"{flag}: no such folder, nor a name on the Hub") from None
    return name, _load(name, flag, None, config.dataset_split, config, streaming, files), [], files


def _load(
    builder: str,
    flag: str,
    pattern: str | None,
    split: str,
    config: DataConfig,
    streaming: bool,
    files: LocalFiles | None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads a dataset with the `datasets` library.

    Args:
        builder: A builder of `datasets`, a local folder of data files or a name on the Hub.
        flag: The flag that names the dataset, and its value, for messages.
        pattern: The data files, which make the split 'train'; None for those that `datasets` finds itself.
        split: The split to load.
        config: Gives the dataset's configuration and the folder for downloads.
        streaming: Whether to read the dataset while it is used.
        files: Those of the dataset, if they are on this machine.

    Raises:
        UserInputError: If the dataset can't be loaded.
    """
    is_local = pattern is not None or Path(builder).is_dir()
    if is_local:  # the bars of local files would flash past; the bar of a download is worth seeing
        datasets.disable_progress_bars()
    load = partial(
        datasets.load_dataset,
        builder,
        config.dataset_config_name,
        data_files=None if pattern is None else {"train": pattern},
        split=split,
        cache_dir=config.cache_dir,
        streaming=streaming,
    )
    try:
        rows = load()
        if files is not None and not streaming:
            # `datasets` knows a file by its time of modification, which a copy may keep.
            copies = [os.stat(copy["filename"]).st_mtime for copy in rows.cache_files]
            if min(copies, default=files.newest_change) < files.newest_change:
                rows = load(download_mode="force_redownload")
        return rows
    except Exception as error:  # builders raise errors of many types on broken data, archives and networks
        split_flag = "" if split == "train" else f", --dataset_split {split}"
        reason = "" if is_local else "no such folder, and on the Hub: "
        raise UserInputError(f"{flag}{split_flag}: {reason}{first_line(error.__cause__ or error)}") from None


def find_image_folder(folder: Path, split: str) -> Path:
    """Returns the subfolder of a split or, for 'train' without a subfolder, the folder itself."""
    if not folder.is_dir():
        raise UserInputError(f"--train_data_dir {folder}: no such folder")
    if Path(split).parts != (split,) or split == "..":
        raise UserInputError(f"--dataset_split '{split}': name a subfolder of {folder}, such as train")
    if (folder / split).is_dir():
        folder = folder / split
    elif split != "train":
        raise UserInputError(f"--dataset_split {split}: {folder} has no subfolder of this name")
    return folder


def _find_column(
    features: datasets.Features, feature_type: type, flag: str, given: str | None, source_name: str
) -> str | None:
    """Returns the column that `--flag` gives or, if it gives none, the only one of a type; None if there is none."""
    if given is not None:
        if given not in features:
            raise UserInputError(f"--{flag} {given}: {source_name} has the columns {', '.join(features)}")
        return given
    found = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    if len(found) > 1:
        raise UserInputError(f"{source_name} has the columns {', '.join(found)}: name one of them by --{flag}")
    return found[0] if found else None


def read_table(table: Table, config: DataConfig) -> Source:
    """Returns the images and labels of a table that is not streamed. Raises `UserInputError` for wrong labels."""
    class_labels = class_names = None
    if table.label_column is not None:
        # The labels of all rows, so that the ids don't depend on `max_train_samples`.
        labels = table.rows[table.label_column][:]
        class_labels, class_names = to_class_ids(labels, table.known_class_names, config, table.labels_name)
    rows = spread_over_classes(class_labels, len(table.rows), config.max_train_samples)
    images = table.rows.select_columns(table.image_column)
    values = (example[table.image_column] for example in (images if len(rows) == len(images) else images.select(rows)))
    captions = None
    if table.caption_column is not None:
        texts = table.rows.select_columns(table.text_column).select(rows)
        captions = Captions.of(
            table.caption_of(text, f"row {row} of {table.name}") for row, text in zip(rows, texts, strict=True)
        )
    return Source(
        table.name,
        (table.rows._fingerprint, "" if table.files is None else table.files.identity, table.image_column),
        rows,
        len(table.rows),
        ((name_image(value, f"row {row} of {table.name}"), value) for row, value in zip(rows, values, strict=True)),
        class_labels=None if class_labels is None else class_labels[rows],
        class_names=class_names,
        captions=captions,
        license=table.rows.info.license or None,
        skipped_images=table.skipped_images,
    )
