"""The small U-Net of the sprite course, conditioned on a vector of class weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

NORM_TYPES = ("group", "batch")
NUM_GROUPS = 8


def conv_norm_gelu(in_channels: int, out_channels: int, norm_type: str) -> nn.Sequential:
    """Returns a 3x3 convolution, a normalization and GELU."""
    norm = nn.BatchNorm2d(out_channels) if norm_type == "batch" else nn.GroupNorm(NUM_GROUPS, out_channels)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1), norm, nn.GELU())


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with a normalization and GELU."""

    def __init__(self, in_channels: int, out_channels: int, norm_type: str) -> None:
        super().__init__()
        self.conv1 = conv_norm_gelu(in_channels, out_channels, norm_type)
        self.conv2 = conv_norm_gelu(out_channels, out_channels, norm_type)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(hidden_states))


class ResidualConvBlock(ConvBlock):
    """A `ConvBlock` whose input is added to its output, through a 1x1 convolution where the channels differ."""

    def __init__(self, in_channels: int, out_channels: int, norm_type: str) -> None:
        super().__init__(in_channels, out_channels, norm_type)
        # The course's code makes this convolution inside of forward, with new random weights at every call, so that
        # its weights are neither trained nor saved there.
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, hidden_states: torch.Tensor, shortcut: nn.Module | None = None) -> torch.Tensor:
        shortcut = shortcut or self.shortcut
        # The divisor is the course's, not sqrt(2), so that a network with its weights is the same function.
        return (shortcut(hidden_states) + super().forward(hidden_states)) / 1.414


def down_block(in_channels: int, out_channels: int, norm_type: str) -> nn.Sequential:
    """Returns two blocks of convolutions, and a pooling that halves the sides."""
    return nn.Sequential(
        ConvBlock(in_channels, out_channels, norm_type),
        ConvBlock(out_channels, out_channels, norm_type),
        nn.MaxPool2d(2),
    )


def up_block(in_channels: int, out_channels: int, norm_type: str) -> nn.Sequential:
    """Returns a convolution that doubles the sides, and two blocks of convolutions."""
    return nn.Sequential(
        nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2),
        ConvBlock(out_channels, out_channels, norm_type),
        ConvBlock(out_channels, out_channels, norm_type),
    )


def embedding(in_features: int, out_features: int) -> nn.Sequential:
    """Returns the two linear layers that embed the time or the context."""
    return nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


