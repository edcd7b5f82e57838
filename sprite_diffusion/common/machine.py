"""The machine that a program runs on: its processes, threads, memory and number formats."""

import ctypes
import os
import platform
import re
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from sprite_diffusion.common.errors import UserInputError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
CPUINFO = Path("/proc/cpuinfo")


def join_processes() -> PartialState:
    """Joins the processes that `accelerate launch` has started, on GPUs or CPUs; one process needs no other."""
    # Sampling on the main process may take long while the others wait.
    return PartialState(cpu=use_cpu(), timeout=timedelta(hours=2))


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

    'auto' becomes what `accelerate config` says, else bf16 where the hardware has it, else fp16 on a GPU.
    """
    if mixed_precision != "auto":
        return mixed_precision
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured != "no":
        return configured
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native_bf16 = CPUINFO.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(CPUINFO.read_text().split())
    return "bf16" if native_bf16 else "no"


def prepare_cpu() -> None:
    """Lets torch use all cores, and keeps the memory that was freed for the next step."""
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


def describe_device(device: torch.device) -> str:
    """Returns the name of the hardware, for a record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*:\s*(.+)", CPUINFO.read_text()) if CPUINFO.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
