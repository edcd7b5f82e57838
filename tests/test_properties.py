"""Tests what holds for every input, on inputs that hypothesis makes up; a failure shows the simplest that it found."""

import contextlib
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import DataConfig
from sprite_diffusion.data.decoding import BadImageError, open_image, prepare_image
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.presets import parse_config

settings.register_profile(
    "quick", max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("quick")

# The diffusion process, compared with diffusers' own

SCHEDULER_OPTIONS = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.integers(1, 1200),
        "beta_start": st.floats(1e-5, 1e-3),
        "beta_end": st.floats(1e-3, 0.05),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]),
        "variance_type": st.sampled_from(["fixed_small", "fixed_large"]),
        "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.floats(0.5, 3),
        "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
        "steps_offset": st.integers(0, 1),
    }
)


@given(SCHEDULER_OPTIONS, st.data())
def test_steps_agree_with_diffusers(options, data):
    ours, theirs = ClosedFormDDPMScheduler(**options), DDPMScheduler(**options)
    num_timesteps = options["num_train_timesteps"]
    sample, model_output = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = data.draw(st.integers(0, num_timesteps - 1))

    timesteps = torch.tensor([t, num_timesteps - 1])
    torch.testing.assert_close(
        ours.add_noise(sample, model_output, timesteps),
        theirs.add_noise(sample, model_output, timesteps),
        rtol=1e-3,  # diffusers' tables are products of up to 1200 float32
        atol=1e-4,
    )
    steps = [
        scheduler.step(model_output, t, sample, generator=torch.Generator().manual_seed(1))
        for scheduler in (ours, theirs)
    ]
    for name in ("pred_original_sample", "prev_sample"):
        mine, reference = (getattr(step, name) for step in steps)
        if not reference.isfinite().all():  # diffusers has divided by an alpha_bar of 0
            continue
        size = reference.abs().max().clamp(min=1)
        torch.testing.assert_close(mine / size, reference / size, rtol=5e-3, atol=5e-3)


# Images

MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "La",
    "RGBa",
]


@st.composite
def images(draw):
    size = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    mode = draw(st.sampled_from(MODES))
    if mode in ("I", "F"):
        white = 1 if mode == "F" else 65535
        levels = np.random.default_rng(draw(st.integers(0, 99))).random(size[::-1]) * white
        return Image.fromarray(levels.astype(np.float32 if mode == "F" else np.int32))
    plain = Image.frombytes("RGBA", size, np.random.default_rng(draw(st.integers(0, 99))).bytes(4 * size[0] * size[1]))
    if mode in ("PA", "LAB", "I;16", "RGBX"):
        return Image.new(mode, size, draw(st.integers(0, 255)))
    if mode in ("La", "RGBa"):
        return plain.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode in ("HSV", "YCbCr", "CMYK", "P"):
        plain = plain.convert("RGB")
    return plain.convert(mode)


@given(
    image=images(),
    resolution=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resize_mode=st.sampled_from(["crop", "pad"]),
    interpolation=st.sampled_from(["lanczos", "bicubic", "bilinear", "box", "nearest"]),
    image_mode=st.sampled_from(["auto", "L", "RGB", "RGBA"]),
    center_crop=st.booleans(),
    background=st.sampled_from(["white", "black", "#ff8000"]),
)
def test_prepared_image_has_the_promised_shape_and_type(image, resolution, **flags):
    width, height = resolution
    config = TrainingConfig(resolution=f"{width}x{height}", **flags)
    try:
        pixels = prepare_image(image, "image", config)
    except BadImageError:
        assert image.mode in ("La", "LAB")  # Pillow converts these to few modes
        return
    channels, rows, columns = pixels.shape
    assert pixels.dtype == (np.uint16 if image.mode in ("I", "F", "I;16") else np.uint8)
    if flags["image_mode"] != "auto":
        assert channels == {"L": 1, "RGB": 3, "RGBA": 4}[flags["image_mode"]]
    elif flags["background"] == "#ff8000" or image.mode in ("P", "RGB", "RGBA", "CMYK"):
        assert channels == 3
    else:
        assert channels in (1, 3)
    if channels == 4:
        assert (pixels[:3] <= pixels[3]).all()
    if flags["resize_mode"] == "pad" or flags["center_crop"]:
        assert (rows, columns) == (height, width)
    else:
        assert rows >= height
        assert columns >= width
        assert rows == height or columns == width


@given(st.binary(max_size=200))
def test_random_bytes_are_a_bad_image_or_a_good_one(content):
    with contextlib.suppress(BadImageError):
        open_image(content, DataConfig(resolution="8"))


# Configurations

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from([field.name for field in fields(TrainingConfig)]) | st.text(max_size=6)


def parse(path):
    """Checks that a file gives a valid configuration or a `UserInputError`."""
    try:
        with warnings.catch_warnings(action="ignore"):
            config = parse_config(["--config", str(path)], default_preset="")
    except UserInputError:
        return
    for field in fields(config):
        value = getattr(config, field.name)
        if value is not None or field.default is not None:
            assert field.type not in (int, float, bool) or type(value) is field.type
            assert field.type is not float or np.isfinite(value)
    assert min(config.image_size) >= 1


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return tmp_path_factory.mktemp("configs") / "random.yaml"


@settings(max_examples=300)
@given(content=st.binary(max_size=300))
def test_random_bytes_as_config(content, config_file):
    config_file.write_bytes(content)
    parse(config_file)


@settings(max_examples=300)
@given(values=st.dictionaries(KEYS, VALUES, max_size=4))
def test_random_values_as_config(values, config_file):
    config_file.write_text(yaml.safe_dump(values))
    parse(config_file)
