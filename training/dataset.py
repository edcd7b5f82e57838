"""The path of an image from disk to a batch of tensors in [-1, 1]."""

import glob
import hashlib
import json
import os
import stat
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image, ImageColor, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from training.config import BUILT_IN_DATASET, TrainingConfig
from training.errors import UserInputError, first_line, printable
from training.image_store import ImageStore, decode_once
from training.sprites import CLASS_NAMES, draw_sprites

BUILT_IN_SIZE = 8000
STREAM_HEAD_SIZE = 16  # images that decide the channel count of a stream
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey of more than 8 bits
GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)
DECODING_FLAGS = (  # what a decoded image depends on, besides its source
    *("max_train_samples", "resolution", "resize_mode", "center_crop", "interpolation", "image_mode", "background"),
    "on_bad_image",
)


@dataclass(frozen=True)
class ImageData:
    """What a run trains on."""

    dataset: "StoredImages | StreamedImages"
    num_channels: int
    id2label: dict[int, str] | None  # None where labels were not asked for
    num_images: int | None  # None for a stream
    skipped_images: list[tuple[str, str]]  # (name, reason); of a stream, only what shows before it is read
    source: str
    license: str | None = None  # where the data says it


@dataclass(frozen=True)
class _Source:
    """Images that are not decoded yet."""

    name: str
    identity: tuple[Any, ...]  # changes if an image does
    num_images: int
    images: Iterable[tuple[str, Any]]  # what errors call the image, and an array, file name or encoded image
    class_labels: np.ndarray | None = None  # int64, of these images or more
    class_names: list[str] | None = None
    license: str | None = None


class _BadImageError(Exception):
    """An image that can't be decoded; the message is part of a line."""


class StoredImages(Dataset):
    """Decoded images, gathered a batch at a time.

    Crop places and flips are a function of (seed, epoch, index): neither the order of the images nor the number of
    processes changes them, and a resumed run repeats them.
    """

    def __init__(self, store: ImageStore, class_labels: np.ndarray | None, config: TrainingConfig) -> None:
        self.store = store  # each (C, >= H, >= W)
        self.class_labels = class_labels  # (N,) int64
        self.image_size = config.image_size
        self.random_flip = config.random_flip
        self.seed = config.seed
        self.num_channels = int(store.table[:, 1].max())
        self.dtype = np.uint16 if store.table[:, 4].max() == 2 else np.uint8
        self.max_offsets = store.table[:, 2:4] - np.array(self.image_size)  # (N, 2)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng((self.seed, epoch))
        self.offsets = rng.integers(self.max_offsets, endpoint=True)  # (N, 2), top and left
        self.flips = (rng.random(len(self)) < 0.5) & self.random_flip  # (N,)

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        batch = {"images": torch.from_numpy(self.gather(indices, self.offsets, self.flips))}
        if self.class_labels is not None:
            batch["class_labels"] = torch.from_numpy(self.class_labels[indices])  # (B,)
        return batch

    def gather(self, indices: Iterable[int], offsets: np.ndarray, flips: np.ndarray | None = None) -> np.ndarray:
        """(B, C, H, W) of `dtype`, each image cropped at its row of `offsets` (N, 2)."""
        indices = list(indices)
        pixels = np.empty((len(indices), self.num_channels, *self.image_size), self.dtype)
        for row, i in enumerate(indices):
            image = _crop_and_flip(self.store[i], offsets[i], flips is not None and flips[i], self.image_size)
            # A grey image in a set with colour, and one of 8 bits in a set of 16
            np.multiply(image, 257 if image.dtype != self.dtype else 1, out=pixels[row], dtype=self.dtype)
        return pixels


