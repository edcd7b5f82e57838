"""Tests `sample.py --image` and `--mask`, on pictures whose right answer is known."""

import json
import sys

import numpy as np
import pytest
import torch
from launching import run_script
from PIL import Image
from tiny_network import make_tiny_network

from pipelines import ConditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.sampling.editing import read_edit

SEEN = np.random.default_rng(0).integers(256, size=(8, 8, 4), dtype=np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[:4] = 255
FLAGS = "--class food --num_images 3 --num_inference_steps 4 --scale 1"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    network = make_tiny_network(in_channels=4, out_channels=4, num_class_embeds=3)
    names = {0: "hero", 1: "food"}
    ConditionalDDPMPipeline(network, ClosedFormDDPMScheduler(), id2label=names).save_pretrained(str(folder))
    (folder / "palette.hex").write_text("000000\nffffff\n")
    return str(folder)


@pytest.fixture
def files(tmp_path):
    Image.fromarray(SEEN).save(tmp_path / "image.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    return f"--image {tmp_path}/image.png", f"--mask {tmp_path}/mask.png"


def read(folder) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_nothing_of_a_picture_is_changed_at_a_strength_of_zero(model, files, tmp_path):
    run_script("sample", f"{model} {FLAGS} {files[0]} --strength 0 --output {tmp_path}/out")
    pictures = read(tmp_path / "out")
    assert len(pictures) == 3
    assert all((picture == SEEN).all() for picture in pictures)


@pytest.mark.parametrize("flags", ["", "--palette auto --binary_alpha", "--scheduler unipc --guidance_scale 2"])
def test_outside_of_the_mask_a_picture_is_kept_bit_for_bit(model, files, tmp_path, flags):
    """Also where what is drawn is snapped to a palette; and what is drawn is another for each seed."""
    run_script("sample", f"{model} {FLAGS} {' '.join(files)} {flags} --output {tmp_path}/out")
    pictures = read(tmp_path / "out")
    assert all((picture[4:] == SEEN[4:]).all() for picture in pictures)
    assert len({picture[:4].tobytes() for picture in pictures}) == 3
    if "palette" in flags:
        assert all(np.isin(picture[:4], (0, 255)).all() for picture in pictures)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["mask"] == f"{tmp_path}/mask.png"
    assert Image.open(tmp_path / "out" / "00000.png").text["image"] == f"{tmp_path}/image.png"


def test_more_strength_changes_more(model, files, tmp_path):
    changes = []
    for strength in (0.25, 0.5, 0.75):
        out = tmp_path / f"{100 * strength:.0f}"
        run_script("sample", f"{model} {FLAGS} {files[0]} --strength {strength} --output {out}")
        changes.append(np.abs(np.stack(read(out)).astype(float) - SEEN).mean())
    assert 0 < changes[0] < changes[1] < changes[2]


def test_pictures_of_other_sizes_and_modes_are_treated_as_training_images_are(tmp_path):
    """A picture of twice the size; one without transparency; and a mask of twice the size, which stays hard."""
    pipeline = ConditionalDDPMPipeline(
        make_tiny_network(in_channels=4, out_channels=4, num_class_embeds=3), ClosedFormDDPMScheduler()
    )
    flat = np.full((16, 16, 4), (200, 100, 50, 255), np.uint8)
    Image.fromarray(flat).save(tmp_path / "large.png")
    Image.fromarray(flat[:8, :8, :3]).save(tmp_path / "rgb.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :6] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for name in ("large.png", "rgb.png"):
        edit = read_edit(pipeline, tmp_path / name, None, tmp_path / "mask.png")
        expected = torch.tensor([200, 100, 50, 255]).view(1, 4, 1, 1).expand(1, 4, 8, 8) / 255
        torch.testing.assert_close(edit.image, expected, atol=1e-6, rtol=0)
        assert torch.equal(edit.mask, torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).expand(1, 1, 8, 8))


def test_an_animation_begins_with_the_picture_and_not_with_noise(model, files, tmp_path):
    run_script(
        "sample", f"{model} {FLAGS} {files[0]} --strength 0.5 --animate {tmp_path}/a.gif --output {tmp_path}/o.png"
    )
    assert Image.open(tmp_path / "a.gif").n_frames <= 2 + 1  # two steps of four, and the last again


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--strength 0.5", "--strength and --mask need an --image"),
        ("--mask mask.png", "--strength and --mask need an --image"),
        ("--image {image} --strength 2", "--strength is 2.0"),
        ("--image {image} --forward sprites", "--image does not go with --forward"),
        ("--image {image} --scheduler pndm", "--image does not go with the sampler pndm"),
        ("--image {image} --compare ddim:4,pndm:4", "--image does not go with the sampler pndm"),
        ("--image {image} --strength 0 --animate a.gif", "give --image more --strength than 0"),
        ("--image missing.png", "--image missing.png can't be read"),
        ("--image {image} --mask missing.png", "missing.png can't be read"),
        ("--image setup.cfg", "--image setup.cfg is not an image"),
    ],
)
def test_what_cannot_be_done_is_one_line(model, files, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("text")
    with pytest.raises(SystemExit) as stopped:
        run_script("sample", f"{model} {flags.format(image='image.png')} --output {tmp_path}/o.png")
    assert stopped.value.code == 2
    assert message in (printed := capsys.readouterr().err)
    assert printed.count("\n") == 1
    assert not (tmp_path / "o.png").exists()
    assert sys.exc_info() == (None, None, None)
