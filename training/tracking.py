"""Experiment trackers, through accelerate."""

from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
from accelerate import Accelerator
from PIL import Image

from training.config import TrainingConfig
from training.errors import UserInputError


def check_tracker(config: TrainingConfig) -> None:
    """Raises if the package of `--logger` is missing."""
    if config.logger != "none" and find_spec(config.logger) is None:
        raise UserInputError(f"--logger {config.logger}: run 'pip install {config.logger}', or give --logger none")


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Opens the tracker with the run's configuration, without the token."""
    values = {name: value for name, value in asdict(config).items() if name != "hub_token"}
    # TensorBoard takes numbers and strings only.
    flat = {name: v if isinstance(v, int | float | str) else str(v) for name, v in values.items()}
    accelerator.init_trackers("sprite-diffusion", config=flat)


def log_grid(accelerator: Accelerator, grid: Image.Image, step: int) -> None:
    """Sends a sample grid to the tracker."""
    pixels = np.asarray(grid.convert("RGB"))[None]  # (1, H, W, 3) uint8
    for tracker in accelerator.trackers:
        kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": pixels}, step=step, **kwargs)
