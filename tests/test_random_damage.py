"""Random flags, files and damage to them end in a line or in what was there before: no traceback, nothing silent."""

import json
import shutil
import string
import warnings
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inspecting import UNET_WEIGHTS
from launching import TINY
from PIL import Image
from safetensors.torch import load_file, save_file

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.dataset import load_image_data
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.folder import check_output_dir
from sprite_diffusion.runs.manifest import find_damage
from sprite_diffusion.runs.presets import parse_config
from sprite_diffusion.sampling.pipeline_loading import load_pipeline
from sprite_diffusion.sharing.card import read_run

pytestmark = pytest.mark.slow
many = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

WORDS = st.text(string.printable, max_size=8) | st.sampled_from(
    [
        "",
        "-1",
        "0",
        "1",
        "010",
        "1e-4",
        "1e400",
        "nan",
        "-inf",
        "9" * 40,
        "True",
        "null",
        "none",
        "16x16",
        "../x",
        "\0",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS | st.sampled_from([-1, 0, 7, 10**6, 10**12, 10**30, 1e308, float("nan"), float("inf")]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=5,
)


def is_sound(config):
    """Returns whether each number of a configuration is finite and of its type."""
    values = [getattr(config, field.name) for field in fields(config)]
    numbers = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return np.isfinite([v for v in numbers if isinstance(v, int | float)]).all()


@settings(many, max_examples=2000)
@given(st.lists(st.tuples(st.sampled_from([field.name for field in fields(TrainingConfig)]), WORDS), max_size=5))
def test_command_lines(flags):
    argv = [part for name, value in flags for part in (f"--{name}", value)]
    with suppress(UserInputError), warnings.catch_warnings(action="ignore"):
        assert is_sound(parse_config(argv, default_preset="smoke_cpu.yaml"))


@st.composite
def damages(draw, names):
    """Draws the name of a file and a function that damages it, and never leaves its content as it was."""
    kind = draw(
        st.sampled_from(["bytes", "cut", "longer", "zeros", "inverted", "empty", "random", "missing", "folder"])
    )
    places = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
    noise = draw(st.binary(max_size=64))

    def damage(path: Path) -> None:
        content = path.read_bytes()
        changed = bytearray(content)
        if kind in ("missing", "folder"):
            path.unlink()
            if kind == "folder":
                path.mkdir()
            return
        if kind == "bytes":
            for share, mask in {int(share * len(changed)): mask for share, mask in places}.items():
                changed[share] ^= mask
        elif kind == "cut":
            del changed[int(places[0][0] * len(changed)) :]
        changed = {
            "longer": content + (noise or b"\0"),
            "zeros": bytes(len(content)),
            "inverted": bytes(255 - byte for byte in content),
            "empty": b"",
            "random": noise,
        }.get(kind, bytes(changed))
        path.write_bytes(changed if changed != content else changed + b"\0")

    return draw(st.sampled_from(names)), damage


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Makes five images of noise and lets them be stored. Returns their configuration, pixels and stored folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(256, size=(9, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    config = TrainingConfig(train_data_dir=str(tmp_path / "images"), resolution="8", on_bad_image="skip")
    pixels = read_pixels(config)
    (folder,) = (path for path in (tmp_path / "cache").rglob("images/*") if path.is_dir())
    return config, pixels, folder


def read_pixels(config):
    return load_image_data(config, with_labels=False).dataset.__getitems__(range(5))["images"]


def test_damaged_stores_are_written_anew(store, tmp_path):
    config, pixels, folder = store
    shutil.copytree(folder, tmp_path / "whole")

    @settings(many, max_examples=1200)
    @given(damages(["pixels.bin", "table.npy", "skipped.json", "xxh3.txt"]))
    def check(drawn):
        name, damage = drawn
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / name)
        assert torch.equal(read_pixels(config), pixels)

    check()


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_script):
    """Trains a conditional model. Returns the run's folder."""
    output_dir = tmp_path_factory.mktemp("random") / "run"
    run_script("train_conditional", f"{TINY} --max_train_steps 3 --ddpm_num_steps 4", output_dir)
    return output_dir


def paths_of(value, path=()):
    """Yields the place of each value inside of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_of(item, (*path, key))


def replaced(value, path, new):
    """Returns JSON with the value at a place replaced."""
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


MODEL_CONFIGS = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]


def sample_or_line(folder):
    """Samples a model, or returns None if it is refused in a line. Its images must be finite."""
    try:
        pipeline = load_pipeline(str(folder))
    except UserInputError:
        return None
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings(action="ignore"):
        images = pipeline(batch_size=1, num_inference_steps=2, output_type="pt").images
    assert all(weight.isfinite().all() for weight in pipeline.unet.state_dict().values())
    assert images.isfinite().all()
    return images


def test_models_with_odd_values(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(run, model, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "samples"))
    contents = {name: json.loads((model / name).read_text()) for name in MODEL_CONFIGS}
    places = [(name, path) for name, content in contents.items() for path in paths_of(content)]
    assert sample_or_line(model) is not None

    @settings(many, max_examples=1000)
    @given(st.sampled_from(places), VALUES)
    def check(place, value):
        name, path = place
        (model / name).write_text(json.dumps(replaced(contents[name], path, value)))
        try:
            sample_or_line(model)
        finally:
            (model / name).write_text(json.dumps(contents[name]))

    check()


def test_damaged_models(run, tmp_path):
    model = tmp_path / "model"

    @settings(many, max_examples=400)
    @given(damages([*MODEL_CONFIGS, UNET_WEIGHTS]))
    def check(drawn):
        name, damage = drawn
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(run, model, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "samples"))
        damage(model / name)
        sample_or_line(model)

    check()


def test_models_with_numbers_that_are_not_finite(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(run, model, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "samples"))
    weights = load_file(model / UNET_WEIGHTS)

    @settings(many, max_examples=200)
    @given(
        st.sampled_from(sorted(weights)), st.floats(0, 1, exclude_max=True), st.sampled_from([np.nan, np.inf, -np.inf])
    )
    def check(name, share, value):
        changed = weights[name].clone()
        changed.view(-1)[int(share * changed.numel())] = float(value)
        save_file({**weights, name: changed}, model / UNET_WEIGHTS)
        with pytest.raises(UserInputError, match="not finite"):
            load_pipeline(str(model))

    check()


def test_damaged_checkpoints_are_found(run, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    names = [str(p.relative_to(run / "checkpoint-3")) for p in (run / "checkpoint-3").rglob("*") if p.is_file()]

    @settings(many, max_examples=500)
    @given(damages(names))
    def check(drawn):
        name, damage = drawn
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.copytree(run / "checkpoint-3", checkpoint)
        damage(checkpoint / name)
        assert find_damage(checkpoint) != "" or name == "manifest.json"

    check()


def test_records_of_a_run_with_odd_values(run, tmp_path):
    """A card is made of them, and the next start of the same command reads them."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    summary = json.loads((copy / "training_summary.json").read_text())

    @settings(many, max_examples=500)
    @given(st.sampled_from(list(paths_of(summary))), VALUES)
    def check(path, value):
        (copy / "training_summary.json").write_text(json.dumps(replaced(summary, path, value)))
        for read in (
            lambda: read_run(copy),
            lambda: check_output_dir(TrainingConfig(output_dir=str(copy), resume_from_checkpoint="latest")),
            lambda: check_output_dir(TrainingConfig(output_dir=str(copy))),
        ):
            with suppress(UserInputError):
                read()

    check()


def test_random_arrays(tmp_path):
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (2, 8, 8, 1), }"
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((2, 8, 8, 1), np.uint8))
    whole = path.read_bytes()
    assert whole.startswith(header)

    @settings(many, max_examples=500)
    @given(st.lists(st.tuples(st.integers(0, len(header) - 1), st.integers(0, 255)), min_size=1, max_size=4))
    def check(changes):
        content = bytearray(whole)
        for place, byte in changes:
            content[place] = byte
        path.write_bytes(content)
        with suppress(UserInputError):
            data = load_image_data(TrainingConfig(dataset_name=str(path), resolution="8"), with_labels=False)
            assert data.dataset.__getitems__([0])["images"].shape[1:] == (data.num_channels, 8, 8)

    check()
