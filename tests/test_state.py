"""Tests what is due after each step of a run, by the rule of each flag, and how a run counts its steps and epochs."""

import json

import pytest

from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.state import Due, TrainState, find_due

STEPS_PER_EPOCH = 4
# Intervals that no run here is long enough for, in place of defaults that could hide what a row is about.
RARE = {"logging_steps": 999, "checkpointing_steps": 999, "save_images_epochs": 999, "save_model_epochs": 999}
COUNTED_IN_STEPS = {"max_train_steps": 20, "save_images_epochs": None, "save_model_epochs": None}
AT_THE_END = "log checkpoint samples pipeline end"
HUB = {"push_to_hub": True, "checkpointing_steps": 3}


def after(step: int) -> TrainState:
    """Returns the state of a run that has taken so many steps, of 4 in each epoch and of 5 images each."""
    state = TrainState()
    for index in range(step):
        epoch, index_in_epoch = divmod(index, STEPS_PER_EPOCH)
        state.advance(epoch, index_in_epoch, index_in_epoch == STEPS_PER_EPOCH - 1, num_images=5)
    return state


# Each row: the steps taken, the steps of the run, the flags that differ from RARE, and the names of what is due.
ROUTINE = [
    # In the middle of an epoch nothing by itself; at the end of an epoch its loss.
    (3, 20, {}, ""),
    (7, 20, {}, ""),
    (8, 20, {}, "log"),
    # At the end of the first epoch all that is due every N epochs, whatever N: a run is seen to learn.
    (4, 20, {}, "log samples pipeline"),
    (4, 20, {"snapshot_epochs": 999}, "log samples snapshot pipeline"),
    # The loss is logged every N steps, wherever in an epoch they fall.
    (6, 20, {"logging_steps": 5}, ""),
    (5, 20, {"logging_steps": 5}, "log"),
    (10, 20, {"logging_steps": 5}, "log"),
    (1, 20, {"logging_steps": 1}, "log"),
    # A checkpoint is written every N steps, and the loss logged, so that a resumed run begins a new mean there too.
    (2, 20, {"checkpointing_steps": 3}, ""),
    (3, 20, {"checkpointing_steps": 3}, "log checkpoint"),
    (9, 20, {"checkpointing_steps": 3}, "log checkpoint"),
    (10, 20, {"checkpointing_steps": 3}, ""),
    # A sample grid is made every N epochs from the first on, when their last step is done, and every M steps besides.
    (8, 20, {"save_images_epochs": 1}, "log samples"),
    (9, 20, {"save_images_epochs": 1}, ""),
    (8, 20, {"save_images_epochs": 2}, "log"),
    (12, 20, {"save_images_epochs": 2}, "log samples"),
    (16, 20, {"save_images_epochs": 2}, "log"),
    (20, 40, {"save_images_epochs": 4}, "log samples"),  # of epoch 5
    (5, 20, {"save_images_steps": 5}, "samples"),
    (6, 20, {"save_images_steps": 5}, ""),
    (5, 20, {"save_images_steps": 5, "save_images_epochs": 2}, "samples"),
    (12, 20, {"save_images_steps": 5, "save_images_epochs": 2}, "log samples"),
    # The pipeline is written every N epochs.
    (8, 20, {"save_model_epochs": 1}, "log pipeline"),
    (6, 20, {"save_model_epochs": 1}, ""),
    (12, 20, {"save_model_epochs": 3}, "log"),
    (16, 20, {"save_model_epochs": 3}, "log pipeline"),
    # Metrics are calculated after epochs N, 2 N and so on, and not at all without the flag.
    (4, 20, {"evaluate_every": 2}, "log samples pipeline"),
    (4, 20, {"evaluate_every": 1}, "log metrics samples pipeline"),
    (8, 20, {"evaluate_every": 1}, "log metrics"),
    (5, 20, {"evaluate_every": 1}, ""),
    (8, 20, {"evaluate_every": 2}, "log metrics"),
    (12, 20, {"evaluate_every": 2}, "log"),
    (8, 20, {"evaluate_every": None}, "log"),
    # A snapshot is kept every N epochs, and not at all without the flag.
    (8, 20, {"snapshot_epochs": 1}, "log snapshot"),
    (7, 20, {"snapshot_epochs": 1}, ""),
    (12, 20, {"snapshot_epochs": 3}, "log"),
    (16, 20, {"snapshot_epochs": 3}, "log snapshot"),
    (12, 20, {"snapshot_epochs": None}, "log"),
    # A run that is counted in steps has no intervals of epochs unless it is given some.
    (4, 20, COUNTED_IN_STEPS, "log"),
    (5, 20, {**COUNTED_IN_STEPS, "save_images_steps": 5}, "samples"),
    (4, 20, {**COUNTED_IN_STEPS, "save_images_epochs": 5}, "log samples"),
    # Several at once.
    (
        12,
        20,
        {"logging_steps": 6, "checkpointing_steps": 4, "save_images_epochs": 2, "snapshot_epochs": 1},
        "log checkpoint samples snapshot",
    ),
]
UPLOADS = [
    # The Hub gets the pipeline of every checkpoint, if it was asked to: then it is written there too.
    (3, 20, {**HUB, "hub_strategy": "checkpoint"}, "log checkpoint pipeline"),
    (5, 20, {**HUB, "hub_strategy": "checkpoint"}, ""),
    (6, 20, {**HUB, "hub_strategy": "checkpoint"}, "log checkpoint pipeline"),
    (8, 20, {**HUB, "hub_strategy": "checkpoint", "save_model_epochs": 1}, "log pipeline"),
    (3, 20, {**HUB, "hub_strategy": "every_save"}, "log checkpoint"),
    (3, 20, {**HUB, "hub_strategy": "end"}, "log checkpoint"),
    (3, 20, {**HUB, "hub_strategy": "checkpoint", "push_to_hub": False}, "log checkpoint"),
]
ENDS = [
    # The end of a run leaves all that is asked for at all, whatever the intervals.
    (20, 20, {}, AT_THE_END),
    (20, 20, COUNTED_IN_STEPS, AT_THE_END),
    (20, 20, {"evaluate_every": 999}, f"metrics {AT_THE_END}"),
    (20, 20, {"snapshot_epochs": 999}, f"snapshot {AT_THE_END}"),
    (20, 20, {"save_images_steps": 999}, AT_THE_END),
    (20, 20, {**HUB, "hub_strategy": "end"}, AT_THE_END),
    (19, 20, {"evaluate_every": 999, "snapshot_epochs": 999}, ""),
    # Also where the run ends in the middle of an epoch.
    (6, 6, {}, AT_THE_END),
    (6, 6, {"evaluate_every": 2, "snapshot_epochs": 2}, f"metrics snapshot {AT_THE_END}"),
    # A run that is resumed with fewer steps than it has taken is at its end.
    (9, 6, {}, AT_THE_END),
    # Before the first step nothing is due, though 0 is a multiple of every interval.
    (0, 20, {"logging_steps": 1, "checkpointing_steps": 1, "save_images_steps": 1, "save_images_epochs": 1}, ""),
    (0, 20, {"save_model_epochs": 1, "evaluate_every": 1, "snapshot_epochs": 1}, ""),
    (0, 20, {**HUB, "hub_strategy": "checkpoint"}, ""),
]