class ContextUNet2DModel(ModelMixin, ConfigMixin):
    """
    The small U-Net of the sprite course "How Diffusion Models Work" (DeepLearning.AI, 2023), its `ContextUnet`: a
    residual block, two down blocks, an average over all positions, a transposed convolution back up and two up
    blocks over skip connections. Before each up block the features are multiplied by an embedding of the context
    and an embedding of time is added.

    The context is a vector: one-hot for a class, a mixture for mixed classes, zero for none. With
    `norm_type="batch"` the network is the course's, except that its 1x1 shortcut is a trained layer here.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 16):
            Side, or height and width, of the images, divisible by 4. The network takes no other size.
        in_channels (`int`, defaults to 3): Number of channels of the input.
        out_channels (`int`, defaults to 3): Number of channels of the output.
        num_features (`int`, defaults to 64): Number of features at full resolution, divisible by 8.
        context_dim (`int`, defaults to 5): Length of the context vector, the number of classes.
        norm_type (`"group"` or `"batch"`, defaults to `"group"`): Normalization of the 3x3 convolutions.
        num_train_timesteps (`int`, defaults to 1000): Number of timesteps of the noise process.
        pool_size (`int`, *optional*):
            Side of the square of features at the bottom, from the top left, whose average the network takes; the
            course's code has 4 for every `sample_size`. If not given, the average is over all positions.
        shortcut_seed (`int`, *optional*):
            Draws the 1x1 shortcut anew at each call, as the course's code does, from this seed and the timestep. If
            not given, the shortcut is a layer like the others.

    Raises:
        ValueError: If a size is not divisible as above, `norm_type` is unknown, or more than one square of
            `pool_size` fits.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        out_channels: int = 3,
        num_features: int = 64,
        context_dim: int = 5,
        norm_type: Literal["group", "batch"] = "group",
        num_train_timesteps: int = 1000,
        pool_size: int | None = None,
        shortcut_seed: int | None = None,
    ) -> None:
        super().__init__()
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        if any(side % 4 for side in sides):
            raise ValueError(f"The sides of sample_size must be divisible by 4, got {sample_size}.")
        if num_features % NUM_GROUPS:
            raise ValueError(f"num_features must be divisible by {NUM_GROUPS}, got {num_features}.")
        if norm_type not in NORM_TYPES:
            raise ValueError(f"Unknown norm_type {norm_type!r}; known are {', '.join(NORM_TYPES)}.")

        self.sides = sides  # (H, W)
        self.conv_in = ResidualConvBlock(in_channels, num_features, norm_type)
        self.down_blocks = nn.ModuleList(
            [
                down_block(num_features, num_features, norm_type),
                down_block(num_features, 2 * num_features, norm_type),
            ]
        )
        deep_features = 2 * num_features
        bottom_sides = (sides[0] // 4, sides[1] // 4)
        if pool_size is not None and any(side // pool_size != 1 for side in bottom_sides):
            raise ValueError(f"pool_size {pool_size} does not fit once into a bottom of {bottom_sides}.")
        self.pool = nn.Sequential(nn.AvgPool2d(pool_size or bottom_sides), nn.GELU())
        self.unpool = nn.Sequential(
            nn.ConvTranspose2d(deep_features, deep_features, kernel_size=bottom_sides, stride=bottom_sides),
            nn.GroupNorm(NUM_GROUPS, deep_features),
            nn.ReLU(),
        )
        self.time_embeddings = nn.ModuleList([embedding(1, deep_features), embedding(1, num_features)])
        self.context_embeddings = nn.ModuleList(
            [embedding(context_dim, deep_features), embedding(context_dim, num_features)]
        )
        self.up_blocks = nn.ModuleList(
            [
                up_block(2 * deep_features, num_features, norm_type),
                up_block(2 * num_features, num_features, norm_type),
            ]
        )
        self.conv_out = nn.Sequential(
            nn.Conv2d(2 * num_features, num_features, kernel_size=3, padding=1),
            nn.GroupNorm(NUM_GROUPS, num_features),
            nn.ReLU(),
            nn.Conv2d(num_features, out_channels, kernel_size=3, padding=1),
        )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Predicts what the network was trained to predict, for the classes asked for; for none without `class_labels`
        and `context`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The noisy images.
            timestep (`torch.Tensor` of shape `()` or `(batch_size,)`, or a number):
                The timesteps, 0 to `num_train_timesteps - 1`.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Integer classes, 0 to `context_dim - 1`, or `context_dim` for none: the null class.
            context (`torch.Tensor` of shape `(batch_size, context_dim)`, *optional*): Context vectors.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            [`UNet2DOutput`] or `tuple`: The output, `(batch_size, out_channels, height, width)`.

        Raises:
            ValueError: If `sample` is not of `sample_size`, or both `class_labels` and `context` are given.
        """
        if sample.shape[-2:] != self.sides:
            raise ValueError(
                f"This model takes images of {self.sides[0]} x {self.sides[1]}, its sample_size; "
                f"got {sample.shape[-2]} x {sample.shape[-1]}."
            )
        time = self._time(sample, timestep)
        context = self._context(sample, class_labels, context)

        features = self.conv_in(sample, self._draw_shortcut(timestep))  # (B, F, H, W)
        down1 = self.down_blocks[0](features)  # (B, F, H/2, W/2)
        down2 = self.down_blocks[1](down1)  # (B, 2F, H/4, W/4)
        hidden = self.unpool(self.pool(down2))  # (B, 2F, 1, 1) -> (B, 2F, H/4, W/4)
        for i, skip in enumerate((down2, down1)):
            scale = self.context_embeddings[i](context)[:, :, None, None]
            shift = self.time_embeddings[i](time)[:, :, None, None]
            # (B, F, H/2, W/2), then (B, F, H, W)
            hidden = self.up_blocks[i](torch.cat((scale * hidden + shift, skip), dim=1))
        output = self.conv_out(torch.cat((hidden, features), dim=1))  # (B, out_channels, H, W)
        if not return_dict:
            return (output,)
        return UNet2DOutput(sample=output)

    def _draw_shortcut(self, timestep: torch.Tensor | float) -> nn.Module | None:
        """Returns the 1x1 shortcut of a call, with the random weights of a new layer; None if it is a trained one."""
        seed, layer = self.config["shortcut_seed"], self.conv_in.shortcut
        if seed is None or not isinstance(layer, nn.Conv2d):
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + int(torch.as_tensor(timestep).flatten()[0]))
            shortcut = nn.Conv2d(layer.in_channels, layer.out_channels, kernel_size=1)
        return shortcut.to(layer.weight.device, layer.weight.dtype)

    def _time(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """Returns the timestep of each image as a number in (0, 1], `(B, 1)`."""
        steps = torch.as_tensor(timestep, device=sample.device).float() + 1
        time = steps / self.config["num_train_timesteps"]  # the course's t / T, where t is 1 to T
        # The cast comes last: in half precision `t + 1` itself would be rounded.
        return time.to(self.dtype).expand(len(sample))[:, None]  # (B, 1)

    def _context(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None, context: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the context vector of each image, `(B, context_dim)`, of its class or as given; zero for none."""
        if class_labels is not None and context is not None:
            raise ValueError("Give class_labels or context, not both.")
        context_dim = self.config["context_dim"]
        if class_labels is not None:
            # The null class is one more than the context has numbers: without the last column its vector is zero.
            context = F.one_hot(class_labels.long(), context_dim + 1)[:, :-1]
        if context is None:
            context = sample.new_zeros(len(sample), context_dim)
        return context.to(self.dtype)  # (B, context_dim)
