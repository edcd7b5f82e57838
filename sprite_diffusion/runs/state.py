"""Where a run stands, and what is due there."""

from dataclasses import asdict, dataclass
from typing import Any

from sprite_diffusion.runs.config import TrainingConfig


@dataclass
class TrainState:
    """Where a run stands. Everything random is a function of this and the seed."""

    global_step: int = 0  # optimizer steps done
    epoch: int = 0  # of the last step done, counted from 0
    steps_done: int = 0  # of this epoch
    ends_epoch: bool = False  # whether no step of this epoch is left
    images_seen: int = 0  # by all processes
    skipped_steps: int = 0  # of global_step: steps whose loss or gradient was not finite
    overflowed_steps: int = 0  # of global_step: steps at which GradScaler lowered its scale instead
    loss: float | None = None  # the mean that was logged last
    seconds: float = 0.0  # of training, with its samples and checkpoints

    def advance(self, epoch: int, index: int, ends_epoch: bool, num_images: int) -> None:
        """Counts an optimizer step: number `index` of an epoch, of `num_images` on all processes."""
        self.global_step += 1
        self.epoch, self.steps_done, self.ends_epoch = epoch, index + 1, ends_epoch
        self.images_seen += num_images

    def epochs_done(self, is_end: bool) -> int:
        """Returns the number of epochs that are over. The end of a run ends its last epoch, even in the middle."""
        return self.epoch + (self.ends_epoch or is_end)

    def record(self, is_end: bool) -> dict[str, Any]:
        """Returns the state for people and cards, where `epoch` is the number of epochs that are over."""
        values = asdict(self)
        epochs_done = self.epochs_done(is_end)
        values.update(epoch=epochs_done, steps_done=0 if epochs_done > self.epoch else self.steps_done)
        del values["ends_epoch"]
        return values


@dataclass(frozen=True)
class Due:
    """What is to be done after a step, in this order."""

    log: bool = False
    checkpoint: bool = False
    metrics: bool = False
    samples: bool = False
    snapshot: bool = False
    pipeline: bool = False
    end: bool = False

    @property
    def outputs(self) -> bool:
        """Whether anything is to be written besides a checkpoint."""
        return self.metrics or self.samples or self.snapshot or self.pipeline


def find_due(state: TrainState, config: TrainingConfig, total_steps: int) -> Due:
    """Returns what is due: a function of the state alone, so that a resumed run does again what may be missing."""
    if state.global_step == 0:
        return Due()
    end = state.global_step >= total_steps

    def every_steps(interval: int | None) -> bool:
        return interval is not None and state.global_step % interval == 0

    def every_epochs(interval: int | None, first: int = 1) -> bool:
        """Returns whether the epoch that ends is the `first`, one of every `interval` from there on, or the last."""
        number = state.epoch + 1
        return interval is not None and (
            end or (state.ends_epoch and number >= first and (number - first) % interval == 0)
        )

    is_uploaded = config.push_to_hub and config.hub_strategy == "checkpoint"
    checkpoint = end or every_steps(config.checkpointing_steps)
    return Due(
        # At a checkpoint too: a run that is resumed from it begins a new mean, as one that was never stopped does.
        log=checkpoint or state.ends_epoch or every_steps(config.logging_steps),
        checkpoint=checkpoint,
        metrics=every_epochs(config.evaluate_every, first=config.evaluate_every or 1),  # the first is too early
        samples=end or every_epochs(config.save_images_epochs) or every_steps(config.save_images_steps),
        snapshot=every_epochs(config.snapshot_epochs),
        pipeline=(
            end or every_epochs(config.save_model_epochs) or (is_uploaded and every_steps(config.checkpointing_steps))
        ),
        end=end,
    )
