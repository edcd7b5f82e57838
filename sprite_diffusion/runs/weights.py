"""The weights that a run keeps: their moving average, whether they are finite, and the pipeline of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.run_files import TRAINED_PARTS
from sprite_diffusion.runs.config import TrainingConfig


class Weights:
    """The unwrapped networks of a run, their moving average if there is one, and the pipeline of them."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        config: TrainingConfig,
        make_pipeline: Callable[..., DiffusionPipeline],
    ) -> None:
        self.model = find_parts(accelerator.unwrap_model(model))
        self.ema = make_ema(self.model, config) if config.use_ema else None
        self._make_pipeline = make_pipeline

    def average(self) -> None:
        """Takes the weights of an optimizer step into the moving average."""
        if self.ema is not None:
            self.ema.step(ema_tensors(self.model))

    def metrics(self) -> dict[str, float]:
        """Returns what trackers are told of the average."""
        return {} if self.ema is None else {"ema_decay": self.ema.cur_decay_value}

    def check_finite(self, step: int, newest_checkpoint: str) -> None:
        """Raises `UserInputError` if a weight or an average is not finite: it is not saved, sampled or uploaded."""
        tensors = ema_tensors(self.model) + ([] if self.ema is None else self.ema.shadow_params)
        if not torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all():
            raise UserInputError(
                f"the weights are not finite at step {step}: lower --learning_rate; last checkpoint: "
                f"{newest_checkpoint}"
            )

    @contextmanager
    def pipeline(self) -> Iterator[DiffusionPipeline]:
        """Yields the pipeline of the network as it is to be used: averaged weights, evaluation mode."""
        self.model.eval()
        try:
            with ema_weights(self.ema, self.model):
                yield self._make_pipeline(**self.model)
        finally:
            self.model.train()

    def save(self, folder: Path) -> None:
        """Writes the folder of a pipeline, without a text encoder that is not trained: it stays what it was."""
        with self.pipeline() as pipeline:
            for name in pipeline.components.keys() & {*TRAINED_PARTS} - self.model.keys():
                pipeline.register_modules(**{name: None})
            pipeline.save_pretrained(str(folder))

    def finish(self) -> DiffusionPipeline:
        """Returns the pipeline of a trained network, whose weights become the averaged ones for good."""
        if self.ema is not None:
            self.ema.copy_to(ema_tensors(self.model))
        return self._make_pipeline(**self.model.eval())

    def load_average(self, folder: Path, optimization_step: int) -> None:
        """Takes the moving average, which the pipeline in a folder has as its weights, after so many steps."""
        assert self.ema is not None
        classes: dict[str, Any] = {name: type(part) for name, part in self.model.items()}
        parts = {name: part.from_pretrained(folder, subfolder=name) for name, part in classes.items()}
        saved = torch.nn.ModuleDict(parts).state_dict()
        self.ema.shadow_params = [saved[name].to(tensor.device) for name, tensor in self.model.state_dict().items()]
        self.ema.optimization_step = optimization_step


def find_parts(network: torch.nn.Module) -> torch.nn.ModuleDict:
    """Returns the parts of a network by their names in its pipeline: the U-Net, and the text encoder if it has one.

    The layer that an `AugmentedNetwork` adds to the U-Net is of the training alone.
    """
    parts = {name: getattr(network, name) for name in TRAINED_PARTS if hasattr(network, name)} or {"unet": network}
    parts["unet"] = getattr(parts["unet"], "unet", parts["unet"])
    return torch.nn.ModuleDict(parts)


def ema_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Returns all tensors that are saved with the model, in the order of its state dict.

    `EMAModel` averages what requires a gradient and copies the rest. BatchNorm's statistics belong to the weights
    that they were measured with, so they have to be averaged as well: they are handed over as aliases that claim to
    require a gradient.
    """
    tensors = model.state_dict(keep_vars=True).values()
    return [t if t.requires_grad or not t.is_floating_point() else t.detach().requires_grad_() for t in tensors]


def make_ema(model: torch.nn.Module, config: TrainingConfig) -> EMAModel:
    """Returns a moving average whose decay grows with the steps, so that it suits short runs as well as long ones."""
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
    """Puts the averaged weights into the model, and the trained ones back at the end, whatever happens."""
    if ema is None:
        yield
        return
    tensors = ema_tensors(model)
    trained = [t.detach().clone() for t in tensors]
    ema.copy_to(tensors)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, trained, strict=True):
                tensor.copy_(value)
