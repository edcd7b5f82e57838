"""The path of an image from its source to a batch of tensors in [-1, 1]."""

import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import torch
from PIL import ImageColor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import BUILT_IN_DATASET, DataConfig
from sprite_diffusion.data.decoding import (
    SkippedImage,
    crop_and_flip,
    name_image,
    prepare_or_skip,
    to_model_range,
)
from sprite_diffusion.data.image_store import ImageStore, decode_once
from sprite_diffusion.data.labels import choose_class_names, to_class_id, to_class_ids
from sprite_diffusion.data.sources import (
    Source,
    draw_built_in,
    find_image_column,
    find_label_column,
    open_arrays,
    open_dataset,
    open_table,
)

STREAM_HEAD_SIZE = 16  # images that decide the channel count of a stream


@dataclass(frozen=True)
class ImageData:
    """What a run trains on."""

    dataset: "StoredImages | StreamedImages"
    num_channels: int
    id2label: dict[int, str] | None  # None where labels were not asked for
    num_images: int | None  # None for a stream
    skipped_images: list[SkippedImage]  # of a stream, only those that show before it is read
    source: str
    license: str | None = None  # where the data says it


class StoredImages(Dataset):
    """Decoded images, gathered a batch at a time.

    Crop places and flips are a function of (seed, epoch, index): neither the order of the images nor the number of
    processes changes them, and a resumed run repeats them.
    """

    def __init__(self, store: ImageStore, class_labels: np.ndarray | None, image_size: tuple[int, int]) -> None:
        self.store = store  # each (C, >= H, >= W)
        self.class_labels = class_labels  # (N,) int64
        self.image_size = image_size  # (H, W)
        self.num_channels = int(store.table[:, 1].max())
        self.dtype = np.uint16 if store.table[:, 4].max() == 2 else np.uint8
        self.max_offsets = store.table[:, 2:4] - np.array(self.image_size)  # (N, 2)
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int, seed: int = 0, random_flip: bool = False) -> None:
        """Chooses the crop places and flips of an epoch."""
        rng = np.random.default_rng((seed, epoch))
        self.offsets = rng.integers(self.max_offsets, endpoint=True)  # (N, 2), top and left
        self.flips = (rng.random(len(self)) < 0.5) & random_flip  # (N,)

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        batch = {"images": torch.from_numpy(self.gather(indices, self.offsets, self.flips))}
        if self.class_labels is not None:
            batch["class_labels"] = torch.from_numpy(self.class_labels[indices])  # (B,)
        return batch

    def gather(self, indices: Iterable[int], offsets: np.ndarray, flips: np.ndarray | None = None) -> np.ndarray:
        """Returns images (B, C, H, W) of `dtype`, each cropped at its row of `offsets` (N, 2)."""
        indices = list(indices)
        pixels = np.empty((len(indices), self.num_channels, *self.image_size), self.dtype)
        for row, i in enumerate(indices):
            image = crop_and_flip(self.store[i], offsets[i], flips is not None and flips[i], self.image_size)
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
        config: DataConfig,
    ) -> None:
        self.stream = stream
        self.source_name = source_name
        self.image_column = image_column
        self.label_column = label_column
        self.class_names = class_names
        self.config = config
        head = islice((pixels for pixels, _ in self._read(stream) if isinstance(pixels, np.ndarray)), STREAM_HEAD_SIZE)
        self.num_channels = max(map(len, head), default=0)
        if self.num_channels == 3:
            self.config = replace(config, image_mode="RGB")
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int, seed: int = 0, random_flip: bool = False) -> None:
        """Shuffles the stream for an epoch."""
        self.epoch, self.seed, self.random_flip = epoch, seed, random_flip
        self.shuffled = self.stream.shuffle(seed=seed)
        self.shuffled.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        image_size = self.config.image_size
        num_skipped = 0
        for pixels, class_label in self._read(self.shuffled):
            if isinstance(pixels, SkippedImage):
                num_skipped += 1
                continue
            if len(pixels) != self.num_channels:
                raise UserInputError(
                    f"{self.source_name} begins grey and has colour later: give --image_mode L or RGB"
                )
            rng = np.random.default_rng((self.seed, self.epoch, zlib.crc32(pixels.tobytes())))
            offsets = rng.integers(np.subtract(pixels.shape[1:], image_size), endpoint=True)
            flip = rng.random() < 0.5 and self.random_flip
            pixels = np.ascontiguousarray(crop_and_flip(pixels, offsets, flip, image_size))
            # Here and not on the device: 8 and 16 bits may stand in one batch.
            item = {"images": to_model_range(torch.from_numpy(pixels))}  # (C, H, W)
            if class_label is not None:
                item["class_labels"] = torch.tensor(class_label)
            yield item
        if num_skipped:
            tqdm.write(f"{self.source_name}: {num_skipped} images skipped in this pass", file=sys.stderr)

    def _read(self, stream: datasets.IterableDataset) -> Iterator[tuple[np.ndarray | SkippedImage, int | None]]:
        for example in stream:
            name = name_image(example[self.image_column], f"an image of {self.source_name}")
            class_label = None
            if self.class_names is not None:
                place = f"{name}, column '{self.label_column}'"
                class_label = to_class_id(example[self.label_column], self.class_names, place)
            yield prepare_or_skip(example[self.image_column], name, self.config), class_label


