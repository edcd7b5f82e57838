"""Losses and speed between two logs, and the progress bar."""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from sprite_diffusion.runs.state import TrainState


class Meter:
    """Measures a training. The progress bar is shown inside of `with`."""

    def __init__(self, accelerator: Accelerator, total_steps: int, state: TrainState) -> None:
        self._accelerator = accelerator
        self._total_steps = total_steps
        self._first_step = state.global_step
        self._losses: list[tuple[torch.Tensor, int]] = []  # on the device, each with its number of images
        self._images_logged, self._log_time = state.images_seen, time.perf_counter()

    def __enter__(self) -> "Meter":
        self._bar = tqdm(
            total=self._total_steps,
            initial=self._first_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not self._accelerator.is_local_main_process,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def add_loss(self, loss: torch.Tensor, num_images: int) -> None:
        """Takes the mean loss of a micro-batch. Does not wait for the device."""
        self._losses.append((loss.detach(), num_images))

    def add_step(self) -> None:
        """Moves the progress bar on by an optimizer step."""
        self._bar.update(1)

    def read(self, state: TrainState, grad_norm: torch.Tensor, lr: float) -> dict[str, float]:
        """Returns the mean loss of the images since the last call, and the speed. Waits for the device.

        Losses that are not finite are left out; the mean is NaN if there was no other.
        """
        means = torch.stack([loss for loss, _ in self._losses])
        num_images = torch.tensor([images for _, images in self._losses], device=means.device)
        finite = means.isfinite()
        sums = torch.stack([(means * num_images).where(finite, 0.0).sum(), (num_images * finite).sum()])
        loss_sum, num_finite = self._accelerator.reduce(sums, reduction="sum").tolist()
        seconds = time.perf_counter() - self._log_time
        state.seconds += seconds
        metrics = {
            "loss": loss_sum / num_finite if num_finite else math.nan,
            "lr": lr,
            "epoch": state.epoch,
            "grad_norm": float(grad_norm),
            "images_per_second": (state.images_seen - self._images_logged) / seconds,
        }
        self._losses, self._images_logged, self._log_time = [], state.images_seen, self._log_time + seconds
        self._bar.set_postfix_str("loss={loss:.4f}, lr={lr:.1e}, {images_per_second:.0f} images/s".format(**metrics))
        return metrics
