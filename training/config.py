"""The configuration of a run: defaults < `--config FILE.yaml` < flags."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

from training.errors import ArgumentParser, UserInputError, check_numbers
from training.files import write_text

PRESETS_DIR = Path(__file__).resolve().parent.parent / "configs"
BUILT_IN_DATASET = "sprites"
DATA_FLAGS = (  # what says which images there are and how they are read
    *("dataset_name", "dataset_config_name", "dataset_split", "train_data_dir", "cache_dir", "image_column"),
    *("label_column", "labels_file", "class_names", "max_train_samples", "resolution", "resize_mode"),
    *("interpolation", "image_mode", "background", "on_bad_image"),
)

# What changes no number of a run: its weights, its samples, its figures.
WITHOUT_EFFECT = (
    *("config", "cache_dir", "local_rank", "preserve_input_precision", "max_skipped_steps", "shutdown_grace"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logger", "logging_dir", "logging_steps"),
    *("save_images_epochs", "save_images_steps", "save_model_epochs", "snapshot_epochs", "evaluate_every"),
    *("checkpointing_steps", "checkpoints_total_limit", "keep_best_checkpoint"),
    *("push_to_hub", "hub_strategy", "hub_token", "hub_model_id", "hub_private_repo"),
)
# What `save` leaves out, as it says how to start: no run is to be removed by its own configuration.
NOT_SAVED = ("config", "hub_token", "overwrite_output_dir", "resume_from_checkpoint")


def _field(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@dataclass
class TrainingConfig:
    """Everything that determines a run.

    Where diffusers' official `train_unconditional.py` has the same flag, the name, the meaning and the default
    are the same; docs/flags.md has the table.
    """

    config: str | None = _field(None, "YAML file of these same names; flags given besides it win.")

    # Data
    dataset_name: str | None = _field(
        None,
        "'sprites' (built in), a dataset on the Hub, a local dataset folder, or a .parquet or .npy file.",
    )
    dataset_config_name: str | None = _field(None, "Configuration of the dataset, where it has several.")
    dataset_split: str = _field("train", "Split of the dataset.")
    train_data_dir: str | None = _field(
        None, "Folder of images; subfolder names are the classes. Ignored if `dataset_name` is given."
    )
    cache_dir: str | None = _field(None, "Where `datasets` keeps what it downloads.")
    image_column: str | None = _field(None, "Column of the images; found from the features if not given.")
    label_column: str | None = _field(None, "Column of the class labels; found if not given.")
    labels_file: str | None = _field(None, ".npy file of the labels, (N,) or one-hot (N, K), of a .npy dataset.")
    class_names: list[str] | None = _field(None, "Names of the classes, in order, where the data has none.")
    max_train_samples: int | None = _field(
        None, "Use the first N images; for 'sprites', how many are drawn (8,000 if not given)."
    )
    streaming: bool = _field(
        False, "Read while training: for sets that do not fit on the disk. Needs `max_train_steps`."
    )
    resolution: str = _field("64", "Side of the images, or WIDTHxHEIGHT.")
    resize_mode: Literal["crop", "pad", "none"] = _field(
        "crop",
        "How an image of another shape is made to fit, its aspect kept: resize to cover and crop, "
        "resize to fit and pad with `background`, or 'none': refuse images that are not of the resolution.",
    )
    center_crop: bool = _field(False, "Crop the centre, not a random place.")
    random_flip: bool = _field(False, "Mirror half of the images, left to right.")
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = _field(
        "lanczos", "Resize filter; 'nearest' for pixel art."
    )
    image_mode: Literal["auto", "L", "RGB"] = _field(
        "auto", "Channels to train on: grey, colour, or what the data has."
    )
    background: str = _field("white", "Colour under transparent pixels and around padded images.")
    preserve_input_precision: bool = _field(
        False, "Accepted for the official script's users: 16-bit images always keep their range here."
    )
    on_bad_image: Literal["error", "skip"] = _field("error", "What to do about an image that can't be decoded.")
    dataloader_num_workers: int = _field(0, "Processes that read a streamed dataset.")

    # Network
    model_class: Literal["UNet2DModel", "ContextUNet2DModel", "BasicUNet2DModel"] = _field(
        "UNet2DModel", "The network: diffusers' U-Net, the sprite course's, or the toy of three convolutions."
    )
    model_config_name_or_path: str | None = _field(
        None, "A config.json of a UNet2DModel, its folder or its Hub id; in place of the next four."
    )
    block_out_channels: list[int] = _field(
        [128, 128, 256, 256, 512, 512], "Channels of each level; ContextUNet2DModel takes one number."
    )
    attention_levels: list[int] = _field([5], "Levels with self-attention, 1 = full resolution; 0 = none.")
    layers_per_block: int = _field(2, "Residual blocks per level.")
    attention_head_dim: int = _field(8, "Channels per attention head; 32 or 64 is faster than the default.")
    norm_type: Literal["group", "batch"] = _field("group", "Normalisation of ContextUNet2DModel.")
    gradient_checkpointing: bool = _field(
        False, "Less memory: activations of UNet2DModel's blocks are calculated again in the backward pass."
    )
    enable_xformers_memory_efficient_attention: bool = _field(False, "Use xFormers' attention.")

    # Noise process
    noise_scheduler_class: Literal["ClosedFormDDPMScheduler", "LinearCorruptionScheduler"] = _field(
        "ClosedFormDDPMScheduler", "The forward process."
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = _field(
        "epsilon", "What the network predicts: the noise, the clean image, or the velocity."
    )
    ddpm_num_steps: int = _field(1000, "Steps of the forward process, T.")
    ddpm_num_inference_steps: int = _field(1000, "Steps of the sample grids.")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = _field(
        "linear", "How beta grows from `beta_start` to `beta_end`."
    )
    beta_start: float = _field(0.0001, "First beta.")
    beta_end: float = _field(0.02, "Last beta.")
    noise_type: Literal["gaussian", "uniform"] = _field("gaussian", "Noise of LinearCorruptionScheduler.")

    # Optimisation
    train_batch_size: int = _field(16, "Images per process and micro-batch.")
    num_epochs: int = _field(100, "Passes over the data.")
    max_train_steps: int | None = _field(None, "Optimizer steps; ends the run before `num_epochs` if smaller.")
    gradient_accumulation_steps: int = _field(1, "Micro-batches per optimizer step.")
    learning_rate: float = _field(1e-4, "Learning rate after the warm-up.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _field("cosine", "Learning-rate schedule, counted in optimizer steps.")
    lr_warmup_steps: int = _field(500, "Optimizer steps of the warm-up.")
    adam_beta1: float = _field(0.95, "AdamW's beta1.")
    adam_beta2: float = _field(0.999, "AdamW's beta2.")
    adam_weight_decay: float = _field(1e-6, "AdamW's weight decay; 0 makes it Adam.")
    adam_epsilon: float = _field(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _field(1.0, "Gradients are scaled down to this norm.")
    snr_gamma: float | None = _field(None, "Min-SNR weighting of the loss with this gamma (5 is usual).")
    label_dropout: float = _field(
        0.1, "Share of labels replaced by 'no class' (train_conditional.py): what guidance needs."
    )
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = _field(
        "no", "'auto': bf16 where the hardware does it well, else fp16 on a GPU, else 'no'."
    )
    compile: Literal["auto", "on", "off"] = _field(
        "auto", "torch.compile; 'auto': on a GPU, for runs that are long enough to earn it back."
    )
    use_ema: bool = _field(False, "Sample from and save the moving average of the weights.")
    ema_inv_gamma: float = _field(1.0, "EMA warm-up: decay = 1 - (1 + step / inv_gamma) ** -power.")
    ema_power: float = _field(0.75, "EMA warm-up, see `ema_inv_gamma`.")
    ema_max_decay: float = _field(0.9999, "Largest EMA decay.")
    seed: int = _field(0, "Seed of the weights, the data order, the noise and the samples.")
    max_skipped_steps: int = _field(
        10, "Stop after N steps in a row whose loss or gradient is not finite; fewer are skipped."
    )
    local_rank: int = _field(-1, "Accepted for old launchers; accelerate finds the rank itself.")

    # Output
    output_dir: str = _field("ddpm-model-64", "Folder of the run.")
    overwrite_output_dir: bool = _field(False, "Remove the earlier run in `output_dir` first.")
    save_images_epochs: int = _field(10, "A sample grid every N epochs and at the end.")
    save_images_steps: int | None = _field(None, "A sample grid every N optimizer steps as well.")
    eval_batch_size: int = _field(16, "Images per sample grid (train_conditional.py: per class).")
    guidance_scale: float = _field(
        1.0, "Classifier-free guidance of the sample grids (train_conditional.py); 1 = none."
    )
    save_model_epochs: int = _field(10, "Write the pipeline every N epochs and at the end.")
    evaluate_every: int | None = _field(
        None, "Calculate metrics every N epochs and at the end, of fewer images than calculate_metrics.py."
    )
    snapshot_epochs: int | None = _field(None, "Keep a pipeline under `snapshots/` every N epochs.")
    checkpointing_steps: int = _field(500, "Write a checkpoint to resume from every N optimizer steps.")
    checkpoints_total_limit: int | None = _field(None, "Keep the newest N checkpoints.")
    keep_best_checkpoint: bool = _field(
        False, "Keep the checkpoint of the lowest Frechet distance besides. Needs `evaluate_every`."
    )
    resume_from_checkpoint: str | None = _field(
        None, "'latest', or a checkpoint folder inside `output_dir`; an unfinished run of the same flags needs none."
    )
    shutdown_grace: float = _field(30.0, "Seconds from SIGTERM or SIGINT to the end, with a checkpoint or without.")
    logger: Literal["tensorboard", "wandb", "trackio", "all", "none"] = _field(
        "tensorboard", "Experiment tracker; 'all': each of the three that is installed."
    )
    logging_dir: str = _field("logs", "Folder of the trackers, inside `output_dir`.")
    logging_steps: int = _field(10, "Log the mean loss every N optimizer steps.")

    # Hub
    push_to_hub: bool = _field(False, "Upload the pipeline, beside the training.")
    hub_strategy: Literal["end", "every_save", "checkpoint"] = _field(
        "every_save", "Upload at the end, also every time the pipeline is written, or also at every checkpoint."
    )
    hub_token: str | None = _field(None, "Token for the Hub; better: `hf auth login`. Never saved.")
    hub_model_id: str | None = _field(None, "Repository; the name of `output_dir` if not given.")
    hub_private_repo: bool = _field(False, "Create the repository as private.")

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_data_dir is None:
            self.dataset_name = BUILT_IN_DATASET
        self._check_ranges()
        parts = Path(self.logging_dir).parts
        # Also a pattern: --overwrite_output_dir removes what it names.
        if not parts or ".." in parts or Path(self.logging_dir).is_absolute() or {*"*?["} & {*self.logging_dir}:
            raise UserInputError(
                f"--logging_dir {self.logging_dir}: name a folder inside of --output_dir, such as logs"
            )
        self.image_size  # noqa: B018 - raises if it can't be parsed

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.resolution)
        if match is None or min(sides := [int(side) for side in match.groups(match[1])]) < 1:
            raise UserInputError(f"--resolution is '{self.resolution}': give a side (32) or WIDTHxHEIGHT (24x16)")
        width, height = sides
        return height, width

    def total_batch_size(self, num_processes: int) -> int:
        """Images of an optimizer step."""
        return num_processes * self.train_batch_size * self.gradient_accumulation_steps

    def _check_ranges(self) -> None:
        at_least = {
            0: ("lr_warmup_steps", "dataloader_num_workers", "adam_weight_decay", "ema_power"),
            1: (
                "train_batch_size eval_batch_size num_epochs max_train_steps gradient_accumulation_steps "
                "save_images_epochs save_images_steps save_model_epochs snapshot_epochs evaluate_every "
                "checkpointing_steps checkpoints_total_limit logging_steps ddpm_num_steps ddpm_num_inference_steps "
                "layers_per_block attention_head_dim max_train_samples guidance_scale max_skipped_steps"
            ).split(),
        }
        check_numbers(self.seed, self.guidance_scale)
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserInputError(f"--{name} is {value}: it must be a finite number")
        for minimum, names in at_least.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= minimum:
                    raise UserInputError(f"--{name} is {value}: it must be at least {minimum}")
        for name in (
            "learning_rate",
            "max_grad_norm",
            "snr_gamma",
            "ema_inv_gamma",
            "beta_start",
            "adam_epsilon",
            "shutdown_grace",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserInputError(f"--{name} is {value}: it must be above 0")
        for name in ("label_dropout", "adam_beta1", "adam_beta2", "ema_max_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserInputError(f"--{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        if not self.beta_start <= self.beta_end < 1:
            raise UserInputError(f"--beta_end is {self.beta_end}: it must lie between --beta_start and 1")
        class_names = self.class_names or []
        if len(set(class_names)) < len(class_names):
            raise UserInputError(f"--class_names {' '.join(class_names)} has a name twice: each class needs its own")
        if min(self.block_out_channels) < 1:
            raise UserInputError(f"--block_out_channels holds {min(self.block_out_channels)}: channels are above 0")
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise UserInputError(
                f"--ddpm_num_inference_steps is {self.ddpm_num_inference_steps}: "
                f"it can't exceed --ddpm_num_steps, {self.ddpm_num_steps}"
            )
        if self.streaming and self.max_train_steps is None:
            raise UserInputError("--streaming needs --max_train_steps: the length of a stream is not known")
        if self.streaming and self.evaluate_every is not None:
            raise UserInputError("--evaluate_every does not go with --streaming: metrics need all images at hand")
        if self.keep_best_checkpoint and self.evaluate_every is None:
            raise UserInputError("--keep_best_checkpoint needs --evaluate_every: only then is there a best one")

    def save(self, path: Path) -> None:
        """Writes what repeats this run with `--config PATH`; never the token."""
        values = {name: value for name, value in asdict(self).items() if name not in NOT_SAVED}
        write_text(path, yaml.safe_dump(values, sort_keys=False))

    def differences(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The flags that change the numbers of a run, with their values in a saved configuration and here."""
        pairs = {
            f.name: (saved.get(f.name, _default(f)), getattr(self, f.name))
            for f in fields(self)
            if f.name not in WITHOUT_EFFECT
        }
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