class StreamedImages(IterableDataset):
    """Images decoded while they are read, one per item.

    Crop place and flip are a function of (seed, epoch, pixels): an image of a stream has no index that all reading
    processes agree on.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        source_name: str,
        image_column: str,
        label_column: str | None,
        class_names: list[str] | None,
        config: TrainingConfig,
    ) -> None:
        self.stream = stream.shuffle(seed=config.seed)
        self.source_name = source_name
        self.image_column = image_column
        self.label_column = label_column
        self.class_names = class_names
        self.config = config
        self.epoch = 0
        head = islice((pixels for pixels, _ in self._read(stream) if isinstance(pixels, np.ndarray)), STREAM_HEAD_SIZE)
        self.num_channels = max(map(len, head), default=0)
        if self.num_channels == 3:
            self.config = replace(config, image_mode="RGB")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        image_size = self.config.image_size
        num_skipped = 0
        for pixels, class_label in self._read(self.stream):
            if isinstance(pixels, tuple):
                num_skipped += 1
                continue
            if len(pixels) != self.num_channels:
                raise UserInputError(
                    f"{self.source_name} begins grey and has colour later: give --image_mode L or RGB"
                )
            rng = np.random.default_rng((self.config.seed, self.epoch, zlib.crc32(pixels.tobytes())))
            offsets = rng.integers(np.subtract(pixels.shape[1:], image_size), endpoint=True)
            flip = rng.random() < 0.5 and self.config.random_flip
            pixels = np.ascontiguousarray(_crop_and_flip(pixels, offsets, flip, image_size))
            # Here and not on the device: 8 and 16 bits may stand in one batch.
            item = {"images": to_model_range(torch.from_numpy(pixels))}  # (C, H, W)
            if class_label is not None:
                item["class_labels"] = torch.tensor(class_label)
            yield item
        if num_skipped:
            tqdm.write(f"{self.source_name}: {num_skipped} images skipped in this pass", file=sys.stderr)

    def _read(self, stream: datasets.IterableDataset) -> Iterator[tuple[np.ndarray | tuple[str, str], int | None]]:
        for example in stream:
            name = _name_image(example[self.image_column], f"an image of {self.source_name}")
            class_label = None
            if self.class_names is not None:
                where = f"{name}, column '{self.label_column}'"
                class_label = _to_class_id(example[self.label_column], self.class_names, where)
            yield _prepare_or_skip(example[self.image_column], name, self.config), class_label


def load_image_data(config: TrainingConfig, with_labels: bool | None) -> ImageData:
    """Finds the images that `config` names and, unless they are streamed, decodes them all.

    Errors in the data so show before the training, not hours later. `with_labels` of None is for labels if there are
    any.
    """
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        raise UserInputError(f"--background {config.background}: give a colour, as 'white' or '#ff8000'") from None
    name = config.dataset_name or ""
    is_array = name.endswith(".npy")
    if config.labels_file and not is_array:
        raise UserInputError("--labels_file belongs to a --dataset_name that is an .npy file")
    if name == BUILT_IN_DATASET or is_array:
        if config.streaming:
            raise UserInputError(f"--streaming can't be used with {name}, which fits into memory: leave it out")
        return _decode_all(_open_arrays(config, with_labels) if is_array else _draw(config, with_labels), config)

    dataset, source_name, skipped_images = _load_dataset(config)
    image_column = _find_column(dataset, datasets.Image, "image_column", config.image_column, source_name)
    if image_column is None:
        raise UserInputError(
            f"{source_name} has no image column: name one by --image_column (columns: {', '.join(dataset.features)})"
        )
    label_column = None
    if with_labels is not False:
        label_column = _find_column(dataset, datasets.ClassLabel, "label_column", config.label_column, source_name)
        if label_column is None and with_labels:
            raise UserInputError(
                f"{source_name} has no label column: name one by --label_column "
                f"(columns: {', '.join(dataset.features)}), or put the images of each class into a folder of its own"
            )
    if isinstance(dataset.features[image_column], datasets.Image):
        # Decoded here instead, where an image that can't be decoded can be named.
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if isinstance(dataset, datasets.IterableDataset):
        data = _open_stream(dataset, source_name, image_column, label_column, config)
    else:
        data = _decode_all(_open_table(dataset, source_name, image_column, label_column, config), config)
    return replace(data, skipped_images=skipped_images + data.skipped_images)


def load_image_file(path: str, config: TrainingConfig) -> torch.Tensor:
    """One image, (C, H, W) float32 in [-1, 1], treated as those of a dataset."""
    try:
        return to_model_range(torch.from_numpy(prepare_image(open_image(path), path, config)))
    except _BadImageError as error:
        raise UserInputError(f"{path} {error}") from None


def make_dataloader(data: ImageData, config: TrainingConfig) -> DataLoader:
    """Shuffled batches of `config.train_batch_size`; the last of an epoch may be smaller."""
    if isinstance(data.dataset, StreamedImages):
        return DataLoader(data.dataset, batch_size=config.train_batch_size, num_workers=config.dataloader_num_workers)
    return DataLoader(
        data.dataset,
        batch_size=config.train_batch_size,
        shuffle=True,
        collate_fn=_keep_batch,
        pin_memory=torch.cuda.is_available(),
    )


def _keep_batch(batch: Any) -> Any:
    return batch


# Sources


def _draw(config: TrainingConfig, with_labels: bool | None) -> _Source:
    images, class_labels, _ = draw_sprites(config.max_train_samples or BUILT_IN_SIZE)
    return _Source(
        f"{BUILT_IN_DATASET} (built in)",
        ("sprites", hashlib.sha256(images.tobytes()).hexdigest()),
        len(images),
        ((f"sprite {row}", image) for row, image in enumerate(images)),
        None if with_labels is False else class_labels,
        None if with_labels is False else _choose_class_names(list(CLASS_NAMES), [], config, "the built-in sprites"),
        license="apache-2.0",
    )


def _open_arrays(config: TrainingConfig, with_labels: bool | None) -> _Source:
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
    stat = os.stat(path)
    return _Source(
        path,
        (os.path.realpath(path), stat.st_size, stat.st_mtime_ns),
        len(images),
        ((f"image {row} of {path}", image) for row, image in enumerate(images)),
        class_labels,
        class_names,
    )


def _read_label_array(path: str, num_images: int, config: TrainingConfig) -> tuple[np.ndarray, list[str]]:
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
    return _to_class_ids(labels.tolist(), known_names, config, where)


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


def _load_dataset(
    config: TrainingConfig,
) -> tuple[datasets.Dataset | datasets.IterableDataset, str, list[tuple[str, str]]]:
    """The dataset, its name, and what can't be used of a folder of images."""
    name, split = config.dataset_name, config.dataset_split
    is_local = True
    skipped_images: list[tuple[str, str]] = []
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
            streaming=config.streaming,
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


