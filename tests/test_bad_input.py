"""What users get wrong: one line on standard error, exit status 2, nothing touched."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, TINY
from PIL import Image


def fingerprint(folder) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def fails(run_script, tmp_path, capsys):
    def check(script: str, flags: str, *fragments: str, output_dir=None) -> None:
        with pytest.raises(SystemExit) as exit:
            run_script(script, flags, output_dir or tmp_path / "run")
        assert exit.value.code == 2
        error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]  # after progress bars
        assert error.startswith("error: ")
        for fragment in fragments:
            assert fragment in error
        assert not (tmp_path / "run").exists()

    return check


@pytest.fixture
def pictures(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "pictures" / label / f"{i}.png")
    return tmp_path / "pictures"


def test_flags_and_configs(fails):
    fails("train_unconditional", "--learning_rat 3", "--learning_rate")
    fails("train_unconditional", "--config no-such.yaml", "no-such.yaml")
    fails("train_unconditional", f"{TINY} --block_out_channels 8 8 --resolution 17", "--resolution 17", "multiples")
    fails("train_conditional", f"{TINY} --noise_scheduler_class LinearCorruptionScheduler", "train_unconditional.py")
    fails("train_conditional", f"{TINY} --model_class BasicUNet2DModel", "BasicUNet2DModel")
    fails("train_unconditional", f"{TINY} --resume_from_checkpoint checkpoint-7", "checkpoint-7", "none")


def test_data(fails, pictures, tmp_path):
    own = TINY.replace("--max_train_samples 20 ", "") + " --train_data_dir "
    fails("train_unconditional", own + str(tmp_path / "missing"), "--train_data_dir", "missing")
    (tmp_path / "empty").mkdir()
    fails("train_unconditional", own + str(tmp_path / "empty"), "empty")
    (pictures / "cat" / "0.png").write_bytes((pictures / "cat" / "0.png").read_bytes()[:40])
    fails("train_unconditional", own + str(pictures), "0.png", "--on_bad_image skip")
    fails("train_unconditional", own + f"{pictures} --on_bad_image skip --resolution 8 --resize_mode none", "16x16")


def test_no_labels(fails, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (16, 16)).save(flat / "a.png")
    fails("train_conditional", f"{TINY} --train_data_dir {flat}", "label")


def test_labels_out_of_range(fails, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((4, 16, 16, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.array([0, 1, 7, 0]))
    fails(
        "train_conditional",
        f"{TINY} --dataset_name {tmp_path}/images.npy --labels_file {tmp_path}/labels.npy --class_names a b",
        "labels.npy",
        "7",
    )


def test_skipping_bad_images_reports_the_count(run_script, pictures, tmp_path, capsys):
    (pictures / "cat" / "0.png").write_bytes(b"not an image")
    run_script("train_conditional", f"{TINY} --train_data_dir {pictures} --on_bad_image skip", tmp_path / "run")
    assert "5 images of 16x16, 3 channel(s), 2 classes, 1 skipped" in capsys.readouterr().out


def test_folder_of_another_run_is_not_touched(run_script, fails, tmp_path):
    other = tmp_path / "other"
    run_script("train_unconditional", f"{TINY} --num_epochs 1", other)
    before = fingerprint(other)
    fails("train_unconditional", TINY, "other", "--overwrite_output_dir", "--resume_from_checkpoint", output_dir=other)
    (tmp_path / "file").write_text("mine")
    fails("train_unconditional", TINY, "is a file", output_dir=tmp_path / "file")
    assert fingerprint(other) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_failed_run_leaves_the_folder_that_it_was_to_overwrite(run_script, fails, tmp_path):
    other = tmp_path / "other"
    run_script("train_unconditional", f"{TINY} --num_epochs 1", other)
    before = fingerprint(other)
    fails(
        "train_unconditional",
        f"{TINY} --overwrite_output_dir --train_data_dir {tmp_path}/missing",
        "missing",
        output_dir=other,
    )
    assert fingerprint(other) == before


def test_sampling(run_script, tmp_path, capsys):
    unconditional, conditional, toy = tmp_path / "unconditional", tmp_path / "conditional", tmp_path / "toy"
    run_script("train_unconditional", f"{TINY} --num_epochs 1", unconditional)
    run_script("train_conditional", f"{TINY} --num_epochs 1", conditional)
    run_script(
        "train_unconditional",
        f"{TINY} --num_epochs 1 --model_class BasicUNet2DModel --noise_scheduler_class LinearCorruptionScheduler",
        toy,
    )
    before = fingerprint(tmp_path)
    for flags, fragment in [
        (f"{tmp_path}/missing", "missing"),
        ("--num_images 2", "name a model"),
        (f"{conditional} --snapshots {conditional}", "one of them"),
        (f"--snapshots {conditional}", "train with --snapshot_epochs"),
        (f"--snapshots {tmp_path}/missing", "missing"),
        (f"{unconditional} --class hero", "--class hero"),
        (f"{unconditional} --mix hero=1", "--mix hero=1"),
        (f"{unconditional} --guidance_scale 2", "--guidance_scale"),
        (f"{conditional} --class dragon", "unknown class 'dragon': this model's classes are hero, non-hero"),
        (f"{conditional} --class 5", "unknown class 5"),
        (f"{conditional} --mix hero=1,dragon=1", "--mix: unknown class 'dragon'"),
        (f"{conditional} --mix hero", "--mix hero: 'hero' is not NAME=WEIGHT, as in hero=1,food=0.6"),
        (f"{conditional} --mix hero=1,food=lots", "'food=lots' is not NAME=WEIGHT"),
        (f"{conditional} --mix hero=nan", "'hero=nan' is not NAME=WEIGHT"),
        (f"{conditional} --mix hero=1,0=1", "'0' stands there twice"),
        (f"{conditional} --num_images 0", "--num_images is 0"),
        (f"{conditional} --num_inference_steps 1001", "--num_inference_steps: 1001 steps are out of the 1 to 1000"),
        (f"{conditional} --scheduler ddmp", "unknown sampler 'ddmp'; known are ddpm, ddim"),
        (f"{toy} --scheduler ddim", "LinearCorruptionScheduler, has no sampler but its own"),
        (f"{toy} --no-noise", "LinearCorruptionScheduler adds no noise"),
        (f"{conditional} --compare ddpm:500,ddmp:2", "unknown sampler 'ddmp'"),
        (f"{conditional} --compare ddim:many", "'ddim:many' is not NAME:STEPS"),
        (f"{conditional} --compare ddim:0", "--compare, ddim: 0 steps"),
        (f"{conditional} --compare ddim:2 --no-noise", "not allowed with"),
        (f"{conditional} --compare ddim:2 --scheduler ddim", "does not go with --compare"),
        (f"{conditional} --interpolate 1 2 --scheduler euler", "does not go with --interpolate"),
        (f"{conditional} --interpolate 1 2 --class 0 --class 1 --class 2", "between 2 classes or mixes: 3 are given"),
        (f"{conditional} --interpolate 1", "--interpolate"),
        (f"{conditional} --eta 0.5", "--eta is for --scheduler ddim"),
        (f"{conditional} --scheduler ddim --eta 2", "--eta is 2.0"),
        (f"{conditional} --animate frames.mp4", "frames.mp4: name a .gif or .webp"),
        (f"{conditional} --animate_prediction", "belongs to --animate"),
        (
            f"{conditional} --animate {tmp_path}/a.gif --animate_prediction --scheduler unipc --num_inference_steps 2",
            "UniPCMultistepScheduler does not tell its prediction",
        ),
        (f"{conditional} --forward {tmp_path}/missing.png", "--forward"),
        (f"{conditional} --scale 0", "--scale 0"),
        (f"{conditional} --logger tensorboard", "--logger belongs to --compare"),
        (f"{conditional} --output {tmp_path}/samples.jpg", "samples.jpg: name a .png file or a folder"),
        (f"{conditional} --output {conditional}/model_index.json/x.png", "is not a folder that can be written to"),
        (f"{conditional} --animate {conditional}/model_index.json/x.gif", "is not a folder that can be written to"),
        ("wandb:me/sprites/model:latest", "wandb:me/sprites/model:latest"),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_script("sample", flags)
        assert exit.value.code == 2, flags
        error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert fragment in error
    assert fingerprint(tmp_path) == before


def test_no_traceback_from_the_program_itself(tmp_path):
    result = subprocess.run(
        [sys.executable, "train_unconditional.py", "--train_data_dir", str(tmp_path / "missing")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --train_data_dir")
