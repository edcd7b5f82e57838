"""Precision, attention and compilation: training as fast as the machine allows; docs/performance.md has the gains."""

from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, TorchDynamoPlugin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.overrides import TorchFunctionMode

from sprite_diffusion.common.machine import choose_compilation, choose_precision, prepare_cpu, use_cpu
from sprite_diffusion.runs.config import TrainingConfig

STEPS_WORTH_COMPILING = 5000  # on a GPU, where compiling takes about a minute; an estimate


def check_speed_flags(config: TrainingConfig) -> None:
    """Raises `UserInputError` if flags and `accelerate launch` contradict each other, or the hardware."""
    choose_precision(config.mixed_precision)
    choose_compilation(config.compile)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Returns the processes, devices and precision that `accelerate config` and the flags ask for.

    Raises `UserInputError` if these contradict each other, or the hardware.
    """
    accelerator = Accelerator(
        cpu=use_cpu(),
        mixed_precision=choose_precision(config.mixed_precision),
        # `Steps` accumulates. Accelerate would divide each loss by a number that it reads from the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),  # `compile_model` compiles, whatever the environment says
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=config.seed, non_blocking=torch.cuda.is_available()
        ),
    )
    if accelerator.device.type == "cpu":
        prepare_cpu(config.num_threads)
    else:
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it by default
    return accelerator


def prepare_attention(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Lets attention compute in float32 on a CPU in bf16, where its backward pass is several times as fast so."""
    if accelerator.device.type != "cpu" or accelerator.mixed_precision != "bf16":
        return
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(Float32AttnProcessor())


class Float32AttnProcessor(AttnProcessor2_0):
    """diffusers' attention with queries, keys and values in float32; its projections are left to autocast."""

    @wraps(AttnProcessor2_0.__call__)  # `Attention` passes what the signature names
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with _Float32Attention():
            return super().__call__(*args, **kwargs)


class _Float32Attention(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return function(*(tensor.float() for tensor in args), **(kwargs or {}))


def compile_model(model: Any, config: TrainingConfig, accelerator: Accelerator, total_steps: int) -> Any:
    """Returns the model as training calls it: compiled if `--compile` asks for it or, with 'auto', if it pays."""
    compilation = choose_compilation(config.compile)
    compiles = compilation == "on" or (
        compilation == "auto" and accelerator.device.type == "cuda" and total_steps >= STEPS_WORTH_COMPILING
    )
    return torch.compile(model) if compiles else model
