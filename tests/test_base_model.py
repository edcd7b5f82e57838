"""Tests runs that begin with the weights of a trained model, by the functions that the two networks are."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from course_network import make_course_network
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from inspecting import assert_same_weights, weights
from launching import TINY
from tiny_network import make_tiny_network

from models import BasicUNet2DModel, ContextUNet2DModel
from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.common.flags import read_yaml
from sprite_diffusion.data.sprites import CLASS_NAMES
from sprite_diffusion.runs.base_model import load_base
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.presets import load_preset, parse_config
from sprite_diffusion.sampling.pipeline_loading import load_pipeline
from sprite_diffusion.sharing.card import make_card
from sprite_diffusion.training.initial_weights import adapt_network, channel_map

# A sum of as many float32 as these networks have weights, in another order: each rounds by 2**-24 of numbers near 1.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
NAMES = {0: "hero", 1: "food"}
# Of TINY without the network, which is the model's.
FLAGS = TINY[: TINY.index("--block_out_channels")] + "--checkpointing_steps 3 --logging_steps 1 --logger none"


def make_pipeline(classes=None, channels=3, prediction_type="sample"):
    scheduler = ClosedFormDDPMScheduler(num_train_timesteps=20, prediction_type=prediction_type)
    shape = {"in_channels": channels, "out_channels": channels}
    if classes is None:
        return UnconditionalDDPMPipeline(make_tiny_network(**shape), scheduler)
    unet = make_tiny_network(**shape, num_class_embeds=len(classes) + 1)
    return ConditionalDDPMPipeline(unet, scheduler, id2label=dict(enumerate(classes)))


def make_course_pipeline(classes=None, channels=3):
    torch.manual_seed(0)
    shape = {"in_channels": channels, "out_channels": channels, "context_dim": len(classes or "_")}
    unet = ContextUNet2DModel(sample_size=8, num_features=8, num_train_timesteps=20, **shape)
    scheduler = ClosedFormDDPMScheduler(num_train_timesteps=20, prediction_type="sample")
    if classes is None:
        return UnconditionalDDPMPipeline(unet, scheduler)
    return ConditionalDDPMPipeline(unet, scheduler, id2label=dict(enumerate(classes)))


@torch.no_grad()
def predict(network, images, label=None):
    kwargs = {} if label is None else {"class_labels": torch.full((len(images),), label)}
    return network.eval()(images, torch.tensor(7), **kwargs).sample


def adapt(base, channels=3, names=None, image_size=(8, 8)):
    sides = f"{image_size[1]}x{image_size[0]}"
    config = TrainingConfig(resolution=sides, ddpm_num_steps=20, ddpm_num_inference_steps=20)
    return adapt_network(base, config, channels, names)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MAKERS = pytest.mark.parametrize("make", [make_pipeline, make_course_pipeline])


@MAKERS
def test_the_same_network_is_the_same_function(make):
    base = make(["hero", "food"])
    network, changes = adapt(base, names=NAMES)
    assert changes == "every weight as it was"
    assert_same_weights(base.unet.state_dict(), network.state_dict())


@MAKERS
def test_classes_keep_their_names_and_new_ones_begin_apart(make):
    base = make(["food", "spell", "hero"])
    network, changes = adapt(base, names={0: "hero", 1: "potion", 2: "food", 3: "coin"})
    assert changes == (
        "without the classes spell; the classes potion, coin begin at random about the mean of its classes"
    )
    for before, now in ((2, 0), (0, 2), (3, 4)):  # the last id of either is "no class"
        torch.testing.assert_close(predict(network, IMAGES, now), predict(base.unet, IMAGES, before), **ROUNDING)
    for other in (0, 2, 3, 4):
        assert not torch.allclose(predict(network, IMAGES, 1), predict(network, IMAGES, other), **ROUNDING)


def test_new_classes_are_as_far_from_their_mean_as_those_of_a_new_network():
    base = make_pipeline(["food", "spell", "hero"])
    network, _ = adapt(base, names={id: f"class {id}" for id in range(500)})
    rows, new = base.unet.class_embedding.weight, network.class_embedding.weight
    assert torch.equal(new[-1], rows[-1])
    distances = new[:-1] - rows[:3].mean(dim=0)
    # Normal, of variance 1 as of a new embedding: the mean and the deviation of so many are right to thousandths.
    assert abs(distances.mean()) < 6 / distances.numel() ** 0.5
    assert abs(distances.std() - 1) < 6 / (2 * distances.numel()) ** 0.5


@MAKERS
def test_a_network_without_classes_is_what_the_model_knew_of_no_class(make):
    base = make(["hero", "food"])
    network, changes = adapt(base)
    assert "its classes are left out" in changes
    torch.testing.assert_close(predict(network, IMAGES), predict(base.unet, IMAGES, 2), **ROUNDING)


@MAKERS
def test_no_class_begins_as_the_model_without_classes(make):
    base = make()
    network, changes = adapt(base, names=NAMES)
    assert changes == 'the classes hero, food begin at random, "no class" as the model without classes'
    torch.testing.assert_close(predict(network, IMAGES, 2), predict(base.unet, IMAGES), **ROUNDING)
    first, second = (predict(network, IMAGES, label) for label in range(2))
    assert not torch.allclose(first, second, **ROUNDING)
    assert network.state_dict().keys() >= base.unet.state_dict().keys()


@MAKERS
@pytest.mark.parametrize("before", [1, 3, 4])
@pytest.mark.parametrize("now", [1, 3, 4])
def test_channels_are_converted_as_pixels_are(make, before, now):
    """On images of the new channels the network predicts what the model does on the same images of its own."""
    base = make(channels=before)
    network, changes = adapt(base, channels=now)
    images = torch.randn(2, now, 8, 8, generator=torch.Generator().manual_seed(1))
    there, back = (torch.eye(now),) * 2 if now == before else (channel_map(now, before), channel_map(before, now))
    as_before = torch.einsum("bc,nchw->nbhw", there, images)
    expected = torch.einsum("bc,nchw->nbhw", back, predict(base.unet, as_before))
    if now == 4 > before:
        expected[:, 3] = 1  # opaque
    torch.testing.assert_close(predict(network, images), expected, **ROUNDING)
    assert changes == (
        "every weight as it was" if now == before else f"images of {now} channel(s) in place of {before}"
    )


def test_pixels_of_other_channels():
    colour = np.array([0.9, 0.6, 0.3])
    for before, after, pixel, expected in [
        (3, 1, colour, [0.6]),
        (1, 3, [0.5], [0.5, 0.5, 0.5]),
        (3, 4, colour, [*colour, 0]),
        (4, 3, [*colour, 0.7], colour),
        (4, 1, [*colour, 0.7], [0.6]),
        (1, 4, [0.5], [0.5, 0.5, 0.5, 0]),
    ]:
        np.testing.assert_allclose(channel_map(before, after).numpy() @ np.array(pixel), expected, rtol=1e-6)


def test_alpha_of_a_network_that_predicts_noise_begins_at_zero():
    network, _ = adapt(make_pipeline(prediction_type="epsilon"), channels=4)
    assert predict(network, torch.randn(2, 4, 8, 8))[:, 3].abs().max() == 0


def test_dropout_is_the_models_unless_a_flag_says_otherwise():
    base = make_pipeline()
    base.unet.register_to_config(dropout=0.2)
    for flag, expected in ((0.0, 0.2), (0.1, 0.1)):
        network, _ = adapt_network(base, TrainingConfig(resolution="8", dropout=flag), 3, None)
        assert network.config.dropout == expected


def test_other_sides_are_taken_by_a_network_of_convolutions_and_named_where_weights_have_them():
    base = make_pipeline()
    network, changes = adapt(base, image_size=(16, 12))
    assert changes == "images of 12x16 in place of 8x8"
    assert_same_weights(base.unet.state_dict(), network.state_dict())
    assert tuple(network.config.sample_size) == (16, 12)
    base = make_course_pipeline()
    _, changes = adapt(base, image_size=(16, 16))
    number = len(base.unet.state_dict())
    assert changes == f"1 of {number} weights begin at random (unpool.0.weight); images of 16x16 in place of 8x8"


def start_from(model, *flags):
    return parse_config(["--init_from", str(model), *" ".join(flags).split()], "sprites_unconditional.yaml")


def test_process_and_schedule_follow_from_the_model_and_flags_win(tmp_path, capsys):
    make_pipeline(prediction_type="v_prediction").save_pretrained(tmp_path / "model")
    config = start_from(tmp_path / "model")
    assert (config.prediction_type, config.ddpm_num_steps, config.ddpm_num_inference_steps) == ("v_prediction", 20, 20)
    assert (config.resolution, config.block_out_channels, config.ddpm_beta_schedule) == ("8", [8], "linear")
    assert config.resnet_time_scale_shift == "default"  # the preset's network is told of the time in another way
    assert (config.learning_rate, config.max_train_steps) < (1e-3, 1200)  # the preset's
    assert config.output_dir == "runs/model-tuned"
    assert "--prediction_type=v_prediction" in capsys.readouterr().out

    config = start_from(tmp_path / "model", "--resolution 16 --timestep_spacing linspace --num_epochs 3 --seed 1")
    assert (config.resolution, config.timestep_spacing, config.num_epochs) == ("16", "linspace", 3)
    assert config.max_train_steps is None
    assert start_from(tmp_path / "model", "--no_clip_sample").clip_sample is False
    # The saved file repeats the run, what was chosen against the model too.
    config.save(tmp_path / "saved.yaml")
    assert parse_config(["--config", str(tmp_path / "saved.yaml")], "").differences(config.__dict__) == {}
    # A file that does not know of the model gives way to its process, and not to its schedule.
    config = start_from(tmp_path / "model", "--config sprites_long.yaml")
    assert (config.prediction_type, config.max_train_steps, config.learning_rate) == ("v_prediction", 2000, 1e-3)
    config = load_preset("sprites_unconditional.yaml", init_from=str(tmp_path / "model"), max_train_steps=7)
    assert (config.prediction_type, config.block_out_channels, config.max_train_steps) == ("v_prediction", [8], 7)


def test_betas_of_its_own_stay(run_script, tmp_path):
    torch.save(make_course_network(f=8, c=5).state_dict(), tmp_path / "course.pth")
    run_script("train_conditional", f"{FLAGS} --init_from {tmp_path / 'course.pth'}", tmp_path / "run")
    before, now = (load_pipeline(str(path)) for path in (tmp_path / "course.pth", tmp_path / "run"))
    assert torch.equal(before.scheduler.alphas_cumprod, now.scheduler.alphas_cumprod)
    assert (now.id2label[1], len(now.scheduler)) == ("non-hero", 500)


@pytest.mark.parametrize("script", ["train_unconditional", "train_conditional"])
def test_run_from_each_kind_of_model_is_loaded_by_diffusers(run_script, tmp_path, script, capsys):
    """A run of ours by class, its checkpoint, the official script's folder, a bare network, and an early Hub model."""
    run_script("train_conditional", TINY, tmp_path / "run")
    unet = load_pipeline(str(tmp_path / "run")).unet
    stock = UNet2DModel.from_config({**unet.config, "num_class_embeds": None})
    DDPMPipeline(stock, DDPMScheduler()).save_pretrained(tmp_path / "official", safe_serialization=False)
    stock.save_pretrained(tmp_path / "bare")
    shutil.copytree(tmp_path / "bare", tmp_path / "early")
    DDPMScheduler().save_pretrained(tmp_path / "early")
    shutil.copy(tmp_path / "official" / "model_index.json", tmp_path / "early")
    for name in ("run", "run/checkpoint-3", "official", "bare", "early"):
        output_dir = tmp_path / f"from-{name.replace('/', '-')}"
        run_script(script, f"{FLAGS} --init_from {tmp_path / name} --image_mode RGBA", output_dir)
        pipeline = DiffusionPipeline.from_pretrained(output_dir, trust_remote_code=script == "train_conditional")
        assert (pipeline.unet.config.in_channels, type(pipeline.unet)) == (4, UNet2DModel)
        begun = pipeline.unet.state_dict()["mid_block.resnets.0.conv1.weight"]
        of_model = load_pipeline(str(tmp_path / name)).unet.state_dict()["mid_block.resnets.0.conv1.weight"]
        assert (begun - of_model).abs().max() < 0.01 < of_model.abs().max()  # 8 small steps away, not anew
        assert "images of 4 channel(s) in place of 3" in capsys.readouterr().out


