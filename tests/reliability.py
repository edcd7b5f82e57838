"""What the tests of broken runs share: processes of the training scripts, and what two runs must have in common."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ENVIRONMENT, REPOSITORY, TINY

CPU_ENVIRONMENT = {**os.environ, **ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
TIMES = {"seconds"}  # what differs from run to run


def start(script: str, flags: str, output_dir: Path, launcher: tuple[str, ...] = (), **options) -> subprocess.Popen:
    """A process of its own, on the CPU."""
    command = [
        sys.executable,
        *launcher,
        f"{script}.py",
        *TINY.split(),
        *flags.split(),
        "--output_dir",
        str(output_dir),
    ]
    return open_process(command, env=CPU_ENVIRONMENT, **options)


def open_process(command: list[str], **options) -> subprocess.Popen:
    """In the repository, what it prints kept as text."""
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """What it printed, and the lines on standard error without progress bars."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith(("error:", "warning:"))]
    assert "Traceback" not in err, err
    return out, "\n".join(lines)


def wait_for(process: subprocess.Popen, output_dir: Path, pattern: str) -> bool:
    """Waits until there is such a file or folder; False if the process ended before."""
    while process.poll() is None:
        try:
            if any(output_dir.glob(pattern)):
                return True
        except FileNotFoundError:  # renamed while it was looked at
            pass
        time.sleep(0.0005)
    return False


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def assert_same_runs(first: Path, second: Path, logging_dir: str = "logs") -> None:
    """Bit for bit, but for times and logs."""
    files = [
        {name for path in run.rglob("*") if path.is_file() and (name := path.relative_to(run)).parts[0] != logging_dir}
        for run in (first, second)
    ]
    assert not files[0] ^ files[1], str(files[0] ^ files[1])
    for name in sorted(files[0]):
        one, other = (first / name).read_bytes(), (second / name).read_bytes()
        if name.name == "manifest.json":  # it lists the times' file
            continue
        if name.name in ("train_state.json", "training_summary.json"):
            one, other = ({k: v for k, v in json.loads(text).items() if k not in TIMES} for text in (one, other))
        if name.name == "training_config.yaml":
            one, other = (
                [line for line in text.splitlines() if not line.startswith(b"output_dir")] for text in (one, other)
            )
        assert one == other, name
