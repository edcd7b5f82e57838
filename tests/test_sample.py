"""Tests sample.py and its parts, on networks whose right answer is known or on tiny ones with random weights."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from launching import PYTHON, run_command
from PIL import Image

from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.sprites import draw_sprites
from sprite_diffusion.sampling.conditions import Condition, choose_conditions
from sprite_diffusion.sampling.figures import (
    compare_samplers,
    find_snapshots,
    interpolate,
    show_collapse,
    show_predictions,
    show_steps,
    slerp,
)
from sprite_diffusion.sampling.flags import SAMPLERS, parse_args
from sprite_diffusion.sampling.generation import (
    Request,
    Trajectory,
    frame_indices,
    sample_images,
    sample_noise,
    to_unit_range,
)
from sprite_diffusion.sampling.pictures import to_pixels
from sprite_diffusion.sampling.pipeline_loading import load_pipeline
from sprite_diffusion.sampling.samplers import make_sampler

NAMES = ("hero", "non-hero", "food")
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class GaussianModel(ModelMixin, ConfigMixin):
    """The exact predictor where each pixel of the data is normal with `mean` and `std`."""

    @register_to_config
    def __init__(
        self,
        mean: float = 0.4,
        std: float = 0.0,
        prediction_type: str = "epsilon",
        sample_size: int = 8,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # gives the model a dtype
        self.alphas_cumprod = ALPHAS_CUMPROD

    def forward(self, sample, timestep):
        # Between timesteps, where some samplers ask, as theirs: linear in log(sigma), sigma^2 = (1 - a) / a.
        log_sigmas = 0.5 * np.log((1 - self.alphas_cumprod) / self.alphas_cumprod)
        variance = np.exp(2 * np.interp(float(timestep), np.arange(len(log_sigmas)), log_sigmas))
        a = 1 / (1 + variance)
        mean, std = self.config.mean, self.config.std
        sample = sample.double()
        noise = (sample - a**0.5 * mean) * ((1 - a) ** 0.5 / (a * std**2 + 1 - a))
        image = (sample - (1 - a) ** 0.5 * noise) / a**0.5
        velocity = a**0.5 * noise - (1 - a) ** 0.5 * image
        predictions = {"epsilon": noise, "sample": image, "v_prediction": velocity}
        return SimpleNamespace(sample=predictions[self.config.prediction_type].float())


def gaussian_pipeline(**config) -> UnconditionalDDPMPipeline:
    return UnconditionalDDPMPipeline(GaussianModel(**config), ClosedFormDDPMScheduler())


def known_image_pipeline(prediction_type: str, **process) -> UnconditionalDDPMPipeline:
    """Returns a model that knows its only image, 0.4 everywhere, and predicts it in one of three ways."""
    scheduler = ClosedFormDDPMScheduler(prediction_type=prediction_type, **process)
    model = GaussianModel(prediction_type=prediction_type)
    model.alphas_cumprod = scheduler.alphas_cumprod.numpy()
    return UnconditionalDDPMPipeline(model, scheduler)


def unet(seed: int, num_classes: int | None = None, num_channels: int = 3) -> UNet2DModel:
    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=8,
        in_channels=num_channels,
        out_channels=num_channels,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
    if num_classes is not None:  # so that classes make a difference that is seen in the pixels
        model.class_embedding.weight.data.mul_(5)
    return model.eval()


def random_process() -> ClosedFormDDPMScheduler:
    """Returns a process of velocities: a random network's noise would leave the starting noise as it is."""
    return ClosedFormDDPMScheduler(prediction_type="v_prediction")