def _check_image_files(folder: Path, config: TrainingConfig) -> list[tuple[str, str]]:
    """Finds what `datasets` would pass over in silence: broken links, linked folders, folders that can't be read."""
    endings = Image.registered_extensions()
    errors: list[OSError] = []
    skipped_images = []
    has_images = False
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))  # as `datasets` does
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                skipped_images.append(_skip(str(path), "is a link to a folder, which is not followed", config))
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
                    skipped_images.append(_skip(str(path), "is not a file", config))
            except OSError as error:
                skipped_images.append(_skip(str(path), f"can't be read ({error.strerror})", config))
    for unreadable in errors:
        skipped_images.append(_skip(str(unreadable.filename), f"can't be read ({unreadable.strerror})", config))
    if not has_images:
        raise UserInputError(f"--train_data_dir {folder}: no image in this folder or below (such as .png or .jpg)")
    return skipped_images


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


def _open_table(
    dataset: datasets.Dataset,
    source_name: str,
    image_column: str,
    label_column: str | None,
    config: TrainingConfig,
) -> _Source:
    class_labels = class_names = None
    if label_column is not None:
        known_names = getattr(dataset.features[label_column], "names", None)
        where = f"{source_name}, column '{label_column}'"
        # Of all rows, so that the ids don't depend on `max_train_samples`.
        class_labels, class_names = _to_class_ids(dataset[label_column][:], known_names, config, where)
    num_images = min(len(dataset), config.max_train_samples or len(dataset))
    values = (row[image_column] for row in dataset.select_columns(image_column).select(range(num_images)))
    return _Source(
        source_name,
        (dataset._fingerprint, image_column),
        num_images,
        ((_name_image(value, f"row {row} of {source_name}"), value) for row, value in enumerate(values)),
        class_labels,
        class_names,
        dataset.info.license or None,
    )


def _open_stream(
    stream: datasets.IterableDataset,
    source_name: str,
    image_column: str,
    label_column: str | None,
    config: TrainingConfig,
) -> ImageData:
    class_names = None
    if label_column is not None:
        known_names = getattr(stream.features[label_column], "names", None)
        where = f"{source_name}, column '{label_column}'"
        if known_names is None and config.class_names is None:
            raise UserInputError(f"{where}: a stream's classes are not known in advance: give --class_names")
        class_names = _choose_class_names(known_names, [], config, where)
    if config.max_train_samples is not None:
        stream = stream.take(config.max_train_samples)
    columns = [image_column] if label_column is None else [image_column, label_column]
    dataset = StreamedImages(
        stream.select_columns(columns), source_name, image_column, label_column, class_names, config
    )
    if dataset.num_channels == 0:
        raise UserInputError(f"{source_name} holds no image that can be decoded")
    id2label = None if class_names is None else dict(enumerate(class_names))
    license = stream.info.license or None
    return ImageData(dataset, dataset.num_channels, id2label, None, [], source_name, license)


