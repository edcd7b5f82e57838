"""The machine that a program runs on: its processes, threads, memory and number formats."""

import ctypes
import os
import platform
import re
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import is_torch_xla_available, parse_flag_from_env, str_to_bool

from sprite_diffusion.common.errors import UserInputError, first_line

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
CPUINFO = Path("/proc/cpuinfo")

# What `accelerate launch` and `accelerate config` ask for by environment variables, and what is not here.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
SWITCHES = (
    *UNSUPPORTED,
    "ACCELERATE_USE_CPU",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_DYNAMO_USE_DYNAMIC",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
    "FORK_LAUNCHED",
)
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def join_processes() -> PartialState:
    """Joins the processes that `accelerate launch` has started, on GPUs or CPUs; one process needs no other.

    Raises `UserInputError` if they were started in a way that is not supported.
    """
    check_launch()
    # Sampling on the main process may take long while the others wait.
    return PartialState(cpu=use_cpu(), timeout=timedelta(hours=2))


def check_launch() -> None:
    """Checks what the environment asks accelerate for.

    Raises `UserInputError` for what this project does not support, and for values that accelerate can't read.
    """
    for name in SWITCHES:
        value = os.environ.get(name, "false")
        try:
            is_on = str_to_bool(value)
        except ValueError:
            raise UserInputError(f"{name} is '{value}': it must be true or false") from None
        if is_on and name in UNSUPPORTED:
            raise UserInputError(
                f"{name}: {UNSUPPORTED[name]} is not supported, only one process for each GPU or several on the CPU; "
                "answer 'accelerate config' anew, or take the flag of accelerate launch out"
            )
    for name in NUMBERS:
        value = os.environ.get(name, "0")
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise UserInputError(f"{name} is '{value}': it must be a whole number")
    if is_torch_xla_available():
        raise UserInputError("torch_xla: TPUs and XLA are not supported; set USE_TORCH_XLA=0, or uninstall torch_xla")
    device = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts that it has it
            raise UserInputError(f"ACCELERATE_TORCH_DEVICE is '{device}': {first_line(error)}") from None


def use_cpu() -> bool:
    """Returns whether accelerate has to be told to work on the CPU.

    Without a GPU and without being told, accelerate takes each of several processes for the only one. Raises
    `UserInputError` where `accelerate launch` was asked for several processes and started one.
    """
    num_processes = os.environ.keys() & {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    # `accelerate launch` sets MASTER_PORT if it was asked for several, and then starts one unless it sees GPUs or MPI.
    if not num_processes and os.environ.keys() >= {"ACCELERATE_DYNAMO_BACKEND", "MASTER_PORT"}:
        raise UserInputError(
            "--num_processes of accelerate launch: it started one process, as it does with --cpu or without GPUs; "
            "give --multi_gpu in place of --cpu, which starts several on CPUs too"
        )
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (bool(num_processes) and not torch.accelerator.is_available())


def choose_precision(mixed_precision: str) -> str:
    """Returns 'no', 'fp16' or 'bf16' for a value of `--mixed_precision`.

    `accelerate launch --mixed_precision` and `accelerate config` count where the flag says 'no', its default, or
    'auto'. Without them 'auto' becomes bf16 where the hardware has it, else fp16 on a GPU. Raises `UserInputError` if
    the two differ, or the hardware does not have what is asked for.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    if configured not in ("no", "fp16", "bf16"):
        raise UserInputError(f"ACCELERATE_MIXED_PRECISION is '{configured}': it must be no, fp16 or bf16")
    if configured != "no" and mixed_precision not in ("no", "auto", configured):
        raise UserInputError(
            f"--mixed_precision is {mixed_precision}, but accelerate launch or its configuration says {configured}: "
            "give the same to both"
        )
    precision = configured if configured != "no" else mixed_precision
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if precision == "fp16" and on_cpu:
        raise UserInputError("--mixed_precision fp16 needs a GPU: give bf16, no or auto")
    if precision != "auto":
        return precision
    if torch.cuda.is_available() and not on_cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native_bf16 = CPUINFO.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(CPUINFO.read_text().split())
    return "bf16" if native_bf16 else "no"


def choose_compilation(compilation: str) -> str:
    """Returns 'auto', 'on' or 'off' for a value of `--compile`.

    `accelerate launch --dynamo_backend inductor` is another way to say `--compile on`. Raises `UserInputError` for
    another backend, and if the two differ.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").lower() or "no"
    if backend == "no":
        return compilation
    if backend != "inductor":
        raise UserInputError(f"ACCELERATE_DYNAMO_BACKEND is '{backend}': only no and inductor are supported")
    if compilation == "off":
        raise UserInputError(
            "--compile is off, but accelerate launch or its configuration says --dynamo_backend inductor: "
            "take one of them out"
        )
    return "on"


def prepare_cpu(num_threads: int | None) -> None:
    """Sets torch's number of threads, and keeps the memory that was freed for the next step.

    `num_threads` is the value of `--num_threads`. If it is None, OMP_NUM_THREADS counts, or else all cores are shared
    among the processes.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given == "1" and "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        given = None  # `accelerate launch` sets it to 1 where nobody has set it: half or less of any machine
    if num_threads is None and not given:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if sys.platform == "linux":
        # Every activation is allocated anew. By default glibc gives large ones back to the system at once, and each
        # step pays again for their pages: keep up to 2 GiB of what was freed.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
                libc.mallopt(option, value)


def count_free_cores() -> int:
    """Returns how many cores other programs leave, at least 1. Waits for a fifth of a second to see."""
    used = psutil.cpu_percent(interval=0.2, percpu=True)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(len(used))
    return max(1, sum(used[core] < 50 for core in cores))


def describe_device(device: torch.device) -> str:
    """Returns the name of the hardware, for a record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*:\s*(.+)", CPUINFO.read_text()) if CPUINFO.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