def conditional_pipeline(seed: int = 0) -> ConditionalDDPMPipeline:
    return ConditionalDDPMPipeline(unet(seed, len(NAMES)), random_process(), dict(enumerate(NAMES)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    UnconditionalDDPMPipeline(unet(0), random_process()).save_pretrained(folder / "unconditional")
    UnconditionalDDPMPipeline(unet(1), random_process()).save_pretrained(folder / "weaker")
    other = ClosedFormDDPMScheduler(prediction_type="v_prediction", num_train_timesteps=500)
    UnconditionalDDPMPipeline(unet(1), other).save_pretrained(folder / "of_fewer_steps")
    UnconditionalDDPMPipeline(unet(0, num_channels=4), random_process()).save_pretrained(folder / "transparent")
    conditional_pipeline().save_pretrained(folder / "conditional")
    for epoch in (4, 8):
        conditional_pipeline(epoch).save_pretrained(folder / "run" / "snapshots" / f"epoch-{epoch:04d}")
    return folder


@pytest.fixture
def sample(run_script, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(model: str, flags: str = "") -> None:
        run_script("sample", f"{folders / model if model else ''} {flags}".strip())

    return run


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def labelled_cells(path, side: int = 64) -> list[np.ndarray]:
    """Returns the last row of a labelled grid without column labels, from the right; each cell (side, side, 3)."""
    canvas = pixels(path)
    return [canvas[-side - 2 : -2, -side - 2 - k * (side + 4) :][:, :side] for k in range(3)]


LIGHT = """
import sys
import sample
try:
    sample.main()
except SystemExit as exit:
    loaded = {"torch", "diffusers", "datasets"} & sys.modules.keys()
    print("status", exit.code, "loaded", sorted(loaded))
"""


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("--help", 0),
        ("model --eta 2", 2),
        ("model --scale 0", 2),
        ("model --scheduler ddmp", 2),
        ("model --compare ddim:5,ddmp:5", 2),
        ("model --num_images 1000000000000", 2),
    ],
)
def test_help_and_wrong_flags_wait_for_no_library(flags, status):
    result = run_command([*PYTHON, "-c", LIGHT, *flags.split()], fork=False)
    assert result.stdout.splitlines()[-1] == f"status {status} loaded []"


def test_by_default_only_the_current_folder_has_to_be_writable(tmp_path, monkeypatch):
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr(sys, "argv", ["sample.py", "model"])
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) == Path.cwd())
    assert parse_args(None).output == Path("samples.png")


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_the_image_that_the_model_knows(name, prediction_type):
    """Each sampler ends at the image that the exact predictor knows, if it runs the model's own process."""
    pipeline = known_image_pipeline(prediction_type)
    sampler = make_sampler("--scheduler", pipeline, name, 20)
    images = sample_images(pipeline, sampler, Request([0, 1], [Condition()] * 2))
    # diffusers' tables hold alpha_bar in float32: sqrt(1 - alpha_bar_0) = 0.01 is off by 2^-24 / 1e-4 / 2 = 3e-4 of
    # itself, times noise of up to 5, halved with the range; and again where we read it to turn an image into noise.
    # Two samplers end with the noise of timestep 0 itself.
    tolerance = 0.01 * 5 / 2 * (1 if name in ("deis", "pndm") else 2 * 3e-4)
    assert (images - 0.7).abs().max() < tolerance


@pytest.mark.parametrize("strength", [0.3, 0.6])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])
def test_a_changed_picture_is_what_the_model_knows(name, strength):
    """From any picture to the only one that there is, with each sampler that begins midway.

    As above, deis ends with the noise of timestep 0 itself. lms takes coefficients for steps that were left out, and
    errs by 0.02.
    """
    pipeline = gaussian_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_sampler("--scheduler", pipeline, name, 10).scheduler
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    kwargs = {"num_inference_steps": 10, "generator": generator, "output_type": "pt"}
    changed = pipeline(image=picture, strength=strength, **kwargs).images
    assert (changed - 0.7).abs().max() < {"deis": 0.01 * 5 / 2, "lms": 0.05}.get(name, 1e-3)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("deis", "pndm")])
@pytest.mark.parametrize("process", [{"beta_schedule": "sigmoid"}, {"num_train_timesteps": 4}])
def test_samplers_find_the_image_by_schedules_that_diffusers_lacks_and_in_short_processes(name, process):
    """Without a number of steps each sampler takes as many as it can."""
    pipeline = known_image_pipeline("sample", **process)
    sampler = make_sampler("--scheduler", pipeline, name, None)
    images = sample_images(pipeline, sampler, Request([0, 1], [Condition()] * 2))
    assert (images - 0.7).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "num_steps", "num_train_timesteps", "message"),
    [
        ("pndm", 3, 1000, "--num_inference_steps: 3 steps are out of the 4 to 500 of this model's process by pndm"),
        ("pndm", None, 7, "--scheduler pndm: this model's process of 7 steps is too short for it"),
        ("dpmsolver++", 50, 50, "50 steps are out of the 1 to 49 of this model's process by dpmsolver"),
        ("unipc", 50, 50, "out of the 1 to 49"),
        ("deis", 1000, 1000, "out of the 1 to 999"),
        ("dpmsolver++_singlestep", 1, 1, "diffusers can't make it for this model's process"),
        ("ddim", 1001, 1000, "1001 steps are out of the 1 to 1000 of this model's process"),
    ],
)
def test_numbers_of_steps_that_a_sampler_can_not_take(name, num_steps, num_train_timesteps, message):
    pipeline = known_image_pipeline("sample", num_train_timesteps=num_train_timesteps)
    with pytest.raises(UserInputError, match=re.escape(message)):
        make_sampler("--scheduler", pipeline, name, num_steps)


