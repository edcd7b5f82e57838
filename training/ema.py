"""The moving average of the weights, of buffers too."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from training.config import TrainingConfig


def ema_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """All tensors that are saved with the model, in the order of its state dict.

    `EMAModel` averages what requires a gradient and copies the rest. BatchNorm's statistics belong to the weights
    that they were measured with, so they have to be averaged as well: they are handed over as aliases that claim to
    require a gradient.
    """
    tensors = model.state_dict(keep_vars=True).values()
    return [t if t.requires_grad or not t.is_floating_point() else t.detach().requires_grad_() for t in tensors]


def make_ema(model: torch.nn.Module, config: TrainingConfig) -> EMAModel:
    """An EMA whose decay grows with the steps, so that it suits short runs as well as long ones."""
    return EMAModel(
        ema_tensors(model),
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=True,
    )


@contextmanager
def ema_weights(ema: EMAModel | None, model: torch.nn.Module) -> Iterator[None]:
    """The model holds the averaged weights inside, and its own again after, whatever happens."""
    if ema is None:
        yield
        return
    tensors = ema_tensors(model)
    own = [t.detach().clone() for t in tensors]
    ema.copy_to(tensors)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, own, strict=True):
                tensor.copy_(value)
