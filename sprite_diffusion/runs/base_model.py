"""The trained model that a run begins from, `--init_from`, and the flags that follow from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import ModelCard

from sprite_diffusion.common.errors import UserInputError, mask_secrets
from sprite_diffusion.common.run_files import CARD_FILE
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.sampling.flags import PROCESS_OPTIONS, SAMPLING_OPTIONS
from sprite_diffusion.sampling.pipeline_loading import PROCESS_FILE, Pipeline, find_model_kind, load_pipeline
from sprite_diffusion.sharing.card import UNKNOWN_LICENSE

SHAPE_FLAGS = (
    "model_class",
    "model_config_name_or_path",
    "block_out_channels",
    "attention_levels",
    "layers_per_block",
    "attention_head_dim",
    "resnet_time_scale_shift",
    "norm_type",
)
# Of the flags of the process, those that name its options as they are called.
SAME_OPTIONS = ("beta_start", "beta_end", "noise_type")
SAMPLE_STEPS = 50  # of the sample grids
# A trained network needs few steps, and small ones at first, as its optimizer knows nothing of it: docs/finetuning.md
SHORT_SCHEDULE = {"max_train_steps": 400, "learning_rate": 5e-4, "lr_warmup_steps": 20}


def load_base(init_from: str, flags: Mapping[str, Any]) -> Pipeline:
    """Returns the model of `--init_from` on the CPU in float32.

    Args:
        init_from: What `load_pipeline` takes.
        flags: Values by name; those of `PROCESS_OPTIONS` count for a network that is saved without its process.

    Raises:
        UserInputError: If there is no such model, or one that can't be trained on.
    """
    path = Path(init_from)
    lacks_process = find_model_kind(path) == "network" and not (path / PROCESS_FILE).exists()
    process = {name: flags[name] for name in PROCESS_OPTIONS if name in flags} if lacks_process else {}
    try:
        base = load_pipeline(init_from, process=process)
    except UserInputError as error:
        raise UserInputError(f"--init_from: {error}") from None
    if base.unet.config["out_channels"] != base.sample_shape[0]:
        raise UserInputError(f"--init_from {init_from}: its network predicts a variance besides, name another model")
    return base


def flags_of_model(base: Pipeline) -> dict[str, Any]:
    """Returns the sides, the shape of the network and the process of a model, as flags."""
    network, process = base.unet.config, base.scheduler.config
    _, height, width = base.sample_shape
    flags: dict[str, Any] = {
        "resolution": str(width) if width == height else f"{width}x{height}",
        "model_class": type(base.unet).__name__,
        "noise_scheduler_class": "ClosedFormDDPMScheduler",
        "ddpm_num_inference_steps": min(SAMPLE_STEPS, len(base.scheduler)),
    }
    if "beta_schedule" not in process:
        flags["noise_scheduler_class"] = "LinearCorruptionScheduler"
    if "down_block_types" in network:
        levels = [level for level, block in enumerate(network["down_block_types"], 1) if "Attn" in block]
        flags |= {
            "block_out_channels": list(network["block_out_channels"]),
            "attention_levels": levels or [0],
            "layers_per_block": network["layers_per_block"],
            "resnet_time_scale_shift": network["resnet_time_scale_shift"],
            # None is one head of all channels.
            "attention_head_dim": network["attention_head_dim"] or network["block_out_channels"][-1],
        }
        if "cross_attention_dim" in network:  # where what is called so are the heads of each level
            *_, heads = np.atleast_1d(network["attention_head_dim"]).tolist()
            flags["attention_head_dim"] = network["block_out_channels"][-1] // heads
    elif "num_features" in network:
        flags |= {"block_out_channels": [network["num_features"]], "norm_type": network["norm_type"]}
    options = PROCESS_OPTIONS | SAMPLING_OPTIONS | {name: name for name in SAME_OPTIONS}
    return flags | {flag: process[option] for flag, option in options.items() if process.get(option) is not None}


def check_same_prediction(config: TrainingConfig, base: Pipeline) -> None:
    """Raises `UserInputError` if a run is to predict something else than the network that it begins from."""
    of_model = flags_of_model(base)
    for name in ("noise_scheduler_class", "prediction_type"):
        if name in of_model and getattr(config, name) != of_model[name]:
            raise UserInputError(
                f"--{name} {getattr(config, name)}: the network of --init_from {config.init_from} has learned "
                f"{of_model[name]}, and what it predicts would mean something else: leave the flag out"
            )


def describe_base(init_from: str | None) -> dict[str, Any]:
    """Returns the public name, the place and the licence of the model of `--init_from`, for the summary of a run."""
    if init_from is None:
        return {}
    path = Path(init_from)
    is_on_hub = not path.exists() and not init_from.startswith("wandb:")
    name = init_from if is_on_hub else path.resolve().name  # the folders above it are nobody's business
    return {
        "base": mask_secrets(name),
        "base_is_on_hub": is_on_hub,
        "base_license": _read_license(init_from, is_on_hub),
    }


def _read_license(init_from: str, is_on_hub: bool) -> str | None:
    """Returns the licence in a model's card; None if there is no card, or none in it, or the Hub can't be reached."""
    try:
        card = ModelCard.load(init_from if is_on_hub else Path(init_from, CARD_FILE), ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None
    licence = card.data.to_dict().get("license")
    return None if licence in (None, UNKNOWN_LICENSE) else str(licence)
