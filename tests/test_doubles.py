"""Tests images that stand twice in the data, by a comparison of each with each."""

import numpy as np
import pytest
import torch
from launching import TINY

from sprite_diffusion.data import doubles
from sprite_diffusion.data.config import DataConfig
from sprite_diffusion.data.dataset import load_tensor


@pytest.fixture
def images():
    """Forty images, of which the last twelve are five copies and seven that differ by a little, by less and less."""
    different = torch.randint(256, (28, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    near = [(different[i].int() + 4 * (i - 3)).clamp(0, 255).to(torch.uint8) for i in range(4, 11)]
    return torch.cat((different, different[:5], torch.stack(near)))


def test_doubles_are_those_that_a_comparison_of_each_with_each_finds(images, monkeypatch):
    monkeypatch.setattr(doubles, "COMPARED_AT_ONCE", 9)  # blocks that end within the images
    stored = load_tensor(images, DataConfig(resolution="8")).dataset
    pixels = images.numpy().astype(float) / 255
    distances = np.sqrt(np.square(pixels[:, None] - pixels[None]).mean(axis=(2, 3, 4)))
    earlier = [distances[i, :i] for i in range(1, len(images))]
    assert doubles.count_doubles(stored) == sum((row == 0).any() for row in earlier) == 5
    near = sum((row <= doubles.NEAR_COPY).any() for row in earlier)
    assert 5 < near < 12
    assert doubles.count_near_doubles(stored) == near


def test_the_start_of_a_run_says_how_many_there_are(run_script, tmp_path, images, capsys):
    np.save(tmp_path / "images.npy", images.permute(0, 2, 3, 1).numpy())
    flags = f"{TINY} --dataset_name {tmp_path / 'images.npy'} --resolution 8 --max_train_samples 40 --num_epochs 1"
    run_script("train_unconditional", flags, tmp_path / "run")
    assert "40 images of 8x8, 3 channel(s), 5 doubles of others" in capsys.readouterr().out
