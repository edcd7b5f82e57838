"""Tests the kinds of models that can be loaded: pipelines, bare networks and checkpoints of the sprite course.

The checkpoints are compared with a network and a sampling loop written as the course's.
"""

import json

import numpy as np
import pytest
import torch
from course_network import make_course_network
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.sampling.course_checkpoint import course_scheduler
from sprite_diffusion.sampling.pipeline_loading import find_model_kind, load_pipeline
from sprite_diffusion.sampling.samplers import make_sampler


@pytest.fixture
def convert(run_script):
    def run(*arguments) -> None:
        run_script("sprite_diffusion.sampling.convert", " ".join(map(str, arguments)))

    return run


class CourseSchedule:
    """The course's tables, in float64: index t is its timestep, 1..500."""

    betas = (0.02 - 1e-4) * torch.linspace(0, 1, 501, dtype=torch.float64) + 1e-4
    alphas = 1 - betas
    alpha_bars = torch.cumsum(alphas.log(), dim=0).exp()

    def denoise(self, x, t, prediction, noise):
        mean = (x - prediction * ((1 - self.alphas[t]) / (1 - self.alpha_bars[t]).sqrt())) / self.alphas[t].sqrt()
        return mean + self.betas[t].sqrt() * noise


def test_converted_pipeline_predicts_and_steps_as_the_course(convert, tmp_path):
    course = make_course_network(f=16, c=5)
    torch.save(course.state_dict(), tmp_path / "context_model_trained.pth")
    convert(tmp_path / "context_model_trained.pth", tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert pipeline.id2label == {0: "hero", 1: "non-hero", 2: "food", 3: "spell", 4: "side-facing"}

    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    context = torch.tensor([[1, 0, 0, 0, 0], [0.5, 0, 0.6, 0, 0]])
    schedule, scheduler = CourseSchedule(), pipeline.scheduler
    scheduler.set_timesteps(500)
    assert scheduler.timesteps.tolist() == list(range(499, -1, -1))
    with torch.no_grad():
        for t in (500, 499, 250, 2):
            expected = course(x, torch.full((2, 1), t / 500), context)
            prediction = pipeline.unet(x, t - 1, context=context).sample
            # the same layers on the same numbers: roundings as in tests/test_models.py
            torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)

            generator = torch.Generator().manual_seed(t)
            stepped = scheduler.step(prediction, t - 1, x, generator=generator).prev_sample
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            expected = schedule.denoise(x.double(), t, prediction.double(), noise.double())
            # About ten float32 operations on values below 16.
            torch.testing.assert_close(stepped.double(), expected, rtol=0, atol=10 * 16 * 2**-24)


def test_schedule_is_the_courses():
    scheduler = course_scheduler()
    torch.testing.assert_close(scheduler.alphas_cumprod, CourseSchedule.alpha_bars[1:], rtol=1e-13, atol=0)
    assert not scheduler.config.clip_sample


