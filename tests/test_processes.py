"""Tests that several processes and machines train what one process with the same batch does, also when resumed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from inspecting import assert_same_weights, read_scalars, weights
from launching import LAUNCH, LAUNCH_TWO, REPOSITORY, finish, start
from PIL import Image

from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.training.randomness import draw_randomness
from sprite_diffusion.training.steps import Batch, Step, take_share

NUM_IMAGES = 37  # the last of an epoch's steps of 16 has 5, of which the second of two processes gets none
STEPS_PER_EPOCH, NUM_STEPS = 3, 27
# float32 rounds to 6e-8, and sums over the images differ in nothing but their order. Over 27 steps that grows:
# 2e-7 in the loss and 2e-6 in the weights were measured, and 4e-2 where one image of a stream was repeated.
TOLERANCE = 1e-5
FLAGS = (
    f"--config {REPOSITORY / 'configs' / 'smoke_cpu.yaml'} --lr_warmup_steps 2 --ddpm_num_inference_steps 2 "
    "--eval_batch_size 1 --block_out_channels 8 16 --attention_levels 0 --attention_head_dim 8 --resolution 8 "
    "--num_epochs 9 --save_images_epochs 9 --save_model_epochs 9 --checkpointing_steps 4 --logging_steps 1 "
    "--random_flip --checkpoints_total_limit 10"
)


MICRO_BATCH = {"images": torch.zeros(4, 1, 2, 2)}  # of one process


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Makes images whose red is their index, with labels, and returns the flags that name them."""
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(256, size=(NUM_IMAGES, 8, 8, 3), dtype=np.uint8)
    images[..., 0] = np.arange(NUM_IMAGES)[:, None, None]
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.arange(NUM_IMAGES) % 3)
    return f"--dataset_name {folder / 'images.npy'} --labels_file {folder / 'labels.npy'} {FLAGS}"


def copy_checkpoint(run: Path, step: int, resumed: Path) -> str:
    """Copies a checkpoint into a new folder, and returns the flag that resumes from it."""
    resumed.mkdir()
    shutil.copytree(run / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
    return f"--resume_from_checkpoint checkpoint-{step}"


def read_record(output_dir: Path, rank: int) -> list[list[int]]:
    return [json.loads(line) for line in Path(f"{output_dir}-{rank}.jsonl").read_text().splitlines()]


def assert_same_but_for_rounding(first: Path, second: Path, first_step: int = 1) -> None:
    """Asserts that two runs have the same losses, gradient norms and weights, but for rounding."""
    for tag in ("loss", "grad_norm"):
        one, two = (dict(read_scalars(run / "logs")[tag]) for run in (first, second))
        assert sorted(two) == list(range(first_step, NUM_STEPS + 1))
        assert two == pytest.approx({step: one[step] for step in two}, rel=TOLERANCE)
    one, two = (torch.cat([tensor.flatten() for tensor in weights(run).values()]) for run in (first, second))
    assert torch.linalg.norm(one - two) < TOLERANCE * torch.linalg.norm(one)


def assert_equal_weights(first: Path, second: Path) -> None:
    """Asserts that two runs have the same averaged and trained weights, bit for bit."""
    assert_same_weights(weights(first), weights(second))
    last = f"checkpoint-{NUM_STEPS}"
    assert_same_weights(weights(first / last, "model.safetensors"), weights(second / last, "model.safetensors"))


def kill_in_training(launchers: list[subprocess.Popen], output_dir: Path, rank: int) -> list[psutil.Process]:
    """Kills the process of a rank after the first checkpoint. Returns the processes that the launchers started."""
    while not (output_dir / "checkpoint-4").exists():
        assert all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.005)
    workers = [child for launcher in launchers for child in psutil.Process(launcher.pid).children()]
    (victim,) = (worker for worker in workers if worker.environ().get("RANK") == str(rank))
    victim.send_signal(signal.SIGKILL)
    return workers


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    """Trains with two processes, which record their images, and returns the output folder.

    The run is measured on its way, which is to change no number.
    """
    output_dir = tmp_path_factory.mktemp("two") / "run"
    flags = f"{data} --train_batch_size 8 --evaluate_every 3 --keep_best_checkpoint --stop_when_copying"
    printed = finish(start("tests/record_images", flags, output_dir, LAUNCH_TWO)).stdout
    assert "2 process(es)" in printed
    assert f"{NUM_STEPS} steps of 16 images" in printed
    return output_dir


