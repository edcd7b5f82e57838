"""Starts the scripts under test, in this process or in processes of their own, and waits for their end."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from forking import ForkedProgram, ForkServer

REPOSITORY = Path(__file__).resolve().parents[1]

# The flags of a run of seconds: 4 optimizer steps an epoch, of a network of 0.02 M parameters.
TINY = (
    f"--config {REPOSITORY / 'configs' / 'smoke_cpu.yaml'} --max_train_samples 20 --train_batch_size 5 --num_epochs 2 "
    "--lr_warmup_steps 2 --ddpm_num_inference_steps 2 --eval_batch_size 3 --block_out_channels 8 "
    "--attention_levels 0 --attention_head_dim 8 --checkpointing_steps 3 --logging_steps 1"
)

PYTHON = [sys.executable]
# `accelerate launch`, with the flags that stand in for what `accelerate config` may have saved on this machine.
LAUNCH = [*PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch"]
LAUNCH += "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0".split()
LAUNCH_TWO = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]  # on CPUs where there are no GPUs

# Threads that wait in a loop would make steps of milliseconds take seconds on a machine that is busy otherwise.
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

fork_servers: list[ForkServer] = []  # which pytest has while a session lasts


@contextmanager
def forking_from(servers: Sequence[ForkServer]) -> Iterator[None]:
    """Lets programs be forked from servers, which end after that; where there is a GPU, does nothing.

    There, imports may begin to use it, which a fork can't go on with.
    """
    can_fork = sys.platform == "linux" and not torch.accelerator.is_available()
    with ExitStack() as ends, pytest.MonkeyPatch.context() as monkeypatch:
        if can_fork:
            monkeypatch.setattr(sys.modules[__name__], "fork_servers", [*fork_servers, *servers])
        for server in servers:
            ends.enter_context(server)
        yield


def run_script(script: str, flags: str, output_dir: Path | None = None) -> None:
    """Runs the `main` of a script or module in this process."""
    output = [] if output_dir is None else ["--output_dir", str(output_dir)]
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", [script, *flags.split(), *output])
        importlib.import_module(script).main()


def start(
    script: str, flags: str, output_dir: Path, launcher: Sequence[str] = PYTHON, **options: Any
) -> subprocess.Popen[str]:
    """Starts a script of the repository in a process of its own, with the arguments of `run_script`."""
    return start_command([*launcher, f"{script}.py", *flags.split(), "--output_dir", str(output_dir)], **options)


def start_command(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    cwd: Path = REPOSITORY,
    fork: bool = True,
    **options: Any,
) -> subprocess.Popen[str]:
    """Starts a program and keeps what it prints. `environment` is added to that of every started process.

    Where it can make no difference, the program is forked from a process that has done its imports. `fork=False` is
    for tests of how a program starts, and of what may differ between two interpreters, as the hashes of strings do.
    """
    options |= {
        "cwd": cwd,
        "env": make_environment(command, environment),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        # pytest-xdist's processes ignore Ctrl-C, which a program that they start would inherit.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    for server in fork_servers if fork else []:
        if server.can_run(command, options["env"]):
            return ForkedProgram(server, command, **options)
    return subprocess.Popen(command, **options)


def make_environment(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment of a program that the tests start."""
    # A user's account at the Hub, and their cache of it, are not for tests.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    # A run repeats bit for bit on the CPU alone; several processes may show what they do on GPUs.
    device = {} if "--multi_gpu" in command else {"ACCELERATE_USE_CPU": "true"}
    return {**inherited, **ENVIRONMENT, **device, **(environment or {})}


def finish(process: subprocess.Popen[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    """Waits for the end of a process and returns what it printed.

    Fails unless it ends within ten minutes, with this exit status and without a traceback.
    """
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == status, err
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(process.args, status, out, err)


def run_command(command: Sequence[str], status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Starts a program as `start_command` does and waits for its end as `finish` does."""
    return finish(start_command(command, **options), status)


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a process by SIGKILL, as a machine that fails would; a launcher with the processes that it launched."""
    launched = psutil.Process(process.pid).children() if "launch" in process.args else []
    for each in (process, *launched):
        each.kill()
    process.communicate()
    psutil.wait_procs(launched)


def complaints(stderr: str) -> str:
    """Returns the lines that tell of errors and warnings, without the progress bars around them."""
    lines = stderr.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if line.startswith(("error:", "warning:")))
