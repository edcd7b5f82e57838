"""The toy network that tutorials start from: six convolutions, and no notion of time."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


class BasicUNet2DModel(ModelMixin, ConfigMixin):
    """
    The toy network that tutorials start from: three 5x5 convolutions down and three up, with max-pooling,
    nearest upsampling and additive skips; 309,057 parameters for one channel. It is the `BasicUNet` of the
    Hugging Face diffusion course, unit 1, "Diffusion Models from Scratch", without the activation after the last
    layer.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 28):
            Side, or height and width, of the images to sample. The network takes any sides divisible by 4.
        in_channels (`int`, defaults to 1): Number of channels of the input.
        out_channels (`int`, defaults to 1): Number of channels of the output.
    """

    @register_to_config
    def __init__(self, sample_size: int | tuple[int, int] = 28, in_channels: int = 1, out_channels: int = 1) -> None:
        super().__init__()
        self.down_layers = nn.ModuleList(
            [
                nn.Conv2d(in_channels, 32, kernel_size=5, padding=2),
                nn.Conv2d(32, 64, kernel_size=5, padding=2),
                nn.Conv2d(64, 64, kernel_size=5, padding=2),
            ]
        )
        self.up_layers = nn.ModuleList(
            [
                nn.Conv2d(64, 64, kernel_size=5, padding=2),
                nn.Conv2d(64, 32, kernel_size=5, padding=2),
                nn.Conv2d(32, out_channels, kernel_size=5, padding=2),
            ]
        )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Predicts what the network was trained to predict: for `LinearCorruptionScheduler`, the clean images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The noisy images.
            timestep (`torch.Tensor` or `float`, *optional*):
                Accepted for the common interface and not used: the network is told nothing of the amount of noise.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`UNet2DOutput`] or `tuple`: The output, `(batch_size, out_channels, height, width)`.

        Raises:
            ValueError: If the height or the width is not divisible by 4.
        """
        height, width = sample.shape[-2:]
        if height % 4 or width % 4:
            raise ValueError(f"Height and width must be divisible by 4, got {height} x {width}.")
        down1 = F.silu(self.down_layers[0](sample))  # (B, 32, H, W)
        down2 = F.silu(self.down_layers[1](F.max_pool2d(down1, 2)))  # (B, 64, H/2, W/2)
        hidden = F.silu(self.down_layers[2](F.max_pool2d(down2, 2)))  # (B, 64, H/4, W/4)
        hidden = F.silu(self.up_layers[0](hidden))
        hidden = F.interpolate(hidden, scale_factor=2.0) + down2  # (B, 64, H/2, W/2)
        hidden = F.silu(self.up_layers[1](hidden))
        hidden = F.interpolate(hidden, scale_factor=2.0) + down1  # (B, 32, H, W)
        # The course has SiLU here too, which is never below -0.28: enough for images in [0, 1], but it would cut off
        # the dark part of images in [-1, 1].
        output = self.up_layers[2](hidden)  # (B, out_channels, H, W)
        if not return_dict:
            return (output,)
        return UNet2DOutput(sample=output)
