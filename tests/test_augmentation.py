"""Tests images that are changed at random: what is done, what the network is told, and what no model keeps of it."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from inspecting import assert_same_weights, weights
from launching import TINY
from tiny_network import make_tiny_network

from sprite_diffusion.training.augmentation import (
    COLOUR_ORDERS,
    LARGEST_SHIFT,
    NUM_LABELS,
    NUM_UNIFORM,
    AugmentedNetwork,
    augment,
)

NUM_IMAGES = 2000
IMAGES = 2 * torch.rand(NUM_IMAGES, 4, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
UNIFORM = torch.rand(NUM_IMAGES, NUM_UNIFORM, generator=torch.Generator().manual_seed(1))


def test_labels_say_what_was_done_to_pixel_art():
    """Each image is made again by NumPy from its labels alone."""
    changed, labels = augment(IMAGES, UNIFORM, "pixel_art", 0.3)
    seen = set()
    for image, result, label in zip(IMAGES.numpy(), changed.numpy(), labels.numpy(), strict=True):
        mirrored, cosine, sine, shift_x, shift_y, scale, *order = label
        expected = image[:, :, ::-1] if mirrored else image
        quarters = round(np.arctan2(sine, cosine + 1) / (np.pi / 2)) % 4
        expected = np.rot90(expected, -quarters, axes=(1, 2))  # y points down
        columns, rows = round(shift_x * LARGEST_SHIFT * 16), round(shift_y * LARGEST_SHIFT * 16)
        padded = np.pad(expected, ((0, 0), (4, 4), (4, 4)), mode="edge")
        expected = padded[:, 4 - rows : 20 - rows, 4 - columns : 20 - columns]
        colours = COLOUR_ORDERS[order.index(1) + 1 if 1 in order else 0].tolist()
        np.testing.assert_array_equal(result, expected[[*colours, 3]])
        assert scale == 0
        seen.add((bool(mirrored), quarters, columns, rows, *colours))
    assert [len(set(column)) for column in zip(*seen, strict=True)] == [2, 4, 5, 5, 3, 3, 3]


@pytest.mark.parametrize(("kind", "share"), [("pixel_art", 0.85 * 0.7**3), ("photo", 0.85 * 0.7**3)])
def test_images_that_nothing_was_done_to_are_as_they_were(kind, share):
    changed, labels = augment(IMAGES, UNIFORM, kind, 0.3)
    untouched = (labels == 0).all(dim=1)
    assert torch.equal(changed[untouched], IMAGES[untouched])
    assert all(not torch.equal(a, b) for a, b in zip(changed[~untouched], IMAGES[~untouched], strict=True))
    # A share of 2,000 images, five standard deviations; a shift of less than half a pixel is none.
    assert abs(untouched.float().mean() - share) < 5 * (share * (1 - share) / NUM_IMAGES) ** 0.5 + 0.3 / 25


def test_photographs_are_turned_about_their_centre():
    """A quarter turn by a sampler of fractions is that of NumPy, but for the rounding of the coordinates."""
    uniform = torch.full((1, NUM_UNIFORM), 0.99)
    uniform[0, 1], uniform[0, 2] = 0, 0.75  # of -180 to 180 degrees, 90
    changed, labels = augment(IMAGES[:1], uniform, "photo", 0.5)
    assert labels[0].tolist() == pytest.approx([0, -1, 1, 0, 0, 0, 0, 0, 0, 0, 0], abs=1e-6)
    expected = np.rot90(IMAGES[0].numpy(), -1, axes=(1, 2))
    # coordinates of up to 16 pixels, rounded by 2**-24, between pixels that differ by up to 2
    np.testing.assert_allclose(changed[0].numpy(), expected, atol=16 * 8 * 2**-24 * 2)


def test_scale_and_wide_images_keep_their_shapes():
    """A wide photograph that is turned by 180 degrees; one that is enlarged shows its own middle."""
    wide = IMAGES[:1, :3, :8]
    uniform = torch.full((1, NUM_UNIFORM), 0.99)
    uniform[0, 1], uniform[0, 2] = 0, 0.0
    changed, _ = augment(wide, uniform, "photo", 0.5)
    np.testing.assert_allclose(changed[0].numpy(), wide[0].numpy()[:, ::-1, ::-1], atol=16 * 8 * 2**-24 * 2)
    changed, labels = augment(wide, uniform, "pixel_art", 0.5)  # quarters do not fit: half turns alone
    assert torch.equal(changed[0], wide[0].flip((1, 2)))
    assert labels[0, 1] == -2

    ramp = torch.linspace(-1, 1, 17)[:16].expand(1, 1, 16, 16)
    uniform = torch.full((1, NUM_UNIFORM), 0.99)
    uniform[0, 6], uniform[0, 7] = 0, 1.0  # the largest scale
    changed, labels = augment(ramp, uniform, "photo", 0.5)
    assert labels[0, 5] == 1
    step_before, step_now = (image[0, 0, 8, 8] - image[0, 0, 8, 7] for image in (ramp, changed))
    assert step_now / step_before == pytest.approx(2**-0.3, rel=1e-4)


def test_grey_images_have_no_colours_to_swap():
    changed, labels = augment(IMAGES[:, :1], UNIFORM, "pixel_art", 1)
    assert changed.shape[1] == 1
    assert not labels[:, 6:].any()


def test_network_without_its_layer_is_the_network_that_is_told_of_no_change():
    unet = make_tiny_network(in_channels=4, out_channels=4).eval()
    network = AugmentedNetwork(unet)
    torch.nn.init.normal_(network.augmentation.weight)
    images, t = torch.randn(2, 4, 8, 8), torch.tensor(3)
    labels = torch.zeros(2, NUM_LABELS)
    with torch.no_grad():
        assert torch.equal(network(images, t, labels).sample, unet(images, t).sample)
        labels[0, 0] = 1
        told = network(images, t, labels).sample
        assert not torch.allclose(told[0], unet(images, t).sample[0], atol=1e-3)
        assert torch.equal(told[1], unet(images, t).sample[1])


@pytest.mark.parametrize("script", ["train_unconditional", "train_conditional"])
def test_saved_network_is_a_stock_one_and_a_resumed_run_goes_on(run_script, tmp_path, script):
    flags = f"{TINY} --augmentation pixel_art --use_ema --dropout 0.1"
    run_script(script, flags, tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "resumed" / "checkpoint-3")
    run_script(script, f"{flags} --resume_from_checkpoint latest", tmp_path / "resumed")
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    trained = weights(tmp_path / "whole" / "checkpoint-8", "model.safetensors")
    assert trained["augmentation.weight"].abs().max() > 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole", trust_remote_code=script == "train_conditional")
    assert type(pipeline.unet) is UNet2DModel
    assert pipeline.unet.config.dropout == 0.1
    assert not any("augmentation" in name for name in weights(tmp_path / "whole"))


def test_networks_that_cannot_be_told_are_refused(run_script, tmp_path, capsys):
    flags = f"{TINY} --model_class ContextUNet2DModel --augmentation photo"
    with pytest.raises(SystemExit):
        run_script("train_unconditional", flags, tmp_path)
    assert "--augmentation: ContextUNet2DModel does not have it" in capsys.readouterr().err
