"""The path of an image from its source to a batch of tensors."""

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
import xxhash
from PIL import ImageColor
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.captions import NO_CAPTION, Captions, clean_caption
from sprite_diffusion.data.config import BUILT_IN_DATASET, IMAGE_MODES, DataConfig
from sprite_diffusion.data.decoding import (
    SkippedImage,
    choose_mode,
    crop_and_flip,
    name_image,
    premultiply,
    prepare_or_skip,
    to_model_range,
)
from sprite_diffusion.data.image_store import ImageStore, decode_once
from sprite_diffusion.data.labels import check_each_has_images, choose_class_names, to_class_id, to_class_ids
from sprite_diffusion.data.sheets import cut_sheets
from sprite_diffusion.data.sources import Source, Table, draw_built_in, open_arrays, open_table, read_table

STREAM_HEAD_SIZE = 16  # images that decide the channel count of a stream


@dataclass(frozen=True)
class ImageData:
    """Images to train on, and facts about them."""

    dataset: "StoredImages | StreamedImages"
    class_names: list[str] | None  # None for images without labels
    skipped_images: list[SkippedImage]  # of a stream, only those that are found before an image is decoded
    source: str  # the name of the data, for messages and the model card
    license: str | None = None  # if the data names one
    num_available: int | None = None  # of which `max_train_samples` are used; None for a stream
    held_out: "StoredImages | None" = None  # images that are not trained on

    @property
    def identity(self) -> str | None:
        """Returns a hash of all pixels, labels and captions; None for a stream."""
        return self.dataset.identity if isinstance(self.dataset, StoredImages) else None

    @property
    def num_channels(self) -> int:
        """Returns 1 for grey images, 3 for colour, 4 for colours times alpha, and alpha."""
        return self.dataset.num_channels

    @property
    def captions(self) -> list[str] | None:
        """Returns the distinct captions of the images, the empty one first; None for images without captions."""
        return None if self.dataset.captions is None else self.dataset.captions.texts

    @property
    def num_images(self) -> int | None:
        """Returns the number of images, without the skipped ones; None for a stream."""
        return len(self.dataset) if isinstance(self.dataset, StoredImages) else None

    @property
    def id2label(self) -> dict[int, str] | None:
        """Returns the names of the classes by their ids 0..K-1; None for images without labels."""
        return None if self.class_names is None else dict(enumerate(self.class_names))