# Labels


def _to_class_ids(
    labels: list[Any], known_names: list[str] | None, config: TrainingConfig, where: str
) -> tuple[np.ndarray, list[str]]:
    class_names = _choose_class_names(known_names, labels, config, where)
    ids = [_to_class_id(label, class_names, f"{where}, row {row}") for row, label in enumerate(labels)]
    return np.array(ids, dtype=np.int64), class_names


def _choose_class_names(
    known_names: list[str] | None, labels: list[Any], config: TrainingConfig, where: str
) -> list[str]:
    if config.class_names is not None:
        if known_names is not None and len(known_names) != len(config.class_names):
            raise UserInputError(
                f"--class_names gives {len(config.class_names)} names: {where} has {len(known_names)} classes"
            )
        return config.class_names
    if known_names is not None:
        return known_names
    values = [label for label in labels if label is not None]
    if all(isinstance(value, str) for value in values):
        return sorted(set(values))
    if all(isinstance(value, int) for value in values):
        return [str(k) for k in range(max(values, default=-1) + 1)]
    raise UserInputError(f"{where}: labels must be integers or strings")


def _to_class_id(label: Any, class_names: list[str], where: str) -> int:
    if isinstance(label, str):
        if label in class_names:
            return class_names.index(label)
        raise UserInputError(f"{where}: label '{label}' is not one of the classes {', '.join(class_names)}")
    if isinstance(label, int) and 0 <= label < len(class_names):
        return int(label)
    raise UserInputError(
        f"{where}: label {label} is outside of the {len(class_names)} classes, 0 to {len(class_names) - 1}"
    )


# Images


def _decode_all(source: _Source, config: TrainingConfig) -> ImageData:
    store = decode_once(_cache_key(source, config), _read_all(source, config))
    if len(store) == 0:
        raise UserInputError(f"{source.name} holds no image that can be decoded")
    class_labels = source.class_labels
    if class_labels is not None:
        class_labels = np.delete(class_labels[: source.num_images], [row for row, _, _ in store.skipped])
    dataset = StoredImages(store, class_labels, config)
    return ImageData(
        dataset=dataset,
        num_channels=dataset.num_channels,
        id2label=None if source.class_names is None else dict(enumerate(source.class_names)),
        num_images=len(store),
        skipped_images=[(name, reason) for _, name, reason in store.skipped],
        source=source.name,
        license=source.license,
    )