def test_two_processes_train_what_one_trains(data, two, run_script, tmp_path):
    run_script("record_images", f"{data} --train_batch_size 16", tmp_path / "one")
    assert_same_but_for_rounding(tmp_path / "one", two)
    # Together the two see each image once an epoch, in the order of the one process.
    ranks = [read_record(two, rank) for rank in (0, 1)]
    for step, batch in enumerate(read_record(tmp_path / "one", 0)):
        shares = [record[step] for record in ranks]
        if step % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1:  # the second process keeps one image, of weight 0
            assert (len(batch), len(shares.pop())) == (5, 1)
        assert [index for indices in shares for index in indices] == batch
        if step % STEPS_PER_EPOCH == 0:
            seen = []
        seen += batch
        if step % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1:
            assert sorted(seen) == list(range(NUM_IMAGES))
    summary = json.loads((two / "training_summary.json").read_text())
    assert (summary["images_seen"], summary["num_processes"]) == (9 * NUM_IMAGES, 2)


def test_another_number_of_processes_goes_on_where_the_steps_stay_the_same(data, two, run_script, tmp_path):
    """One process, whose steps have four micro-batches, goes on with the run of two in the middle of an epoch."""
    resume = copy_checkpoint(two, 4, tmp_path / "resumed")
    run_script(
        "train_conditional",
        f"{data} --train_batch_size 4 --gradient_accumulation_steps 4 {resume}",
        tmp_path / "resumed",
    )
    assert_same_but_for_rounding(two, tmp_path / "resumed", first_step=5)


def test_another_number_of_processes_is_refused_where_the_steps_change(data, two, run_script, tmp_path, capsys):
    resume = copy_checkpoint(two, 4, tmp_path / "resumed")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        run_script("train_conditional", f"{data} --train_batch_size 8 {resume}", tmp_path / "resumed")
    assert exit.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for part in ("checkpoint-4", "2 process(es)", "16 images", "--train_batch_size"):
        assert part in line
    assert sorted(tmp_path.rglob("*")) == before


def test_every_process_leaves_its_random_state(two):
    assert {path.name for path in (two / "checkpoint-4").glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }


def test_one_process_where_several_were_asked_for_is_an_error(data, tmp_path):
    """`accelerate launch` starts one process on CPUs, unless it is told that there are several GPUs."""
    process = start("train_conditional", data, tmp_path / "run", [*LAUNCH, "--cpu", "--num_processes", "2"])
    errors = process.communicate()[1]
    assert process.returncode != 0
    assert "error: --num_processes" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 1)])
@pytest.mark.parametrize("images_left", [1, 7, 8, 11, 23, 24, 50])
def test_shares_divide_a_step(num_processes, accumulation, images_left):
    shares = {rank: [] for rank in range(num_processes)}
    for first_row in range(0, min(images_left, 4 * num_processes * accumulation), 4 * num_processes):
        of_all = min(4 * num_processes, images_left - first_row)
        for rank in shares:
            shares[rank].append(take_share(MICRO_BATCH, first_row, rank, of_all))
        assert sum(batches[-1].num_images for batches in shares.values()) == of_all
    rows, weight_of_image = [], []
    for micro_batch in range(len(shares[0])):
        for batches in shares.values():
            step, batch = Step(batches, epoch=0, index=0, ends_epoch=False), batches[micro_batch]
            counted = range(batch.first_row, batch.first_row + batch.num_images)
            rows += counted
            # A process weights the mean over its images, and the gradients of all processes are averaged.
            weight_of_image += [step.loss_weight(batch, num_processes) / len(counted) / num_processes for _ in counted]
    total = min(images_left, 4 * num_processes * accumulation)
    assert rows == list(range(total))
    assert weight_of_image == pytest.approx([1 / total] * total)


