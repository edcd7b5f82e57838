"""Tests that runs survive kills, damaged checkpoints and full disks."""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from inspecting import assert_same_runs, assert_same_weights, read_scalars, wait_for, weights
from launching import LAUNCH_TWO, PYTHON, TINY, complaints, finish, kill, start
from PIL import Image
from safetensors.torch import save_file

from sprite_diffusion.common.files import DiskFullError, written_beside
from sprite_diffusion.common.run_files import list_checkpoints
from sprite_diffusion.metrics.report import Measurement
from sprite_diffusion.runs import outputs
from sprite_diffusion.runs.manifest import find_damage
from sprite_diffusion.sampling import samplers
from sprite_diffusion.sharing.card import make_card

EVERYTHING = (
    f"{TINY} --num_epochs 6 --save_images_steps 5 --save_images_epochs 1 --save_model_epochs 1 --snapshot_epochs 2"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Makes a folder of 24 pictures of two classes, for streaming."""
    folder = tmp_path_factory.mktemp("pictures")
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for i in range(12):
            Image.new("RGB", (16, 16), (20 * i, 255 * (label == "cat"), 0)).save(folder / label / f"{i}.png")
    return folder


def run_with_kills(start_run: Callable[[Path], subprocess.Popen], output_dir: Path, moments: list[str]) -> list[str]:
    """Starts a run again and again, kills it at each of `moments` and lets the last one finish.

    A moment is a pattern of files that are being written, or a number of seconds after the training began. Returns
    the moments that came before the run ended.
    """
    survived = []
    for moment in moments:
        process = start_run(output_dir)
        config = output_dir / "training_config.yaml"
        before = config.stat().st_mtime_ns if config.exists() else 0
        while process.poll() is None and not (config.exists() and config.stat().st_mtime_ns != before):
            time.sleep(0.001)  # the configuration is written when the training begins
        if moment[0].isdigit():
            time.sleep(float(moment))
        else:
            wait_for(process, output_dir, moment)
        if process.poll() is None:
            kill(process)
            survived.append(moment)
        else:
            finish(process, process.returncode)
    process = start_run(output_dir)
    finish(process, 0 if len(survived) == len(moments) else process.wait())
    return survived


def test_a_killed_run_started_again_equals_the_one_never_stopped(tmp_path):
    flags = f"{EVERYTHING} --gradient_accumulation_steps 2 --random_flip --checkpoints_total_limit 2"
    flags += " --ddpm_num_inference_steps 30"
    start_run = partial(start, "train_conditional", flags)
    finish(start("train_conditional", flags, tmp_path / "whole"))
    moments = ["checkpoint-*.partial", "samples/step-000005.png", "checkpoint-12"]  # the last step is 12
    assert run_with_kills(start_run, tmp_path / "killed", moments) == moments
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


KINDS = {
    "memory": "train_conditional --num_epochs 40 --evaluate_every 4 --keep_best_checkpoint --use_ema --random_flip "
    "--max_train_samples 40 --gradient_accumulation_steps 2",
    "stream": "train_unconditional --num_epochs 999 --max_train_steps 450 --train_data_dir {pictures} --streaming "
    "--max_train_samples 24 --dataloader_num_workers 2",
    "two processes": "train_conditional --num_epochs 999 --max_train_steps 450 --max_train_samples 37 --use_ema",
    "wandb": "train_unconditional --num_epochs 999 --max_train_steps 450 --logger wandb",
    "trackio": "train_unconditional --num_epochs 999 --max_train_steps 450 --logger trackio",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_survives_many_kills(tmp_path, pictures, kind):
    script, flags = KINDS[kind].format(pictures=pictures).split(maxsplit=1)
    flags = f"{TINY} {flags} --save_images_steps 5 --save_images_epochs 3 --save_model_epochs 2 --snapshot_epochs 10"
    environment = {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    launcher = LAUNCH_TWO if kind == "two processes" else PYTHON
    start_run = partial(start, script, flags, launcher=launcher, environment=environment)
    finish(start_run(tmp_path / "whole", fork=False))  # whose strings have other hashes than those of forks
    rng = random.Random(0)
    patterns = ["checkpoint-*.partial", "samples/*.partial", "staged.partial*", "snapshots/*.partial", "*.partial"]
    moments = [f"{rng.uniform(0, 2):.3f}" if i % 2 else patterns[i // 2 % len(patterns)] for i in range(26)]
    survived = run_with_kills(start_run, tmp_path / "killed", moments)
    print(f"{len(survived)} kills: {survived}")
    assert len(survived) >= 20
    assert sum("checkpoint" in moment for moment in survived) >= 2
    assert_same_runs(tmp_path / "whole", tmp_path / "killed", same_python_random=kind != "trackio")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains a run that is killed after its second checkpoint."""
    output_dir = tmp_path_factory.mktemp("stopped") / "run"
    process = start("train_unconditional", f"{TINY} --num_epochs 4", output_dir)
    assert wait_for(process, output_dir, "checkpoint-6")
    kill(process)
    return output_dir


@pytest.fixture
def stopped(run, tmp_path):
    """Copies the killed run, for a test to change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def refuses(run_script, capsys):
    """Returns a function that runs a script which has to end with status 2, and returns its line of error."""

    def check(flags: str, output_dir: Path) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_script("train_unconditional", f"{TINY} {flags}", output_dir)
        assert exit.value.code == 2
        lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
        assert lines[-1].startswith("error: ")
        return lines[-1]

    return check


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add_to_manifest(checkpoint: Path, name: str) -> None:
    """Adds a file of another checkpoint to a manifest, with the size and SHA-256 that it has there."""
    listed = json.loads((checkpoint / "manifest.json").read_text())
    other = json.loads((checkpoint.parent / "checkpoint-3" / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**listed, name: other["model.safetensors"]}))


FILES = ("model.safetensors", "optimizer.bin", "unet/diffusion_pytorch_model.safetensors", "train_state.json")
FILES = (*FILES, "random_states_0.pkl", "model_index.json", "scheduler/scheduler_config.json")
DAMAGES = {
    **{
        f"{name}, truncated": lambda c, name=name: os.truncate(c / name, (c / name).stat().st_size // 2)
        for name in FILES
    },
    **{f"{name}, a bit flipped": lambda c, name=name: flip_bit(c / name) for name in FILES},
    **{f"{name}, removed": lambda c, name=name: (c / name).unlink() for name in FILES},
    "manifest removed": lambda c: (c / "manifest.json").unlink(),
    "manifest truncated": lambda c: os.truncate(c / "manifest.json", 40),
    "manifest empty": lambda c: (c / "manifest.json").write_text(""),
    "manifest a list": lambda c: (c / "manifest.json").write_text("[]"),
    "manifest of nothing": lambda c: (c / "manifest.json").write_text("{}"),
    "manifest of numbers": lambda c: (c / "manifest.json").write_text('{"model.safetensors": 1}'),
    "manifest not text": lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest of brackets": lambda c: (c / "manifest.json").write_text(100_000 * "["),
    "manifest names a file outside": lambda c: add_to_manifest(c, "../checkpoint-3/model.safetensors"),
    "manifest names an absolute file": lambda c: add_to_manifest(c, str(c.parent / "checkpoint-3/model.safetensors")),
    "empty folder": lambda c: [shutil.rmtree(c), c.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found(stopped, damage):
    assert find_damage(stopped / "checkpoint-3") == find_damage(stopped / "checkpoint-6") == ""
    DAMAGES[damage](stopped / "checkpoint-6")
    assert find_damage(stopped / "checkpoint-6")
    assert find_damage(stopped / "checkpoint-3") == ""


def test_every_flipped_bit_is_found(stopped):
    """Flips 300 bits one after the other, each at random in a random file, which may be the manifest."""
    rng = random.Random(0)
    checkpoint = stopped / "checkpoint-6"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for _ in range(300):
        path = rng.choice(files)
        content = path.read_bytes()
        damaged = bytearray(content)
        position = rng.randrange(len(content))
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert find_damage(checkpoint), (path, position)
        path.write_bytes(content)
    assert find_damage(checkpoint) == ""


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run_script, stopped, capsys):
    flip_bit(stopped / "checkpoint-6" / "optimizer.bin")
    run_script("train_unconditional", f"{TINY} --num_epochs 4 --checkpoints_total_limit 1", stopped)
    printed = capsys.readouterr()
    assert f"from {stopped / 'checkpoint-3'}" in printed.out
    warnings = [line for line in printed.err.splitlines() if line.startswith("warning: damaged")]
    assert len(warnings) == 1
    assert "checkpoint-6 (optimizer.bin has another SHA-256)" in warnings[0]
    assert [p.name for p in stopped.glob("checkpoint-*")] == ["checkpoint-16"]


def test_with_no_sound_checkpoint_nothing_starts_over(refuses, stopped):
    for name in ("checkpoint-3", "checkpoint-6"):
        os.truncate(stopped / name / "model.safetensors", 100)
    before = sorted(stopped.rglob("*"))
    error = refuses("--num_epochs 4", stopped)
    assert "no sound checkpoint" in error
    assert "checkpoint-6 (model.safetensors has 100 bytes" in error
    assert "checkpoint-3 (" in error
    assert "damaged (" in refuses("--resume_from_checkpoint checkpoint-3", stopped)
    assert sorted(stopped.rglob("*")) == before


def test_other_flags_are_named_and_refused(refuses, run_script, stopped, capsys):
    before = sorted(stopped.rglob("*"))
    error = refuses("--num_epochs 4 --learning_rate 3e-4 --use_ema False", stopped)
    assert "(--learning_rate 0.001 is now 0.0003, --use_ema True is now False)" in error
    for remedy in ("'--resume_from_checkpoint latest'", "--overwrite_output_dir", "another folder"):
        assert remedy in error
    assert sorted(stopped.rglob("*")) == before
    run_script("train_unconditional", f"{TINY} --learning_rate 3e-4 --resume_from_checkpoint latest", stopped)
    assert f"from {stopped / 'checkpoint-6'}" in capsys.readouterr().out


def test_flags_without_effect_on_numbers_may_change(run_script, stopped, capsys):
    flags = "--logger none --checkpoints_total_limit 2 --shutdown_grace 5 --logging_steps 2 --checkpointing_steps 5"
    run_script("train_unconditional", f"{TINY} --num_epochs 4 {flags}", stopped)
    assert f"from {stopped / 'checkpoint-6'}" in capsys.readouterr().out
    assert {p.name for p in stopped.glob("checkpoint-*")} == {"checkpoint-15", "checkpoint-16"}


def test_a_finished_run_is_left_alone(refuses, run_script, stopped, capsys):
    run_script("train_unconditional", f"{TINY} --num_epochs 4", stopped)
    shutil.copytree(stopped / "checkpoint-15", stopped / "checkpoint-16.partial")
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    assert "finished run" in refuses("--num_epochs 4", stopped)
    assert "finished run" in refuses("--num_epochs 5", stopped)
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before
    shutil.rmtree(stopped / "checkpoint-16")
    assert "finished run" in refuses("--num_epochs 4", stopped)
    run_script("train_unconditional", f"{TINY} --num_epochs 5 --resume_from_checkpoint latest", stopped)
    assert f"from {stopped / 'checkpoint-15'}" in capsys.readouterr().out


def test_a_run_that_left_no_checkpoint_begins_again(run_script, tmp_path, capsys):
    process = start("train_unconditional", f"{TINY} --checkpointing_steps 100 --num_epochs 50", tmp_path / "run")
    assert wait_for(process, tmp_path / "run", "logs/*/events*")
    kill(process)
    flags = "--checkpointing_steps 100 --num_epochs 2"
    run_script("train_unconditional", f"{TINY} {flags} --overwrite_output_dir", tmp_path / "other")
    run_script("train_unconditional", f"{TINY} {flags} --resume_from_checkpoint latest", tmp_path / "run")
    assert "from the start" in capsys.readouterr().out
    assert_same_runs(tmp_path / "run", tmp_path / "other")


def test_steps_of_a_run_that_left_no_checkpoint_are_logged_once(run_script, tmp_path):
    """TensorBoard writes to the disk every two minutes: a killed run may have left steps that come again."""
    run_script("train_unconditional", TINY, tmp_path)
    for checkpoint in list_checkpoints(tmp_path):
        shutil.rmtree(checkpoint)
    (tmp_path / "training_summary.json").unlink()
    run_script("train_unconditional", TINY, tmp_path)
    assert [step for step, _ in read_scalars(tmp_path / "logs")["loss"]] == list(range(1, 9))


def test_folders_that_are_no_runs_are_refused(refuses, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is not empty" in refuses("", tmp_path / "mine")
    (tmp_path / "mine" / "training_config.yaml").write_text("just text")
    assert "is not empty" in refuses("", tmp_path / "mine")


def test_resuming_from_an_earlier_checkpoint_ends_the_later_ones(run_script, stopped):
    """The limit must not remove the newest checkpoint in favour of later steps of an abandoned run."""
    flags = (
        "--resume_from_checkpoint checkpoint-3 --checkpointing_steps 4 --max_train_steps 4 --checkpoints_total_limit 1"
    )
    run_script("train_unconditional", f"{TINY} --num_epochs 4 {flags}", stopped)
    assert [p.name for p in stopped.glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_best_checkpoint_is_that_of_the_lowest_distance(run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "IMAGES_PER_EVALUATION", 10)
    monkeypatch.setattr(samplers, "FEW_STEPS", 2)
    flags = f"{TINY} --max_train_samples 40 --num_epochs 6 --evaluate_every 1 --keep_best_checkpoint"
    flags += " --checkpoints_total_limit 2 --checkpointing_steps 20 --learning_rate 1e-2"
    run_script("train_unconditional", flags, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["figures"]["frechet_distance"]["value"])["global_step"]
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {
        f"checkpoint-best-{best}",
        "checkpoint-40",
        "checkpoint-48",
    }
    assert find_damage(tmp_path / f"checkpoint-best-{best}") == ""
    run_script("calculate_metrics", f"{tmp_path}/checkpoint-best-{best} --num_images 10 --num_inference_steps 2")


def test_a_run_that_copies_ends_at_its_best_checkpoint(run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "IMAGES_PER_EVALUATION", 10)
    monkeypatch.setattr(samplers, "FEW_STEPS", 2)
    asked: list[int] = []
    # From the fourth evaluation on more than real images do: a network of these seconds copies nothing.
    monkeypatch.setattr(Measurement, "exceeds_floor", property(lambda self: asked.append(0) or len(asked) > 3))
    flags = (
        f"{TINY} --max_train_samples 40 --num_epochs 9 --evaluate_every 1 --keep_best_checkpoint --stop_when_copying"
    )
    flags += " --checkpoints_total_limit 2 --checkpointing_steps 4 --learning_rate 1e-2 --use_ema"
    run_script("train_unconditional", flags, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    distances = {line["global_step"]: line["figures"]["frechet_distance"]["value"] for line in lines}
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    best = summary["global_step"]
    assert summary["total_steps"] == best < 32  # the fourth of nine epochs of 8 steps
    assert max(distances) == best  # later ones are not of this run any more
    steps = {p.name for p in tmp_path.glob("checkpoint-*")}
    assert {f"checkpoint-best-{best}", f"checkpoint-{best}"} <= steps
    assert max(int(name.rpartition("-")[2]) for name in steps) == best
    assert_same_weights(weights(tmp_path), weights(tmp_path / f"checkpoint-best-{best}"))
    assert f"samples/step-{best:06d}.png" in make_card(tmp_path, None, None)
    with pytest.raises(SystemExit):
        run_script("train_unconditional", flags, tmp_path)
    assert "holds a finished run" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of 4 MB, for a test to fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a file system takes the rights of root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Writes a file that takes all but `leave` bytes of a disk, and returns its path."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, max(0, ballast.stat().st_size - leave))
    return ballast


@pytest.mark.parametrize("leave", [0, pytest.param(40_000, marks=pytest.mark.slow)])
def test_a_full_disk_costs_what_there_is_no_room_for_and_no_more(small_disk, leave):
    """Fills the disk after the second checkpoint and frees it some time later; the run goes on all the while."""
    flags = f"{TINY} --num_epochs 60 --checkpoints_total_limit 2 --checkpointing_steps 10 --logger none"
    flags += " --logging_steps 100 --save_images_epochs 1 --save_model_epochs 1 --ddpm_num_inference_steps 1"
    output_dir = small_disk / "run"
    process = start("train_unconditional", flags, output_dir)
    assert wait_for(process, output_dir, "checkpoint-10")
    began = time.monotonic()
    assert wait_for(process, output_dir, "checkpoint-20")
    ballast = fill(small_disk, leave)
    time.sleep(3 * (time.monotonic() - began))  # about three more checkpoints are due meanwhile
    assert process.poll() is None
    during = list_checkpoints(output_dir)
    assert [find_damage(checkpoint) for checkpoint in during] == [""] * len(during) != []
    DiffusionPipeline.from_pretrained(output_dir)
    assert not list(output_dir.rglob("*.partial")) or leave
    ballast.unlink()
    ended = finish(process)
    errors = complaints(ended.stderr)
    assert len(errors.splitlines()) <= 4  # one each of checkpoints, samples, the log and the pipeline
    assert "the disk is full; the run goes on without, and writes again when there is room" in errors
    written = [int(line.rpartition("-")[2]) for line in ended.stdout.splitlines() if "checkpoint-" in line]
    assert len(written) < 24
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-230", "checkpoint-240"]
    assert all(find_damage(checkpoint) == "" for checkpoint in list_checkpoints(output_dir))


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_is_said(small_disk):
    flags = f"{TINY} --num_epochs 12 --logger none --checkpoints_total_limit 1"
    output_dir = small_disk / "run"
    process = start("train_unconditional", flags, output_dir)
    assert wait_for(process, output_dir, "checkpoint-6")
    while process.poll() is None:  # a checkpoint that the run removes makes room again
        ballast = fill(small_disk)
        time.sleep(0.01)
    errors = complaints(finish(process, 2).stderr)
    assert "the pipeline was not written; free some and give the same command again" in errors
    assert find_damage(list_checkpoints(output_dir)[-1]) == ""
    ballast.unlink()
    printed = finish(start("train_unconditional", flags, output_dir)).stdout
    assert f"from {output_dir}" in printed
    assert (output_dir / "model_index.json").is_file()


def test_room_is_asked_for_before_the_training(run_script, small_disk, capsys):
    ballast = fill(small_disk, leave=100_000)
    with pytest.raises(SystemExit) as exit:
        run_script("train_unconditional", f"{TINY} --logger none", small_disk / "run")
    assert exit.value.code == 2
    assert f"{small_disk} has 0.1 MB free, a checkpoint takes 0.2 MB" in capsys.readouterr().err
    assert not (small_disk / "run").exists()
    ballast.unlink()
    run_script("train_unconditional", f"{TINY} --logger none --checkpointing_steps 1 --num_epochs 1", small_disk / "a")
    assert "warning" not in capsys.readouterr().err
    fill(small_disk, leave=900_000)
    flags = f"{TINY} --logger none --checkpointing_steps 2 --num_epochs 4 --checkpoints_total_limit 10"
    with suppress(SystemExit):  # the disk may be full at the end, as the warning says
        run_script("train_unconditional", flags, small_disk / "b")
    assert "8 checkpoints take" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torch", "safetensors", "text"])
def test_the_errors_of_every_writer_are_told_from_others(small_disk, kind):
    (small_disk / "file").write_text("earlier")
    fill(small_disk)
    write = {
        "torch": lambda path: torch.save(torch.zeros(100_000), path),
        "safetensors": lambda path: save_file({"zeros": torch.zeros(100_000)}, path),
        "text": lambda path: path.write_text("later" * 100_000),
    }[kind]
    with pytest.raises(DiskFullError), written_beside(small_disk / "file") as partial:
        write(partial)
    assert (small_disk / "file").read_text() == "earlier"
    assert {path.name for path in small_disk.iterdir()} == {"file", "ballast"}
    (small_disk / "ballast").unlink()
    with pytest.raises(ZeroDivisionError), written_beside(small_disk / "file"):
        1 / 0  # noqa: B018


def save_classes(folder, classes):
    """Saves three images of each class."""
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (16, 16), 40 * level + i).save(folder / name / f"{i}.png")


class TestImagesOfACheckpoint:
    """The classes, the number and the pixels of the images belong to a checkpoint."""

    @pytest.fixture
    def resume(self, run_script, tmp_path, capsys):
        """Trains on cats and dogs, lets a function change their folder, and trains on. Returns what is said."""

        def train_and_resume(change, streaming=""):
            save_classes(tmp_path / "images", ["cat", "dog"])
            flags = f"{TINY} --train_data_dir {tmp_path / 'images'} --logger none {streaming}"
            flags = flags.replace("--max_train_samples 20", "")
            run_script("train_conditional", f"{flags} --max_train_steps 1", tmp_path / "run")
            change(tmp_path / "images")
            capsys.readouterr()
            arguments = f"{flags} --max_train_steps 2 --resume_from_checkpoint latest"
            run_script("train_conditional", arguments, tmp_path / "run")
            return capsys.readouterr().err

        return train_and_resume

    @pytest.mark.parametrize("streaming", ["", "--streaming"])
    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            (lambda folder: (folder / "cat").rename(folder / "wolf"), "without cat and with wolf"),
            (lambda folder: save_classes(folder, ["ant"]), "with ant"),
            (
                lambda folder: (shutil.rmtree(folder / "cat"), save_classes(folder, ["a", "b"])),
                "without cat and with a, b",
            ),
        ],
    )
    def test_other_classes_are_refused(self, resume, tmp_path, capsys, change, difference, streaming):
        with pytest.raises(SystemExit) as ended:
            resume(change, streaming)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert f"{tmp_path}/run/checkpoint-1 was trained on 2 classes, and the images now come {difference}" in error
        assert find_damage(tmp_path / "run" / "checkpoint-1") == ""
        assert not (tmp_path / "run" / "checkpoint-2").exists()

    def test_names_in_another_order_are_refused(self, run_script, tmp_path, capsys):
        save_classes(tmp_path / "images", ["cat", "dog"])
        flags = f"{TINY} --train_data_dir {tmp_path / 'images'} --logger none".replace("--max_train_samples 20", "")
        run_script("train_conditional", f"{flags} --class_names a b --max_train_steps 1", tmp_path / "run")
        flags += " --class_names b a --max_train_steps 2 --resume_from_checkpoint latest"
        with pytest.raises(SystemExit):
            run_script("train_conditional", flags, tmp_path / "run")
        assert "trained on the classes a, b, and their order is now b, a" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "warning"),
        [
            (
                lambda folder: (folder / "cat" / "0.png").unlink(),
                "was trained on 6 images, and the run goes on with 5",
            ),
            (lambda folder: Image.new("L", (16, 16), 9).save(folder / "cat" / "0.png"), "was trained on other images"),
            (
                lambda folder: (folder / "cat" / "0.png").rename(folder / "dog" / "9.png"),
                "was trained on other images",
            ),
        ],
    )
    def test_other_images_are_warned_of(self, resume, change, warning):
        assert f"checkpoint-1 {warning}" in resume(change)

    def test_the_same_images_elsewhere_are_not_warned_of(self, resume):
        def copy(folder):
            shutil.move(folder, folder.with_name("moved"))
            shutil.copytree(folder.with_name("moved"), folder)

        assert "was trained on" not in resume(copy)
