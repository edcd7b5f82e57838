"""What makes training fast without changing what is computed; docs/performance.md has what each part is worth."""

import ctypes
import os
import sys
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DataLoaderConfiguration
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.overrides import TorchFunctionMode

from training.config import TrainingConfig
from training.processes import use_cpu

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
STEPS_WORTH_COMPILING = 5000  # on a GPU, where compiling takes about a minute; an estimate


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Processes, devices and precision, as `accelerate config` and the flags say."""
    accelerator = Accelerator(
        cpu=use_cpu(),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=choose_precision(config.mixed_precision),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=config.seed, non_blocking=torch.cuda.is_available()
        ),
        # Sampling on the main process may take long while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if accelerator.device.type == "cpu":
        prepare_cpu()
    else:
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it by default
    return accelerator


def choose_precision(mixed_precision: str) -> str:
    """'auto' -> what `accelerate config` says, else bf16 where the hardware has it, else fp16 on a GPU."""
    if mixed_precision != "auto":
        return mixed_precision
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured != "no":
        return configured
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    native_bf16 = cpuinfo.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpuinfo.read_text().split())
    return "bf16" if native_bf16 else "no"


def prepare_cpu() -> None:
    """All cores, and memory that stays with the process."""
    if torch.get_num_threads() == 1:
        # `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise: a quarter of a small machine.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if sys.platform == "linux":
        # Every activation is allocated anew. By default glibc gives large ones back to the system at once, and each
        # step pays again for their pages: keep up to 2 GiB of what was freed.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
                libc.mallopt(option, value)


def prepare_attention(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """On a CPU in bf16, attention in float32: its backward pass is several times as fast there as in bf16."""
    if accelerator.device.type != "cpu" or accelerator.mixed_precision != "bf16":
        return
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(Float32AttnProcessor())


class Float32AttnProcessor(AttnProcessor2_0):
    """diffusers' attention with the attention itself in float32; its projections are left to autocast."""

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
    """The model as training calls it: compiled if that is asked for or, with 'auto', worth its time."""
    compiles = config.compile == "on" or (
        config.compile == "auto" and accelerator.device.type == "cuda" and total_steps >= STEPS_WORTH_COMPILING
    )
    return torch.compile(model) if compiles else model