def test_making_a_sampler_takes_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    make_sampler("--scheduler", gaussian_pipeline(), "kdpm2_ancestral", 5)
    assert torch.rand(1) == expected


def test_images_that_are_not_finite_are_refused():
    pipeline = gaussian_pipeline(mean=float("nan"))
    with pytest.raises(UserInputError, match="that the model samples with ddpm:2 are not finite"):
        sample_images(pipeline, make_sampler("--scheduler", pipeline, None, 2), Request([0], [Condition()]))


def test_samplers_of_few_steps_clip_as_the_model_was_trained_to():
    """A prediction out of range ends at the border of the range; this model predicts 1.4."""
    for name in ("dpmsolver++", "dpmsolver++_singlestep", "unipc"):
        pipeline = gaussian_pipeline(mean=1.4)
        pipeline.scheduler = make_sampler("--scheduler", pipeline, name, 5).scheduler
        largest = []

        def record(pipeline, step, timestep, tensors, largest=largest):
            largest.append(tensors["latents"].max().item())
            return {}

        pipeline(num_inference_steps=5, generator=torch.Generator().manual_seed(0), callback_on_step_end=record)
        assert largest[-1] < 1.01, name


def test_sampling_that_fails_leaves_the_pipeline_its_scheduler():
    pipeline = gaussian_pipeline()
    scheduler = pipeline.scheduler
    sampler = make_sampler("--scheduler", pipeline, "unipc", 2)
    animated = Trajectory(max_frames=2, predicted=True)  # of predictions, which this sampler does not return
    with pytest.raises(UserInputError):
        sample_images(pipeline, sampler, Request([0], [Condition()]), trajectory=animated)
    assert pipeline.scheduler is scheduler


def test_images_depend_on_their_own_seed_only(sample):
    sample("unconditional", "--num_images 5 --num_inference_steps 3 --output together --batch_size 5")
    sample("unconditional", "--num_images 5 --num_inference_steps 3 --output alone --batch_size 1")
    sample("unconditional", "--num_images 1 --num_inference_steps 3 --output fourth --seed 3")
    for i in range(5):
        # Another batch size may sum in another order, and so round to the next of 256 levels.
        assert np.abs(pixels(f"together/0000{i}.png") - pixels(f"alone/0000{i}.png")).max() <= 1
    assert np.abs(pixels("together/00003.png") - pixels("fourth/00000.png")).max() <= 1
    assert np.abs(pixels("together/00002.png") - pixels("fourth/00000.png")).max() > 10


def test_files_say_how_they_were_made(sample, folders):
    sample(
        "conditional", "--class food --num_images 2 --num_inference_steps 4 --scheduler ddim --eta 0.5 --output out"
    )
    record = json.loads(Path("out/samples.json").read_text())
    text = Image.open("out/00001.png").text
    assert text == {
        "model": str(folders / "conditional"),
        "dtype": "float32",
        "scheduler": "ddim",
        "num_inference_steps": "4",
        "guidance_scale": "1.0",
        "eta": "0.5",
        "seed": "1",
        "class": "food",
    }
    assert record["images"] == [
        {"seed": 0, "class": "food", "file": "00000.png"},
        {"seed": 1, "class": "food", "file": "00001.png"},
    ]
    flags = f"--class {text['class']} --seed {text['seed']} --scheduler {text['scheduler']} --eta {text['eta']}"
    sample("conditional", f"{flags} --num_images 1 --num_inference_steps {text['num_inference_steps']} --output again")
    assert np.abs(pixels("again/00000.png") - pixels("out/00001.png")).max() <= 1
    sample("conditional", "--class food --num_images 2 --num_inference_steps 2 --output grid.png")
    assert json.loads(Image.open("grid.png").text["images"]) == json.loads(Path("grid.json").read_text())["images"]