def test_sizes_are_read_from_the_shapes(convert, tmp_path):
    torch.save(make_course_network(f=24, c=3).state_dict(), tmp_path / "other.pth")
    convert(tmp_path / "other.pth", tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (pipeline.unet.config.num_features, pipeline.num_classes, pipeline.id2label) == (24, 3, {})
    images = pipeline(class_labels=[0, 2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


class Malicious:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_files_that_are_not_course_checkpoints(convert, tmp_path, capsys):
    course = make_course_network().state_dict()
    torch.save({"unet.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save({name: value for name, value in course.items() if "up0" not in name}, tmp_path / "part.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(Malicious(), tmp_path / "malicious.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    torch.save(course, tmp_path / "good.pth")
    for arguments, fragment in [
        (("other.pth", "out"), "'unet.weight' is not a weight of the course's ContextUnet"),
        (("part.pth", "out"), "part.pth is not a checkpoint of the course's ContextUnet"),
        (("list.pth", "out"), "list.pth is not a checkpoint of the course's ContextUnet"),
        (("malicious.pth", "out"), "malicious.pth is not a state dict"),
        (("text.pth", "out"), "text.pth is not a state dict"),
        (("missing.pth", "out"), "missing.pth: no such file"),
        (("good.pth", "full"), "full is there already"),
    ]:
        with pytest.raises(SystemExit) as exit:
            convert(*(tmp_path / argument for argument in arguments))
        assert exit.value.code == 2
        output = capsys.readouterr()
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        assert fragment in output.err
        assert "this code ran" not in output.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", [16, 20, 24, 28])
def test_larger_sides_pool_the_top_left_as_the_course_does(side, tmp_path):
    course = make_course_network(side, side, c=5, pool_size=4)
    torch.save(course.state_dict(), tmp_path / "course.pth")
    pipeline = load_pipeline(str(tmp_path / "course.pth"))
    x, context = torch.randn(2, 3, side, side), torch.eye(5)[:2]
    with torch.no_grad():
        expected = course(x, torch.full((2, 1), 0.5), context)
        torch.testing.assert_close(pipeline.unet(x, 249, context=context).sample, expected, rtol=1e-5, atol=1e-5)


def test_network_without_context_is_an_unconditional_pipeline(tmp_path):
    course = make_course_network(has_context=False)
    torch.save(course.state_dict(), tmp_path / "model_trained.pth")
    pipeline = load_pipeline(str(tmp_path))  # the folder of a single checkpoint, as W&B's artifacts are
    assert type(pipeline) is UnconditionalDDPMPipeline
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = course(x, torch.full((2, 1), 0.5), torch.zeros(2, 5))
        torch.testing.assert_close(pipeline.unet(x, 249).sample, expected, rtol=1e-5, atol=1e-5)
    # One step of training with context moves a weight of the first layers beyond where new ones lie.
    course.contextembed2.model[0].weight.data[0, 0] = 5**-0.5 + 1e-3
    torch.save(course.state_dict(), tmp_path / "model_trained.pth")
    assert type(load_pipeline(str(tmp_path))) is ConditionalDDPMPipeline


def test_random_shortcut_is_that_of_the_course(convert, tmp_path):
    course = make_course_network()
    torch.save(course.state_dict(), tmp_path / "course.pth")
    convert(tmp_path / "course.pth", tmp_path / "out", "--shortcut_seed", 7)
    unet = load_pipeline(str(tmp_path / "out")).unet
    x, context = torch.randn(2, 3, 16, 16), torch.eye(5)[:2]
    course.init_conv.has_random_shortcut = True
    outputs = []
    with torch.no_grad():
        for t in (249, 250):
            state = torch.get_rng_state()
            outputs.append(unet(x, t, context=context).sample)
            assert torch.equal(torch.get_rng_state(), state)
            torch.manual_seed(7 + t)
            expected = course(x, torch.full((2, 1), (t + 1) / 500), context)
            torch.testing.assert_close(outputs[-1], expected, rtol=1e-5, atol=1e-5)
    # The shortcut changes at each step: with one and the same, the outputs of neighbours would be alike.
    assert (outputs[0] - outputs[1]).square().mean().sqrt() > 0.05


def test_ddim_is_that_of_the_course(tmp_path):
    """The course's DDIM of 25 steps goes from t = 500 to 480 and so on, which are 499, 479, ... here."""
    torch.save(make_course_network().state_dict(), tmp_path / "course.pth")
    scheduler = make_sampler("--scheduler", load_pipeline(str(tmp_path / "course.pth")), "ddim", 25).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps.tolist() == list(range(499, 0, -20))

    x = course_x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha_bars = CourseSchedule.alpha_bars.clone()
    alpha_bars[0] = 1
    for t in range(500, 0, -20):
        noise = 0.7 * course_x
        alpha_bar, previous = alpha_bars[t], alpha_bars[t - 20]
        course_x = (previous / alpha_bar).sqrt() * (course_x - (1 - alpha_bar).sqrt() * noise)
        course_x = course_x + (1 - previous).sqrt() * noise
        x = scheduler.step(0.7 * x, t - 1, x).prev_sample
    # diffusers has alpha_bar in float32: 25 steps, each of which rounds its square roots of quotients
    torch.testing.assert_close(x, course_x, rtol=25 * 8 * 2**-24, atol=1e-7)


def bare_network(folder, **config):
    """Saves a network alone, as tutorials do, and returns it."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **config,
    )
    unet.save_pretrained(folder)
    return unet


def test_bare_network_is_sampled_by_the_process_that_is_found_or_given(tmp_path):
    unet = bare_network(tmp_path / "net")
    pipeline = load_pipeline(str(tmp_path / "net"))
    assert type(pipeline) is UnconditionalDDPMPipeline
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), pipeline.unet.parameters(), strict=True))
    config = pipeline.scheduler.config
    assert (len(pipeline.scheduler), config.beta_schedule, config.prediction_type) == (1000, "linear", "epsilon")

    flags = {"ddpm_num_steps": 50, "ddpm_beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
    config = load_pipeline(str(tmp_path / "net"), process={**flags, "clip_sample": False}).scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule) == (50, "squaredcos_cap_v2")
    assert (config.prediction_type, config.clip_sample) == ("sample", False)

    DDPMScheduler(num_train_timesteps=20, prediction_type="v_prediction").save_pretrained(tmp_path / "net")
    config = load_pipeline(str(tmp_path / "net")).scheduler.config
    assert (config.num_train_timesteps, config.prediction_type) == (20, "v_prediction")


def test_bare_network_with_classes_is_a_conditional_pipeline(tmp_path):
    bare_network(tmp_path / "net", num_class_embeds=4)
    assert load_pipeline(str(tmp_path / "net")).num_classes == 3  # the last is "no class"


def test_kinds_are_told_by_content(tmp_path):
    unet = bare_network(tmp_path / "net")
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "official")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "config.json").write_text("{}")
    kinds = {name: find_model_kind(tmp_path / name) for name in ("net", "official", "pictures", "nothing")}
    assert kinds == {"net": "network", "official": "pipeline", "pictures": None, "nothing": None}


def test_models_that_could_be_meant_otherwise_are_refused(tmp_path):
    unet = bare_network(tmp_path / "checkpoint-5" / "unet_ema")
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "official")
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        (tmp_path / "two" / name).write_bytes(b"")
    for name, process, message in [
        ("official/unet", {}, f"is a part of a pipeline, which knows its process: name {tmp_path / 'official'}"),
        ("checkpoint-5", {}, "holds no pipeline: name its network, .*unet_ema"),
        ("two", {}, "holds 2 checkpoints of weights: name one, such as"),
        ("official", {"prediction_type": "sample"}, "--prediction_type: .* says itself how it was trained"),
        ("official", {"rescale_betas_zero_snr": True}, "--rescale_betas_zero_snr: .*"),
    ]:
        with pytest.raises(UserInputError, match=message):
            load_pipeline(str(tmp_path / name), process=process)


def test_process_flags_reach_the_samples(run_script, tmp_path):
    bare_network(tmp_path / "net")
    flags = f"{tmp_path / 'net'} --num_images 1 --num_inference_steps 5 --ddpm_num_steps 10 --output {tmp_path}"
    pixels = {}
    for changes in ("", "--clip_sample false", "--timestep_spacing trailing", "--variance_type fixed_large"):
        run_script("sample", f"{flags}/{len(pixels)}.png {changes}")
        pixels[changes] = np.asarray(Image.open(tmp_path / f"{len(pixels)}.png")).tobytes()
    assert len(set(pixels.values())) == len(pixels)
    run_script("sprite_diffusion.sampling.convert", f"{tmp_path / 'net'} {tmp_path / 'out'} --clip_sample false")
    assert json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())["clip_sample"] is False
