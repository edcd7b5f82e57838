"""The checkpoints that a run resumes from."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError, warn
from sprite_diffusion.common.files import PARTIAL, DiskFullError, FullDiskWarning
from sprite_diffusion.common.owned_files import OwnedFiles
from sprite_diffusion.common.run_files import list_checkpoints, step_of
from sprite_diffusion.data.dataset import ImageData
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.folder import BEST, list_best, read_folder_state
from sprite_diffusion.runs.manifest import STATE_FILE, write_manifest
from sprite_diffusion.runs.state import TrainState
from sprite_diffusion.runs.weights import Weights


class Checkpoints:
    """Writes the checkpoints of a run and removes old ones. Call its methods on every process.

    A checkpoint is a pipeline folder too, so that samples can be drawn from it; with an EMA, its weights are those.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainingConfig, data: ImageData, weights: Weights, lr_scheduler: Any
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.data = data
        self.output_dir = Path(config.output_dir)
        self.weights = weights
        self.lr_scheduler = lr_scheduler
        resumed_from = config.resume_from_checkpoint
        self.newest = None if resumed_from is None else self.output_dir / resumed_from  # of the whole ones
        self.known = read_folder_state(self.output_dir)  # when the run began
        self.files: OwnedFiles  # of the folder, once the main process has locked it
        self.disk = FullDiskWarning()

    def describe_newest(self) -> str:
        """Returns the newest checkpoint's path, or 'none', for messages."""
        return str(self.newest or "none")

    def load(self) -> TrainState:
        """Restores weights, optimizer, EMA, schedule and random states in place, and returns where the run stands."""
        check_same_on_all(self.newest)
        return TrainState() if self.newest is None else self._restore(self.newest)

    def return_to_best(self) -> TrainState:
        """Restores the best checkpoint in place of all later ones, and returns where the run stands then.

        Raises `UserInputError` if there is none, since the disk was full.
        """
        best = max(list_best(self.output_dir), key=step_of, default=None)  # the last of several is the best of them
        if best is None:
            raise UserInputError(
                f"--stop_when_copying: {self.output_dir} has no best checkpoint to end at, as the disk was full; free "
                "some, and give the same command again"
            )
        state = self._restore(best)
        self.save(state)
        return state

    def _restore(self, path: Path) -> TrainState:
        values = json.loads((path / STATE_FILE).read_text())
        check_num_processes(self.config, path, values, self.accelerator.num_processes)
        check_data(path, values.pop("data", None), self.data)
        self.accelerator.load_state(str(path))
        self.lr_scheduler.load_state_dict(values.pop("lr_scheduler"))
        ema_optimization_step = values.pop("ema_optimization_step", None)
        if self.weights.ema is not None:
            if ema_optimization_step is None:
                raise UserInputError(f"{path} was written without --use_ema: resume without it as well")
            self.weights.load_average(path, ema_optimization_step)
        return TrainState(**values)

    def begin(self, files: OwnedFiles) -> None:
        """Takes the list of the folder's files, and removes checkpoints that a kill has left beyond the limit."""
        self.files = files
        if self.newest is not None:
            self._remove(self._beyond_limit(self.newest))

    def save(self, state: TrainState, is_best: bool = False) -> None:
        """Writes `checkpoint-STEP`, then removes the oldest beyond the limit; or `checkpoint-best-STEP`.

        Where the disk is full, warns and leaves the earlier ones.
        """
        path = self.output_dir / f"checkpoint-{BEST if is_best else ''}{state.global_step}"
        if path == self.newest:  # the run begins here, or a signal asks for a checkpoint that is there
            return
        self.weights.check_finite(state.global_step, self.describe_newest())
        written = False
        with self.disk.instead_of_error("checkpoint"):
            self._write(path, state)
            written = True
        written = self._all_have(written)
        if not written:
            return
        if not is_best:
            self.newest = path
        if self.accelerator.is_main_process:
            tqdm.write(f"wrote {path}")
            self._remove(self._superseded(path))
        self.accelerator.wait_for_everyone()

    def _write(self, path: Path, state: TrainState) -> None:
        is_main = self.accelerator.is_main_process
        with self.files.writing(path) if is_main else nullcontext(path.with_name(path.name + PARTIAL)) as partial:
            self.accelerator.wait_for_everyone()  # until no earlier attempt is left there
            error: Exception = DiskFullError(f"{path}: the disk of another process is full")
            try:
                self.accelerator.save_state(str(partial))
                complete = True
            except Exception as caught:  # raised below, when the others know
                error, complete = caught, False
            if not self._all_have(complete):
                raise error
            if is_main:
                self.weights.save(partial)
                num_processes = self.accelerator.num_processes
                values = {
                    **asdict(state),
                    "num_processes": num_processes,
                    "total_batch_size": self.config.total_batch_size(num_processes),
                    "lr_scheduler": self.lr_scheduler.state_dict(),
                    "data": describe_data(self.data),
                }
                if self.weights.ema is not None:
                    values["ema_optimization_step"] = self.weights.ema.optimization_step
                (partial / STATE_FILE).write_text(json.dumps(values))
                write_manifest(partial)

    def _remove(self, checkpoints: list[Path]) -> None:
        for path in checkpoints:
            if others := self.files.remove_folder(path):
                warn(f"{path} is kept: {others[0].name} in it was not written by the run")

    def _all_have(self, done: bool) -> bool:
        flag = torch.tensor([float(done)], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).min())

    def _superseded(self, path: Path) -> list[Path]:
        """Returns the checkpoints that a new one takes the place of: those beyond the limit, and those of later steps.

        Those of later steps were damaged, or belong to a run that was resumed from an earlier checkpoint.
        """
        if path.name.startswith(f"checkpoint-{BEST}"):
            return [other for other in list_best(self.output_dir) if other != path]
        later = [other for other in list_checkpoints(self.output_dir) if step_of(other) > step_of(path)]
        return self._beyond_limit(path) + later

    def _beyond_limit(self, newest: Path) -> list[Path]:
        checkpoints = list_checkpoints(self.output_dir)
        place = checkpoints.index(newest) + 1 if newest in checkpoints else 0
        return checkpoints[: max(0, place - self.config.checkpoints_total_limit)]


