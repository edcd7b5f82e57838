"""The names of the files in a run's folder, and how the folder is found from one of them."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.flags import read_yaml

CARD_FILE = "README.md"
CONFIG_FILE = "training_config.yaml"
HISTORY_FILE = "metrics.jsonl"  # a line for each evaluation of a run
INDEX_FILE = "model_index.json"
LIST_FILE = "run_files.txt"  # the files that a run has written: a line for each, a folder's ends in /
MANIFEST_FILE = "manifest.json"  # of a checkpoint: size and SHA-256 of every other file
LOSS_FILE = "loss.png"
METRICS_FILE = "metrics.json"
PALETTE_FILE = "palette.hex"  # of pixel art: a colour on each line
PAIRS_FILE = "closest_pairs.png"
PROMPT_PICTURE = "prompt-{:02d}.png"  # of the newest samples: the first of each example prompt
REPORT_FILE = "report.html"
SKIPPED_IMAGES_FILE = "skipped_images.jsonl"
SUMMARY_FILE = "training_summary.json"
TRAINING_LOG_FILE = "training_log.jsonl"  # a line for each time that the loss was logged
NETWORK_CONFIG_FILE = "unet/config.json"
TRAINED_PARTS = ("unet", "text_encoder")  # of a pipeline, as far as it has them
SAMPLES_DIR = "samples"
SNAPSHOTS_DIR = "snapshots"
PART_FOLDERS = ("unet", "scheduler", "text_encoder", "tokenizer")  # of a pipeline
RESERVED_NAMES = {
    CARD_FILE,
    CONFIG_FILE,
    HISTORY_FILE,
    INDEX_FILE,
    LIST_FILE,
    LOSS_FILE,
    METRICS_FILE,
    PALETTE_FILE,
    PAIRS_FILE,
    REPORT_FILE,
    SKIPPED_IMAGES_FILE,
    SUMMARY_FILE,
    SAMPLES_DIR,
    SNAPSHOTS_DIR,
    TRAINING_LOG_FILE,
    *PART_FOLDERS,
}
# A pipeline for others. A `*` goes across folders: `*.py` would take those of snapshots.
PIPELINE_FILES = [INDEX_FILE, "pipeline*.py", *(f"{part}/*" for part in PART_FOLDERS), PALETTE_FILE, CONFIG_FILE]


def find_run(path: Path) -> Path | None:
    """Returns the folder of the run that a model is from: `path`, or a folder above that of a checkpoint; or None."""
    folders = (path, *path.absolute().parents[:2])
    return next((folder for folder in folders if (folder / CONFIG_FILE).is_file()), None)


def check_logging_dir(name: str) -> None:
    """Raises `UserInputError` if `--logging_dir` is not a folder inside of the run's."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or {*"*?[\0"} & {*name}:
        raise UserInputError(f"--logging_dir {name}: name a folder inside of --output_dir, such as logs")
    if parts[0] in RESERVED_NAMES or parts[0].startswith(("checkpoint-", "pipeline", ".run.lock")):
        raise UserInputError(f"--logging_dir {name}: a run has other files of this name, give another, such as logs")


def find_logging_dir(run_dir: Path) -> Path:
    """Returns the folder of a run's trackers. Raises `UserInputError` if the saved configuration can't be read."""
    name = str(read_yaml(run_dir / CONFIG_FILE).get("logging_dir", "logs"))
    check_logging_dir(name)
    return run_dir / name


def read_saved_config(run_dir: Path) -> dict[str, Any] | None:
    """Returns the saved flags of a run by name; None if they are missing or can't be read."""
    try:
        return read_yaml(run_dir / CONFIG_FILE, typed=True)
    except UserInputError:
        return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first, without the best one."""
    found: list[Path] = []
    with suppress(FileNotFoundError):  # of a folder that goes while it is listed
        found = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the number of optimizer steps in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])
