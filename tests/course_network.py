"""Defines the network of the course "How Diffusion Models Work", with its parameter names and an all-zero shortcut."""

import torch
import torch.nn.functional as F
from torch import nn


class CourseBlock(nn.Module):
    """A residual block whose shortcut, if its channels change, is all zero or, as in the course, new at each call."""

    def __init__(self, channels_in, channels_out, norm, is_res=False):
        super().__init__()
        self.is_res, self.channels, self.has_random_shortcut = is_res, (channels_in, channels_out), False
        self.conv1 = nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, 1, 1), norm(channels_out), nn.GELU())
        self.conv2 = nn.Sequential(nn.Conv2d(channels_out, channels_out, 3, 1, 1), norm(channels_out), nn.GELU())

    def forward(self, x):
        features = self.conv2(self.conv1(x))
        if self.has_random_shortcut:
            features = nn.Conv2d(*self.channels, kernel_size=1)(x) + features
        return features / 1.414 if self.is_res else features


class Wrapped(nn.Module):
    """`UnetDown`, `UnetUp` and `EmbedFC`: their layers stand in a `model`."""

    def __init__(self, *layers):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


class CourseUNet(nn.Module):
    """The `ContextUnet` of the course, for sides other than square too."""

    def __init__(self, height, width, norm, f, c, pool_size=None):
        super().__init__()
        self.pool_size = pool_size
        sides = (height // 4, width // 4)

        def embed(dim_in, dim_out):
            return Wrapped(nn.Linear(dim_in, dim_out), nn.GELU(), nn.Linear(dim_out, dim_out))

        def block(channels_in, channels_out):
            return CourseBlock(channels_in, channels_out, norm)

        self.init_conv = CourseBlock(3, f, norm, is_res=True)
        self.down1 = Wrapped(block(f, f), block(f, f), nn.MaxPool2d(2))
        self.down2 = Wrapped(block(f, 2 * f), block(2 * f, 2 * f), nn.MaxPool2d(2))
        self.timeembed1, self.timeembed2 = embed(1, 2 * f), embed(1, f)
        self.contextembed1, self.contextembed2 = embed(c, 2 * f), embed(c, f)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * f, 2 * f, sides, sides), nn.GroupNorm(8, 2 * f), nn.ReLU())
        self.up1 = Wrapped(nn.ConvTranspose2d(4 * f, f, 2, 2), block(f, f), block(f, f))
        self.up2 = Wrapped(nn.ConvTranspose2d(2 * f, f, 2, 2), block(f, f), block(f, f))
        self.out = nn.Sequential(nn.Conv2d(2 * f, f, 3, 1, 1), nn.GroupNorm(8, f), nn.ReLU(), nn.Conv2d(f, 3, 3, 1, 1))

    def forward(self, x, t, c):
        def image(v):
            return v.view(*v.shape, 1, 1)

        x = self.init_conv(x)
        down1 = self.down1(x)
        down2 = self.down2(down1)
        # The course's `AvgPool2d(4)`, or for sides other than the course's the mean of all positions.
        pooled = F.avg_pool2d(down2, self.pool_size) if self.pool_size else down2.mean(dim=(2, 3), keepdim=True)
        vector = F.gelu(pooled)
        up1 = self.up0(vector)
        up1 = image(self.contextembed1(c)) * up1 + image(self.timeembed1(t))
        up2 = self.up1(torch.cat((up1, down2), 1))
        up2 = image(self.contextembed2(c)) * up2 + image(self.timeembed2(t))
        up3 = self.up2(torch.cat((up2, down1), 1))
        return self.out(torch.cat((up3, x), 1))


def make_course_network(
    height=16, width=16, norm=nn.BatchNorm2d, f=16, c=5, pool_size=None, has_context=True
) -> CourseUNet:
    """A course network as if it were trained: a new norm layer is nearly the identity and would hide a missing one."""
    torch.manual_seed(0)
    course = CourseUNet(height, width, norm, f, c, pool_size)
    if has_context:
        for embedding in (course.contextembed1, course.contextembed2):
            embedding.model[0].weight.data.normal_()
    for layer in course.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            # He's initialisation in place of torch's: else each layer shrinks what it is given, and next to nothing of
            # the bottom of the network reaches its output.
            layer.weight.data.mul_(6**0.5)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            layer.weight.data.uniform_(0.5, 2)
            layer.bias.data.normal_()
    return course.eval()
