"""The flags of a training run, what they mean, and which of them go together."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from sprite_diffusion.common.errors import UserInputError, keep_secret, mask_value
from sprite_diffusion.common.flags import (
    MAX_COUNT,
    MAX_SEED,
    MAX_THREADS,
    MAX_TIMESTEPS,
    THREADS_HELP,
    AugmentationSet,
    BetaSchedule,
    PredictionType,
    ProcessClass,
    TimestepSpacing,
    VarianceType,
    check_token,
    default_of,
    flag,
)
from sprite_diffusion.common.run_files import check_logging_dir
from sprite_diffusion.data.config import DataConfig

# Larger values than these would fill any memory.
MAX_WORKERS = 1024
MAX_CHANNELS = 2**16
MAX_LAYERS = 1000
MAX_IMAGES = 2**20  # of an optimizer step, whose noise is drawn at once
MAX_GRID = 2**16  # images of a sample grid

# The official script's.
NUM_EPOCHS = 100
OUTPUT_EPOCHS = 10  # between two sample grids, and two times that the pipeline is written


@dataclass
class TrainingConfig(DataConfig):
    """Everything that determines a run, with the images of `DataConfig`.

    Where diffusers' official `train_unconditional.py` has the same flag, the name, the meaning and the default
    are the same; docs/flags.md has the table.
    """

    config: str | None = flag(
        None, "YAML file of these same names; flags given besides it win.", changes="nothing", saved=False
    )

    # Reading
    streaming: bool = flag(
        False, "Read while training: for sets that do not fit on the disk. Needs `max_train_steps`."
    )
    random_flip: bool = flag(False, "Mirror half of the images, left to right.")
    augmentation: AugmentationSet = flag(
        "none",
        "Change images at random and tell the network how, so that samples are not changed: for few images. "
        "'pixel_art' keeps pixels whole.",
    )
    augmentation_probability: float = flag(0.15, "That of each change.", above=0, at_most=1)
    preserve_input_precision: bool = flag(
        False,
        "Accepted for the official script's users: 16-bit images always keep their range here.",
        changes="nothing",
    )
    dataloader_num_workers: int = flag(0, "Processes that read a streamed dataset.", at_least=0, at_most=MAX_WORKERS)

    # Network
    init_from: str | None = flag(
        None,
        "Begin with the weights of a trained model: whatever sample.py draws from. Its network and process are taken.",
    )
    model_class: Literal["UNet2DModel", "UNet2DConditionModel", "ContextUNet2DModel", "BasicUNet2DModel"] = flag(
        "UNet2DModel",
        "The network: diffusers' U-Net, which is UNet2DConditionModel with captions; the sprite course's; or the toy "
        "of three convolutions.",
    )
    text_encoder: str | None = flag(
        None,
        "A trained text encoder of transformers with its tokenizer, a Hub id or a folder, which reads the captions "
        "and stays as it is. Default: a small one, trained with the network.",
    )
    model_config_name_or_path: str | None = flag(
        None, "A config.json of a UNet2DModel, its folder or its Hub id; in place of the flags of its shape."
    )
    block_out_channels: list[int] = flag(
        [128, 128, 256, 256, 512, 512],
        "Channels of each level; ContextUNet2DModel takes one number.",
        at_most=MAX_CHANNELS,
    )
    attention_levels: list[int] = flag([5], "Levels with self-attention, 1 = full resolution; 0 = none.")
    layers_per_block: int = flag(2, "Residual blocks per level.", at_least=1, at_most=MAX_LAYERS)
    dropout: float = flag(
        0.0,
        "Share of the features that UNet2DModel's blocks leave out; 0 leaves it to a given model or config.",
        at_least=0,
        below=1,
    )
    attention_head_dim: int = flag(
        8, "Channels per attention head; 32 or 64 is faster than the default.", at_least=1, at_most=MAX_CHANNELS
    )
    resnet_time_scale_shift: Literal["default", "scale_shift"] = flag(
        "default",
        "How residual blocks are told the time, class and caption: by what is added to their features, or by what "
        "they are scaled and shifted with.",
    )
    norm_type: Literal["group", "batch"] = flag("group", "Normalisation of ContextUNet2DModel.")
    gradient_checkpointing: bool = flag(
        False, "Less memory: activations of UNet2DModel's blocks are calculated again in the backward pass."
    )
    enable_xformers_memory_efficient_attention: bool = flag(False, "Use xFormers' attention.")

    # Noise process
    noise_scheduler_class: ProcessClass = flag("ClosedFormDDPMScheduler", "The forward process.")
    prediction_type: PredictionType = flag(
        "epsilon", "What the network predicts: the noise, the clean image, or the velocity."
    )
    ddpm_num_steps: int = flag(1000, "Steps of the forward process, T.", at_least=1, at_most=MAX_TIMESTEPS)
    ddpm_num_inference_steps: int = flag(1000, "Steps of the sample grids.", at_least=1)
    ddpm_beta_schedule: BetaSchedule = flag("linear", "How beta grows from `beta_start` to `beta_end`.")
    beta_start: float = flag(0.0001, "First beta.", above=0)
    beta_end: float = flag(0.02, "Last beta.")
    rescale_betas_zero_snr: bool = flag(
        False, "Let the process end in pure noise; needs `prediction_type` sample or v_prediction."
    )
    clip_sample: bool = flag(True, "Clip the predicted image to [-1, 1] at each step of sampling; saved in the model.")
    variance_type: VarianceType = flag("fixed_small", "Variance of the reverse step; saved in the model.")
    timestep_spacing: TimestepSpacing = flag(
        "leading", "Which timesteps a sampler of fewer than T steps takes; saved in the model."
    )
    noise_type: Literal["gaussian", "uniform"] = flag("gaussian", "Noise of LinearCorruptionScheduler.")

    # Optimisation
    train_batch_size: int = flag(16, "Images per process and micro-batch.", at_least=1, at_most=MAX_IMAGES)
    num_epochs: int | None = flag(
        None,
        "Passes over the data. Default: 100, if `max_train_steps` is not given either. The shorter length counts.",
        at_least=1,
    )
    max_train_steps: int | None = flag(
        None, "Optimizer steps. `--num_epochs` on the command line takes the place of a file's.", at_least=1
    )
    gradient_accumulation_steps: int = flag(1, "Micro-batches per optimizer step.", at_least=1, at_most=MAX_IMAGES)
    learning_rate: float = flag(1e-4, "Learning rate after the warm-up.", above=0)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = flag("cosine", "Learning-rate schedule, counted in optimizer steps.")
    lr_scheduler_interval: Literal["step", "epoch"] = flag(
        "step", "When the schedule moves the learning rate: at each step, or only at the start of an epoch."
    )
    lr_warmup_steps: int = flag(500, "Optimizer steps of the warm-up.", at_least=0)
    optimizer: Literal["adamw", "muon"] = flag("adamw", "'muon': for matrices, Muon at 20 times `learning_rate`.")
    adam_beta1: float = flag(0.95, "AdamW's beta1.", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW's beta2.", at_least=0, below=1)
    adam_weight_decay: float = flag(1e-6, "AdamW's weight decay; 0 makes it Adam.", at_least=0)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this norm.", above=0)
    snr_gamma: float | None = flag(None, "Min-SNR weighting of the loss with this gamma (5 is usual).", above=0)
    snr_floor: float = flag(
        0.0,
        "Least weight of an error of the predicted image, 1 for captions: words are learned at high noise.",
        at_least=0,
    )
    timestep_power: float = flag(
        1.0, "Timesteps are drawn as often as t^(this - 1): 1 evenly, 2 for captions.", above=0, at_most=10
    )
    label_dropout: float = flag(
        0.1,
        "Share of labels or captions left out, so that 'no class' is learned as well (train_conditional.py): what "
        "guidance needs.",
        at_least=0,
        below=1,
    )
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = flag(
        "no", "'auto': bf16 where the hardware does it well, else fp16 on a GPU, else 'no'."
    )
    compile: Literal["auto", "on", "off"] = flag(
        "auto", "torch.compile; 'auto': on a GPU, for runs that are long enough to earn it back."
    )
    num_threads: int | None = flag(None, THREADS_HELP, at_least=1, at_most=MAX_THREADS, changes="nothing")
    use_ema: bool = flag(False, "Sample from and save the moving average of the weights.")
    ema_inv_gamma: float = flag(1.0, "EMA warm-up: decay = 1 - (1 + step / inv_gamma) ** -power.", above=0)
    ema_power: float = flag(0.75, "EMA warm-up, see `ema_inv_gamma`.", at_least=0)
    ema_max_decay: float = flag(0.9999, "Largest EMA decay.", at_least=0, below=1)
    seed: int = flag(
        0, "Seed of the weights, the data order, the noise and the samples.", at_least=0, at_most=MAX_SEED
    )
    max_skipped_steps: int = flag(
        10,
        "Stop after N steps in a row whose loss or gradient is not finite; fewer are skipped.",
        at_least=1,
        changes="nothing",
    )
    local_rank: int = flag(
        -1, "Accepted for old launchers; accelerate finds the rank itself.", at_least=-1, changes="nothing"
    )

    # Output
    output_dir: str = flag("ddpm-model-64", "Folder of the run.", changes="nothing")
    overwrite_output_dir: bool = flag(
        False, "Remove the earlier run in `output_dir` first.", changes="nothing", saved=False
    )
    save_images_epochs: int | None = flag(
        None,
        "A sample grid after epochs 1, 1 + N, 1 + 2 N, ... and at the end. Default: 10 in a run of `num_epochs`.",
        at_least=1,
        changes="nothing",
    )
    save_images_steps: int | None = flag(
        None, "A sample grid every N optimizer steps as well.", at_least=1, changes="nothing"
    )
    eval_batch_size: int = flag(
        16, "Images per sample grid (train_conditional.py: per class or caption).", at_least=1, at_most=MAX_GRID
    )
    guidance_scale: float = flag(
        1.0, "Classifier-free guidance of the sample grids (train_conditional.py); 1 = none.", at_least=1
    )
    save_model_epochs: int | None = flag(
        None,
        "Write the pipeline after epochs 1, 1 + N, 1 + 2 N, ... and at the end. Default: 10 in a run of `num_epochs`.",
        at_least=1,
        changes="nothing",
    )
    evaluate_every: int | None = flag(
        None,
        "Calculate metrics after epochs N, 2 N, ... and the last, of fewer images than calculate_metrics.py.",
        at_least=1,
        changes="nothing",
    )
    validation_fraction: float = flag(
        0.0,
        "Share of the images, of each class, that are not trained on: each evaluation has their loss beside that of "
        "the others.",
        at_least=0,
        below=1,
    )
    snapshot_epochs: int | None = flag(
        None,
        "Keep a pipeline under `snapshots/` after epochs 1, 1 + N, 1 + 2 N, ... and the last.",
        at_least=1,
        changes="nothing",
    )
    checkpointing_steps: int = flag(
        500, "Write a checkpoint to resume from every N optimizer steps.", at_least=1, changes="nothing"
    )
    checkpoints_total_limit: int = flag(3, "Keep the newest N checkpoints.", at_least=1, changes="nothing")
    keep_best_checkpoint: bool = flag(
        False, "Keep the checkpoint of the lowest Frechet distance besides. Needs `evaluate_every`.", changes="nothing"
    )
    stop_when_copying: bool = flag(
        False,
        "End at the best checkpoint once near-copies of training images are more than among real ones. Needs "
        "`keep_best_checkpoint`.",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "'latest', or a checkpoint folder inside `output_dir`; an unfinished run of the same flags needs none.",
        changes="nothing",
        saved=False,
    )
    shutdown_grace: float = flag(
        30.0,
        "Seconds from SIGTERM or SIGINT to the end, with a checkpoint or without.",
        above=0,
        at_most=MAX_COUNT,
        changes="nothing",
    )
    logger: Literal["tensorboard", "wandb", "trackio", "all", "none"] = flag(
        "tensorboard", "Experiment tracker; 'all': each of the three that is installed.", changes="nothing"
    )
    tracker_project: str | None = flag(
        None,
        "Project in W&B and trackio; the variable WANDB_PROJECT or else 'sprite-diffusion' if not given.",
        changes="nothing",
    )
    tracker_job_type: str | None = flag(None, "Job type of the run in W&B, such as 'train'.", changes="nothing")
    logging_dir: str = flag("logs", "Folder of the trackers, inside `output_dir`.", changes="nothing")
    logging_steps: int = flag(10, "Log the mean loss every N optimizer steps.", at_least=1, changes="nothing")

    # Hub
    push_to_hub: bool = flag(False, "Upload the pipeline, beside the training.", changes="nothing")
    hub_strategy: Literal["end", "every_save", "checkpoint"] = flag(
        "every_save",
        "Upload at the end, also every time the pipeline is written, or also at every checkpoint.",
        changes="nothing",
    )
    hub_token: str | None = flag(
        None, "Token for the Hub; better: `hf auth login`. Never saved.", changes="nothing", saved=False
    )
    hub_model_id: str | None = flag(None, "Repository; the name of `output_dir` if not given.", changes="nothing")
    hub_private_repo: bool = flag(False, "Create the repository as private.", changes="nothing")

    def __post_init__(self) -> None:
        if self.hub_token is not None:
            keep_secret(str(self.hub_token))  # before anything that could print it
        super().__post_init__()
        self._set_length()
        if self.hub_token is not None or self.push_to_hub:
            check_token(self.hub_token)
        check_logging_dir(self.logging_dir)
        if not self.beta_start <= self.beta_end < 1:
            raise UserInputError(f"--beta_end is {self.beta_end}: it must lie between --beta_start and 1")
        if min(self.block_out_channels) < 1:
            raise UserInputError(f"--block_out_channels holds {min(self.block_out_channels)}: channels are above 0")
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise UserInputError(
                f"--ddpm_num_inference_steps is {self.ddpm_num_inference_steps}: "
                f"it can't exceed --ddpm_num_steps, {self.ddpm_num_steps}"
            )
        if self.total_batch_size(num_processes=1) > MAX_IMAGES:
            raise UserInputError(
                f"--train_batch_size {self.train_batch_size} and --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}: an optimizer step of more than {MAX_IMAGES:,} images"
            )
        if self.streaming and self.max_train_steps is None:
            raise UserInputError("--streaming needs --max_train_steps: the length of a stream is not known")
        if self.streaming and self.lr_scheduler_interval == "epoch":
            raise UserInputError("--lr_scheduler_interval epoch does not go with --streaming: a stream has no epochs")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserInputError(
                "--rescale_betas_zero_snr needs --prediction_type v_prediction or sample: a process that ends "
                "in pure noise can't be learned by predicting the noise"
            )
        if self.snr_floor and self.prediction_type == "epsilon":
            raise UserInputError(
                "--snr_floor needs --prediction_type v_prediction or sample: an error of the predicted noise would "
                "weigh 1 / SNR, which has no bound"
            )
        if self.snr_gamma is not None and self.snr_floor > self.snr_gamma:
            raise UserInputError(f"--snr_floor is {self.snr_floor:g}: it can't exceed --snr_gamma, {self.snr_gamma:g}")
        if self.streaming and self.evaluate_every is not None:
            raise UserInputError("--evaluate_every does not go with --streaming: metrics need all images at hand")
        if self.keep_best_checkpoint and self.evaluate_every is None:
            raise UserInputError("--keep_best_checkpoint needs --evaluate_every: only then is there a best one")
        if self.validation_fraction and self.evaluate_every is None:
            raise UserInputError("--validation_fraction needs --evaluate_every, which measures the loss of its images")
        if self.stop_when_copying and not self.keep_best_checkpoint:
            raise UserInputError("--stop_when_copying needs --keep_best_checkpoint, where the run ends")

    def _set_length(self) -> None:
        """Sets the official script's number of epochs if no length is given, and its intervals in a run of epochs."""
        if self.num_epochs is None and self.max_train_steps is None:
            self.num_epochs = NUM_EPOCHS
        if self.num_epochs is not None:
            self.save_images_epochs = self.save_images_epochs or OUTPUT_EPOCHS
            self.save_model_epochs = self.save_model_epochs or OUTPUT_EPOCHS

    def total_batch_size(self, num_processes: int) -> int:
        """Returns the number of images of an optimizer step."""
        return num_processes * self.train_batch_size * self.gradient_accumulation_steps

    def save(self, path: Path) -> None:
        """Writes the file that repeats this run with `--config PATH`; a token is never in it."""
        saved = {flag.name for flag in fields(self) if flag.metadata["saved"]}
        values = {name: mask_value(value) for name, value in asdict(self).items() if name in saved}
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def differences(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns the flags that change the numbers of a run, with their values in a saved configuration and here."""
        pairs = {
            flag.name: (saved.get(flag.name, default_of(flag)), mask_value(getattr(self, flag.name)))
            for flag in fields(self)
            if flag.metadata["changes"] != "nothing"
        }
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}