class StoredImages(Dataset):
    """Decoded images, gathered a batch at a time.

    Crops and flips are a function of (seed, epoch, index): neither the order of the images nor the number of processes
    changes them, and a resumed run repeats them.
    """

    def __init__(
        self,
        store: ImageStore,
        class_labels: np.ndarray | None,
        image_size: tuple[int, int],
        captions: Captions | None = None,
    ) -> None:
        self.store = store  # each (C, >= H, >= W)
        self.class_labels = class_labels  # (N,) int64
        self.captions = captions
        self.image_size = image_size  # (H, W)
        self.num_channels = int(store.table[:, 1].max())
        self.dtype = np.uint16 if store.table[:, 4].max() == 2 else np.uint8
        self.max_offsets = store.table[:, 2:4] - np.array(self.image_size)  # (N, 2)
        self.begin_epoch(0)

    @property
    def identity(self) -> str:
        """A hash of all pixels, labels and captions."""
        digest = xxhash.xxh3_128(self.store.digest.encode())
        if self.class_labels is not None:
            digest.update(self.class_labels.tobytes())
        if self.captions is not None:
            digest.update(self.captions.ids.tobytes() + json.dumps(self.captions.texts).encode())
        return digest.hexdigest()

    def select(self, rows: np.ndarray) -> "StoredImages":
        """Returns the images of some rows."""
        labels = None if self.class_labels is None else self.class_labels[rows]
        captions = None if self.captions is None else Captions(self.captions.texts, self.captions.ids[rows])
        return StoredImages(self.store.select(rows), labels, self.image_size, captions)

    def begin_epoch(self, epoch: int, seed: int = 0, random_flip: bool = False) -> None:
        """Chooses the crops and flips of an epoch."""
        rng = np.random.default_rng((seed, epoch))
        self.offsets = rng.integers(self.max_offsets, endpoint=True)  # (N, 2), top and left
        self.flips = (rng.random(len(self)) < 0.5) & random_flip  # (N,)

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Returns "images" (B, C, H, W), uint8 or uint16, and what `read_ids` does."""
        return {"images": torch.from_numpy(self.gather(indices, self.offsets, self.flips)), **self.read_ids(indices)}

    def read_ids(self, indices: list[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Returns "class_labels" (B,) and "caption_ids" (B,), the numbers of captions, int64, as far as there are."""
        ids: dict[str, torch.Tensor] = {}
        if self.class_labels is not None:
            ids["class_labels"] = torch.from_numpy(self.class_labels[indices])
        if self.captions is not None:
            ids["caption_ids"] = torch.from_numpy(self.captions.ids[indices])
        return ids

    def gather(self, indices: Iterable[int], offsets: np.ndarray, flips: np.ndarray | None = None) -> np.ndarray:
        """Returns images (B, C, H, W) of the dataset's `dtype`, cropped and flipped.

        Args:
            indices: The images (B,).
            offsets: The top and left of each image's crop (N, 2), for all images of the dataset.
            flips: Whether to mirror each image (N,); None for no image.
        """
        indices = list(indices)
        pixels = np.empty((len(indices), self.num_channels, *self.image_size), self.dtype)
        for row, i in enumerate(indices):
            image = crop_and_flip(self.store[i], offsets[i], flips is not None and flips[i], self.image_size)
            # NumPy repeats a grey image in a set with colour. In a set of 16 bits, 255 becomes 257 * 255 = 65535.
            np.multiply(image, 257 if image.dtype != self.dtype else 1, out=pixels[row], dtype=self.dtype)
        return pixels

    def read_centred(self, indices: Iterable[int]) -> torch.Tensor:
        """Returns images (B, C, H, W) as uint8, cropped in the centre, never flipped; 16 bits are rounded to 8."""
        pixels = self.gather(indices, self.max_offsets // 2)
        if pixels.dtype == np.uint16:
            pixels = (pixels / 257).round().astype(np.uint8)  # 257 * 255 = 65535
        return torch.from_numpy(pixels)


class StreamedImages(IterableDataset):
    """Images decoded while they are read, one per item.

    Crop and flip are a function of (seed, epoch, pixels): an image of a stream has no index that all reading processes
    agree on.
    """

    def __init__(
        self, table: Table, class_names: list[str] | None, captions: Captions | None, config: DataConfig
    ) -> None:
        self.table = table
        self.class_names = class_names
        self.captions = captions
        self._caption_ids = {} if captions is None else {text: id for id, text in enumerate(captions.texts)}
        self.config = config
        decoded = (pixels for pixels, *_ in self._read(table.rows) if isinstance(pixels, np.ndarray))
        self.num_channels = max(map(len, islice(decoded, STREAM_HEAD_SIZE)), default=0)
        if self.num_channels == 3:
            self.config = replace(config, image_mode="RGB")
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int, seed: int = 0, random_flip: bool = False) -> None:
        """Shuffles the stream for an epoch."""
        self.epoch, self.seed, self.random_flip = epoch, seed, random_flip
        self.shuffled = self.table.rows.shuffle(seed=seed)
        self.shuffled.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields "images" (C, H, W) float32 in [-1, 1], and "class_labels" and "caption_ids" (), int64, if any."""
        image_size = self.config.image_size
        num_skipped = 0
        for pixels, class_label, caption_id in self._read(self.shuffled):
            if isinstance(pixels, SkippedImage):
                num_skipped += 1
                continue
            if len(pixels) != self.num_channels:
                raise UserInputError(f"{self.table.name} begins grey and has colour later: give --image_mode L or RGB")
            rng = np.random.default_rng((self.seed, self.epoch, zlib.crc32(pixels.tobytes())))
            offsets = rng.integers(np.subtract(pixels.shape[1:], image_size), endpoint=True)
            flip = rng.random() < 0.5 and self.random_flip
            pixels = crop_and_flip(pixels, offsets, flip, image_size).copy()  # torch takes no mirrored view
            # Not left to the training, which converts whole batches: here 8 and 16 bits may stand in one batch.
            item = {"images": to_model_range(torch.from_numpy(pixels))}  # (C, H, W)
            if class_label is not None:
                item["class_labels"] = torch.tensor(class_label)
            if caption_id is not None:
                item["caption_ids"] = torch.tensor(caption_id)
            yield item
        if num_skipped:
            tqdm.write(f"{self.table.name}: {num_skipped} images skipped in this pass", file=sys.stderr)

    def _read(
        self, rows: datasets.IterableDataset
    ) -> Iterator[tuple[np.ndarray | SkippedImage, int | None, int | None]]:
        """Yields each image, decoded or skipped, with the ids of its class and its caption where there are any."""
        image_column, label_column = self.table.image_column, self.table.label_column
        for row in rows:
            name = name_image(row[image_column], f"an image of {self.table.name}")
            class_label = None
            if self.class_names is not None:
                class_label = to_class_id(row[label_column], self.class_names, f"{name}, column '{label_column}'")
            caption_id = None
            if self.captions is not None:  # of a row that has appeared since they were read, none
                caption_id = self._caption_ids.get(self.table.caption_of(row, name), NO_CAPTION)
            yield prepare_or_skip(row[image_column], name, self.config), class_label, caption_id


def load_image_data(
    config: DataConfig, with_labels: bool | None, streaming: bool = False, table: Table | None = None
) -> ImageData:
    """Finds the images that `config` names and, unless they are streamed, decodes them all.

    So errors in the data show before the training, not hours later.

    Args:
        config: The source of the images, and how to decode them.
        with_labels: Whether to read class labels; None for those that the source has, if any.
        streaming: Whether to decode images while they are used.
        table: That of the images, if `find_captions` has opened it.

    Raises:
        UserInputError: For a source, image or label that can't be used.
    """
    opened = open_images(config, with_labels, streaming, table)
    return _open_stream(opened, config) if isinstance(opened, Table) else _decode_all(opened, config, with_labels)


def open_images(
    config: DataConfig, with_labels: bool | None, streaming: bool = False, table: Table | None = None
) -> Source | Table:
    """Finds the images that `config` names, and decodes none. The arguments and errors are those of `load_image_data`.

    Returns a `Table` of images that are to be streamed, else a `Source`.
    """
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        raise UserInputError(f"--background {config.background}: give a colour, as 'white' or '#ff8000'") from None
    name = config.dataset_name or ""
    is_array = name.endswith(".npy")
    if config.labels_file and not is_array:
        raise UserInputError("--labels_file belongs to a --dataset_name that is an .npy file")
    if not is_array and name != BUILT_IN_DATASET and config.cell is None:
        table = table or open_table(config, with_labels, streaming)
        if with_labels and table.label_column is None:
            raise UserInputError(
                f"{table.name} has no label column: name one by --label_column (columns: "
                f"{', '.join(table.rows.features)}), or put the images of each class into a folder of its own"
            )
        return table if streaming else read_table(table, config)
    if streaming:
        raise UserInputError(
            f"--streaming can't be used with {name or '--cell'}, which fits into memory: leave it out"
        )
    if config.caption_column is not None and name != BUILT_IN_DATASET:
        raise UserInputError(
            f"--caption_column {config.caption_column}: {name or 'the sheets of --cell'} have no captions, give "
            "another --config, or leave it out"
        )
    open_source = cut_sheets if config.cell is not None else open_arrays if is_array else draw_built_in
    return open_source(config, with_labels)


def load_tensor(
    images: torch.Tensor,
    config: DataConfig,
    class_labels: torch.Tensor | np.ndarray | list[Any] | None = None,
    captions: list[str] | None = None,
) -> ImageData:
    """Returns images that are in memory already, to train on: neither resized nor converted to other channels.

    Args:
        images: uint8 (N, C, H, W) of 1, 3 or 4 channels. The fourth is straight alpha, as image files have it: the
            colours are multiplied by it here, for a network that gives images with transparency. Images larger than
            `config.resolution` are cropped at random places, others in every epoch.
        config: `resolution`, and `class_names` if the classes have names; its other flags of images are not used.
        class_labels: Ids 0..K-1 or names (N,); None for images without classes.
        captions: A text for each image (N,); None for images without captions.

    Raises:
        UserInputError: If the images are of another kind, or the labels or captions do not fit them.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in IMAGE_MODES or len(images) == 0:
        raise UserInputError(
            f"images are {images.dtype} {tuple(images.shape)}: they must be uint8 (N, C, H, W) with 1, 3 or 4 channels"
        )
    (height, width), (rows, columns) = config.image_size, images.shape[2:]
    if rows < height or columns < width:
        raise UserInputError(f"--resolution {config.resolution}: the images are smaller, {columns}x{rows}")
    ids = class_names = None
    if class_labels is not None:
        values = class_labels if isinstance(class_labels, list) else class_labels.reshape(-1).tolist()
        if len(values) != len(images):
            raise UserInputError(f"{len(values)} class labels for {len(images)} images: give one for each")
        ids, class_names = to_class_ids(values, None, config, "class_labels")
    if captions is not None and len(captions) != len(images):
        raise UserInputError(f"{len(captions)} captions for {len(images)} images: give one for each")
    store = ImageStore.from_array(premultiply(images.cpu()).numpy())
    named = None
    if captions is not None:
        named = Captions.of(clean_caption(text, f"caption {number}") for number, text in enumerate(captions))
    dataset = StoredImages(store, ids, config.image_size, named)
    return ImageData(dataset, class_names, [], "images in memory")


