"""The output folder of a run, and the checkpoints in it that a run resumes from."""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from tqdm.auto import tqdm

from training.config import TrainingConfig
from training.ema import ema_tensors
from training.errors import UserInputError, check_writable
from training.files import PARTIAL, DiskFullError, FullDiskWarning, remove, remove_whole, written_beside

CONFIG_FILE = "training_config.yaml"
SUMMARY_FILE = "training_summary.json"
STATE_FILE = "train_state.json"
SKIPPED_IMAGES_FILE = "skipped_images.jsonl"
MANIFEST_FILE = "manifest.json"  # of a checkpoint: size and SHA-256 of every other file
BEST = "best-"
WEIGHTS_FILE = "unet/diffusion_pytorch_model.safetensors"
# A pipeline for others. A `*` goes across folders: `*.py` would take those of snapshots.
PIPELINE_FILES = ["model_index.json", "pipeline*.py", "unet/*", "scheduler/*", CONFIG_FILE]
# What a run writes: the only things that --overwrite_output_dir removes.
RUN_FILES = (
    CONFIG_FILE,
    SUMMARY_FILE,
    SKIPPED_IMAGES_FILE,
    "model_index.json",
    "unet",
    "scheduler",
    "samples",
    "snapshots",
    "metrics.json",
    "metrics.jsonl",
    "closest_pairs.png",
    "*.py",
    "checkpoint-*",
)


@dataclass
class TrainState:
    """Where a run stands. Everything random is a function of this and the seed."""

    global_step: int = 0  # optimizer steps done
    epoch: int = 0
    steps_done: int = 0  # of this epoch
    images_seen: int = 0  # by all processes
    skipped_steps: int = 0  # of global_step: their loss or gradient was not finite
    overflowed_steps: int = 0  # of global_step: GradScaler lowered its scale instead
    loss: float | None = None  # the mean that was logged last
    seconds: float = 0.0  # of training, with its samples and checkpoints


def check_output_dir(config: TrainingConfig) -> None:
    """Sets `config.resume_from_checkpoint` to the checkpoint that the run goes on from, None for a new run.

    Raises if the run would mix with what the folder holds. Writes nothing.
    """
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserInputError(f"--output_dir {output_dir} is a file: name a folder")
    check_writable("--output_dir", output_dir)
    if config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        if not output_dir.is_dir() or all(path.name.endswith(PARTIAL) for path in output_dir.iterdir()):
            return
        _check_same_run(config)
        config.resume_from_checkpoint = "latest"
    if config.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint)
        config.resume_from_checkpoint = None if checkpoint is None else checkpoint.name


def _check_same_run(config: TrainingConfig) -> None:
    """Raises unless the folder holds an unfinished run of the same flags."""
    output_dir = Path(config.output_dir)
    others = "--overwrite_output_dir to start over, or name another folder"
    try:
        saved = yaml.safe_load((output_dir / CONFIG_FILE).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        saved = None
    if not isinstance(saved, dict):
        raise UserInputError(
            f"--output_dir {output_dir} is not empty: add '--resume_from_checkpoint latest' to go on with the run in "
            f"it, {others}"
        )
    if _is_finished(output_dir):
        raise UserInputError(
            f"--output_dir {output_dir} holds a finished run: add '--resume_from_checkpoint latest' and more epochs "
            f"to train it on, {others}"
        )
    if differences := config.differences(saved):
        changed = ", ".join(f"--{name} {old} is now {new}" for name, (old, new) in differences.items())
        raise UserInputError(
            f"--output_dir {output_dir} holds an unfinished run of other flags ({changed}): add "
            f"'--resume_from_checkpoint latest' to go on with the new values, {others}"
        )


def _is_finished(output_dir: Path) -> bool:
    """Whether the run in a folder wrote its last file, the summary, and was not trained on since."""
    try:
        summary = json.loads((output_dir / SUMMARY_FILE).read_text())
    except (OSError, ValueError):
        return False
    finished = summary["global_step"] >= summary["total_steps"]
    newest = [_step(path) for path in list_checkpoints(output_dir)[-1:]]
    return finished and all(step <= summary["global_step"] for step in newest)


def prepare_output_dir(config: TrainingConfig) -> None:
    """Makes the folder, without the earlier run if it is to be overwritten, and saves the configuration."""
    output_dir = Path(config.output_dir)
    leftovers = [name + PARTIAL for name in (*RUN_FILES, "samples/*", "snapshots/*", "staged*")]
    overwritten = []
    if config.overwrite_output_dir and config.resume_from_checkpoint is None:
        overwritten = [*RUN_FILES, config.logging_dir]
    for pattern in (*leftovers, *overwritten):
        for path in output_dir.glob(pattern):
            remove(path)
    output_dir.mkdir(parents=True, exist_ok=True)
    config.save(output_dir / CONFIG_FILE)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; without the best one."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The checkpoint of that name, or for 'latest' the newest sound one, None if there is none at all.

    Raises if it is damaged or, for 'latest', if all are; warns of damaged ones that a sound one stands in for.
    """
    checkpoints = list_checkpoints(output_dir)
    if name != "latest":
        path = output_dir / Path(name).name
        checkpoints += output_dir.glob(f"checkpoint-{BEST}*[0-9]")
        if path not in checkpoints:
            known = ", ".join(p.name for p in checkpoints) or "none"
            raise UserInputError(f"--resume_from_checkpoint {path} is not a checkpoint; those of the run: {known}")
        if damage := find_damage(path):
            raise UserInputError(f"--resume_from_checkpoint {path} is damaged ({damage}): name another")
        return path
    damaged: list[str] = []
    for path in reversed(checkpoints):
        if not (damage := find_damage(path)):
            if damaged and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"warning: damaged: {', '.join(damaged)}; going on from {path}", file=sys.stderr)
            return path
        damaged.append(f"{path.name} ({damage})")
    if damaged:
        raise UserInputError(
            f"--output_dir {output_dir} has no sound checkpoint, damaged: {', '.join(damaged)}; restore one, give "
            "--overwrite_output_dir to start over, or name another folder"
        )
    return None


def write_manifest(folder: Path) -> None:
    """Lists size and SHA-256 of every file, for `find_damage`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(listed, indent=2) + "\n")