def test_shares_of_a_stream_are_what_it_gives():
    """A stream's length is not known, so that its last batch, here of 5 images, is divided among the processes."""
    last_batch = {"images": torch.zeros(3, 1, 2, 2)}
    first, second = (take_share(last_batch, 8, rank, 5) for rank in (0, 1))
    assert (first.first_row, second.first_row) == (8, 11)
    assert (first.num_images, second.num_images) == (3, 2)
    assert first.num_images_of_all_processes == second.num_images_of_all_processes == 5
    for rank, last in enumerate((first, second)):
        step = Step([take_share(MICRO_BATCH, 0, rank, 8), last], epoch=0, index=0, ends_epoch=True)
        assert step.num_images == 13
        assert step.loss_weight(last, 2) / last.num_images / 2 == pytest.approx(1 / 13)


def test_processes_and_micro_batches_draw_what_one_batch_draws():
    images = torch.zeros(6, 3, 4, 4)
    config = TrainingConfig()
    whole = draw_randomness((7, 100), Batch(images, None, None, 0, 6, 6), config, 6)
    parts = [draw_randomness((7, 100), Batch(images[:2], None, None, row, 2, 6), config, 6) for row in (0, 2, 4)]
    for expected, *drawn in zip(whole, *parts, strict=True):
        assert torch.equal(expected, torch.cat(drawn))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--seed 1", "--seed 2 --prediction_type v_prediction --snr_gamma 5 --use_ema"])
@pytest.mark.parametrize(("processes", "divided"), [(2, (8, 1)), (2, (4, 2)), (2, (2, 4)), (4, (4, 1))])
def test_divided_steps_are_the_same_steps(data, run_script, tmp_path, flags, processes, divided):
    run_script("train_conditional", f"{data} {flags} --train_batch_size 16", tmp_path / "one")
    batch_size, accumulation = divided
    flags += f" --train_batch_size {batch_size} --gradient_accumulation_steps {accumulation}"
    launcher = [*LAUNCH, "--multi_gpu", "--num_processes", str(processes)]
    finish(start("train_conditional", f"{data} {flags}", tmp_path / "divided", launcher))
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "divided")