def _cache_key(source: _Source, config: TrainingConfig) -> str:
    """A hash of the images, of how they are asked for, and of the code that decodes them."""
    settings = {name: getattr(config, name) for name in DECODING_FLAGS}
    digest = hashlib.sha256(json.dumps([source.identity, settings, PIL.__version__]).encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def _read_all(source: _Source, config: TrainingConfig) -> Iterator[np.ndarray | tuple[str, str]]:
    """The images, with a bar; for one that is skipped its name and the reason."""
    for name, value in tqdm(
        source.images, desc="reading images", total=source.num_images, unit="image", dynamic_ncols=True
    ):
        yield _prepare_or_skip(value, name, config)


def _prepare_or_skip(value: Any, name: str, config: TrainingConfig) -> np.ndarray | tuple[str, str]:
    try:
        return prepare_image(open_image(value), name, config)
    except _BadImageError as error:
        return _skip(name, str(error), config)


def _skip(name: str, reason: str, config: TrainingConfig) -> tuple[str, str]:
    """An image that can't be used, as it is listed; raises where that is to stop the run."""
    if config.on_bad_image == "error":
        raise UserInputError(f"{name} {reason}: replace it, or give --on_bad_image skip")
    tqdm.write(printable(f"skipped: {name} {reason}"), file=sys.stderr)
    return name, reason


def _name_image(value: Any, where: str) -> str:
    """The file of an image; where it lies inside of a parquet file, `where` and the name that it had."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not value["path"]:
        return where
    return value["path"] if value["bytes"] is None else f"{where} ({value['path']})"


def open_image(value: Any) -> Image.Image:
    """A decoded image, upright, from an (H, W, C) array, a file name, a file's bytes or a `datasets` example."""
    if isinstance(value, np.ndarray):
        return Image.fromarray(value[..., 0] if value.shape[2] == 1 else value)
    if isinstance(value, str | bytes):
        value = {"path": value, "bytes": None} if isinstance(value, str) else {"path": None, "bytes": value}
    if not isinstance(value, dict):
        raise _BadImageError(f"is not an image but {type(value).__name__}")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            return datasets.Image().decode_example(value)  # applies the EXIF orientation
    except UnidentifiedImageError:
        raise _BadImageError("is not an image that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _BadImageError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        if isinstance(error, OSError) and error.strerror:
            raise _BadImageError(f"can't be read ({error.strerror})") from None
        raise _BadImageError(f"can't be decoded ({first_line(error)})") from None


def prepare_image(image: Image.Image, name: str, config: TrainingConfig) -> np.ndarray:
    """-> (C, H, W) uint8, or uint16 where the image has more than 8 bits.

    H and W are `config.image_size`, or one of them is larger where a random place is to be cropped.
    """
    height, width = config.image_size
    if 0 in image.size:
        raise _BadImageError("has no pixels")
    if config.resize_mode == "none" and image.size != (width, height):
        raise UserInputError(
            f"{name} is {image.width}x{image.height}, --resolution {width}x{height}: give --resize_mode crop or pad"
        )
    mode = _choose_mode(image, config)
    # Before the resize, which would mix the hidden colour of transparent pixels into the edges.
    image = _flatten(image, mode, config.background)
    scale = (max if config.resize_mode == "crop" else min)(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise _BadImageError(f"is {image.width}x{image.height}, too thin to be resized to {size[0]}x{size[1]}")
    pixels = np.asarray(image.resize(size, Image.Resampling[config.interpolation.upper()]))
    if pixels.dtype == np.float32:
        pixels = pixels.clip(0, 65535).round().astype(np.uint16)  # a resize may overshoot the range
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)
    if mode == "RGB":
        pixels = np.broadcast_to(pixels, (3, *pixels.shape[1:]))
    if config.resize_mode == "pad":
        return _pad(pixels, (height, width), ImageColor.getcolor(config.background, mode))
    if config.center_crop:
        top, left = np.subtract(pixels.shape[1:], (height, width)) // 2
        pixels = pixels[:, top : top + height, left : left + width]
    return np.ascontiguousarray(pixels)


def _choose_mode(image: Image.Image, config: TrainingConfig) -> str:
    if config.image_mode != "auto":
        return config.image_mode
    red, green, blue = ImageColor.getrgb(config.background)[:3]
    return "L" if image.mode in GREY_MODES and red == green == blue else "RGB"


def _flatten(image: Image.Image, mode: str, background: str) -> Image.Image:
    """Any mode -> `mode`, or 'F' in 0..65535 where it has more than 8 bits: Pillow resizes no other deep mode well."""
    if image.mode in DEEP_MODES:
        white = 1 if image.mode == "F" else 65535
        values = np.asarray(image, dtype=np.float32)  # (H, W)
        if not (values.min() >= 0 and values.max() <= white):
            raise _BadImageError(
                f"has values of {values.min():g} to {values.max():g}, mode {image.mode} should hold 0 to {white}"
            )
        return Image.fromarray(values * (65535 / white))
    try:
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
            image = Image.alpha_composite(canvas, image.convert("RGBA"))
        return image.convert(mode)
    except ValueError as error:  # such as LAB
        raise _BadImageError(f"can't be used ({first_line(error)})") from None


def _pad(pixels: np.ndarray, image_size: tuple[int, int], colour: int | tuple[int, ...]) -> np.ndarray:
    level = np.reshape(colour, (-1, 1, 1)) * (257 if pixels.dtype == np.uint16 else 1)  # 257 * 255 = 65535
    padded = np.empty((len(pixels), *image_size), pixels.dtype)
    padded[:] = level
    top, left = np.subtract(image_size, pixels.shape[1:]) // 2
    padded[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return padded


def _crop_and_flip(pixels: np.ndarray, offsets: np.ndarray, flip: bool, image_size: tuple[int, int]) -> np.ndarray:
    top, left = offsets
    pixels = pixels[:, top : top + image_size[0], left : left + image_size[1]]
    return pixels[:, :, ::-1] if flip else pixels


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 or uint16 -> float32 in [-1, 1]; what is there already passes."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float().div_(torch.iinfo(pixels.dtype).max / 2).sub_(1)