def test_a_guide_is_a_model_of_the_same_images_and_process(sample, folders, capsys):
    flags = "--num_images 2 --num_inference_steps 3 --scale 1"
    sample("unconditional", f"{flags} --guide {folders / 'weaker'} --output guided")
    record = json.loads(Path("guided/samples.json").read_text())
    assert (record["guide"], record["guidance_scale"]) == (str(folders / "weaker"), 2)
    pipelines = [load_pipeline(str(folders / name)) for name in ("unconditional", "weaker")]
    noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = pipelines[0](2, 3, noise, guide=pipelines[1].unet, guidance_scale=2.0, output_type="np").images
    for i, image in enumerate(expected):
        assert np.abs(pixels(f"guided/0000{i}.png") - 255 * image).max() <= 1
    sample("unconditional", f"{flags} --guide {folders / 'unconditional'} --guidance_scale 7 --output same")
    sample("unconditional", f"{flags} --output plain")
    assert (pixels("same/00000.png") == pixels("plain/00000.png")).all()
    assert np.abs(pixels("guided/00000.png") - pixels("plain/00000.png")).max() > 10
    for model, message in {
        "transparent": "it draws images of another size or mode",
        "of_fewer_steps": "its num_train_timesteps is 500, that of",
    }.items():
        with pytest.raises(SystemExit):
            sample("unconditional", f"{flags} --guide {folders / model} --output wrong")
        assert message in capsys.readouterr().err
    assert not Path("wrong").exists()


def test_scale(sample):
    for flags, side in [("", 64), ("--scale auto", 64), ("--scale 1", 8), ("--scale 3", 24)]:
        sample("unconditional", f"--num_images 1 --num_inference_steps 1 --output out {flags}")
        assert pixels("out/00000.png").shape == (side, side, 3)


def test_eta_is_that_of_diffusers(folders):
    pipeline = UnconditionalDDPMPipeline(unet(0), random_process())
    sampler = make_sampler("--scheduler", pipeline, "ddim", 5)
    request = Request([7], [Condition()])
    images_by_eta = {eta: sample_images(pipeline, sampler, replace(request, eta=eta)) for eta in (0.0, 1.0)}
    for eta, images in images_by_eta.items():
        scheduler = DDIMScheduler.from_config(random_process().config)
        stock = DDIMPipeline(unet(0), scheduler)
        expected = stock(
            generator=torch.Generator().manual_seed(7), eta=eta, num_inference_steps=5, output_type="np"
        ).images
        # the same arithmetic
        np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=1e-6)
    assert (images_by_eta[0.0] - images_by_eta[1.0]).abs().max() > 0.1


def test_classes_and_mixes():
    pipeline = conditional_pipeline()
    conditions = choose_conditions(pipeline, ["food", "0"], ["hero=1,food=0.6", "food=1"])
    assert [c.name for c in conditions] == ["food", "hero", "hero=1,food=0.6", "food=1"]
    weights = torch.stack([c.arguments["context"] for c in conditions])
    assert torch.equal(weights, torch.tensor([[0, 0, 1], [1, 0, 0], [1, 0, 0.6], [0, 0, 1]]))
    assert [c.name for c in choose_conditions(pipeline, None, None)] == list(NAMES)

    sampler = make_sampler("--scheduler", pipeline, "ddim", 3)
    images = sample_images(pipeline, sampler, Request([5] * 4, conditions, guidance_scale=1.5))
    pipeline.scheduler = sampler.scheduler
    expected = pipeline(
        context=weights,
        guidance_scale=1.5,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(5) for _ in range(4)],
        output_type="pt",
    ).images
    assert torch.equal(images, expected)
    assert torch.equal(images[0], images[3])
    in_two = sample_images(pipeline, sampler, Request([5] * 4, conditions, batch_size=2, guidance_scale=1.5))
    torch.testing.assert_close(in_two, images, rtol=0, atol=1 / 255)  # other sums, roundings of a level's size at most
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (images[i] - images[j]).abs().max() > 0.01


def test_frames_keep_the_last_steps_and_thin_the_first():
    indices = frame_indices(1000, 60)
    assert len(indices) <= 60
    assert indices[-10:] != [*range(990, 1000)] or len(indices) == 60
    assert indices[-3:] == [997, 998, 999]
    gaps = np.diff(indices)
    assert (np.diff(gaps) <= 1).all()  # rounding apart, ever closer
    assert gaps[0] > 5 * gaps[-5]
    assert indices[0] == 0
    assert frame_indices(5, 60) == [0, 1, 2, 3, 4]
    assert frame_indices(1, 60) == [0]


