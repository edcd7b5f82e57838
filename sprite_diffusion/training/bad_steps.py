"""Makes the optimizer leave out steps whose loss or gradient is not finite, without waiting for the device."""

import sys
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.runs.state import TrainState

# GradScaler starts at a scale of 2 ** 16 and halves it at each overflow: more in a row are not the scale's fault.
OVERFLOWS_IN_A_ROW = 24


class BadSteps:
    """Makes the optimizer skip steps of a non-finite loss or gradient, and counts them on the device.

    With fp16 a gradient may overflow while the loss is finite. Then the scale of the loss was too large, GradScaler
    lowers it, and the step is an overflow: counted for itself and no sign of divergence.
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any, model: torch.nn.Module, limit: int) -> None:
        self._accelerator = accelerator
        self._optimizer = optimizer.optimizer  # accelerate wraps it
        self._limit = limit
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._finite_buffers = [buffer.clone() for buffer in self._buffers]
        self._loss_is_bad = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        # Columns: diverged, overflowed. Their number since the last log, how many were in a row up to this step, and
        # the longest such row since the last log.
        self._counts, self._row, self._longest = torch.zeros((3, 2), device=accelerator.device)

    def watch(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss of a micro-batch, NaN if it is not finite: the gradient then tells every process."""
        is_finite = loss.detach().isfinite()
        self._loss_is_bad |= ~is_finite
        return loss * torch.where(is_finite, 1.0, torch.nan)

    def mark(self, grad_norm: torch.Tensor) -> None:
        """Tells the optimizer whether its next step is to change nothing, by the norm of the gradients."""
        skip = ~grad_norm.detach().isfinite()
        overflowed = skip & ~self._loss_is_bad
        if self._accelerator.scaler is None:
            overflowed = torch.zeros_like(overflowed)
            # The fused kernel reads these; with fp16 they are GradScaler's.
            self._optimizer.grad_scale, self._optimizer.found_inf = None, skip.float()
        kinds = torch.stack([skip & ~overflowed, overflowed])
        self._counts += kinds
        self._row = (self._row + 1) * kinds
        self._longest = torch.maximum(self._longest, self._row)
        self._loss_is_bad.zero_()
        for buffer, finite in zip(
            self._buffers, self._finite_buffers, strict=True
        ):  # BatchNorm's, of the forward pass
            buffer.copy_(torch.where(skip, finite, buffer))
            finite.copy_(buffer)

    def read(self, state: TrainState, last_checkpoint: str) -> dict[str, int]:
        """Adds the skipped steps to `state`, and returns their numbers for the trackers.

        Waits for the device. Raises `UserInputError` if too many came in a row.
        """
        counts, longest = (
            self._accelerator.gather(values[None]).amax(0).tolist() for values in (self._counts, self._longest)
        )
        self._counts.zero_()
        self._longest.copy_(self._row)
        remedy = f"lower --learning_rate, or give --mixed_precision no; last checkpoint: {last_checkpoint}"
        diverged, overflows = map(int, counts)
        if diverged and self._accelerator.is_main_process:
            tqdm.write(f"warning: {diverged} step(s) skipped: the loss or gradient was not finite", file=sys.stderr)
        if longest[0] >= self._limit:
            raise UserInputError(f"the loss or gradient was not finite in {longest[0]:.0f} steps in a row: {remedy}")
        if longest[1] >= OVERFLOWS_IN_A_ROW:
            raise UserInputError(f"fp16 overflowed in {longest[1]:.0f} steps in a row, at any scale: {remedy}")
        state.skipped_steps += diverged
        state.overflowed_steps += overflows
        numbers = {"skipped_steps": state.skipped_steps}
        return numbers if self._accelerator.scaler is None else {**numbers, "overflowed_steps": state.overflowed_steps}
