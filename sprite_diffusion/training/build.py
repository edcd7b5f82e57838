"""The network and the noise process that a configuration asks for."""

import math
from typing import Any

import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel, UNet2DModel

from models import BasicUNet2DModel, ContextUNet2DModel
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.common.errors import UserInputError, first_line, mask_secrets, printable
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.sampling.pipeline_loading import Pipeline
from sprite_diffusion.training.augmentation import AugmentedNetwork
from sprite_diffusion.training.initial_weights import adapt_network

TEXT_HEADS = 4  # of the attention that pools the words of a caption
UNETS: dict[str, Any] = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}


def build_noise_scheduler(
    config: TrainingConfig, base: Pipeline | None = None
) -> ClosedFormDDPMScheduler | LinearCorruptionScheduler:
    """Returns the forward process; of a model to begin from also what no flag says, such as betas of its own."""
    if config.noise_scheduler_class == "LinearCorruptionScheduler":
        return LinearCorruptionScheduler(num_train_timesteps=config.ddpm_num_steps, noise_type=config.noise_type)
    return ClosedFormDDPMScheduler.from_config(
        {} if base is None else base.scheduler.config,
        num_train_timesteps=config.ddpm_num_steps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        clip_sample=config.clip_sample,
        variance_type=config.variance_type,
        timestep_spacing=config.timestep_spacing,
    )


def check_network(config: TrainingConfig, base: Pipeline | None = None) -> None:
    """Raises `UserInputError` if the network's flags do not fit each other or the resolution.

    The network is that of `base` if there is one. No images are needed: they may take long to decode.
    """
    for flag in ("gradient_checkpointing", "dropout", "augmentation"):
        if getattr(config, flag) not in (False, 0, "none") and config.model_class not in UNETS:
            raise UserInputError(f"--{flag}: {config.model_class} does not have it, leave it out")
    if base is not None and config.model_class in UNETS:
        _check_sides(config, multiple=2 ** (len(base.unet.config["block_out_channels"]) - 1))
    elif config.model_class not in UNETS:
        _check_sides(config, multiple=4)
        channels = config.block_out_channels
        if config.model_class == "ContextUNet2DModel" and (len(channels) != 1 or channels[0] % 8):
            raise UserInputError("--block_out_channels must be one multiple of 8 for ContextUNet2DModel, such as 64")
    elif config.model_config_name_or_path is not None:
        levels = _load_unet2d_config(config)["block_out_channels"]
        _check_sides(config, multiple=2 ** (len(levels) - 1))
    else:
        _check_sides(config, multiple=2 ** (len(config.block_out_channels) - 1))
        _check_attention(config)


def check_without_captions(config: TrainingConfig) -> None:
    """Raises `UserInputError` if a run that reads no captions is given some, or a network that needs them."""
    if config.caption_column is not None:
        raise UserInputError(f"--caption_column {config.caption_column}: captions are for train_conditional.py")
    if config.model_class == "UNet2DConditionModel":
        raise UserInputError(
            "--model_class UNet2DConditionModel reads captions: name their --caption_column, in train_conditional.py"
        )
    if config.text_encoder is not None:
        raise UserInputError(f"--text_encoder {config.text_encoder}: there are no captions, leave it out")


def build_model(
    config: TrainingConfig,
    num_channels: int,
    id2label: dict[int, str] | None = None,
    base: Pipeline | None = None,
    cross_attention_dim: int | None = None,
) -> torch.nn.Module:
    """Returns the network, with random weights or those of `base`.

    With the names of K classes in `id2label`, the network takes labels 0..K-1, and K for "no class". BasicUNet2DModel
    takes no classes. UNet2DConditionModel takes vectors of `cross_attention_dim` features in place of labels. Raises
    `UserInputError` if diffusers can't build the network.
    """
    if base is not None:
        model, changes = adapt_network(base, config, num_channels, id2label)
        if PartialState().is_main_process and config.resume_from_checkpoint is None:
            print(printable(mask_secrets(f"begun from {config.init_from}: {changes}")))
        return _finish_unet2d(model, config)
    num_classes = None if id2label is None else len(id2label)
    if config.model_class == "BasicUNet2DModel":
        return BasicUNet2DModel(sample_size=config.image_size, in_channels=num_channels, out_channels=num_channels)
    if config.model_class == "ContextUNet2DModel":
        return ContextUNet2DModel(
            sample_size=config.image_size,
            in_channels=num_channels,
            out_channels=num_channels,
            num_features=config.block_out_channels[0],
            context_dim=num_classes or 1,
            norm_type=config.norm_type,
            num_train_timesteps=config.ddpm_num_steps,
        )
    shape: dict[str, Any] = {
        "sample_size": config.image_size,
        "in_channels": num_channels,
        "out_channels": num_channels,
    }
    if cross_attention_dim is None:
        shape["num_class_embeds"] = None if num_classes is None else num_classes + 1
    else:
        shape |= {
            "cross_attention_dim": cross_attention_dim,
            # One vector of all words is added to the time as a class would be: Saharia et al. 2022, section 2.3.
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": math.gcd(TEXT_HEADS, cross_attention_dim),
        }
    return _build_unet2d(config, shape)


