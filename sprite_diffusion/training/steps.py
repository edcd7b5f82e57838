"""The data as optimizer steps: the micro-batches that this process has of each."""

import math
import sys
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.dataset import ImageData, StreamedImages
from sprite_diffusion.data.decoding import to_model_range
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.state import TrainState


@dataclass(frozen=True)
class Batch:
    """A micro-batch: images of an optimizer step that this process trains on at a time.

    Where other processes have the last images of an epoch and this one has none left, it gets one image of no weight,
    as the processes average their gradients together.
    """

    images: torch.Tensor  # (B, C, H, W) float32 in [-1, 1]
    class_labels: torch.Tensor | None  # (B,) int64
    caption_ids: torch.Tensor | None  # (B,) int64, numbers of the data's captions
    first_row: int  # the place of the first image among all images of the step
    num_images: int  # of this process that count: B, or 0
    num_images_of_all_processes: int


@dataclass(frozen=True)
class Step:
    """The micro-batches that this process has of one optimizer step."""

    batches: list[Batch]
    epoch: int  # counted from 0
    index: int  # of the step within its epoch
    ends_epoch: bool

    @property
    def num_images(self) -> int:
        """The number of images that all processes have of the step."""
        return sum(batch.num_images_of_all_processes for batch in self.batches)

    def loss_weight(self, batch: Batch, num_processes: int) -> float:
        """Returns the weight of a batch's mean loss with which each image of the step counts the same.

        Processes average their gradients, hence their number.
        """
        return batch.num_images * num_processes / self.num_images


class Steps:
    """Every image once an epoch, in an order that is a function of the seed and the epoch."""

    def __init__(self, data: ImageData, config: TrainingConfig, accelerator: Accelerator) -> None:
        self._data = data
        self._config = config
        self._accelerator = accelerator
        self._dataloader = accelerator.prepare(
            make_dataloader(data, config.train_batch_size, config.dataloader_num_workers)
        )
        self.size = config.total_batch_size(accelerator.num_processes)  # images of all processes in a step
        # accelerate's own count of the images that are left is lost where `skip_first_batches` skips some.
        self._num_images = len(data.dataset) if isinstance(data.dataset, Sized) else None
        if self._num_images is None:  # a stream, for which the configuration has made sure of `max_train_steps`
            self.total = self.per_epoch = config.max_train_steps or 0
        else:
            self.per_epoch = math.ceil(len(self._dataloader) / config.gradient_accumulation_steps)
            steps_of_epochs = sys.maxsize if config.num_epochs is None else config.num_epochs * self.per_epoch
            self.total = min(steps_of_epochs, config.max_train_steps or sys.maxsize)

    def after(self, state: TrainState) -> Iterator[Step]:
        """Yields the steps that follow `state`, without end."""
        accumulation = self._config.gradient_accumulation_steps
        epoch, index = (state.epoch + 1, 0) if state.ends_epoch else (state.epoch, state.steps_done)
        while True:
            self._dataloader.set_epoch(epoch)
            self._data.dataset.begin_epoch(epoch, self._config.seed, self._config.random_flip)
            batches: list[Batch] = []
            first_row = 0
            for rows in self._accelerator.skip_first_batches(self._dataloader, index * accumulation):
                of_all = self._images_of_all(rows, index, first_row)
                batches.append(take_share(rows, first_row, self._accelerator.process_index, of_all))
                first_row += batches[-1].num_images_of_all_processes
                ends_epoch = self._accelerator.gradient_state.end_of_dataloader
                if ends_epoch or len(batches) == accumulation:
                    yield Step(batches, epoch, index, ends_epoch)
                    batches, first_row, index = [], 0, index + 1
            if index == 0:
                raise UserInputError(f"{self._data.source} gave no batch: there is no image to train on")
            epoch, index = epoch + 1, 0

    def _images_of_all(self, rows: dict[str, torch.Tensor], index: int, first_row: int) -> int:
        """Returns how many different images all processes were given: accelerate fills up an epoch's last batch."""
        given = len(rows["images"]) * self._accelerator.num_processes
        if self._num_images is not None:
            return min(given, self._num_images - index * self.size - first_row)
        state = self._accelerator.gradient_state
        return state.remainder if state.end_of_dataloader and state.remainder > 0 else given


def make_dataloader(data: ImageData, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Returns shuffled batches, of which the last of an epoch may be smaller.

    Args:
        data: The images.
        batch_size: The number of images in a batch.
        num_workers: The processes that read a stream; 0 for the calling process. Other data needs none.
    """
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
    """Returns what `StoredImages` has gathered, which is a batch already."""
    return batch


def take_share(rows: dict[str, torch.Tensor], first_row: int, rank: int, num_images_of_all: int) -> Batch:
    """Returns this process's share of a micro-batch.

    Args:
        rows: What the process was given: "images" (B, C, H, W), as many as every other process, and "class_labels" and
            "caption_ids" (B,) where there are any.
        first_row: The place of the micro-batch's first image among all images of the step.
        rank: The number of the process.
        num_images_of_all: The different images that all processes were given together, the first ranks first.
    """
    batch_size = len(rows["images"])
    num_images = min(max(num_images_of_all - rank * batch_size, 0), batch_size)
    kept = {name: values[: max(1, num_images)] for name, values in rows.items()}
    images = to_model_range(kept["images"])
    conditions = kept.get("class_labels"), kept.get("caption_ids")
    return Batch(images, *conditions, first_row + rank * batch_size, num_images, num_images_of_all)