def find_damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint in a few words, '' if nothing is."""
    try:
        listed = json.loads((checkpoint / MANIFEST_FILE).read_text())
        for name, entry in listed.items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()):
                return f"{MANIFEST_FILE} names {name}, outside of the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['size']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has another SHA-256"
        missing = {STATE_FILE, "model.safetensors", "optimizer.bin"} - listed.keys()
        return f"{MANIFEST_FILE} lacks {', '.join(sorted(missing))}" if missing else ""
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError, KeyError):
        return f"{MANIFEST_FILE} is no manifest"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """Writes the checkpoints of a run and removes old ones. Call its methods on every process.

    A checkpoint is a pipeline folder too, so that samples can be drawn from it; with an EMA, its weights are those.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainingConfig,
        model: torch.nn.Module,
        lr_scheduler: Any,
        ema: EMAModel | None,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.limit = config.checkpoints_total_limit
        self.model = model
        self.lr_scheduler = lr_scheduler
        self.ema = ema
        resumed_from = config.resume_from_checkpoint
        self.newest = None if resumed_from is None else self.output_dir / resumed_from  # that is whole
        self.disk = FullDiskWarning()

    def describe_newest(self) -> str:
        """For a line."""
        return str(self.newest or "none")

    def check_weights(self, step: int) -> None:
        """Raises if the weights, or their averages, are not finite: they are not saved, sampled or uploaded."""
        tensors = ema_tensors(self.accelerator.unwrap_model(self.model))
        tensors += [] if self.ema is None else self.ema.shadow_params
        finite = torch.stack([tensor.detach().isfinite().all() for tensor in tensors])
        if not finite.all():
            raise UserInputError(
                f"the weights are not finite at step {step}: lower --learning_rate; last checkpoint: "
                f"{self.describe_newest()}"
            )

    def load(self) -> TrainState:
        """Restores weights, optimizer, EMA, schedule and random states in place, and says where the run stands."""
        path = self.newest
        check_same_on_all(path)
        if path is None:
            return TrainState()
        values = json.loads((path / STATE_FILE).read_text())
        check_num_processes(self.config, path, values, self.accelerator.num_processes)
        self.accelerator.load_state(str(path))
        self.accelerator.step = 0  # micro-batches: the saved number is of that process and that accumulation
        self.lr_scheduler.load_state_dict(values.pop("lr_scheduler"))
        ema_optimization_step = values.pop("ema_optimization_step", None)
        if self.ema is not None:
            if ema_optimization_step is None:
                raise UserInputError(f"{path} was written without --use_ema: resume without it as well")
            shadow = load_file(path / WEIGHTS_FILE)  # not to the device: "cpu:0" is unknown to it
            names = self.accelerator.unwrap_model(self.model).state_dict()
            self.ema.shadow_params = [shadow[name].to(self.accelerator.device) for name in names]
            self.ema.optimization_step = ema_optimization_step
        if self.accelerator.is_main_process:  # a kill may have come between the newest checkpoint and this
            for old in self._beyond_limit(path):
                remove_whole(old)
        return TrainState(**values)

    def save(self, state: TrainState, save_pipeline: Callable[[Path], None], is_best: bool = False) -> None:
        """Writes `checkpoint-STEP`, then removes the oldest beyond the limit; or `checkpoint-best-STEP`.

        Where the disk is full, warns and leaves the earlier ones.
        """
        path = self.output_dir / f"checkpoint-{BEST if is_best else ''}{state.global_step}"
        if path == self.newest:  # asked for by a signal at a step that has one anyway
            return
        self.check_weights(state.global_step)
        written = False
        with self.disk.instead_of_error("checkpoint"):
            self._write(path, state, save_pipeline)
            written = True
        written = self._all_have(written)
        if not written:
            return
        if not is_best:
            self.newest = path
        if self.accelerator.is_main_process:
            tqdm.write(f"wrote {path}")
            for old in self._superseded(path):
                remove_whole(old)
        self.accelerator.wait_for_everyone()

    def _write(self, path: Path, state: TrainState, save_pipeline: Callable[[Path], None]) -> None:
        is_main = self.accelerator.is_main_process
        with written_beside(path) if is_main else nullcontext(path.with_name(path.name + PARTIAL)) as partial:
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
                save_pipeline(partial)
                num_processes = self.accelerator.num_processes
                values = {
                    **asdict(state),
                    "num_processes": num_processes,
                    "total_batch_size": self.config.total_batch_size(num_processes),
                    "lr_scheduler": self.lr_scheduler.state_dict(),
                }
                if self.ema is not None:
                    values["ema_optimization_step"] = self.ema.optimization_step
                (partial / STATE_FILE).write_text(json.dumps(values))
                write_manifest(partial)

    def _all_have(self, done: bool) -> bool:
        flag = torch.tensor([float(done)], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).min())

    def _superseded(self, path: Path) -> list[Path]:
        """What a new checkpoint takes the place of: those beyond the limit, and those of steps that are yet to come.

        The latter were damaged, or are of a run that was resumed from an earlier one.
        """
        if path.name.startswith(f"checkpoint-{BEST}"):
            return [other for other in self.output_dir.glob(f"checkpoint-{BEST}*[0-9]") if other != path]
        checkpoints = list_checkpoints(self.output_dir)
        return self._beyond_limit(path) + checkpoints[checkpoints.index(path) + 1 :]

    def _beyond_limit(self, newest: Path) -> list[Path]:
        checkpoints = list_checkpoints(self.output_dir)
        place = checkpoints.index(newest) + 1 if newest in checkpoints else 0
        return [] if self.limit is None else checkpoints[: max(0, place - self.limit)]


