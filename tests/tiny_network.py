"""Makes networks that are built and sampled in milliseconds."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from pipelines import TextToImageDDPMPipeline
from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.training.text_encoder import build_text_encoder, build_tokenizer


def make_tiny_network(**config: Any) -> UNet2DModel:
    """Returns a network of one level for images of 8x8 pixels, with the same random weights each time."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        **config,
    )


def make_tiny_text_to_image() -> TextToImageDDPMPipeline:
    """Returns a pipeline by prompt, of transparent images of 8x8 pixels, with the same random weights each time."""
    tokenizer = build_tokenizer(["a red cat, asleep", "two blue dogs"])
    torch.manual_seed(0)
    text_encoder = build_text_encoder(tokenizer).eval()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text_encoder.config.hidden_size,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    ).eval()
    scheduler = ClosedFormDDPMScheduler(timestep_spacing="trailing")
    return TextToImageDDPMPipeline(unet, scheduler, text_encoder, tokenizer, ["two dogs"])
