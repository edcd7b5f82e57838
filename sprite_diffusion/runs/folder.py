"""The output folder of a run: which run it holds, whether there is room, and which checkpoints are in it."""

import json
import math
import os
import shutil
import socket
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from sprite_diffusion.common.errors import DAMAGED_JSON, UserInputError, warn
from sprite_diffusion.common.files import check_output_folder
from sprite_diffusion.common.owned_files import LOCK_FILE, LOCK_OWNER_FILE, OwnedFiles, read_list
from sprite_diffusion.common.run_files import (
    CONFIG_FILE,
    LIST_FILE,
    PART_FOLDERS,
    SAMPLES_DIR,
    SNAPSHOTS_DIR,
    SUMMARY_FILE,
    list_checkpoints,
    read_saved_config,
    step_of,
)
from sprite_diffusion.data.config import BUILT_IN_DATASET
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.manifest import find_damage

BEST = "best-"


def check_output_dir(config: TrainingConfig) -> None:
    """Sets `config.resume_from_checkpoint` to the checkpoint that the run goes on from, None for a new run.

    Raises `UserInputError` if the run would mix with what the folder holds. Writes nothing.
    """
    output_dir = Path(config.output_dir)
    check_output_folder("--output_dir", output_dir)
    _check_apart_from_inputs(config)
    if not _is_used(output_dir):
        if config.resume_from_checkpoint is not None:
            find_checkpoint(output_dir, config.resume_from_checkpoint)
        config.resume_from_checkpoint = None
        return
    is_copy = bool(list_checkpoints(output_dir)) and not (output_dir / CONFIG_FILE).exists()  # of a checkpoint alone
    # Another machine's own folder has no list: the main process alone writes, but for what is left of checkpoints.
    if PartialState().is_main_process and read_list(output_dir) is None and not is_copy:
        raise UserInputError(
            f"--output_dir {output_dir} is not empty and has no {LIST_FILE}, the list of a run's files: name another "
            f"folder; or, if all files in it are those of a run, by an earlier version too, make the list by: find "
            f"{output_dir} -type f -printf '%P\\n' > {output_dir / LIST_FILE}"
        )
    _check_links(config)
    if config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        _check_same_run(config)
        config.resume_from_checkpoint = "latest"
    if config.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint)
        config.resume_from_checkpoint = None if checkpoint is None else checkpoint.name


def _check_same_run(config: TrainingConfig) -> None:
    """Raises `UserInputError` unless the folder holds an unfinished run of the same flags."""
    output_dir = Path(config.output_dir)
    others = "--overwrite_output_dir to start over, or name another folder"
    saved = read_saved_config(output_dir)
    if saved is None:
        raise UserInputError(
            f"--output_dir {output_dir} is not empty: add '--resume_from_checkpoint latest' to go on with the run in "
            f"it, {others}"
        )
    if _is_finished(output_dir):
        raise UserInputError(
            f"--output_dir {output_dir} holds a finished run: add '--resume_from_checkpoint latest' and more epochs "
            f"or steps to train it on, {others}"
        )
    if differences := config.differences(saved):
        changed = ", ".join(f"--{name} {old} is now {new}" for name, (old, new) in differences.items())
        raise UserInputError(
            f"--output_dir {output_dir} holds an unfinished run of other flags ({changed}): add "
            f"'--resume_from_checkpoint latest' to go on with the new values, {others}"
        )


def _is_finished(output_dir: Path) -> bool:
    """Returns whether the run in a folder wrote its last file, the summary, and was not trained on since."""
    try:
        summary = json.loads((output_dir / SUMMARY_FILE).read_text())
        step, total = int(summary["global_step"]), int(summary["total_steps"])
    except DAMAGED_JSON:
        return False
    newest = [step_of(path) for path in list_checkpoints(output_dir)[-1:]]
    return step >= total and all(other <= step for other in newest)


FolderState = tuple[list[str], int | None]  # the checkpoints' names, and when the summary was written


def read_folder_state(output_dir: Path) -> FolderState:
    """Returns what shows that a run has worked in a folder, to compare with later."""
    summary = output_dir / SUMMARY_FILE
    written = summary.stat().st_mtime_ns if summary.exists() else None
    return [path.name for path in list_checkpoints(output_dir)], written


def _is_used(output_dir: Path) -> bool:
    """Returns whether anything is in a folder besides the traces of a run that has not begun."""
    ignored = {LOCK_FILE, LOCK_OWNER_FILE, LIST_FILE}
    return output_dir.is_dir() and any(path.name not in ignored for path in output_dir.iterdir())


def _check_apart_from_inputs(config: TrainingConfig) -> None:
    """Raises `UserInputError` if the output folder holds or lies in the training images or the model to begin from."""
    output_dir = Path(os.path.realpath(config.output_dir))
    for flag in ("dataset_name" if config.dataset_name else "train_data_dir", "init_from"):
        name = getattr(config, flag)
        path = Path(os.path.realpath(name or ""))
        if not name or name == BUILT_IN_DATASET or not path.exists():
            continue
        if path.is_relative_to(output_dir) or output_dir.is_relative_to(path):
            raise UserInputError(
                f"--output_dir {config.output_dir} and --{flag} {name}: one lies in the other; name an output folder "
                "outside of it"
            )


