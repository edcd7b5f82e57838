"""The output folder of a run, and the checkpoints in it that a run resumes from."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from tqdm.auto import tqdm

from training.config import TrainingConfig
from training.errors import UserInputError, check_writable

CONFIG_FILE = "training_config.yaml"
SUMMARY_FILE = "training_summary.json"
STATE_FILE = "train_state.json"
SKIPPED_IMAGES_FILE = "skipped_images.jsonl"
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
    seconds: float = 0.0  # of training, with its samples and checkpoints


def check_output_dir(config: TrainingConfig) -> None:
    """Raises if the run would mix with what the folder holds. Writes nothing."""
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserInputError(f"--output_dir {output_dir} is a file: name a folder")
    check_writable("--output_dir", output_dir)
    if config.resume_from_checkpoint is not None:
        find_checkpoint(config)
    elif output_dir.is_dir() and any(output_dir.iterdir()) and not config.overwrite_output_dir:
        raise UserInputError(
            f"--output_dir {output_dir} is not empty: add '--resume_from_checkpoint latest' to go on with the run in "
            "it, --overwrite_output_dir to start over, or name another folder"
        )


def prepare_output_dir(config: TrainingConfig) -> None:
    """Makes the folder, without the earlier run if it is to be overwritten, and saves the configuration."""
    output_dir = Path(config.output_dir)
    if config.overwrite_output_dir and config.resume_from_checkpoint is None:
        for path in [p for pattern in (*RUN_FILES, config.logging_dir) for p in output_dir.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    config.save(output_dir / CONFIG_FILE)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint to resume from; None for a new run, also if 'latest' is asked for and there is none."""
    if config.resume_from_checkpoint is None:
        return None
    output_dir = Path(config.output_dir)
    checkpoints = list_checkpoints(output_dir)
    if config.resume_from_checkpoint == "latest":
        return checkpoints[-1] if checkpoints else None
    path = output_dir / Path(config.resume_from_checkpoint).name
    if path not in checkpoints:
        known = ", ".join(p.name for p in checkpoints) or "none"
        raise UserInputError(f"--resume_from_checkpoint {path} is not a checkpoint; those of the run: {known}")
    return path


def save_checkpoint(
    accelerator: Accelerator,
    config: TrainingConfig,
    state: TrainState,
    lr_scheduler: Any,
    ema: EMAModel | None,
    save_pipeline: Callable[[Path], None],
) -> None:
    """Writes `checkpoint-STEP`, then removes the oldest beyond the limit. Call it on every process.

    A checkpoint is a pipeline folder too, so that samples can be drawn from it; with an EMA, its weights are those.
    """
    path = Path(config.output_dir) / f"checkpoint-{state.global_step}"
    partial = path.with_name(path.name + ".partial")
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        save_pipeline(partial)
        values = {
            **asdict(state),
            "num_processes": accelerator.num_processes,
            "total_batch_size": config.total_batch_size(accelerator.num_processes),
            "lr_scheduler": lr_scheduler.state_dict(),
        }
        if ema is not None:
            values["ema_optimization_step"] = ema.optimization_step
        (partial / STATE_FILE).write_text(json.dumps(values))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)  # a checkpoint is whole or not there
        tqdm.write(f"wrote {path}")
        if config.checkpoints_total_limit is not None:
            for old in list_checkpoints(path.parent)[: -config.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(
    accelerator: Accelerator,
    config: TrainingConfig,
    path: Path,
    model: torch.nn.Module,
    lr_scheduler: Any,
    ema: EMAModel | None,
) -> TrainState:
    """Restores weights, optimizer, EMA, schedule and random states in place, and says where the run stands."""
    values = json.loads((path / STATE_FILE).read_text())
    check_num_processes(config, path, values, accelerator.num_processes)
    accelerator.load_state(str(path))
    accelerator.step = 0  # micro-batches: the saved number is of that process and that accumulation
    lr_scheduler.load_state_dict(values.pop("lr_scheduler"))
    ema_optimization_step = values.pop("ema_optimization_step", None)
    if ema is not None:
        if ema_optimization_step is None:
            raise UserInputError(f"{path} was written without --use_ema: resume without it as well")
        shadow = load_file(path / WEIGHTS_FILE)  # not to the device: "cpu:0", of several processes, it does not know
        names = accelerator.unwrap_model(model).state_dict()
        ema.shadow_params = [shadow[name].to(accelerator.device) for name in names]
        ema.optimization_step = ema_optimization_step
    return TrainState(**values)


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