def check_same_on_all(checkpoint: Path | None) -> None:
    """Raises `UserInputError` on every process if machines see different checkpoints, as they don't share a folder."""
    names = gather_object([None if checkpoint is None else checkpoint.name])
    if len(set(names)) > 1:
        raise UserInputError(
            f"--output_dir does not hold the same checkpoints on every machine ({', '.join(map(str, names))}): share "
            "the folder, or copy the checkpoint to each"
        )


def describe_data(data: ImageData) -> dict[str, Any]:
    """Returns the facts about a run's images that have to stay, for its checkpoints."""
    return {
        "class_names": data.class_names,
        "has_captions": data.captions is not None,
        "num_images": data.num_images,
        "identity": data.identity,
    }


def check_data(path: Path, saved: dict[str, Any] | None, data: ImageData) -> None:
    """Compares a run's images with the record in its checkpoint, which is None in checkpoints of earlier versions.

    Raises `UserInputError` for other classes, whose labels would mean something else from here on. Warns of other
    images.
    """
    if saved is None:
        return
    if saved.get("has_captions", False) and data.captions is None:
        raise UserInputError(f"{path} was trained on captions: name their --caption_column, or train anew")
    before, now = saved["class_names"], data.class_names
    if before != now:
        raise UserInputError(
            f"{path} was trained on {_compare_classes(before, now)}: give the same classes, or train anew"
        )
    if saved["num_images"] != data.num_images:
        warn(f"{path} was trained on {saved['num_images']} images, and the run goes on with {data.num_images}")
    elif saved["identity"] != data.identity:
        warn(f"{path} was trained on other images or labels than those that the run goes on with: some have changed")


def _compare_classes(before: list[str] | None, now: list[str] | None) -> str:
    if before is None or now is None:
        return "images with classes, and these have none" if now is None else "images without classes"
    gone, new = ([name for name in names if name not in others] for names, others in ((before, now), (now, before)))
    if gone or new:
        changes = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(new)}"] * bool(new)
        return f"{len(before)} classes, and the images now come {' and '.join(changes)}"
    return f"the classes {', '.join(before)}, and their order is now {', '.join(now)}"


def check_num_processes(config: TrainingConfig, path: Path, values: dict[str, Any], num_processes: int) -> None:
    """Takes the number of processes out of a checkpoint's values.

    Raises `UserInputError` if the number of this run would change the steps.
    """
    before, total_before = values.pop("num_processes"), values.pop("total_batch_size")
    total = config.total_batch_size(num_processes)
    if num_processes != before and total != total_before:
        raise UserInputError(
            f"{path} was written by {before} process(es) in steps of {total_before} images, and {num_processes} would "
            f"take {total}: change --train_batch_size or --gradient_accumulation_steps so that processes x batch size "
            f"x accumulation is {total_before}"
        )