def _build_unet2d(config: TrainingConfig, shape: dict[str, Any]) -> torch.nn.Module:
    """Returns the network of the flags, or of the file that they name, for images and conditions of a shape."""
    network_class = UNETS[config.model_class]
    if config.model_config_name_or_path is not None:
        model_config = _load_unet2d_config(config)
        if config.dropout:
            shape["dropout"] = config.dropout
        try:
            model = network_class.from_config({**model_config, **shape})
        except Exception as error:  # whatever its values lead diffusers to
            raise UserInputError(
                f"--model_config_name_or_path {config.model_config_name_or_path}: {first_line(error)}"
            ) from None
    else:
        channels = config.block_out_channels
        prefix: str = "Attn"
        head_dim: int | list[int] = config.attention_head_dim
        if network_class is UNet2DConditionModel:
            # What is called so there is the number of heads: https://github.com/huggingface/diffusers/issues/2011
            prefix, head_dim = "CrossAttn", [max(1, number // config.attention_head_dim) for number in channels]
        prefixes = [prefix * (level in config.attention_levels) for level in range(1, len(channels) + 1)]
        model = network_class(
            **shape,
            layers_per_block=config.layers_per_block,
            block_out_channels=tuple(channels),
            down_block_types=tuple(f"{prefix}DownBlock2D" for prefix in prefixes),
            up_block_types=tuple(f"{prefix}UpBlock2D" for prefix in reversed(prefixes)),
            attention_head_dim=head_dim,
            norm_num_groups=_choose_num_groups(channels),
            resnet_time_scale_shift=config.resnet_time_scale_shift,
            dropout=config.dropout,
        )
    return _finish_unet2d(model, config)


def _finish_unet2d(model: Any, config: TrainingConfig) -> Any:
    """Returns a network as it is trained, by the flags about its memory and its images.

    Raises `UserInputError` if xFormers can't be used.
    """
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        try:
            model.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError) as error:
            raise UserInputError(f"--enable_xformers_memory_efficient_attention: {error}") from None
    return model if config.augmentation == "none" else AugmentedNetwork(model)


def _choose_num_groups(channels: list[int]) -> int:
    """Returns diffusers' number of groups, 32, or fewer where the channels can't be divided so.

    A group never has one channel alone: time and class enter a block as a number for each channel, and normalising
    each channel by itself would take that number away again.
    """
    groups = math.gcd(32, *channels)
    return groups // 2 if groups == min(channels) else groups


def _load_unet2d_config(config: TrainingConfig) -> dict[str, Any]:
    name_or_path = config.model_config_name_or_path
    try:
        model_config = UNETS[config.model_class].load_config(name_or_path)
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"--model_config_name_or_path {name_or_path} can't be loaded: {first_line(error)}"
        ) from None
    if not isinstance(model_config.get("block_out_channels"), list | tuple):
        raise UserInputError(f"--model_config_name_or_path {name_or_path} is not the config of a {config.model_class}")
    return model_config


def _check_sides(config: TrainingConfig, multiple: int) -> None:
    height, width = config.image_size
    if height % multiple or width % multiple:
        multiples = ", ".join(str(multiple * k) for k in range(max(1, max(height, width) // multiple - 1), 64)[:4])
        raise UserInputError(
            f"--resolution {config.resolution}: this network halves the sides {int(math.log2(multiple))} times, so "
            f"they must be multiples of {multiple} ({multiples}, ...); or give fewer --block_out_channels"
        )


def _check_attention(config: TrainingConfig) -> None:
    channels = config.block_out_channels
    if not set(config.attention_levels) <= set(range(len(channels) + 1)):
        raise UserInputError(
            f"--attention_levels {config.attention_levels}: the levels are 1 to {len(channels)}, 0 for none"
        )
    with_attention = {channels[level - 1] for level in config.attention_levels if level} | {channels[-1]}
    for number in with_attention:  # the middle block, of the last level's channels, always has it
        if number % config.attention_head_dim:
            raise UserInputError(
                f"--attention_head_dim {config.attention_head_dim} does not divide the {number} channels of a level "
                "with attention"
            )
