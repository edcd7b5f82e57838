"""Tests what SIGTERM, SIGINT and SIGUSR1 do to the training scripts, with real processes."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from inspecting import assert_same_runs, wait_for
from launching import LAUNCH, PYTHON, TINY, complaints, finish, start
from PIL import Image

from sprite_diffusion.common.run_files import list_checkpoints
from sprite_diffusion.runs.manifest import find_damage
from sprite_diffusion.runs.signals import SAME_KEYPRESS_SECONDS

FLAGS = f"{TINY} --num_epochs 20 --checkpoints_total_limit 2 --gradient_accumulation_steps 2 --checkpointing_steps 20"
# Steps take seconds, so that a signal finds the main thread in the middle of one.
SLOW_STEP = (
    f"{TINY} --resolution 128 --train_batch_size 20 --block_out_channels 64 64 --layers_per_block 2 --num_epochs 9"
)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Reads the standard error of a process until `text` comes; fails if the process ends before."""
    while text not in (line := process.stderr.readline(300)):
        assert line


def assert_unfinished(output_dir: Path) -> None:
    """Fails if a run says that it came to its end. A pipeline, with its summary, it may have since its first epoch."""
    summary = output_dir / "training_summary.json"
    if summary.exists():
        record = json.loads(summary.read_text())
        assert record["global_step"] < record["total_steps"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(start("train_unconditional", FLAGS, output_dir))
    return output_dir


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGUSR1, 0)])
def test_a_signal_writes_a_checkpoint_and_changes_no_number(whole, tmp_path, number, status):
    process = start("train_unconditional", FLAGS, tmp_path / "run")
    assert wait_for(process, tmp_path / "run", "logs/*/events*")
    time.sleep(0.3)
    process.send_signal(number)
    ended = finish(process, status)
    errors = complaints(ended.stderr)
    assert errors == ""
    steps = {int(line.rpartition("-")[2]) for line in ended.stdout.splitlines() if "checkpoint-" in line}
    assert len(steps - {20, 40}) == 1  # one more than the flags ask for
    assert all(find_damage(checkpoint) == "" for checkpoint in list_checkpoints(tmp_path / "run"))
    if number != signal.SIGUSR1:
        assert_unfinished(tmp_path / "run")
        printed = finish(start("train_unconditional", FLAGS, tmp_path / "run")).stdout
        assert f"from {tmp_path / 'run' / 'checkpoint-'}{max(steps)}" in printed
    assert_same_runs(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "interval",
    ["--save_images_epochs 1", pytest.param("--save_images_steps 2 --num_epochs 1", marks=pytest.mark.slow)],
)
def test_sampling_is_interrupted_and_done_again(tmp_path, interval):
    flags = f"{TINY} {interval} --ddpm_num_inference_steps 300 --checkpoints_total_limit 1"
    finish(start("train_unconditional", flags, tmp_path / "whole"))
    process = start("train_unconditional", flags, tmp_path / "run")
    read_until(process, "0/300")  # the progress bar of sampling counts 300 steps
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    assert not (tmp_path / "run" / "samples").exists()
    finish(start("train_unconditional", flags, tmp_path / "run"))
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


def test_the_end_of_the_launcher_ends_the_run_with_a_checkpoint(tmp_path):
    process = start("train_unconditional", FLAGS, tmp_path / "run", [*LAUNCH, "--cpu"])
    assert wait_for(process, tmp_path / "run", "logs/*/events*")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)  # the program, which has the same pipes, ends later than the launcher
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert f"wrote {checkpoint}" in printed
    assert find_damage(checkpoint) == ""
    assert checkpoint.name not in ("checkpoint-20", "checkpoint-40")  # those that the flags ask for
    assert_unfinished(tmp_path / "run")


def test_past_the_time_limit_it_ends_at_once(tmp_path):
    process = start("train_unconditional", f"{SLOW_STEP} --shutdown_grace 0.5", tmp_path / "run")
    assert wait_for(process, tmp_path / "run", "logs/*/events*")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 1.5
    assert process.returncode == 143
    assert err.strip().splitlines()[-1] == "not done in --shutdown_grace 0.5 s; last checkpoint: none"


def test_a_second_interrupt_ends_at_once(tmp_path):
    process = start("train_unconditional", SLOW_STEP, tmp_path / "run")
    assert wait_for(process, tmp_path / "run", "logs/*/events*")
    time.sleep(1)
    for _ in range(2):  # one press of Ctrl-C comes twice if a program in between hands it on
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    time.sleep(SAME_KEYPRESS_SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 1
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == "stopped at once; last checkpoint: none"


def test_interrupt_while_the_data_is_read(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(2000):
        Image.new("RGB", (64, 64), (i % 256, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    flags = f"{TINY} --train_data_dir {tmp_path / 'pictures'} --max_train_samples 2000"
    process = start("train_unconditional", flags, tmp_path / "run")
    read_until(process, "reading images")
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    if process.poll() is None:  # a signal may be lost while a library reads; a user would press again
        process.send_signal(signal.SIGINT)
    finish(process, 130)


def test_a_terminals_interrupt_does_not_break_workers(tmp_path):
    """A terminal interrupts the whole group of processes, the workers that read a stream among them."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(images / f"{i}.png")
    flags = f"{TINY} --train_data_dir {images} --max_train_samples 8 --streaming --dataloader_num_workers 2"
    flags += " --max_train_steps 5000 --num_epochs 5000 --checkpointing_steps 1000"
    process = start("train_unconditional", flags, tmp_path / "run", start_new_session=True)
    assert wait_for(process, tmp_path / "run", "logs/*/events*")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    errors = complaints(finish(process, 130).stderr)
    assert errors == ""
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_a_terminals_interrupt_under_accelerate_launch(tmp_path):
    """The launcher ends at once, and the program writes its checkpoint all the same."""
    process = start("train_unconditional", FLAGS, tmp_path / "run", [*LAUNCH, "--cpu"], start_new_session=True)
    assert wait_for(process, tmp_path / "run", "logs/*/events*")
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    [checkpoint] = list_checkpoints(tmp_path / "run")
    assert find_damage(checkpoint) == ""


def test_processes_stop_at_the_same_step(tmp_path):
    """One of two processes gets the signal; the other writes its part of the checkpoint at the same step."""
    launcher = [*PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    process = start("train_unconditional", f"{FLAGS} --save_images_steps 2", tmp_path / "run", launcher)
    assert wait_for(process, tmp_path / "run", "samples/step-000002.png")  # by then both processes handle signals
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGTERM)
    finish(process)
    [checkpoint] = list_checkpoints(tmp_path / "run")
    assert checkpoint.name not in ("checkpoint-20", "checkpoint-40")
    assert len(list(checkpoint.glob("random_states_*.pkl"))) == 2
    assert find_damage(checkpoint) == ""
