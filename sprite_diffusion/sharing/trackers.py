"""The experiment trackers of a run, through accelerate."""

import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import first_line, mask_secrets, mask_value, printable
from sprite_diffusion.common.flags import TRACKERS
from sprite_diffusion.common.run_files import PIPELINE_FILES
from sprite_diffusion.sharing.markdown import escape

PROJECT = "sprite-diffusion"
RUN_ID_FILE = "run-id"


class Trackers:
    """The trackers of `--logger`; 'all' are those that are installed.

    Each tracker keeps its records for `logging_dir`, and continues the same run if it is opened for that folder again.
    A tracker that fails costs a warning and is left out from then on: training matters more.

    Args:
        logger: The value of `--logger`.
        logging_dir: The folder of the records.
        config: What the trackers are to know of the run, by name.
        project: The project of W&B and trackio; None for that of the variable WANDB_PROJECT, or else `PROJECT`.
        job_type: What W&B is to call the kind of the run, such as "train".
        resumed_from: The step of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        logger: str,
        logging_dir: Path,
        config: dict[str, Any],
        project: str | None = None,
        job_type: str | None = None,
        resumed_from: int | None = None,
    ) -> None:
        project = project or os.environ.get("WANDB_PROJECT") or PROJECT
        PartialState()  # accelerate's trackers ask it whether they are on the main process
        names = [name for name in TRACKERS if find_spec(name)] if logger == "all" else [logger]
        self._trackers: list[GeneralTracker] = []
        for name in names if logger != "none" else []:
            with self._warned(name):
                self._trackers.append(_start(name, logging_dir, config, project, job_type, resumed_from))

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers of an optimizer step, by name."""
        self._each(lambda tracker: _log(tracker, values, step))

    def log_image(self, name: str, image: Image.Image, caption: str, step: int | None = None) -> None:
        """Logs a picture with a caption that says what it shows."""
        caption = printable(mask_secrets(caption))

        def log(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3) uint8
                tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
                tracker.log({f"{name}/caption": escape(caption)}, step=step)  # TensorBoard's texts are Markdown
            else:
                _log(tracker, {name: _library(tracker).Image(image.convert("RGB"), caption=caption)}, step)

        self._each(log)

    def log_single_images(self, name: str, images: list[Image.Image], captions: list[str], step: int) -> None:
        """Logs pictures one by one with their captions, to W&B alone: other trackers show the grid as well."""

        def log(tracker: Any) -> None:
            if tracker.name == "wandb":
                pairs = zip(images, map(mask_secrets, captions), strict=True)
                _log(tracker, {name: [_library(tracker).Image(image, caption=text) for image, text in pairs]}, step)

        self._each(log)

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Logs a table whose cells are strings, numbers or PIL images; not to TensorBoard, which has no tables."""

        def log(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                return
            library = _library(tracker)
            data = [[library.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
            _log(tracker, {name: library.Table(columns=columns, data=data)}, None)

        self._each(log)

    def log_model(self, folder: Path, alias: str, metadata: dict[str, Any]) -> None:
        """Gives W&B the pipeline in `folder` as an artifact named after the folder. Other trackers keep no models.

        The artifact gets `alias`; the newest one has the alias 'latest' as well.
        """

        def log(tracker: Any) -> None:
            if tracker.name != "wandb":
                return
            name = re.sub(r"[^\w.-]", "-", folder.resolve().name)
            artifact = _library(tracker).Artifact(name, type="model", metadata=metadata)
            files = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
            for file in filter_repo_objects(files, allow_patterns=PIPELINE_FILES):
                artifact.add_file(str(folder / file), file)
            tracker.run.log_artifact(artifact, aliases=[alias, "latest"])

        self._each(log)

    def finish(self) -> None:
        """Waits until the trackers have sent what they were given, and closes them."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Any], None]) -> None:
        """Does something with each tracker that has not failed so far."""
        for tracker in list(self._trackers):
            with self._warned(tracker.name):
                action(tracker)

    @contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        """Turns an error inside into a warning, and drops the tracker of that name."""
        try:
            yield
        except Exception as error:  # three libraries raise whatever their networks and the disk give them
            tqdm.write(f"warning: {name} failed ({first_line(error)}); the run goes on without it", file=sys.stderr)
            self._trackers = [tracker for tracker in self._trackers if tracker.name != name]


def _start(
    name: str, logging_dir: Path, config: dict[str, Any], project: str, job_type: str | None, resumed_from: int | None
) -> Any:
    """Opens a tracker for a folder; see `Trackers` for the arguments."""
    sys.argv[:] = [mask_secrets(argument) for argument in sys.argv]  # W&B records the command line
    logging_dir.mkdir(parents=True, exist_ok=True)
    run_id = _run_id(logging_dir)
    run_name = mask_secrets(logging_dir.resolve().parent.name)
    options: dict[str, dict[str, Any]] = {
        # `purge_step` hides what an interrupted run logged after its checkpoint: a resumed run logs that again.
        "tensorboard": {
            "logging_dir": str(logging_dir),
            "purge_step": None if resumed_from is None else resumed_from + 1,
        },
        "wandb": {
            "id": run_id,
            "resume": "allow",
            "dir": str(logging_dir),
            "name": run_name,
            "job_type": job_type,
        },
        "trackio": {"name": f"{run_name}-{run_id}", "resume": "allow"},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT if name == "tensorboard" else project, **options[name])
    if name == "wandb":
        tracker.init_kwargs["settings"] = _library(tracker).Settings(silent=True)
    tracker.start()
    values = {key: mask_value(value) for key, value in config.items()}
    if name == "tensorboard":  # which takes numbers and strings only
        values = {key: value if isinstance(value, int | float) else str(value) for key, value in values.items()}
    tracker.store_init_configuration(values)
    if name == "wandb":
        # A resumed run logs earlier steps than W&B's newest, which W&B would drop. Hence the step is a value among
        # others there, and the plots take it as their axis.
        tracker.run.define_metric("*", step_metric="global_step")
        settings = tracker.run.settings
        address = f"offline, in {settings.sync_dir}" if tracker.run.offline else tracker.run.url
        tqdm.write(f"wandb run {run_id}: {address}")
    return tracker


def _run_id(logging_dir: Path) -> str:
    """Returns the id of the run that logs into a folder; makes one up the first time."""
    file = logging_dir / RUN_ID_FILE
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return file.read_text()


def _log(tracker: Any, values: dict[str, Any], step: int | None) -> None:
    """Logs values at a step, which W&B takes as a value."""
    if tracker.name == "wandb" and step is not None:
        tracker.log({**values, "global_step": step})
    else:
        tracker.log(values, step=step)


def _library(tracker: GeneralTracker) -> Any:
    """Returns the module of W&B or trackio, which have the same names for images and tables."""
    return __import__(tracker.name)
