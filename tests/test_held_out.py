"""Tests the images that are held out of a training, and their loss."""

import json

import numpy as np
import pytest
import torch
from launching import TINY
from safetensors.torch import load_file

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.dataset import load_tensor
from sprite_diffusion.metrics.report import Losses
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.sampling import samplers
from sprite_diffusion.training.held_out import BATCH_SIZE, NUM_BATCHES, hold_out, measure_losses

CONFIG = TrainingConfig(resolution="2", ddpm_num_steps=10, ddpm_num_inference_steps=10)
FLAGS = f"{TINY} --max_train_samples 40 --num_epochs 2 --checkpointing_steps 100 --validation_fraction 0.25"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Has the images that are measured beside the losses sampled in two steps."""
    monkeypatch.setattr(samplers, "FEW_STEPS", 2)


def numbered(num_images: int, labels: list[int] | None = None):
    """Returns images of 2x2 pixels, each of the level of its number, with labels."""
    images = torch.arange(num_images, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return load_tensor(images, CONFIG, labels)


def levels(dataset) -> list[int]:
    return dataset.read_centred(range(len(dataset)))[:, 0, 0, 0].tolist()


def test_each_image_is_either_trained_on_or_held_out():
    data = numbered(20)
    split = hold_out(data, 0.3)
    kept, held_out = levels(split.dataset), levels(split.held_out)
    assert sorted(kept + held_out) == list(range(20))
    assert len(held_out) == 6
    assert held_out != list(range(6))  # files are often sorted by what they show
    assert levels(hold_out(data, 0.3).held_out) == held_out
    assert len({data.identity, split.identity, hold_out(data, 0.2).identity}) == 3  # a resumed run compares them
    assert hold_out(data, 0) is data


def test_each_class_gives_its_share_and_keeps_images():
    split = hold_out(numbered(26, [0] * 20 + [1] * 5 + [2]), 0.4)
    assert np.bincount(split.held_out.class_labels, minlength=3).tolist() == [8, 2, 0]
    assert np.bincount(split.dataset.class_labels).tolist() == [12, 3, 1]
    for images in (split.dataset, split.held_out):
        of_level = [0] * 20 + [1] * 5 + [2]
        assert images.class_labels.tolist() == [of_level[level] for level in levels(images)]
    with pytest.raises(UserInputError, match=r"--validation_fraction 0\.04 is less than one image"):
        hold_out(numbered(26, [0] * 20 + [1] * 5 + [2]), 0.04)


def test_losses_are_of_the_same_draws_with_labels_and_without_augmentation():
    data = hold_out(numbered(20, [0] * 20), 0.3)
    seen = []

    def loss_fn(model, batch, draws):
        seen.append((batch, draws))
        return batch.images.mean() + draws.noise.mean()

    losses = measure_losses(torch.nn.Linear(1, 1), data, CONFIG, loss_fn)
    assert len(seen) == 2 * NUM_BATCHES
    for (_, of_training), (_, of_held_out) in zip(seen[:NUM_BATCHES], seen[NUM_BATCHES:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of_training, of_held_out, strict=True))
        assert of_training.uniform.min() == of_training.augmentation.min() == 1
    assert len({draws.noise.sum().item() for _, draws in seen}) == NUM_BATCHES
    assert {batch.class_labels.unique().item() for batch, _ in seen} == {0}
    noise = np.mean([draws.noise.mean().item() for _, draws in seen[:NUM_BATCHES]])
    for loss, images in ((losses.training, levels(data.dataset)), (losses.held_out, levels(data.held_out))):
        # Each image is there as often as any other, or once more; levels of 0 to 255 lie in [-1, 1].
        times, rest = divmod(NUM_BATCHES * BATCH_SIZE, len(images))
        darkest, brightest = (
            times * sum(images) + sum(order[:rest]) for order in (sorted(images), sorted(images)[::-1])
        )
        low, high = (total / (NUM_BATCHES * BATCH_SIZE) / 127.5 - 1 + noise for total in (darkest, brightest))
        assert low - 1e-6 <= loss <= high + 1e-6
    assert measure_losses(torch.nn.Linear(1, 1), numbered(20), CONFIG, loss_fn) is None


def test_losses_are_of_all_classes_where_images_are_sorted_by_class():
    """Of each as many as chance gives: within five standard errors of the 1,024 rows."""
    labels = [0] * 1500 + [1] * 1500
    data = hold_out(load_tensor(torch.zeros(3000, 1, 2, 2, dtype=torch.uint8), CONFIG, labels), 0.4)
    seen = []
    measure_losses(
        torch.nn.Linear(1, 1), data, CONFIG, lambda model, batch, draws: seen.append(batch) or torch.ones(())
    )
    for batches in (seen[:NUM_BATCHES], seen[NUM_BATCHES:]):
        of_first = sum(int((batch.class_labels == 0).sum()) for batch in batches)
        assert abs(of_first - 512) < 5 * (1024 / 4) ** 0.5


def test_a_gap_grows_if_it_is_above_the_smallest_by_more_than_chance(run_script, tmp_path):
    run_script("train_unconditional", f"{FLAGS} --num_epochs 1 --evaluate_every 1", tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    history = [{**line, "global_step": step, "loss_gap": gap} for step, gap in ((10, 0.3), (20, 0.1), (30, 0.2))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)))
    gaps = {gap: Losses(1, 1 + gap, gap_error=0.02) for gap in (0.1, 0.15, 0.17, 0.31, 0.35, 0.37)}
    assert [gap for gap, losses in gaps.items() if losses.gap_grows(tmp_path, 40)] == [0.17, 0.31, 0.35, 0.37]
    assert [gap for gap, losses in gaps.items() if losses.gap_grows(tmp_path, 20)] == [0.37]  # above 0.3 at step 10
    assert not any(losses.gap_grows(tmp_path, 10) for losses in gaps.values())
    history = [{**history[0], "loss_gap": -0.5}]  # by chance: a gap of 0 is no sign of anything
    (tmp_path / "metrics.jsonl").write_text(json.dumps(history[0]))
    assert not Losses(1, 1.05, 0.02).gap_grows(tmp_path, 40)
    assert Losses(1, 1.07, 0.02).gap_grows(tmp_path, 40)


@pytest.mark.parametrize("script", ["train_unconditional", "train_conditional"])
def test_held_out_images_are_measured_and_change_nothing_else(run_script, tmp_path, capsys, script):
    """The loss is that of the averaged weights; measuring it twice as often trains the same network."""
    flags = f"{FLAGS} --use_ema --augmentation pixel_art"
    run_script(script, f"{flags} --evaluate_every 1", tmp_path / "often")
    assert "30 images of 16x16" in (printed := capsys.readouterr().out)
    assert "10 held out" in printed
    run_script(script, f"{flags} --evaluate_every 2", tmp_path / "once")
    often, once = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("often", "once")
    )
    assert [line["global_step"] for line in often] == [6, 12]
    assert json.loads((tmp_path / "often" / "training_summary.json").read_text())["num_images"] == 30
    for name in ("loss_of_training_images", "loss_of_held_out_images", "loss_gap"):
        assert often[1][name] == once[0][name]
        assert often[1][name] != often[0][name]
    assert often[0]["loss_gap"] == often[0]["loss_of_held_out_images"] - often[0]["loss_of_training_images"]
    weights = [load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("often", "once")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_what_cannot_be_held_out_is_refused(run_script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_script("train_unconditional", FLAGS, tmp_path)
    assert "--validation_fraction needs --evaluate_every" in capsys.readouterr().err