class _Parser(ArgumentParser, HfArgumentParser):
    """Flags from the fields of a dataclass."""


def parse_config(argv: list[str], default_preset: str) -> TrainingConfig:
    """Reads the command line.

    `default_preset`, a file in configs/, is read where neither `--config` nor other data than the built-in
    sprites is named: with data of one's own, the defaults are the official script's.
    """
    parser = _Parser(TrainingConfig, allow_abbrev=False)  # type: ignore[arg-type]
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]  # without the value, which may be a token
        raise UserInputError(_unknown_name(f"unknown flag '{name}'", name.lstrip("-"), prefix="--"))
    path = flags.config
    if path is None and flags.train_data_dir is None and flags.dataset_name in (None, BUILT_IN_DATASET):
        path = PRESETS_DIR / default_preset
    if flags.hub_token is not None:
        # W&B records the command line.
        hidden = {flags.hub_token: "***", f"--hub_token={flags.hub_token}": "--hub_token=***"}
        sys.argv[:] = [hidden.get(argument, argument) for argument in sys.argv]
    if path is None:
        return TrainingConfig(**vars(flags))
    # A file's values take the way of the flags, so both are read, checked and refused alike.
    yaml_argv = _read_yaml_as_flags(Path(path), parser)
    if flags.train_data_dir is not None and flags.dataset_name is None:  # else a preset's dataset would win over it
        yaml_argv = [flag for flag in yaml_argv if not flag.startswith("--dataset_name=")]
    return TrainingConfig(**vars(parser.parse_args(yaml_argv + argv)))