def check_same_on_all(checkpoint: Path | None) -> None:
    """Raises, on every process, if they see different folders: then machines don't share `--output_dir`."""
    names = gather_object([None if checkpoint is None else checkpoint.name])
    if len(set(names)) > 1:
        raise UserInputError(
            f"--output_dir does not hold the same checkpoints on every machine ({', '.join(map(str, names))}): share "
            "the folder, or copy the checkpoint to each"
        )


def check_num_processes(config: TrainingConfig, path: Path, values: dict[str, Any], num_processes: int) -> None:
    """Takes the number of processes out of a checkpoint's state; raises if another one would change the steps."""
    before, total_before = values.pop("num_processes"), values.pop("total_batch_size")
    total = config.total_batch_size(num_processes)
    if num_processes != before and total != total_before:
        raise UserInputError(
            f"{path} was written by {before} process(es) in steps of {total_before} images, and {num_processes} would "
            f"take {total}: change --train_batch_size or --gradient_accumulation_steps so that processes x batch size "
            f"x accumulation is {total_before}"
        )


def check_room(config: TrainingConfig, model: torch.nn.Module, global_step: int, total_steps: int) -> None:
    """Raises if one checkpoint does not fit on the disk, warns if not all do that will be kept."""
    output_dir = Path(config.output_dir).absolute()
    folder = next(parent for parent in (output_dir, *output_dir.parents) if parent.is_dir())
    # In float32 the weights, those of the pipeline in it (the EMA's), and AdamW's two moments.
    size = 4 * 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6  # MB
    free = shutil.disk_usage(folder).free / 1e6
    remedy = "free some, or name another folder by --output_dir"
    if free < size:
        raise UserInputError(f"{folder} has {free:,.1f} MB free, a checkpoint takes {size:,.1f} MB: {remedy}")
    to_come = math.ceil((total_steps - global_step) / config.checkpointing_steps)
    if config.checkpoints_total_limit is not None:  # a new one is written before an old one goes
        there = len(list_checkpoints(output_dir))
        to_come = max(1, min(to_come, config.checkpoints_total_limit + 1 - there))
    to_come += config.keep_best_checkpoint
    if free < to_come * size and os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(
            f"warning: {folder} has {free:,.1f} MB free, {to_come} checkpoints take {to_come * size:,.1f} MB: "
            f"lower --checkpoints_total_limit, {remedy}",
            file=sys.stderr,
        )