def test_toy_begins_from_a_toy(run_script, tmp_path):
    toy = UnconditionalDDPMPipeline(BasicUNet2DModel(16, 3, 3), LinearCorruptionScheduler(num_train_timesteps=20))
    toy.save_pretrained(tmp_path / "toy")
    run_script("train_unconditional", f"{FLAGS} --init_from {tmp_path / 'toy'}", tmp_path / "run")
    pipeline = load_pipeline(str(tmp_path / "run"))
    assert (type(pipeline.unet), type(pipeline.scheduler)) == (BasicUNet2DModel, LinearCorruptionScheduler)


def test_resumed_run_equals_the_uninterrupted_one_and_its_average_begins_at_the_model(run_script, tmp_path, capsys):
    make_pipeline(CLASS_NAMES).save_pretrained(tmp_path / "model")  # all of the run's: others begin at random
    flags = f"{FLAGS} --init_from {tmp_path / 'model'} --use_ema --resolution 8"
    run_script("train_conditional", flags, tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert "begun from" in capsys.readouterr().out
    run_script("train_conditional", f"{flags} --resume_from_checkpoint latest", tmp_path / "resumed")
    assert "begun from" not in capsys.readouterr().out
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    # The average begins at the model: with a decay of 0.9999 it hardly moves in 8 steps of at most 1.6 learning rates.
    still = "--ema_inv_gamma 1e-9 --ema_power 10 --num_epochs 2"
    run_script("train_conditional", f"{flags} {still}", tmp_path / "still")
    names = load_pipeline(str(tmp_path / "still")).id2label
    network, _ = adapt(load_pipeline(str(tmp_path / "model")), names=names)
    averaged, trained = weights(tmp_path / "still"), weights(tmp_path / "still" / "checkpoint-8", "model.safetensors")
    for name, begun in network.state_dict().items():
        torch.testing.assert_close(averaged[name], begun, rtol=0, atol=8 * 1e-4 * 8 * 1.6 * 1e-3)
    assert (trained["conv_in.weight"] - network.conv_in.weight).abs().max() > 1e-4


def test_card_names_the_model_and_its_licence(run_script, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model\n")
    run_script("train_unconditional", f"{FLAGS} --init_from {tmp_path / 'model'} --resolution 8", tmp_path / "run")
    card = make_card(tmp_path / "run", None, None)
    assert "The training began with the weights of model; licence: cc-by-4.0." in card
    assert "the same data and the model that it began from" in card
    assert "base_model" not in card  # a folder's name is none of the Hub's
    assert str(tmp_path) not in card
    assert read_yaml(tmp_path / "run" / "training_config.yaml")["init_from"] == str(tmp_path / "model")


def test_models_that_no_run_can_begin_from(run_script, tmp_path, capsys):
    make_pipeline(prediction_type="epsilon").save_pretrained(tmp_path / "model")
    learned = make_tiny_network(in_channels=3, out_channels=6)
    DDPMPipeline(learned, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path / "learned")
    for flags, message in [
        (f"--init_from {tmp_path / 'nothing'}", "--init_from: .*nothing is not a model that can be loaded"),
        (f"--init_from {tmp_path / 'learned'}", "predicts a variance besides"),
        (f"--init_from {tmp_path / 'model'} --block_out_channels 8", "--block_out_channels: the network is that of"),
        (f"--init_from {tmp_path / 'model'} --prediction_type sample", "has learned epsilon, .*: leave the flag out"),
        (f"--init_from {tmp_path / 'model'} --overwrite_output_dir", "one lies in the other"),
    ]:
        output_dir = tmp_path / ("model" if "overwrite" in flags else "run")
        with pytest.raises(SystemExit):
            run_script("train_unconditional", f"{FLAGS} {flags}", output_dir)
        assert re.search(message, capsys.readouterr().err)
    assert load_pipeline(str(tmp_path / "model"))
    assert not (tmp_path / "run").exists()


def test_an_artifact_of_wandb_is_begun_from(tmp_path, monkeypatch):
    """What W&B's client downloads; the client itself and its servers are not asked."""
    pipeline = make_pipeline(["hero", "food"])
    pipeline.save_pretrained(str(tmp_path))
    asked = []

    class Api:
        def artifact(self, name, type):
            asked.append((name, type))
            return SimpleNamespace(download=lambda: str(tmp_path))

    monkeypatch.setattr(wandb, "Api", Api)
    config = parse_config(["--init_from", "wandb:me/sprites/model:latest"], default_preset="sprites_conditional.yaml")
    assert set(asked) == {("me/sprites/model:latest", "model")}
    assert config.resolution == "8"
    base = load_base("wandb:me/sprites/model:latest", {})
    assert_same_weights(base.unet.state_dict(), pipeline.unet.state_dict())