def parse_data_flags(argv: list[str], run_config: Path | None) -> TrainingConfig:
    """The data that flags name or, if they name none, that of a run's saved configuration."""
    parser = _Parser(TrainingConfig, allow_abbrev=False)  # type: ignore[arg-type]
    names = [flag.removeprefix("--").split("=")[0] for flag in argv if flag.startswith("--")]
    for name in names:
        if name not in DATA_FLAGS:
            raise UserInputError(_unknown_name(f"unknown flag '--{name}'", name, "--", DATA_FLAGS))
    run_argv: list[str] = []
    if not {"dataset_name", "train_data_dir"}.intersection(names):
        if run_config is None:
            raise UserInputError("name the images to compare with, by --dataset_name or --train_data_dir")
        run_argv = _read_yaml_as_flags(run_config, parser)
    return TrainingConfig(**vars(parser.parse_args(run_argv + argv)))


def _read_yaml_as_flags(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"--config {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserInputError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserInputError(f"--config {path} must hold 'name: value' lines")
    known = {f.name for f in fields(TrainingConfig)} - {"config"}
    argv = []
    for name, value in values.items():
        if name not in known:
            raise UserInputError(_unknown_name(f"--config {path}: unknown key '{name}'", str(name)))
        if value is None:  # every field that can be None is None by default
            continue
        items = value if isinstance(value, list) else [value]
        # `--name=value` for a single value, so that a negative number is not taken for a flag.
        flag = [f"--{name}={items[0]}"] if len(items) == 1 else [f"--{name}", *map(str, items)]
        try:
            _, rest = parser.parse_known_args(flag)
        except UserInputError as error:
            raise UserInputError(f"--config {path}: {error}") from None
        if rest:
            raise UserInputError(f"--config {path}: '{name}' takes one value, not {len(items)}")
        argv += flag
    return argv


def _unknown_name(message: str, name: str, prefix: str = "", known: Iterable[str] | None = None) -> str:
    nearest = difflib.get_close_matches(name, known or [f.name for f in fields(TrainingConfig)], n=1)
    return message + (f"; did you mean '{prefix}{nearest[0]}'?" if nearest else "; --help lists the known ones")