def load_image_data(config: DataConfig, with_labels: bool | None, streaming: bool = False) -> ImageData:
    """Finds the images that `config` names and, unless they are streamed, decodes them all.

    Errors in the data so show before the training, not hours later. With `with_labels` of None, images have labels
    if their source has any. Raises `UserInputError`.
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
        if streaming:
            raise UserInputError(f"--streaming can't be used with {name}, which fits into memory: leave it out")
        open_source = open_arrays if is_array else draw_built_in
        return _decode_all(open_source(config, with_labels), config)

    dataset, source_name, skipped_images = open_dataset(config, streaming)
    image_column = find_image_column(dataset, config.image_column, source_name)
    label_column = find_label_column(dataset, config.label_column, source_name, with_labels)
    if isinstance(dataset.features[image_column], datasets.Image):
        # Decoded here instead, where an image that can't be decoded can be named.
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if isinstance(dataset, datasets.IterableDataset):
        data = _open_stream(dataset, source_name, image_column, label_column, config)
    else:
        data = _decode_all(open_table(dataset, source_name, image_column, label_column, config), config)
    return replace(data, skipped_images=skipped_images + data.skipped_images)


def load_tensor(
    images: torch.Tensor, config: DataConfig, class_labels: torch.Tensor | list[Any] | None = None
) -> ImageData:
    """Returns images that are in memory already, to train on.

    Args:
        images: uint8 (N, C, H, W) of 1 or 3 channels, in the resolution of `config` or larger, which is then cropped.
        config: Where the resolution stands, and `class_names` if the classes have names.
        class_labels: Ids 0..K-1 or names (N,); None for images without classes.

    Raises:
        UserInputError: If the images are of another kind, or the labels do not fit them.
    """
    pixels = images.detach().cpu().numpy()
    height, width = config.image_size
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or len(pixels) == 0:
        raise UserInputError(
            f"images are {images.dtype} {tuple(images.shape)}: they must be uint8 (N, C, H, W) with 1 or 3 channels"
        )
    if pixels.shape[2] < height or pixels.shape[3] < width:
        raise UserInputError(
            f"--resolution {config.resolution}: the images are smaller, {pixels.shape[3]}x{pixels.shape[2]}"
        )
    ids = class_names = None
    if class_labels is not None:
        values = class_labels.tolist() if isinstance(class_labels, torch.Tensor) else list(class_labels)
        if len(values) != len(pixels):
            raise UserInputError(f"{len(values)} class labels for {len(pixels)} images: give one for each")
        ids, class_names = to_class_ids(values, None, config, "class_labels")
    return _as_image_data(ImageStore.from_array(pixels), ids, class_names, config, "images in memory", None)


def make_dataloader(data: ImageData, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Returns shuffled batches; the last of an epoch may be smaller. `num_workers` processes read a stream."""
    if isinstance(data.dataset, StreamedImages):
        return DataLoader(data.dataset, batch_size=batch_size, num_workers=num_workers)
    return DataLoader(
        data.dataset,
        batch_size=batch_size,
        shuffle=True,
        collate_fn=_keep_batch,
        pin_memory=torch.cuda.is_available(),
    )


def _keep_batch(batch: Any) -> Any:
    return batch


def _open_stream(
    stream: datasets.IterableDataset,
    source_name: str,
    image_column: str,
    label_column: str | None,
    config: DataConfig,
) -> ImageData:
    class_names = None
    if label_column is not None:
        known_names = getattr(stream.features[label_column], "names", None)
        place = f"{source_name}, column '{label_column}'"
        if known_names is None and config.class_names is None:
            raise UserInputError(f"{place}: a stream's classes are not known in advance: give --class_names")
        class_names = choose_class_names(known_names, [], config, place)
    if config.max_train_samples is not None:
        stream = stream.take(config.max_train_samples)
    columns = [image_column] if label_column is None else [image_column, label_column]
    dataset = StreamedImages(
        stream.select_columns(columns), source_name, image_column, label_column, class_names, config
    )
    if dataset.num_channels == 0:
        raise UserInputError(f"{source_name} holds no image that can be decoded")
    id2label = None if class_names is None else dict(enumerate(class_names))
    return ImageData(dataset, dataset.num_channels, id2label, None, [], source_name, stream.info.license or None)


def _decode_all(source: Source, config: DataConfig) -> ImageData:
    store = decode_once(_cache_key(source, config), _read_all(source, config))
    if len(store) == 0:
        raise UserInputError(f"{source.name} holds no image that can be decoded")
    class_labels = source.class_labels
    if class_labels is not None:
        class_labels = np.delete(class_labels[: source.num_images], [row for row, _ in store.skipped])
    return _as_image_data(store, class_labels, source.class_names, config, source.name, source.license)


def _as_image_data(
    store: ImageStore,
    class_labels: np.ndarray | None,
    class_names: list[str] | None,
    config: DataConfig,
    source_name: str,
    license: str | None,
) -> ImageData:
    dataset = StoredImages(store, class_labels, config.image_size)
    return ImageData(
        dataset=dataset,
        num_channels=dataset.num_channels,
        id2label=None if class_names is None else dict(enumerate(class_names)),
        num_images=len(store),
        skipped_images=[image for _, image in store.skipped],
        source=source_name,
        license=license,
    )


def _cache_key(source: Source, config: DataConfig) -> str:
    """Returns a hash of the images, of the flags that change a pixel, and of the code that decodes."""
    flags = {
        flag.name: getattr(config, flag.name) for flag in fields(DataConfig) if flag.metadata["changes"] == "pixels"
    }
    digest = hashlib.sha256(json.dumps([source.identity, flags, PIL.__version__]).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _read_all(source: Source, config: DataConfig) -> Iterator[np.ndarray | SkippedImage]:
    """Decodes the images, with a progress bar."""
    for name, value in tqdm(
        source.images, desc="reading images", total=source.num_images, unit="image", dynamic_ncols=True
    ):
        yield prepare_or_skip(value, name, config)
