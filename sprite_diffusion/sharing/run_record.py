"""What the card of a run says of it, read from the files in the run's folder."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from sprite_diffusion.common.errors import DAMAGED_JSON, UserInputError, first_line
from sprite_diffusion.common.flags import read_yaml
from sprite_diffusion.common.run_files import (
    CONFIG_FILE,
    INDEX_FILE,
    METRICS_FILE,
    NETWORK_CONFIG_FILE,
    PROMPT_PICTURE,
    SAMPLES_DIR,
    SUMMARY_FILE,
)
from sprite_diffusion.metrics.report import Report


@dataclass(frozen=True)
class RunRecord:
    """What a card says of a run. The first fields are those of the saved flags and of the summary, as they stand."""

    hub_model_id: str | None
    dataset_name: str | None
    resolution: str
    model_class: str
    noise_scheduler_class: str
    prediction_type: str
    ddpm_beta_schedule: str
    ddpm_num_steps: int
    train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler: str
    logging_steps: int
    use_ema: bool
    seed: int
    global_step: int
    images_seen: int
    seconds: float
    loss: float | None
    script: str
    num_parameters: int
    num_images: int | None
    data_source: str
    data_license: str | None
    num_processes: int
    device: str
    precision: str

    versions: dict[str, str]  # by package
    class_names: list[str]  # empty without classes
    prompts: dict[str, str | None]  # examples, each with its picture's path in the run's folder; empty without any
    needs_remote_code: bool  # whether the pipeline's class is not one of diffusers
    is_transparent: bool  # whether the images are RGBA
    base: str | None  # the model that the run began from: its name
    base_is_on_hub: bool
    base_license: str | None
    newest_grid: str | None  # path in the run's folder
    report: Report | None  # None if these weights were not measured
    sampler: str | None  # of the measured images
    guidance_scale: float | None  # of the measured images; None where they were not guided
    guide: str | None  # the name of the model that they were guided by


def read_run(run_dir: Path) -> RunRecord:
    """Returns the record of the run in `run_dir`.

    Raises `UserInputError` if a file can't be read, or a value is missing or of another type.
    """
    found = (run_dir / SAMPLES_DIR).glob("step-*.png")
    grids = sorted(path for path in found if re.fullmatch(r"step-[0-9]+\.png", path.name))
    try:
        saved = {**read_yaml(run_dir / CONFIG_FILE, typed=True), **_read_json(run_dir / SUMMARY_FILE)}
        index = _read_json(run_dir / INDEX_FILE)
        metrics = _read_metrics(run_dir / METRICS_FILE, saved["global_step"])
        # A run that went back to an earlier step has grids of later ones, which are not of its weights.
        grids = [path for path in grids if int(path.stem.removeprefix("step-")) <= saved["global_step"]]
        combined: dict[str, Any] = {
            "versions": {name: str(version) for name, version in saved["versions"].items()},
            "class_names": [_check_type("id2label", name, str) for name in index.get("id2label", {}).values()],
            "prompts": _read_prompts(run_dir, index),
            "needs_remote_code": not isinstance(index["_class_name"], str),
            "is_transparent": _read_json(run_dir / NETWORK_CONFIG_FILE)["in_channels"] == 4,
            "base": _check_type("base", saved.get("base"), str | None),
            "base_is_on_hub": _check_type("base_is_on_hub", saved.get("base_is_on_hub", False), bool),
            "base_license": _check_type("base_license", saved.get("base_license"), str | None),
            "newest_grid": f"{SAMPLES_DIR}/{grids[-1].name}" if grids else None,
            "report": Report.from_dict(metrics) if metrics else None,
            "sampler": _check_type("sampler", metrics["sampler"], str) if metrics else None,
            "guidance_scale": float(metrics["guidance_scale"]) if "guidance_scale" in metrics else None,
            "guide": _check_type("guide", metrics.get("guide"), str | None) if metrics else None,
        }
        types = {name: kind for name, kind in get_type_hints(RunRecord).items() if name not in combined}
        return RunRecord(**{name: _check_type(name, saved[name], kind) for name, kind in types.items()}, **combined)
    except (*DAMAGED_JSON, UserInputError) as error:
        raise UserInputError(f"{run_dir} is not the output folder of a run: {first_line(error)}") from None


def _read_prompts(run_dir: Path, index: dict[str, Any]) -> dict[str, str | None]:
    """Returns the example prompts of a pipeline with their pictures, None where there is none."""
    prompts = [_check_type("example_prompts", prompt, str) for prompt in index.get("example_prompts", [])]
    pictures = [f"{SAMPLES_DIR}/{PROMPT_PICTURE.format(number)}" for number in range(len(prompts))]
    return {
        prompt: picture if (run_dir / picture).is_file() else None
        for prompt, picture in zip(prompts, pictures, strict=True)
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _read_metrics(path: Path, global_step: int) -> dict[str, Any]:
    """Returns the metrics of the weights of a step; {} if the file is missing, or was measured of other weights."""
    metrics = _read_json(path) if path.is_file() else {}
    return metrics if metrics.get("global_step") == global_step else {}


def _check_type(name: str, value: Any, kind: Any) -> Any:
    """Returns `value`. Raises TypeError if it is not a `kind`; a whole number will do for a float."""
    if not isinstance(value, kind) and not (isinstance(value, int) and isinstance(0.0, kind)):
        raise TypeError(f"{name} is {value!r}")
    return value