@pytest.mark.parametrize(("steps", "total_steps", "changes", "due"), [*ROUTINE, *UPLOADS, *ENDS])
def test_what_is_due_after_a_step(steps, total_steps, changes, due):
    config = TrainingConfig(**{**RARE, **changes})
    assert find_due(after(steps), config, total_steps) == Due(**dict.fromkeys(due.split(), True))


@pytest.mark.parametrize(
    ("due", "outputs"),
    [
        ("", False),
        ("log checkpoint end", False),
        ("metrics", True),
        ("samples", True),
        ("snapshot", True),
        ("pipeline", True),
    ],
)
def test_a_checkpoint_is_not_among_the_outputs(due, outputs):
    assert Due(**dict.fromkeys(due.split(), True)).outputs == outputs


def test_a_step_advances_the_counters():
    state = TrainState(global_step=7, epoch=1, steps_done=3, images_seen=35, skipped_steps=2, loss=0.5, seconds=9.0)
    state.advance(epoch=1, index=3, ends_epoch=True, num_images=2)
    assert state == TrainState(
        global_step=8,
        epoch=1,
        steps_done=4,
        ends_epoch=True,
        images_seen=37,
        skipped_steps=2,
        loss=0.5,
        seconds=9.0,
    )
    state.advance(epoch=2, index=0, ends_epoch=False, num_images=5)
    assert (state.global_step, state.epoch, state.steps_done, state.ends_epoch) == (9, 2, 1, False)
    assert state.images_seen == 42


@pytest.mark.parametrize(
    ("steps", "epochs_done", "epochs_done_at_the_end"),
    [(1, 0, 1), (3, 0, 1), (4, 1, 1), (5, 1, 2), (8, 2, 2)],
)
def test_an_epoch_is_over_with_its_last_step_or_the_run(steps, epochs_done, epochs_done_at_the_end):
    assert after(steps).epochs_done(is_end=False) == epochs_done
    assert after(steps).epochs_done(is_end=True) == epochs_done_at_the_end


@pytest.mark.parametrize(
    ("steps", "is_end", "epoch", "steps_done"),
    [(3, False, 0, 3), (4, False, 1, 0), (5, False, 1, 1), (5, True, 2, 0), (8, True, 2, 0)],
)
def test_the_record_counts_epochs_that_are_over(steps, is_end, epoch, steps_done):
    state = after(steps)
    state.loss, state.seconds = 0.25, 3.0
    record = state.record(is_end)
    assert json.loads(json.dumps(record)) == {
        "global_step": steps,
        "epoch": epoch,
        "steps_done": steps_done,
        "images_seen": 5 * steps,
        "skipped_steps": 0,
        "overflowed_steps": 0,
        "loss": 0.25,
        "seconds": 3.0,
    }
    assert state.steps_done == (steps - 1) % STEPS_PER_EPOCH + 1  # what is recorded is a copy