def _check_links(config: TrainingConfig) -> None:
    """Raises `UserInputError` if a folder that the run writes into is a link to another place."""
    output_dir = Path(config.output_dir)
    for name in (SAMPLES_DIR, SNAPSHOTS_DIR, *PART_FOLDERS, *Path(config.logging_dir).parts[:1]):
        if (output_dir / name).is_symlink():
            raise UserInputError(f"{output_dir / name} is a link: a run writes into none, put a folder in its place")


def prepare_output_dir(config: TrainingConfig, known: FolderState) -> "RunFolder":
    """Makes the folder and locks it, removes the earlier run if it is to be overwritten, and saves the configuration.

    Raises `UserInputError` if another process works in the folder, or has since its state was `known`.
    """
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(output_dir)
    if read_folder_state(output_dir) != known:
        raise UserInputError(f"--output_dir {output_dir} was used by another run meanwhile: give the command again")
    folder.files.remove_leftovers()
    if config.overwrite_output_dir and config.resume_from_checkpoint is None:
        folder.files.remove(output_dir)
    with folder.files.writing(output_dir / CONFIG_FILE) as partial:
        config.save(partial)
    return folder


class RunFolder:
    """The output folder of a run that is under way: locked against other processes, with the list of its files."""

    def __init__(self, output_dir: Path) -> None:
        self._lock = FileLock(output_dir / LOCK_FILE)  # the system frees it when the process ends, however that is
        owner = output_dir / LOCK_OWNER_FILE
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserInputError(f"--output_dir {output_dir} is in use by {_describe_owner(owner)}") from None
        owner.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        self.files = OwnedFiles(output_dir)

    def release(self) -> None:
        """Lets other runs have the folder."""
        self._lock.release()


def _describe_owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['process']} on {owner['host']}: wait for its end, or name another folder"
    except DAMAGED_JSON:
        return "another process: wait for its end, or name another folder"


def list_best(output_dir: Path) -> list[Path]:
    """Returns the best checkpoint of a run; several where a kill came before an earlier one was removed."""
    return list(output_dir.glob(f"checkpoint-{BEST}*[0-9]"))


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """Returns the checkpoint of that name, or for 'latest' the newest sound one; None if there is none at all.

    Raises `UserInputError` if it is damaged or, for 'latest', if all are; warns of the damaged ones that are passed
    over.
    """
    checkpoints = list_checkpoints(output_dir)
    if name != "latest":
        path = output_dir / Path(name).name
        if len(Path(name).parts) > 1 and Path(name).resolve() != path.resolve():
            raise UserInputError(
                f"--resume_from_checkpoint {name} is not in --output_dir {output_dir}: name one that is"
            )
        checkpoints += list_best(output_dir)
        if path not in checkpoints:
            known = ", ".join(p.name for p in checkpoints) or "none"
            raise UserInputError(f"--resume_from_checkpoint {path} is not a checkpoint; those of the run: {known}")
        if damage := find_damage(path):
            raise UserInputError(f"--resume_from_checkpoint {path} is damaged ({damage}): name another")
        return path
    damaged: list[str] = []
    for path in reversed(checkpoints):
        if not (damage := find_damage(path)):
            if damaged:
                warn(f"damaged: {', '.join(damaged)}; going on from {path}")
            return path
        damaged.append(f"{path.name} ({damage})")
    if damaged:
        raise UserInputError(
            f"--output_dir {output_dir} has no sound checkpoint, damaged: {', '.join(damaged)}; restore one, give "
            "--overwrite_output_dir to start over, or name another folder"
        )
    return None


def check_room(config: TrainingConfig, model: torch.nn.Module, global_step: int, total_steps: int) -> None:
    """Raises `UserInputError` if one checkpoint does not fit on the disk; warns if those that will be kept do not."""
    output_dir = Path(config.output_dir).absolute()
    folder = next(parent for parent in (output_dir, *output_dir.parents) if parent.is_dir())
    # In float32 the weights, those of the pipeline in it (the EMA's), and AdamW's two moments.
    size = 4 * 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6  # MB
    free = shutil.disk_usage(folder).free / 1e6
    remedy = "free some, or name another folder by --output_dir"
    if free < size:
        raise UserInputError(f"{folder} has {free:,.1f} MB free, a checkpoint takes {size:,.1f} MB: {remedy}")
    to_come = math.ceil((total_steps - global_step) / config.checkpointing_steps)
    # A new one is written before an old one goes.
    to_come = max(1, min(to_come, config.checkpoints_total_limit + 1 - len(list_checkpoints(output_dir))))
    to_come += config.keep_best_checkpoint
    if free < to_come * size:
        warn(
            f"{folder} has {free:,.1f} MB free, {to_come} checkpoints take {to_come * size:,.1f} MB: "
            f"lower --checkpoints_total_limit, {remedy}"
        )