def test_animation_ends_with_the_samples(sample):
    flags = "--num_images 4 --num_inference_steps 6 --scheduler ddim --output grid.png"
    sample("unconditional", f"{flags} --animate new/frames.webp")
    frames = Image.open("new/frames.webp")
    assert frames.n_frames == 7  # the noise, and each step
    shown, durations = [], []
    for k in range(7):
        frames.seek(k)
        shown.append(np.asarray(frames.convert("RGB")).astype(int))
        durations.append(frames.info["duration"])
    grid = pixels("grid.png")
    assert np.abs(shown[-1] - grid).max() <= 1
    distances = [np.abs(frame - grid).mean() for frame in shown]
    assert sorted(distances, reverse=True) == distances
    assert durations[-1] > 10 * durations[0]

    sample("unconditional", f"{flags} --animate frames.gif --animate_prediction")
    predictions = Image.open("frames.gif")
    assert predictions.n_frames == 6
    assert predictions.info["loop"] == 0
    predictions.seek(5)
    # DDIM's last step returns its prediction; a GIF has 256 colours, fewer than this grid.
    assert np.abs(np.asarray(predictions.convert("RGB")).astype(int) - grid).mean() < 16


def test_transparent_samples_are_files_with_alpha_and_lie_on_a_checkerboard(sample, tmp_path):
    flags = "--num_images 4 --num_inference_steps 2 --scheduler ddim --scale 2"
    sample("transparent", f"{flags} --output out")
    sample("transparent", f"{flags} --output grid.png --animate frames.webp")
    file = Image.open("out/00003.png")
    assert (file.mode, file.size) == ("RGBA", (16, 16))
    rgba = np.asarray(file).astype(int)
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    assert len(np.unique(alpha)) > 10
    odd = np.add.outer(np.arange(16) // 8, np.arange(16) // 8) % 2
    board = np.where(odd, 204, 255)[..., None]  # squares of 8 pixels, white and light grey
    expected = (colours * alpha + board * (255 - alpha) + 127) // 255
    assert Image.open("grid.png").mode == "RGB"
    grid = pixels("grid.png")
    assert grid.shape == (38, 38, 3)  # images of 16 pixels, 2 apart
    np.testing.assert_array_equal(grid[20:36, 20:36], expected)
    frames = Image.open("frames.webp")
    frames.seek(frames.n_frames - 1)
    np.testing.assert_array_equal(np.asarray(frames.convert("RGB")), grid)
    # A labelled grid has the same ground, and data gets the model's channels.
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:4] = 200, 0, 100, 255
    Image.fromarray(picture).save("picture.png")
    sample("transparent", f"--forward {tmp_path / 'picture.png'} --scale 2")
    canvas = pixels("forward.png")
    pitch = canvas.shape[1] // 11
    clean = canvas[2:18, canvas.shape[1] - 11 * pitch + (pitch - 16) // 2 :][:, :16]
    np.testing.assert_array_equal(clean[:8], np.full((8, 16, 3), (200, 0, 100)))
    np.testing.assert_array_equal(clean[8:], np.broadcast_to(board[8:], (8, 16, 3)))


def test_errors_of_transparent_predictions_are_opaque():
    images = torch.full((2, 4, 8, 8), 0.4)
    images[1, 3] = -0.4  # of this one the network is wrong about alpha alone
    figure = show_predictions(known_image_pipeline("epsilon"), [], images, Condition(), seed=0)
    _, predicted, error, _, _, error_of_other = figure.rows
    tolerance = {"rtol": 0, "atol": 8 * 2**-24 / 0.006 / 0.7}  # as above, divided by alpha
    for row, expected in ((predicted, [1, 1, 1, 0.7]), (error, [0, 0, 0, 1]), (error_of_other, [0.4, 0.4, 0.4, 1])):
        torch.testing.assert_close(row, torch.tensor(expected).float().view(4, 1, 1).expand_as(row), **tolerance)


def test_frames_of_samplers_whose_noise_grows_are_shown_in_range(sample):
    """Euler's x is up to 160 times as large as an image: unscaled, every pixel would be black or white."""
    sample("unconditional", "--num_images 4 --num_inference_steps 6 --scheduler euler --animate frames.webp")
    frames = Image.open("frames.webp")
    frames.seek(1)
    levels = np.asarray(frames.convert("RGB"))
    assert ((levels > 5) & (levels < 250)).mean() > 0.4  # 68 % of normal numbers lie in [-1, 1]; a grid has borders


def test_comparison_samples_what_each_sampler_does_by_itself():
    pipeline = conditional_pipeline()
    request = Request([3, 4, 5], choose_conditions(pipeline, None, None), batch_size=2)
    samplers = [make_sampler("--compare", pipeline, name, steps) for name, steps in [("ddpm", 6), ("heun", 3)]]
    figure = compare_samplers(pipeline, samplers, request)
    noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4, 5)]
    assert torch.equal(figure.rows[0], (torch.stack(noise) / 2 + 0.5).clamp(0, 1))
    for row, sampler in zip(figure.rows[1:], samplers, strict=True):
        assert torch.equal(row, sample_images(conditional_pipeline(), sampler, request))
    ddpm, heun = figure.record["samplers"]
    assert (ddpm["scheduler"], ddpm["num_inference_steps"], ddpm["network_calls"]) == ("ddpm", 6, 6)
    assert heun["network_calls"] == 5  # two a step, but for the last
    assert ddpm["seconds_per_image"] > 0
    assert figure.column_labels == list(NAMES)


