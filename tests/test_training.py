"""Tests the training scripts and the loop by runs of seconds and the files that they leave."""

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DModel
from inspecting import assert_same_weights, read_events, read_scalars, weights
from launching import LAUNCH, PYTHON, TINY, finish, run_command, start
from PIL import Image

from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.sampling.pipeline_loading import load_pipeline
from sprite_diffusion.sharing.report import read_training_log
from sprite_diffusion.training.randomness import draw_randomness
from sprite_diffusion.training.steps import Batch


@pytest.mark.parametrize("script", [pytest.param("train_unconditional", marks=pytest.mark.slow), "train_conditional"])
def test_launched_run_leaves_its_files_and_resumes(script, tmp_path):
    output_dir = tmp_path / "run"

    def launch(flags: str) -> str:
        return finish(start(script, f"{TINY} {flags}", output_dir, [*LAUNCH, "--cpu"])).stdout

    launch("")
    assert {p.name for p in output_dir.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    assert {p.name for p in (output_dir / "samples").iterdir()} == {"step-000004.png", "step-000008.png"}
    assert (output_dir / "training_config.yaml").is_file()
    grid = Image.open(output_dir / "samples" / "step-000008.png")
    rows, columns = (2, 2) if script == "train_unconditional" else (5, 3)
    assert grid.size == (columns * 68 + 4, rows * 68 + 4)  # sprites of 64 pixels, 4 apart
    pipeline = DiffusionPipeline.from_pretrained(output_dir, trust_remote_code=script == "train_conditional")
    assert isinstance(pipeline.unet, UNet2DModel)

    before = weights(output_dir)
    printed = launch("--num_epochs 3 --resume_from_checkpoint latest --checkpoints_total_limit 2")
    assert "from " + str(output_dir / "checkpoint-8") in printed
    assert {p.name for p in output_dir.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(output_dir).items())


@pytest.mark.parametrize(
    "flags", ["--use_ema", "--gradient_accumulation_steps 2 --random_flip --mixed_precision bf16"]
)
def test_resumed_run_equals_the_uninterrupted_one(run_script, tmp_path, flags):
    """Resumes in the middle of an epoch, from where the order, flips, noise and schedule have to go on."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_script("train_conditional", f"{TINY} {flags}", whole)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    run_script("train_conditional", f"{TINY} {flags} --resume_from_checkpoint checkpoint-3", resumed)
    assert_same_weights(weights(whole), weights(resumed))
    final = sorted(p.name for p in whole.glob("checkpoint-*"))[-1]
    assert_same_weights(weights(whole / final, "model.safetensors"), weights(resumed / final, "model.safetensors"))
    grid = "samples/" + sorted(p.name for p in (whole / "samples").iterdir())[-1]
    assert (whole / grid).read_bytes() == (resumed / grid).read_bytes()


DIFFUSERS_ALONE = """
import sys
for name in ("models", "pipelines", "schedulers", "sprite_diffusion"):  # an installed copy must not help
    sys.modules[name] = None
import torch
from diffusers import DiffusionPipeline
folder, trust, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=trust == "trust")
picture = pipeline(generator=torch.Generator().manual_seed(4), num_inference_steps=5).images[0]
picture.save(out)
print(type(pipeline).__name__, picture.mode)
"""


@pytest.mark.parametrize("script", ["train_unconditional", "train_conditional"])
def test_transparent_models_draw_transparent_images_anywhere(run_script, tmp_path, script):
    run_script(script, f"{TINY} --image_mode RGBA --num_epochs 1", tmp_path / "run")
    assert Image.open(tmp_path / "run" / "samples" / "step-000004.png").mode == "RGB"  # on a checkerboard
    pipeline = load_pipeline(str(tmp_path / "run"))
    (ours,) = pipeline(generator=torch.Generator().manual_seed(4), num_inference_steps=5).images
    assert (ours.mode, ours.size) == ("RGBA", (16, 16))
    is_stock = script == "train_unconditional"
    arguments = [str(tmp_path / "run"), "no trust" if is_stock else "trust", str(tmp_path / "image.png")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    printed = run_command([*PYTHON, "-I", "-c", DIFFUSERS_ALONE, *arguments], cwd=tmp_path, environment=threads).stdout
    assert printed.split() == ["DDPMPipeline" if is_stock else "ConditionalDDPMPipeline", "RGBA"]
    theirs = np.asarray(Image.open(tmp_path / "image.png")).astype(int)
    expected = np.asarray(ours).astype(int)
    if is_stock:  # whose colours are multiplied by alpha, and may exceed it
        expected[..., :3] = (expected[..., :3] * expected[..., 3:] + 127) // 255
        theirs[..., :3] = np.minimum(theirs[..., :3], theirs[..., 3:])
    # The stock scheduler's float32 tables cost it up to 1e-4 of its coefficients, and each rounding half a level.
    np.testing.assert_allclose(theirs, expected, atol=2 if is_stock else 0)


def test_saved_config_repeats_the_run(run_script, tmp_path):
    run_script("train_unconditional", f"{TINY} --seed 3 --learning_rate 2e-4", tmp_path / "first")
    config_file = tmp_path / "first" / "training_config.yaml"
    assert yaml.safe_load(config_file.read_text())["learning_rate"] == 2e-4
    run_script("train_unconditional", f"--config {config_file}", tmp_path / "second")
    assert_same_weights(weights(tmp_path / "first"), weights(tmp_path / "second"))
    run_script("train_unconditional", f"--config {config_file} --seed 4", tmp_path / "third")
    assert any(
        not torch.equal(tensor, weights(tmp_path / "third")[name])
        for name, tensor in weights(tmp_path / "first").items()
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_schedule_is_counted_in_optimizer_steps(run_script, tmp_path, accumulation):
    """Trains 4 epochs of 4 micro-batches: after 2 steps of warm-up the rate falls linearly from 1e-3 to 0."""
    run_script(
        "train_unconditional",
        f"{TINY} --num_epochs 4 --gradient_accumulation_steps {accumulation} --lr_scheduler linear "
        "--learning_rate 1e-3",
        tmp_path,
    )
    total = 16 // accumulation
    logged = dict(read_scalars(tmp_path / "logs")["lr"])
    expected = {  # each step has the rate of the steps done before it
        done + 1: 1e-3 * (done / 2 if done < 2 else (total - done) / (total - 2)) for done in range(total)
    }
    assert logged == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_rate_can_fall_once_an_epoch_as_in_the_course(run_script, tmp_path):
    flags = "--lr_scheduler linear --lr_scheduler_interval epoch --lr_warmup_steps 0 --learning_rate 1e-3"
    run_script("train_unconditional", f"{TINY} {flags} --num_epochs 4", tmp_path)
    rates = [entry["lr"] for entry in read_training_log(tmp_path)]
    assert rates == pytest.approx([1e-3 * (1 - epoch / 4) for epoch in range(4) for _ in range(4)])


def test_how_to_sample_goes_into_the_model(run_script, tmp_path):
    flags = "--clip_sample false --variance_type fixed_large --timestep_spacing trailing"
    flags += " --rescale_betas_zero_snr true --prediction_type v_prediction"
    run_script("train_unconditional", f"{TINY} {flags} --max_train_steps 1", tmp_path)
    config = DiffusionPipeline.from_pretrained(tmp_path).scheduler.config
    assert (config.clip_sample, config.variance_type) == (False, "fixed_large")
    assert (config.timestep_spacing, config.rescale_betas_zero_snr) == ("trailing", True)


def test_a_run_learns_and_is_tracked(run_script, tmp_path):
    run_script(
        "train_unconditional",
        f"{TINY} --num_epochs 40 --learning_rate 3e-3 --save_images_epochs 20 --logging_steps 8",
        tmp_path,
    )
    scalars = read_scalars(tmp_path / "logs")
    losses = [value for _, value in scalars["loss"]]
    # A network that predicts 0 has a loss of 1. Most of a noisy image is noise, so a copy of it is soon learned.
    assert losses[0] > 0.5
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0]
    assert scalars.keys() >= {"loss", "lr", "epoch", "grad_norm", "images_per_second", "ema_decay"}
    # After epochs 1, 21 and 40.
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {f"step-{step:06d}.png" for step in (4, 84, 160)}
    logged = read_events(tmp_path / "logs").Images("samples")
    assert [image.step for image in logged] == [4, 84, 160]
    tracked = Image.open(io.BytesIO(logged[-1].encoded_image_string))
    assert tracked.tobytes() == Image.open(tmp_path / "samples" / "step-000160.png").tobytes()


def test_checkpoints_are_pipelines_of_the_averaged_weights(run_script, tmp_path):
    run_script("train_conditional", f"{TINY} --use_ema", tmp_path)
    last = load_pipeline(str(tmp_path / "checkpoint-8"))
    assert last.id2label[2] == "food"
    averaged = last.unet.state_dict()
    assert_same_weights(averaged, weights(tmp_path))
    trained = weights(tmp_path / "checkpoint-8", "model.safetensors")
    assert any(not torch.equal(averaged[name], tensor) for name, tensor in trained.items())


def test_snapshots_are_pipelines(run_script, tmp_path):
    run_script("train_unconditional", f"{TINY} --num_epochs 3 --snapshot_epochs 2", tmp_path)
    folders = sorted((tmp_path / "snapshots").iterdir())
    assert [f.name for f in folders] == ["epoch-0001", "epoch-0003"]
    DiffusionPipeline.from_pretrained(folders[0])
    assert_same_weights(weights(folders[1]), weights(tmp_path))


def test_overwriting_removes_only_what_runs_write(run_script, tmp_path):
    run_script("train_unconditional", TINY, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    run_script("train_unconditional", f"{TINY} --overwrite_output_dir --num_epochs 1", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_randomness_is_that_of_the_named_distributions_and_differs_by_step():
    batch = Batch(torch.zeros(4000, 1, 2, 2, dtype=torch.bfloat16), None, None, 0, 4000, 4000)
    config = TrainingConfig(ddpm_num_steps=10, ddpm_num_inference_steps=10)
    noise, timesteps, uniform, _ = draw_randomness((0, 0), batch, config, 4000)
    assert noise.dtype == torch.float32
    # The bounds are five standard errors of 16,000 normal numbers, and of 4,000 of the others.
    assert abs(noise.mean()) < 5 / 16000**0.5
    assert abs(noise.var() - 1) < 5 * (2 / 16000) ** 0.5
    counts = timesteps.bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - 400).abs().max() < 5 * (4000 * 0.09) ** 0.5
    assert abs(uniform.mean() - 0.5) < 5 / (12 * 4000) ** 0.5
    noisier = draw_randomness((0, 0), batch, replace(config, timestep_power=3.0), 4000)
    counts = noisier.timesteps.bincount(minlength=10)
    shares = torch.arange(11, dtype=torch.float64).div(10).pow(3).diff()  # of a density of 3 t^2, by integrating it
    assert len(counts) == 10
    assert ((counts - 4000 * shares).abs() < 5 * (4000 * shares * (1 - shares)).sqrt() + 1).all()
    for other in [(1, 0), (0, 1)]:
        assert not torch.equal(draw_randomness(other, batch, config, 4000)[0], noise)