def _open_stream(table: Table, config: DataConfig) -> ImageData:
    """Decodes the first images of a stream, and leaves the others to the training."""
    class_names = captions = None
    columns = [table.image_column]
    if table.label_column is not None:
        columns.append(table.label_column)
        if table.known_class_names is None and config.class_names is None:
            raise UserInputError(
                f"{table.labels_name}: a stream's classes are not known in advance: give --class_names"
            )
        class_names = choose_class_names(table.known_class_names, [], config, table.labels_name)
    rows = table.rows if config.max_train_samples is None else table.rows.take(config.max_train_samples)
    if table.caption_column is not None:  # all are read once, as the words of the model have to be known in advance
        columns.append(table.text_column)
        texts = tqdm(rows.select_columns(table.text_column), desc="reading captions", unit="image", dynamic_ncols=True)
        captions = Captions.of(table.caption_of(row, f"an image of {table.name}") for row in texts)
    rows = rows.select_columns(list(dict.fromkeys(columns)))
    dataset = StreamedImages(replace(table, rows=rows), class_names, captions, config)
    if dataset.num_channels == 0:
        raise UserInputError(f"{table.name} holds no image that can be decoded")
    return ImageData(dataset, class_names, table.skipped_images, table.name, table.rows.info.license or None)


def _decode_all(source: Source, config: DataConfig, with_labels: bool | None) -> ImageData:
    """Decodes all images, or opens the store of those that an earlier run has decoded."""
    if source.array is not None and _is_ready(source.array, config):
        pixels = source.array if len(source.rows) == len(source.array) else source.array[source.rows]
        store = ImageStore.from_array(pixels.transpose(0, 3, 1, 2))
    else:
        store = decode_once(_cache_key(source, config), _decode(source, config))
    if len(store) == 0:
        raise UserInputError(f"{source.name} holds no image that can be decoded")
    class_labels = source.class_labels
    if class_labels is not None and source.class_names is not None:
        class_labels = np.delete(class_labels, [row for row, _ in store.skipped])
        if with_labels:
            check_each_has_images(class_labels, source.class_names, source.name)
    captions = source.captions
    if captions is not None:
        captions = Captions(captions.texts, np.delete(captions.ids, [row for row, _ in store.skipped]))
    dataset = StoredImages(store, class_labels, config.image_size, captions)
    skipped_images = [*source.skipped_images, *(image for _, image in store.skipped)]
    return ImageData(
        dataset, source.class_names, skipped_images, source.name, source.license, num_available=source.num_available
    )


def _is_ready(array: np.ndarray, config: DataConfig) -> bool:
    """Returns whether images (N, H, W, C) uint8 would be decoded to what they are, so that they need no copy."""
    mode = IMAGE_MODES[array.shape[3]]
    return array.shape[1:3] == config.image_size and mode != "RGBA" and mode == choose_mode(mode, config)


def _cache_key(source: Source, config: DataConfig) -> str:
    """Returns a hash of the images, of the flags that change a pixel, and of the code that decodes."""
    flags = {
        flag.name: getattr(config, flag.name) for flag in fields(DataConfig) if flag.metadata["changes"] == "pixels"
    }
    rows = hashlib.sha256(source.rows.tobytes()).hexdigest()
    digest = hashlib.sha256(json.dumps([source.identity, rows, flags, PIL.__version__]).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _decode(source: Source, config: DataConfig) -> Iterator[np.ndarray | SkippedImage]:
    """Yields each image, decoded or skipped, with a progress bar."""
    for name, value in tqdm(
        source.images, desc="reading images", total=len(source.rows), unit="image", dynamic_ncols=True
    ):
        yield prepare_or_skip(value, name, config)