def test_dashes_in_flags_are_underscores(sample):
    sample("unconditional", "--num-images 1 --num-inference-steps 1 --output out")
    assert len(list(Path("out").glob("*.png"))) == 1


def test_comparison_and_the_other_views_are_written(sample, folders, tmp_path):
    sample("conditional", "--compare pndm:4,ddim:2")  # the first takes no single step, with which a network warms up
    assert [s["scheduler"] for s in json.loads(Path("compare.json").read_text())["samplers"]] == ["pndm", "ddim"]
    sample("", f"--snapshots {folders / 'run'} --num_inference_steps 2 --output learned")
    record = json.loads(Path("learned/snapshots.json").read_text())
    assert [path[-4:] for path in record["snapshots"]] == ["0004", "0008"]
    sample("conditional", "--no-noise --num_inference_steps 2")
    sample("conditional", "--interpolate 1 2 --class hero --mix food=1,hero=0.5 --num_images 3")
    for name in ("compare", "learned/snapshots", "no_noise", "interpolate"):
        picture = Image.open(f"{name}.png")
        assert min(picture.size) > 100
        assert picture.text["model"]


def test_snapshots_are_sampled_each_with_its_own_weights(sample, folders):
    sample("", f"--snapshots {folders / 'run'} --class hero --num_images 3 --num_inference_steps 2 --output all.png")
    for epoch in (4, 8):
        model = f"run/snapshots/epoch-{epoch:04d}"
        sample(model, f"--class hero --num_images 3 --num_inference_steps 2 --output {epoch}.png")
    canvas = pixels("all.png")
    for row, epoch in enumerate((4, 8)):
        top = row * 68 + 2
        for expected, column in zip(labelled_cells(f"{epoch}.png"), range(3), strict=True):
            right = canvas.shape[1] - 2 - column * 68
            assert np.abs(canvas[top : top + 64, right - 64 : right] - expected).max() <= 1