@pytest.mark.slow
def test_two_processes_without_classes(data, run_script, tmp_path):
    run_script("train_unconditional", f"{data} --train_batch_size 16", tmp_path / "one")
    finish(start("train_unconditional", f"{data} --train_batch_size 8", tmp_path / "two", LAUNCH_TWO))
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_read_a_stream_as_one_does(run_script, tmp_path):
    images = np.random.default_rng(0).integers(256, size=(NUM_IMAGES, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    flags = f"--train_data_dir {tmp_path / 'images'} --streaming --max_train_steps {NUM_STEPS} {FLAGS}"
    run_script("train_unconditional", f"{flags} --train_batch_size 16", tmp_path / "one")
    finish(start("train_unconditional", f"{flags} --train_batch_size 8", tmp_path / "two", LAUNCH_TWO))
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_resumed_processes_are_the_uninterrupted_two(data, two, tmp_path):
    """Their weights are the same bit for bit."""
    resume = copy_checkpoint(two, 4, tmp_path / "resumed")
    finish(start("train_conditional", f"{data} --train_batch_size 8 {resume}", tmp_path / "resumed", LAUNCH_TWO))
    assert_equal_weights(two, tmp_path / "resumed")


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one(data, run_script, tmp_path):
    run_script("train_conditional", f"{data} --train_batch_size 16", tmp_path / "one")
    resume = copy_checkpoint(tmp_path / "one", 4, tmp_path / "resumed")
    flags = f"{data} --train_batch_size 2 --gradient_accumulation_steps 4 {resume}"
    finish(start("train_conditional", flags, tmp_path / "resumed", LAUNCH_TWO))
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "resumed", first_step=5)


def test_two_processes_keep_the_best_checkpoint(two):
    """The main process alone knows which is the best, and all of them have to write it."""
    [best] = two.glob("checkpoint-best-*")
    assert len(list(best.glob("random_states_*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(data, two, tmp_path, killed):
    flags = f"{data} --train_batch_size 8"
    launcher = start("tests/record_images", flags, tmp_path / "run", LAUNCH_TWO)
    workers = kill_in_training([launcher], tmp_path / "run", killed)
    started = time.monotonic()
    launcher.communicate(timeout=60)
    print(f"ended after {time.monotonic() - started:.1f} s")
    assert launcher.returncode != 0
    assert not any(worker.is_running() for worker in workers)
    finish(start("train_conditional", f"{flags} --resume_from_checkpoint latest", tmp_path / "run", LAUNCH_TWO))
    assert_equal_weights(two, tmp_path / "run")


def on_two_machines(address: str) -> list[list[str]]:
    machines = f"--multi_gpu --num_processes 2 --num_machines 2 --main_process_ip {address} --machine_rank"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launcher = [*LAUNCH, *machines.split()]
    return [[*launcher, str(rank), "--main_process_port", str(port)] for rank in (0, 1)]


@pytest.mark.slow
def test_two_machines_train_what_one_trains(data, run_script, tmp_path):
    """Starts two launchers on this machine, as if on two, which share the output folder."""
    flags = f"{data} --train_batch_size 8"
    machines = on_two_machines("127.0.0.1")
    for process in [start("train_conditional", flags, tmp_path / "two", machine) for machine in machines]:
        finish(process)
    run_script("train_conditional", f"{data} --train_batch_size 16", tmp_path / "one")
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_machines_with_folders_of_their_own(data, two, tmp_path):
    """The first machine alone writes checkpoints; the other can't resume until one is copied to it."""
    flags = f"{data} --train_batch_size 8 --num_epochs 2"
    folders = [tmp_path / "first" / "run", tmp_path / "second" / "run"]

    def launch(flags: str) -> list[subprocess.Popen]:
        machines = zip(on_two_machines("127.0.0.1"), folders, strict=True)
        return [start("train_conditional", flags, folder, machine) for machine, folder in machines]

    for process in launch(flags):
        finish(process)
    assert (folders[0] / "checkpoint-4" / "model.safetensors").is_file()
    assert not list(folders[1].rglob("*.safetensors"))
    flags = f"{data} --train_batch_size 8 --resume_from_checkpoint latest"
    for process in launch(flags):
        assert "error: --output_dir does not hold the same checkpoints" in process.communicate(timeout=60)[1]
        assert process.returncode != 0
    shutil.rmtree(folders[0] / "checkpoint-6")
    shutil.copytree(folders[0] / "checkpoint-4", folders[1] / "checkpoint-4")
    for process in launch(flags):
        finish(process)
    assert_same_but_for_rounding(two, folders[0])  # the only process of a machine has more threads


@pytest.mark.slow
def test_a_killed_process_ends_the_other_machine(data, tmp_path):
    flags = f"{data} --train_batch_size 8"
    machines = [start("tests/record_images", flags, tmp_path / "run", m) for m in on_two_machines("127.0.0.1")]
    kill_in_training(machines, tmp_path / "run", 1)
    started = time.monotonic()
    for machine in machines:
        machine.communicate(timeout=60)
        assert machine.returncode != 0
    print(f"ended after {time.monotonic() - started:.1f} s")


def may_make_network_namespaces() -> bool:
    return shutil.which("ip") is not None and subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0


@pytest.fixture
def namespaces():
    """Makes two machines as the network sees them, which are name spaces joined by a cable."""
    names = [f"sprites-{os.getpid()}-{rank}" for rank in (0, 1)]
    cable = [f"v{os.getpid()}-{rank}" for rank in (0, 1)]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add {cable[0]} netns {names[0]} type veth peer name {cable[1]} netns {names[1]}")
        for rank in (0, 1):
            ip(f"-n {names[rank]} addr add 10.213.7.{rank + 1}/24 dev {cable[rank]}")
            ip(f"-n {names[rank]} link set {cable[rank]} up")
            ip(f"-n {names[rank]} link set lo up")
        yield names, cable
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not may_make_network_namespaces(), reason="may not make network name spaces")
def test_machines_apart_train_what_one_trains(data, namespaces, run_script, tmp_path):
    names, cable = namespaces
    launchers = [
        ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={interface}", *machine]
        for machine, name, interface in zip(on_two_machines("10.213.7.1"), names, cable, strict=True)
    ]
    flags = f"{data} --train_batch_size 8"
    for process in [start("train_conditional", flags, tmp_path / "two", launcher) for launcher in launchers]:
        finish(process)
    run_script("train_conditional", f"{data} --train_batch_size 16", tmp_path / "one")
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "two")
