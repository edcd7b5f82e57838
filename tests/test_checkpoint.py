"""Runs that are killed, checkpoints that are damaged, disks that are full."""

import json
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image
from reliability import assert_same_runs, finish, kill, start, wait_for

from training.checkpoint import find_damage, write_manifest
from training.files import DiskFullError, written_beside

EVERYTHING = "--num_epochs 6 --save_images_steps 5 --save_images_epochs 1 --save_model_epochs 1 --snapshot_epochs 2"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 pictures of two classes, for streaming."""
    folder = tmp_path_factory.mktemp("pictures")
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for i in range(12):
            Image.new("RGB", (16, 16), (20 * i, 255 * (label == "cat"), 0)).save(folder / label / f"{i}.png")
    return folder


def run_with_kills(script: str, flags: str, output_dir: Path, moments: list[str]) -> list[str]:
    """Starts a run again and again, kills it at each of `moments` and lets the last one finish.

    A moment is a pattern of files that are being written, or seconds after the training began. Returns those that came.
    """
    survived = []
    for moment in moments:
        process = start(script, flags, output_dir)
        config = output_dir / "training_config.yaml"
        before = config.stat().st_mtime_ns if config.exists() else 0
        while process.poll() is None and not (config.exists() and config.stat().st_mtime_ns != before):
            time.sleep(0.001)  # until the training begins
        if moment[0].isdigit():
            time.sleep(float(moment))
        else:
            wait_for(process, output_dir, moment)
        if process.poll() is None:
            kill(process)
            survived.append(moment)
        else:
            finish(process, process.returncode)
    process = start(script, flags, output_dir)
    finish(process, 0 if len(survived) == len(moments) else process.wait())
    return survived


def test_a_killed_run_started_again_equals_the_one_never_stopped(tmp_path):
    flags = f"{EVERYTHING} --gradient_accumulation_steps 2 --random_flip --checkpoints_total_limit 2"
    finish(start("train_conditional", flags, tmp_path / "whole"))
    moments = ["checkpoint-*.partial", "samples/step-000005.png", "checkpoint-9.partial"]
    assert run_with_kills("train_conditional", flags, tmp_path / "killed", moments) == moments
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["memory", "stream"])
def test_a_run_survives_many_kills(tmp_path, pictures, source):
    if source == "memory":
        script, length = "train_conditional", "--num_epochs 40 --evaluate_every 4 --keep_best_checkpoint"
        flags = f"{length} --max_train_samples 40 --gradient_accumulation_steps 2 --random_flip --use_ema"
    else:
        script, length = "train_unconditional", "--num_epochs 100 --max_train_steps 200"
        flags = f"{length} --train_data_dir {pictures} --max_train_samples 24 --streaming --dataloader_num_workers 2"
    flags += " --save_images_steps 5 --save_images_epochs 3 --save_model_epochs 2 --snapshot_epochs 10"
    flags += " --checkpoints_total_limit 3"
    finish(start(script, flags, tmp_path / "whole"))
    rng = random.Random(0)
    patterns = ["checkpoint-*.partial", "samples/*.partial", "pipeline.partial*", "snapshots/*.partial", "*.partial"]
    moments = [f"{rng.uniform(0, 2):.3f}" if i % 2 else patterns[i // 2 % len(patterns)] for i in range(26)]
    survived = run_with_kills(script, flags, tmp_path / "killed", moments)
    print(f"{len(survived)} kills: {survived}")
    assert len(survived) >= 20
    assert sum("checkpoint" in moment for moment in survived) >= 2
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")