def test_snapshots_come_in_the_order_of_their_epochs(tmp_path):
    for name in ("epoch-0009", "epoch-9999", "epoch-10000", "epoch-mine"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    assert [path.name for path in find_snapshots(tmp_path)] == ["epoch-0009", "epoch-9999", "epoch-10000"]


@pytest.mark.parametrize("source", ["array", "folder", "file"])
def test_forward_process(sample, tmp_path, source):
    image = np.full((8, 8, 3), 255, np.uint8)
    np.save(tmp_path / "images.npy", np.stack([image] * 3))
    (tmp_path / "pictures").mkdir()
    Image.fromarray(image).save(tmp_path / "pictures" / "a.png")
    path = {"array": "images.npy", "folder": "pictures", "file": "pictures/a.png"}[source]
    sample("unconditional", f"--forward {tmp_path / path} --scale 8")
    record = json.loads(Path("forward.json").read_text())
    assert record["timesteps"] == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    # a float64 product of up to 1,000 factors
    np.testing.assert_allclose(record["signal_shares"], ALPHAS_CUMPROD[record["timesteps"]], rtol=1000 * 2**-52)
    canvas = pixels("forward.png")
    rows = 3 if source == "array" else 1
    pitch = canvas.shape[1] // 11
    cells = [canvas[2:66, canvas.shape[1] - (11 - k) * pitch :][:, :pitch] for k in range(11)]
    clean, first, last = (cell[:, (pitch - 64) // 2 :][:, :64] for cell in (cells[0], cells[1], cells[-1]))
    assert canvas.shape[0] > rows * 68
    assert (clean == 255).all()
    assert first.min() > 225  # sqrt(1 - alpha_bar_0) = 0.01 of noise, below 5 deviations: 6 levels
    # Noise alone, clipped to [-1, 1]: a third of it lies outside, half below grey. 192 numbers: five deviations.
    assert abs((last < 127.5).mean() - 0.5) < 5 * (0.25 / 192) ** 0.5


def test_forward_process_of_the_toy(sample, folders, tmp_path):
    from models import BasicUNet2DModel

    pipeline = UnconditionalDDPMPipeline(BasicUNet2DModel(8, 3, 3), LinearCorruptionScheduler(num_train_timesteps=10))
    pipeline.save_pretrained(tmp_path / "toy")
    sample("", f"{tmp_path / 'toy'} --forward sprites --num_images 2")
    shares = json.loads(Path("forward.json").read_text())["signal_shares"]
    np.testing.assert_allclose(shares, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0], atol=1e-12)


def test_forward_process_without_a_model(sample, tmp_path):
    np.save(tmp_path / "images.npy", np.full((2, 12, 12, 3), 255, np.uint8))
    flags = "--ddpm_num_steps 500 --ddpm_beta_schedule squaredcos_cap_v2 --resolution 12 --scale 1"
    sample("", f"--forward {tmp_path / 'images.npy'} {flags}")
    record = json.loads(Path("forward.json").read_text())
    scheduler = ClosedFormDDPMScheduler(num_train_timesteps=500, beta_schedule="squaredcos_cap_v2")
    assert record["timesteps"][-1] == 499
    np.testing.assert_allclose(record["signal_shares"], scheduler.alphas_cumprod[record["timesteps"]], rtol=1e-12)
    sample("", "--forward sprites --noise_scheduler_class LinearCorruptionScheduler --ddpm_num_steps 10")
    assert json.loads(Path("forward.json").read_text())["signal_shares"] == pytest.approx(np.arange(9, -1, -1) / 10)
    sample("", "--forward sprites --num_images 1 --scale 4 --output sprites.png")  # at its own size, 16
    canvas = pixels("sprites.png")
    column = canvas.shape[1] // 11
    clean = canvas[2:66, canvas.shape[1] - 11 * column + (column - 64) // 2 :][:, :64]
    assert (clean[::4, ::4] == draw_sprites(1)[0][0]).all()


def test_predictions_of_a_network_that_knows_the_image():
    images = torch.stack([torch.full((3, 8, 8), 0.4), torch.full((3, 8, 8), -0.4)])
    figure = show_predictions(known_image_pipeline("epsilon"), [], images, Condition(), seed=0)
    assert figure.row_labels == ["noisy", "predicted", "error"] * 2
    noisy, predicted, error, _, of_other, error_of_other = figure.rows
    # In float32, where at t = 999 the noise is divided by sqrt(alpha_bar) = 0.006.
    tolerance = {"rtol": 0, "atol": 8 * 2**-24 / 0.006}
    for row, expected in ((predicted, 0.7), (error, 0), (of_other, 0.7), (error_of_other, 0.4)):
        torch.testing.assert_close(row, torch.full_like(row, expected), **tolerance)
    assert (noisy[0] - 0.7).abs().max() < 0.03  # t = 0: 0.01 of noise, halved, and 5 deviations
    errors = figure.record["mean_squared_errors"]["predicted"]
    assert errors == pytest.approx([0.8**2 / 2] * 10, abs=1e-3)  # none for the first image


def test_predictions_are_written_by_class_and_by_snapshot(sample, folders):
    sample("conditional", "--predict sprites --class hero --output one.png")
    record = json.loads(Path("one.json").read_text())
    assert (record["class"], list(record["mean_squared_errors"])) == ("hero", ["predicted"])
    sample("conditional", "--predict sprites --output none.png")
    none = json.loads(Path("none.json").read_text())
    assert none["class"] == "no class"
    assert none["mean_squared_errors"] != record["mean_squared_errors"]
    sample("", f"--predict sprites --snapshots {folders / 'run'} --output learned.png")
    record = json.loads(Path("learned.json").read_text())
    assert list(record["mean_squared_errors"]) == ["epoch 4", "epoch 8"]
    assert record["mean_squared_errors"]["epoch 4"] != record["mean_squared_errors"]["epoch 8"]


def test_steps_shown_pair_what_a_step_is_given_with_what_it_predicts():
    pipeline = known_image_pipeline("epsilon")
    request = Request([3, 4, 5], [Condition()] * 3, batch_size=2)
    sampler = make_sampler("--scheduler", pipeline, "ddim", 10)
    figure = show_steps(pipeline, sampler, request, interval=4)
    assert figure.row_labels == ["step 1\nt = 900", "step 5\nt = 500", "step 9\nt = 100", "step 10\nt = 0"]
    assert figure.column_labels == ["noisy"] * 3 + ["predicted"] * 3
    noise = sample_noise(pipeline.sample_shape, [torch.Generator().manual_seed(seed) for seed in request.seeds])
    assert torch.equal(figure.rows[0][:3], to_unit_range(noise))
    images = sample_images(pipeline, sampler, request)
    assert torch.equal(figure.rows[-1][3:], images)  # the last step of DDIM goes to its prediction


def test_samples_of_no_class(sample, folders):
    sample("conditional", "--no_class --num_images 2 --num_inference_steps 2 --output out")
    pipeline = ConditionalDDPMPipeline.from_pretrained(folders / "conditional", trust_remote_code=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = pipeline(batch_size=2, num_inference_steps=2, generator=generators).images
    for i, image in enumerate(images):
        written = pixels(f"out/{i:05d}.png")[::8, ::8]
        assert np.abs(written - np.asarray(image).astype(int)).max() <= 1
    with pytest.raises(SystemExit):
        sample("unconditional", "--no_class")


def test_without_its_noise_ddpm_collapses_to_the_mean():
    pipeline = gaussian_pipeline(mean=0.1, std=0.3)
    pipeline.scheduler = ClosedFormDDPMScheduler(clip_sample=False)
    request = Request(list(range(40)), [Condition()] * 40)
    figure = show_collapse(pipeline, make_sampler("--scheduler", pipeline, None, 250), request)
    with_noise, without = (2 * row - 1 for row in figure.rows)  # [0, 1] -> [-1, 1]
    # 7,680 normal numbers: five standard errors of their deviation, and 3 % for 250 steps in place of 1,000
    assert abs(with_noise.std() - 0.3) < 0.3 * (5 / (2 * 7680) ** 0.5 + 0.03)
    assert without.std() < 0.1
    assert abs(without.mean() - 0.1) < 0.02


def test_interpolation_goes_from_one_sample_to_the_other():
    pipeline = conditional_pipeline()
    sampler = make_sampler("--interpolate", pipeline, "ddim", 4)
    hero, _, food = choose_conditions(pipeline, None, None)
    figure = interpolate(pipeline, sampler, [1, 2], [hero, food], 3, Request([0], [hero]))
    assert figure.row_labels == ["hero", "50%", "food"]
    assert figure.column_labels == ["seed 1", "50%", "seed 2"]
    for row, condition in [(0, hero), (2, food)]:
        ends = sample_images(pipeline, sampler, Request([1, 2], [condition] * 2))
        # another batch size: roundings of the 256 levels' size at most
        torch.testing.assert_close(figure.rows[row][[0, 2]], ends, rtol=0, atol=1 / 255)
    middle = Condition("middle", {"context": (hero.arguments["context"] + food.arguments["context"]) / 2})
    noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    centre = sample_images(pipeline, sampler, Request([0], [middle]), slerp(*noise, 0.5)[None])
    torch.testing.assert_close(figure.rows[1][1], centre[0], rtol=0, atol=1 / 255)


def test_slerp_keeps_the_length_of_noise():
    x, y = torch.eye(2)
    # sin and cos of 30 degrees, with a few roundings
    torch.testing.assert_close(slerp(x, y, 1 / 3), torch.tensor([3**0.5 / 2, 0.5]), rtol=0, atol=1e-6)
    first, last = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert abs(slerp(first, last, 0.5).std() - 1) < 0.02  # a straight line would have 0.71
    torch.testing.assert_close(slerp(first, first, 0.3), first)


def test_to_pixels_rounds_and_repeats():
    levels = torch.arange(256) / 255
    images = to_pixels(levels.view(1, 1, 16, 16), 3)
    assert images.shape == (1, 1, 48, 48)
    assert torch.equal(images[0, 0, 1::3, 2::3].flatten(), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(images[0, 0, :3, :3], torch.zeros(3, 3, dtype=torch.uint8))
    assert to_pixels(torch.tensor([0.998, 0.999]).view(2, 1, 1, 1), 1).flatten().tolist() == [254, 255]  # 254.49, .74
