"""Tests how folders, tables and arrays of images become batches, with their labels, crops and flips."""

import gc
import io
import os
import re
import stat
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageCms, ImageDraw

from pipelines import to_straight_alpha
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data import decoding
from sprite_diffusion.data.config import DataConfig
from sprite_diffusion.data.dataset import load_image_data, load_tensor
from sprite_diffusion.data.decoding import prepare_image, to_model_range
from sprite_diffusion.data.sprites import CLASS_NAMES, draw_sprites
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.training.steps import make_dataloader

# Two float32 operations on numbers of at most 2 in size, each rounded by at most 2 * 2**-24.
ATOL = 2**-22


@pytest.fixture(scope="module", autouse=True)
def quick_datasets():
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Loading local files asks the Hub to count it, which waits for the network.
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        # Each pass over streamed parquet ends in five seconds of sleep, a broken-off one when it is collected.
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield
        gc.collect()


@pytest.fixture
def load(tmp_path):
    def load_from_flags(with_labels=False, **flags):
        if flags.get("streaming"):
            flags.setdefault("max_train_steps", 1)
        config = TrainingConfig(cache_dir=str(tmp_path / "cache"), **flags)
        data = load_image_data(config, with_labels, config.streaming)
        data.dataset.begin_epoch(0, config.seed, config.random_flip)
        return data

    return load_from_flags


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def random_pixels(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def to_levels(images, white=255):
    """Maps [-1, 1] to whole levels 0..white; fails if a level is not a whole number."""
    levels = (images.double().numpy() + 1) * white / 2
    # float32 in [-1, 1] is off by at most ATOL, a level by white / 2 times that: at most 0.008.
    np.testing.assert_allclose(levels, levels.round(), atol=white / 2 * ATOL)
    return levels.round().astype(int)


def read_all(data):
    """Returns all images, in order, (N, C, H, W)."""
    return to_model_range(data.dataset.__getitems__(list(range(len(data.dataset))))["images"])


def read_one(data, white=255):
    return to_levels(read_all(data), white)[0]


def compose(colour, alpha, background=255):
    """Returns round((alpha * colour + (255 - alpha) * background) / 255), in whole numbers, halves up."""
    colour, alpha = np.asarray(colour, int), np.asarray(alpha, int)
    return (2 * (alpha * colour + (255 - alpha) * background) + 255) // 510


def encode(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


# Modes


def make_mode(mode):
    """Returns an 8x8 image of a mode and the levels (C, 8, 8) to expect from it, of 255 or 65535."""
    a, b, c, d = random_pixels(4, 8, 8)
    deep = random_pixels(8, 8, dtype=np.uint16)
    deep[0, :2] = 0, 65535
    palette = random_pixels(256, 3, seed=1)
    match mode:
        case "1":
            return Image.fromarray(a > 127), [255 * (a > 127)]
        case "L":
            return Image.fromarray(a), [a]
        case "LA":
            return Image.fromarray(np.stack([a, b], -1)), [compose(a, b)]
        case "P":
            image = Image.fromarray(a)
            image.putpalette(palette.tobytes())
            return image, palette[a].transpose(2, 0, 1)
        case "RGB":
            return Image.fromarray(np.stack([a, b, c], -1)), [a, b, c]
        case "RGBA":
            return Image.fromarray(np.stack([a, b, c, d], -1)), compose([a, b, c], d)
        case "CMYK":
            image = Image.frombytes("CMYK", (8, 8), np.stack([a, b, c, d], -1).tobytes())
            return image, [compose(0, ink, 255 - d.astype(int)) for ink in (a, b, c)]
        case "I;16":
            return Image.fromarray(deep), [deep]
        case "I":
            return Image.fromarray(deep.astype(np.int32)), [deep]
        case "F":
            return Image.fromarray((deep / np.float32(65535)).astype(np.float32)), [deep]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_mode(mode, load, pictures):
    image, expected = make_mode(mode)
    assert image.mode == mode
    is_deep = mode in ("I;16", "I", "F")
    path = pictures / ("image.tiff" if mode in ("CMYK", "I", "F") else "image.png")
    image.save(path)
    with Image.open(path) as reopened:
        assert reopened.mode == mode
    data = load(train_data_dir=str(pictures), resolution="8")
    assert data.num_channels == len(expected)
    np.testing.assert_array_equal(read_one(data, 65535 if is_deep else 255), expected)


def test_range_ends_are_exact(load, pictures):
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(pictures / "a.png")
    assert read_all(load(train_data_dir=str(pictures), resolution="2x1")).flatten().tolist() == [-1, 1]
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(pictures / "a.png")
    assert read_all(load(train_data_dir=str(pictures), resolution="2x1")).flatten().tolist() == [-1, 1]


def test_palette_transparency_is_composed(load, pictures):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(pictures / "a.png", transparency=1)
    levels = read_one(load(train_data_dir=str(pictures), resolution="2", background="#010203"))
    assert levels.transpose(1, 2, 0).tolist() == [[[10, 20, 30], [1, 2, 3]], [[70, 80, 90], [1, 2, 3]]]


def test_background_under_alpha(load, pictures):
    rgba = random_pixels(8, 8, 4)
    Image.fromarray(rgba).save(pictures / "a.png")
    levels = read_one(load(train_data_dir=str(pictures), resolution="8", background="#204060"))
    background = np.reshape([0x20, 0x40, 0x60], (3, 1, 1))
    np.testing.assert_array_equal(levels, compose(rgba[..., :3].transpose(2, 0, 1), rgba[..., 3], background))


def test_coloured_background_makes_grey_images_colour(load, pictures):
    grey_alpha = random_pixels(8, 8, 2)
    Image.fromarray(grey_alpha).save(pictures / "a.png")
    levels = read_one(load(train_data_dir=str(pictures), resolution="8", background="red"))
    expected = compose(grey_alpha[..., 0], grey_alpha[..., 1], np.reshape([255, 0, 0], (3, 1, 1)))
    np.testing.assert_array_equal(levels, expected)


def test_resize_does_not_mix_in_hidden_colours(load, pictures):
    # A white disc on white; under its transparent surroundings hides black.
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[8:24, 8:24] = 255
    Image.fromarray(rgba).save(pictures / "a.png")
    assert (read_all(load(train_data_dir=str(pictures), resolution="12")) == 1).all()


def test_image_mode_flag(load, pictures):
    rgb = random_pixels(8, 8, 3)
    Image.fromarray(rgb).save(pictures / "a.png")
    grey = read_one(load(train_data_dir=str(pictures), resolution="8", image_mode="L"))
    # ITU-R BT.601 luma; Pillow's whole-number weights are within 2**-16 of these, so a level is off by one at most.
    np.testing.assert_allclose(grey[0], rgb @ [0.299, 0.587, 0.114], atol=0.51)

    Image.fromarray(rgb[..., 0]).save(pictures / "a.png")
    colour = read_one(load(train_data_dir=str(pictures), resolution="8", image_mode="RGB"))
    np.testing.assert_array_equal(colour, [rgb[..., 0]] * 3)


def test_one_colour_image_makes_the_set_colour(load, pictures):
    grey, rgb = random_pixels(8, 8), random_pixels(8, 8, 3)
    Image.fromarray(grey).save(pictures / "a.png")
    Image.fromarray(rgb).save(pictures / "b.png")
    levels = to_levels(read_all(load(train_data_dir=str(pictures), resolution="8")))
    np.testing.assert_array_equal(levels, [[grey] * 3, rgb.transpose(2, 0, 1)])


def test_8_and_16_bit_images_mix(load, pictures):
    shallow, deep = random_pixels(8, 8), random_pixels(8, 8, dtype=np.uint16)
    Image.fromarray(shallow).save(pictures / "a.png")
    Image.fromarray(deep).save(pictures / "b.png")
    images = read_all(load(train_data_dir=str(pictures), resolution="8")).double().numpy()
    np.testing.assert_allclose(images[0, 0], shallow / 127.5 - 1, rtol=0, atol=ATOL)
    np.testing.assert_allclose(images[1, 0], deep / 32767.5 - 1, rtol=0, atol=ATOL)


def test_16_bit_levels_survive_the_resize(load, pictures):
    deep = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(pictures / "a.png")
    levels = read_one(load(train_data_dir=str(pictures), resolution="32", interpolation="box"), 65535)[0]
    means = deep.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    # Half a level from rounding to a whole one, and float32's 2**-8 of a level (at 65535) for each of four values.
    np.testing.assert_allclose(levels, means, atol=0.5 + 4 * 2**-8)
    assert len(np.unique(levels)) == 32 * 32


def test_lanczos_overshoot_is_clipped(load, pictures):
    deep = np.zeros((16, 16), np.uint16)
    deep[:, 8:] = 65535
    Image.fromarray(deep).save(pictures / "a.png")
    levels = read_one(load(train_data_dir=str(pictures), resolution="32"), 65535)[0]
    # Unclipped, the ringing beside the edge would wrap round from white to black.
    assert levels[:, :14].max() < 10000
    assert levels[:, 18:].min() > 55000


def test_exif_orientation_is_applied(load, pictures):
    grey = random_pixels(6, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to display
    Image.fromarray(grey).save(pictures / "a.png", exif=exif)
    levels = read_one(load(train_data_dir=str(pictures), resolution="6x8", resize_mode="none"))
    np.testing.assert_array_equal(levels[0], np.rot90(grey, k=-1))


# Transparency that is kept: the colours are multiplied by it


def premultiplied(rgba):
    """Returns the levels (..., 4, H, W) that the network sees of straight ones."""
    colours, alpha = np.asarray(rgba)[..., :3, :, :], np.asarray(rgba)[..., 3:, :, :]
    return np.concatenate([compose(colours, alpha, 0), alpha], axis=-3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_mode_with_transparency(mode, load, pictures):
    image, levels = make_mode(mode)
    white = 65535 if mode in ("I;16", "I", "F") else 255
    image.save(pictures / ("image.tiff" if mode in ("CMYK", "I", "F") else "image.png"))
    if mode in ("LA", "RGBA"):
        *colours, alpha = np.asarray(image).transpose(2, 0, 1)
        levels = [compose(colour, alpha, background=0) for colour in colours]
    else:
        alpha = np.full((8, 8), white)
    expected = [*np.broadcast_to(levels, (3, 8, 8)), alpha]
    data = load(train_data_dir=str(pictures), resolution="8", image_mode="RGBA")
    assert data.num_channels == 4
    np.testing.assert_array_equal(read_one(data, white), expected)


def test_colour_that_stands_for_transparency(load, pictures):
    """A PNG file may name one grey, colour or entry of its palette."""
    grey, rgb = np.array([[9, 5], [5, 7]], np.uint8), np.array([[[9, 8, 7], [1, 2, 3]]] * 2, np.uint8)
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    none = [0, 0, 0, 0]
    for image, transparency, expected in [
        (Image.fromarray(grey), 5, [[[9, 9, 9, 255], none], [none, [7, 7, 7, 255]]]),
        (Image.fromarray(rgb), (1, 2, 3), [[[9, 8, 7, 255], none]] * 2),
        (palette, 1, [[[10, 20, 30, 255], none], [[70, 80, 90, 255], none]]),
        (Image.fromarray(grey.astype(np.uint16)), 5, [[[9, 9, 9, 65535], none], [none, [7, 7, 7, 65535]]]),
    ]:
        image.save(pictures / "a.png", transparency=transparency)
        data = load(train_data_dir=str(pictures), resolution="2", image_mode="RGBA")
        levels = read_one(data, 65535 if image.mode == "I;16" else 255)
        assert levels.transpose(1, 2, 0).tolist() == expected, image.mode
        # It is not lost where the colours are converted.
        image.save(pictures / "a.png", transparency=transparency, icc_profile=exchange_red_and_green(SRGB_PROFILE))
        data = load(train_data_dir=str(pictures), resolution="2", image_mode="RGBA")
        alpha = read_one(data, 65535 if image.mode == "I;16" else 255)[3]
        np.testing.assert_array_equal(alpha, np.array(expected)[..., 3], image.mode)


def test_hidden_colours_leave_no_halo(load, pictures):
    """A green square, beside whose edge magenta is hidden, is made a third as large."""
    rgba = np.full((12, 12, 4), (255, 0, 255, 0), np.uint8)
    rgba[4:8, 4:8] = 0, 150, 30, 255
    Image.fromarray(rgba).save(pictures / "a.png")
    data = load(train_data_dir=str(pictures), resolution="4", image_mode="RGBA", interpolation="box")
    levels = read_one(data)
    # Of the 3 rows and columns that make one pixel, 2 are the square's: 4 pixels of 9, the colours times 4/9.
    assert levels[:, 1:3, 1:3].tolist() == [np.full((2, 2), level).tolist() for level in (0, 67, 13, 113)]
    edge = np.ones((4, 4), bool)
    edge[1:3, 1:3] = False
    assert not levels[:, edge].any()
    straight = 255 * to_straight_alpha(torch.from_numpy(levels / 255))[:, 1:3, 1:3]
    # Half a level of rounding, enlarged by 255 / 113.
    np.testing.assert_allclose(straight[:3].amax((1, 2)), [0, 150, 30], atol=0.5 * 255 / 113 + 0.5)


@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic", "bilinear", "box", "nearest"])
def test_resized_colours_do_not_exceed_their_alpha(interpolation, load, pictures):
    Image.fromarray(random_pixels(12, 12, 4)).save(pictures / "a.png")
    flags = {"resolution": "32", "image_mode": "RGBA", "interpolation": interpolation}
    levels = read_one(load(train_data_dir=str(pictures), **flags))
    assert (levels[:3] <= levels[3]).all()
    assert levels[:3].any()


def test_padding_is_transparent(load, pictures):
    rgba = random_pixels(4, 8, 4)
    Image.fromarray(rgba).save(pictures / "a.png")
    flags = {"resolution": "8", "resize_mode": "pad", "image_mode": "RGBA"}
    levels = read_one(load(train_data_dir=str(pictures), **flags))
    np.testing.assert_array_equal(levels[:, 2:6], premultiplied(rgba.transpose(2, 0, 1)))
    assert not levels[:, [0, 1, 6, 7]].any()


def test_colours_come_back_from_their_products_with_alpha(load, pictures):
    rgba = random_pixels(32, 32, 4)
    rgba[:8, :, 3], rgba[8:16, :, 3] = 255, 0
    Image.fromarray(rgba).save(pictures / "a.png")
    levels = read_one(load(train_data_dir=str(pictures), resolution="32", image_mode="RGBA"))
    straight = (255 * to_straight_alpha(torch.from_numpy(levels / 255))).round().numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(straight[:8], rgba[:8])
    assert not straight[8:16].any()
    alpha = rgba[16:, :, 3:]
    np.testing.assert_array_equal(straight[16:, :, 3:], alpha)
    # Two roundings of half a level, the first of a level of alpha.
    error = np.abs(straight[16:, :, :3] - rgba[16:, :, :3])[alpha[..., 0] > 0]
    assert (error <= 0.5 * 255 / alpha[alpha > 0][:, None] + 0.5).all()


# Shape


def save_disc(path, size, diameter):
    image = Image.new("L", size, 0)
    x, y = (size[0] - diameter) / 2, (size[1] - diameter) / 2
    ImageDraw.Draw(image).ellipse([x, y, x + diameter - 1, y + diameter - 1], fill=255)
    image.save(path)


@pytest.mark.parametrize("size", [(80, 40), (40, 80)])
@pytest.mark.parametrize(("resize_mode", "scale"), [("crop", 0.5), ("pad", 0.25)])
def test_a_disc_stays_a_disc(load, pictures, size, resize_mode, scale):
    save_disc(pictures / "a.png", size, diameter=36)
    data = load(
        train_data_dir=str(pictures),
        resolution="20",
        resize_mode=resize_mode,
        center_crop=True,
        background="black",
    )
    inside = read_one(data)[0] > 127
    width, height = inside.any(axis=0).sum(), inside.any(axis=1).sum()
    # An outline is moved by half a pixel at most on either side.
    assert abs(width - 36 * scale) <= 1
    assert abs(height - 36 * scale) <= 1
    rows, columns = np.nonzero(inside)
    np.testing.assert_allclose([rows.mean(), columns.mean()], 9.5, atol=0.5)


def test_center_crop_takes_the_middle(load, pictures):
    grey = random_pixels(8, 16)
    Image.fromarray(grey).save(pictures / "a.png")
    data = load(train_data_dir=str(pictures), resolution="4", center_crop=True, interpolation="box")
    blocks = grey.reshape(4, 2, 8, 2).mean(axis=(1, 3))
    # Pillow rounds after each of the two passes of a resize: half a level each.
    np.testing.assert_allclose(read_one(data)[0], blocks[:, 2:6], atol=1)


def test_pad_puts_the_background_around(load, pictures):
    rgb = random_pixels(4, 2, 3)
    Image.fromarray(rgb).save(pictures / "a.png")
    data = load(train_data_dir=str(pictures), resolution="8x4", resize_mode="pad", background="#0a141e")
    expected = np.empty((4, 8, 3), int)
    expected[:] = 10, 20, 30
    expected[:, 3:5] = rgb
    np.testing.assert_array_equal(read_one(data).transpose(1, 2, 0), expected)


def test_pad_of_16_bit_images(load, pictures):
    Image.fromarray(np.full((4, 2), 1000, np.uint16)).save(pictures / "a.png")
    levels = read_one(load(train_data_dir=str(pictures), resolution="4", resize_mode="pad"), 65535)
    assert levels[0].tolist() == [[65535, 1000, 1000, 65535]] * 4


def test_a_line_keeps_a_pixel(load, pictures):
    Image.new("L", (300, 1), 0).save(pictures / "a.png")
    levels = read_one(load(train_data_dir=str(pictures), resolution="8", resize_mode="pad"))
    assert [row.tolist() for row in levels[0] if row.min() == 0] == [[0] * 8]


def test_nearest_keeps_the_colours(load, pictures):
    rgb = random_pixels(8, 8, 3)
    Image.fromarray(rgb).save(pictures / "a.png")
    data = load(train_data_dir=str(pictures), resolution="24", interpolation="nearest")
    expected = rgb.repeat(3, axis=0).repeat(3, axis=1).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_one(data), expected)


@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic", "bilinear", "box"])
def test_other_filters_average(load, pictures, interpolation):
    checker = 255 * (np.indices((64, 64)).sum(axis=0) % 2).astype(np.uint8)
    Image.fromarray(checker).save(pictures / "a.png")
    levels = read_one(load(train_data_dir=str(pictures), resolution="16", interpolation=interpolation))[0]
    # Without antialiasing a reduced checkerboard is black or white. The edge rows average over half a window.
    assert levels[2:-2, 2:-2].min() > 110
    assert levels[2:-2, 2:-2].max() < 145


# Augmentation


def numbered_images(tmp_path, num_images, height, width):
    """Saves images whose levels are the number of the image (channel 0), of the row (1) and of the column (2)."""
    images = np.zeros((num_images, height, width, 3), np.uint8)
    images[..., 0] = (np.arange(num_images) % 256)[:, None, None]
    images[..., 1] = np.arange(height)[:, None]
    images[..., 2] = np.arange(width)
    np.save(tmp_path / "numbered.npy", images)
    return str(tmp_path / "numbered.npy")


def test_half_of_the_images_are_flipped(load, tmp_path):
    path = numbered_images(tmp_path, 1024, 2, 4)
    columns = to_levels(read_all(load(dataset_name=path, resolution="4x2", random_flip=True)))[:, 2, 0]
    flipped = (columns == [3, 2, 1, 0]).all(axis=1)
    assert (flipped | (columns == [0, 1, 2, 3]).all(axis=1)).all()
    assert abs(flipped.sum() - 512) < 5 * 16  # 5 standard deviations, sqrt(1024) / 2 each

    columns = to_levels(read_all(load(dataset_name=path, resolution="4x2")))[:, 2, 0]
    assert (columns == [0, 1, 2, 3]).all()


def test_random_crop_covers_all_places(load, tmp_path):
    path = numbered_images(tmp_path, 400, 4, 12)
    levels = to_levels(read_all(load(dataset_name=path, resolution="4")))
    lefts = levels[:, 2, 0, 0]
    np.testing.assert_array_equal(levels[:, 2], lefts[:, None, None] + np.arange(4) + np.zeros((4, 1), int))
    np.testing.assert_array_equal(levels[:, 1], np.broadcast_to(np.arange(4)[:, None], (400, 4, 4)))
    assert set(lefts) == set(range(9))  # missing one of 9 places has probability 9 * (8/9)**400 < 1e-19


@pytest.mark.parametrize("height_width", [(4, 12), (12, 4)])
def test_augmentation_is_a_function_of_seed_epoch_and_index(load, tmp_path, height_width):
    path = numbered_images(tmp_path, 64, *height_width)

    def read(seed, epoch):
        data = load(dataset_name=path, resolution="4", random_flip=True, seed=seed)
        for passed_epoch in range(epoch % 3):  # the epochs before must not matter
            data.dataset.begin_epoch(passed_epoch, seed, random_flip=True)
        data.dataset.begin_epoch(epoch, seed, random_flip=True)
        return data.dataset, read_all(data)

    dataset, images = read(seed=1, epoch=5)
    for indices in ([63, 5, 17], [5], list(range(63, -1, -1))):
        torch.testing.assert_close(
            to_model_range(dataset.__getitems__(indices)["images"]), images[indices], rtol=0, atol=0
        )
    assert torch.equal(images, read(seed=1, epoch=5)[1])
    assert not torch.equal(images, read(seed=1, epoch=6)[1])
    assert not torch.equal(images, read(seed=2, epoch=5)[1])


def test_dataloader_gives_each_image_once_with_its_label(tmp_path, load):
    path = numbered_images(tmp_path, 50, 4, 4)
    np.save(tmp_path / "labels.npy", np.arange(50) % 7)
    flags = {"dataset_name": path, "labels_file": str(tmp_path / "labels.npy"), "resolution": "4"}
    data = load(with_labels=True, **flags)
    batches = list(make_dataloader(data, 16))
    assert [len(batch["images"]) for batch in batches] == [16, 16, 16, 2]
    assert all(batch["images"].dtype == torch.uint8 for batch in batches)
    assert all(batch["class_labels"].dtype == torch.int64 for batch in batches)
    numbers = np.concatenate([batch["images"][:, 0, 0, 0] for batch in batches])
    assert sorted(numbers) == list(range(50))
    assert list(numbers) != list(range(50))
    np.testing.assert_array_equal(np.concatenate([batch["class_labels"] for batch in batches]), numbers % 7)


# Sources


def test_built_in_sprites(load):
    data = load(with_labels=True, resolution="16", max_train_samples=20)
    images, class_labels, _ = draw_sprites(20)
    np.testing.assert_array_equal(to_levels(read_all(data)), images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.dataset.class_labels, class_labels)
    assert data.id2label == dict(enumerate(CLASS_NAMES))
    assert (data.num_images, data.num_channels, data.skipped_images) == (20, 3, [])


def test_built_in_sprites_with_transparency(load):
    data = load(with_labels=True, resolution="16", max_train_samples=20, image_mode="RGBA")
    images, _, _ = draw_sprites(20, transparent=True)
    expected = images * (images[..., 3:] == 255)  # black where nothing is drawn
    np.testing.assert_array_equal(to_levels(read_all(data)), expected.transpose(0, 3, 1, 2))


def test_arrays_with_straight_alpha(load, tmp_path):
    images = random_pixels(5, 8, 8, 4)
    np.save(tmp_path / "images.npy", images)
    expected = premultiplied(images.transpose(0, 3, 1, 2))
    data = load(dataset_name=str(tmp_path / "images.npy"), resolution="8", image_mode="RGBA")
    np.testing.assert_array_equal(to_levels(read_all(data)), expected)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    in_memory = load_tensor(tensor, DataConfig(resolution="8"))
    assert in_memory.num_channels == 4
    np.testing.assert_array_equal(to_levels(read_all(in_memory)), expected)
    np.save(tmp_path / "images.npy", images[..., :3])  # which need no copy in their own mode
    data = load(dataset_name=str(tmp_path / "images.npy"), resolution="8", image_mode="RGBA")
    opaque = np.full((5, 1, 8, 8), 255)
    np.testing.assert_array_equal(
        to_levels(read_all(data)), np.concatenate([images[..., :3].transpose(0, 3, 1, 2), opaque], 1)
    )


def test_labels_only_where_asked_for(load):
    data = load(resolution="16", max_train_samples=3)
    assert data.id2label is None
    assert set(data.dataset.__getitems__([0, 1])) == {"images"}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_npy_images(load, tmp_path, channels):
    images = random_pixels(5, 8, 8, channels)
    np.save(tmp_path / "images.npy", images)
    data = load(dataset_name=str(tmp_path / "images.npy"), resolution="8")
    expected = images.transpose(0, 3, 1, 2)
    if channels == 4:
        expected = compose(expected[:, :3], expected[:, 3:])
    np.testing.assert_array_equal(to_levels(read_all(data)), expected)


@pytest.mark.parametrize("one_hot", [True, False])
def test_npy_labels(load, tmp_path, one_hot):
    ids = np.array([2, 0, 3, 1, 2, 4])
    np.save(tmp_path / "images.npy", random_pixels(6, 8, 8, 3))
    np.save(tmp_path / "labels.npy", np.eye(5)[ids] if one_hot else ids)
    flags = {"dataset_name": str(tmp_path / "images.npy"), "labels_file": str(tmp_path / "labels.npy")}
    data = load(with_labels=True, resolution="8", **flags)
    np.testing.assert_array_equal(data.dataset.class_labels, ids)
    assert data.id2label == {k: str(k) for k in range(5)}
    data = load(with_labels=True, resolution="8", max_train_samples=5, class_names=list("vwxyz"), **flags)
    assert (data.num_images, data.dataset.class_labels.tolist()) == (5, [2, 0, 3, 1, 4])
    assert data.id2label == dict(enumerate("vwxyz"))


def save_tree(folder, names):
    """Saves an image of level k under the k-th of `names`, which may hold folders."""
    for level, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), level).save(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_names_are_the_classes(load, pictures, streaming):
    # `datasets` takes "train" and "test" in names for splits, and drops the files without such a name.
    names = ["cat/my_train.png", "cat/other.png", "dog/1.png", "test/[2].png", "toy_test/3.png"]
    save_tree(pictures, names)
    data = load(with_labels=True, train_data_dir=str(pictures), resolution="8", streaming=streaming)
    assert data.id2label == {0: "cat", 1: "dog", 2: "test", 3: "toy_test"}
    examples = as_multiset(data)
    assert sorted((levels[0], label) for levels, label in examples) == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)]


def test_folder_with_glob_characters(load, tmp_path):
    save_tree(tmp_path / "a [1]", ["0.png", "1.png"])
    assert load(train_data_dir=str(tmp_path / "a [1]"), resolution="8").num_images == 2


def test_split_of_a_folder(load, pictures):
    save_tree(pictures, ["train/a/0.png", "train/b/1.png", "valid/a/2.png", "valid/b/3.png", "valid/c/4.png"])
    data = load(with_labels=True, train_data_dir=str(pictures), resolution="8")
    assert (data.num_images, data.id2label) == (2, {0: "a", 1: "b"})
    data = load(with_labels=True, train_data_dir=str(pictures), resolution="8", dataset_split="valid")
    assert (data.num_images, data.id2label) == (3, {0: "a", 1: "b", 2: "c"})


def save_parquet(path, with_features=True, **columns):
    num_rows = len(next(iter(columns.values())))
    encoded = [encode(Image.new("L", (8, 8), level)) for level in range(num_rows)]
    features = None
    if with_features:
        label_names = [f"class {k}" for k in range(max(columns["label"]) + 1)]
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=label_names))
        encoded = [{"bytes": image, "path": None} for image in encoded]
    datasets.Dataset.from_dict({"image": encoded, **columns}, features=features).to_parquet(path)
    return str(path)


def test_parquet_with_features(load, tmp_path):
    path = save_parquet(tmp_path / "data.parquet", label=[1, 0, 2])
    data = load(with_labels=True, dataset_name=path, resolution="8")
    assert data.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
    assert to_levels(read_all(data))[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert data.dataset.class_labels.tolist() == [1, 0, 2]
    data = load(with_labels=True, dataset_name=path, resolution="8", class_names=["x", "y", "z"])
    assert data.id2label == {0: "x", 1: "y", 2: "z"}


def test_label_columns_of_integers_and_strings(load, tmp_path):
    path = save_parquet(tmp_path / "data.parquet", False, number=[2, 0, 1], word=["pear", "fig", "apple"])
    flags = {"dataset_name": path, "image_column": "image", "resolution": "8"}
    data = load(with_labels=True, label_column="number", **flags)
    assert (data.dataset.class_labels.tolist(), data.id2label) == ([2, 0, 1], {k: str(k) for k in range(3)})
    data = load(with_labels=True, label_column="word", **flags)
    assert data.dataset.class_labels.tolist() == [2, 1, 0]
    assert data.id2label == {0: "apple", 1: "fig", 2: "pear"}
    # Labels of a part of the data have the ids that they have in the whole: a class must not go missing unseen.
    with pytest.raises(UserInputError, match=r"no image is of the class pear: .*--max_train_samples"):
        load(with_labels=True, label_column="word", max_train_samples=2, **flags)
    data = load(with_labels=True, label_column="word", class_names=["fig", "pear", "apple"], **flags)
    assert data.dataset.class_labels.tolist() == [1, 0, 2]


def test_a_limited_set_has_images_of_all_classes(load, tmp_path):
    """The first images of a file that is sorted by class would all be of one class."""
    path = save_parquet(tmp_path / "data.parquet", True, label=[0] * 6 + [1] * 6 + [2] * 2)
    data = load(with_labels=True, dataset_name=path, resolution="8", max_train_samples=8)
    assert data.dataset.class_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert (data.num_images, data.num_available) == (8, 14)
    first, last = (load(with_labels=False, dataset_name=path, resolution="8", max_train_samples=n) for n in (14, 2))
    np.testing.assert_array_equal(read_all(last), read_all(first)[[0, 7]])


@pytest.mark.parametrize(("labels", "missing"), [([0, 1, 3, 3], "2"), ([0, 9_999, 0, 1], "2, 3, 4")])
def test_classes_without_an_image_are_refused(load, tmp_path, labels, missing):
    path = save_parquet(tmp_path / "data.parquet", False, number=labels)
    flags = {"dataset_name": path, "image_column": "image", "label_column": "number", "resolution": "8"}
    with pytest.raises(UserInputError, match=f"no image is of the class {missing}.*without gaps"):
        load(with_labels=True, **flags)


@pytest.mark.parametrize("label", [2 * 10**9, 2**64 - 1])
def test_a_huge_label_is_refused_at_once(load, tmp_path, label):
    np.save(tmp_path / "images.npy", random_pixels(3, 8, 8, 3))
    np.save(tmp_path / "labels.npy", np.array([0, 1, label], np.uint64))
    with pytest.raises(UserInputError, match=f"class {label}: number the classes anew"):
        load(
            with_labels=True,
            dataset_name=str(tmp_path / "images.npy"),
            labels_file=str(tmp_path / "labels.npy"),
            resolution="8",
        )


def test_local_dataset_folder(load, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    save_parquet(folder / "train.parquet", label=[0, 1])
    save_parquet(folder / "test.parquet", label=[0, 1, 0])
    assert load(dataset_name=str(folder), resolution="8").num_images == 2
    assert load(dataset_name=str(folder), dataset_split="test", resolution="8").num_images == 3


def test_bad_images_are_skipped_and_counted(load, pictures, capsys):
    save_tree(pictures, ["a/0.png", "a/1.png", "b/2.png", "b/3.png"])
    (pictures / "a/1.png").write_bytes(b"not an image")
    data = load(with_labels=True, train_data_dir=str(pictures), resolution="8", on_bad_image="skip")
    assert (data.num_images, len(data.skipped_images)) == (3, 1)
    assert to_levels(read_all(data))[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert data.dataset.class_labels.tolist() == [0, 1, 1]
    assert "1.png" in capsys.readouterr().err


# Images in memory


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["tensor", "array", "list", "names"])
def test_tensor_arrives_unchanged_with_its_labels(channels, kind):
    images = torch.from_numpy(random_pixels(50, 4, 6, channels)).permute(0, 3, 1, 2)  # as arrays mostly come
    images[:, 0, 0, 0] = torch.arange(50)
    ids = torch.arange(50) % 7
    names = list("bcdefgh")
    labels = {"tensor": ids, "array": ids.numpy(), "list": ids.tolist(), "names": [names[id] for id in ids]}[kind]
    data = load_tensor(images, DataConfig(resolution="6x4"), labels)
    assert (data.num_images, data.num_channels, data.skipped_images) == (50, channels, [])
    assert data.id2label == dict(enumerate(names if kind == "names" else "0123456"))
    batches = list(make_dataloader(data, 16))
    assert [len(batch["images"]) for batch in batches] == [16, 16, 16, 2]
    pixels, class_labels = (torch.cat([batch[key] for batch in batches]) for key in ("images", "class_labels"))
    numbers = pixels[:, 0, 0, 0].long()
    assert sorted(numbers.tolist()) == list(range(50))
    assert (pixels.dtype, class_labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(pixels, images[numbers])
    assert torch.equal(class_labels, ids[numbers])


def test_tensor_without_labels_or_with_names_of_classes():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    data = load_tensor(images, DataConfig(resolution="4"))
    assert data.id2label is None
    assert set(data.dataset.__getitems__([0, 1])) == {"images"}
    data = load_tensor(images, DataConfig(resolution="4", class_names=["cat", "dog"]), [1, 0])
    assert data.id2label == {0: "cat", 1: "dog"}


def test_larger_tensor_is_cropped_at_random_places():
    images = torch.zeros(400, 3, 6, 8, dtype=torch.uint8)
    images[:, 1] = torch.arange(6)[:, None]
    images[:, 2] = torch.arange(8)
    data = load_tensor(images, DataConfig(resolution="4"))
    places = []
    for epoch in range(2):
        data.dataset.begin_epoch(epoch)
        pixels = data.dataset.__getitems__(list(range(400)))["images"].long()
        assert pixels.shape == (400, 3, 4, 4)
        tops, lefts = pixels[:, 1, :1, :1], pixels[:, 2, :1, :1]
        assert torch.equal(pixels[:, 1], (tops + torch.arange(4)[:, None]).expand(400, 4, 4))
        assert torch.equal(pixels[:, 2], (lefts + torch.arange(4)).expand(400, 4, 4))
        places.append(list(zip(tops.flatten().tolist(), lefts.flatten().tolist(), strict=True)))
    # 3 x 5 places: missing one of them has probability 15 * (14/15)**400 < 1e-10.
    assert set(places[0]) == {(top, left) for top in range(3) for left in range(5)}
    assert places[0] != places[1]


BYTES = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
TENSOR_ERRORS = {
    "float": (BYTES.float(), None, ["torch.float32", "(3, 3, 8, 8)", "uint8"]),
    "bfloat16": (BYTES.bfloat16(), None, ["torch.bfloat16", "uint8"]),
    "three axes": (BYTES[:, :, 0], None, ["(3, 3, 8)", "(N, C, H, W)"]),
    "channels last": (BYTES.movedim(1, 3), None, ["(3, 8, 8, 3)", "1, 3 or 4 channels"]),
    "two channels": (BYTES[:, :2], None, ["(3, 2, 8, 8)", "1, 3 or 4 channels"]),
    "no images": (BYTES[:0], None, ["(0, 3, 8, 8)"]),
    "too low": (BYTES[:, :, :7], None, ["--resolution 8", "8x7"]),
    "too narrow": (BYTES[:, :, :, :7], None, ["--resolution 8", "7x8"]),
    "too few labels": (BYTES, [0, 1], ["2 class labels", "3 images"]),
    "one label": (BYTES, torch.tensor(0), ["1 class labels", "3 images"]),
    "one-hot labels": (BYTES, torch.eye(3), ["9 class labels", "3 images"]),
    "fractional labels": (BYTES, torch.tensor([0, 0.5, 1]), ["class_labels", "integers or strings"]),
    "negative label": (BYTES, torch.tensor([0, -1, 1]), ["class_labels, row 1", "label -1", "0 to 1"]),
    "missing label": (BYTES, ["a", None, "b"], ["class_labels, row 1", "label None"]),
}


@pytest.mark.parametrize("case", TENSOR_ERRORS)
def test_tensor_that_does_not_fit(case):
    images, labels, parts = TENSOR_ERRORS[case]
    with pytest.raises(UserInputError) as raised:
        load_tensor(images, DataConfig(resolution="8"), labels)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# The store of decoded images


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """Returns a list to which the name of each decoded image is added; the store is empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "store"))
    names = []

    def prepare(image, name, config):
        names.append(name)
        return prepare_image(image, name, config)

    monkeypatch.setattr(decoding, "prepare_image", prepare)
    return names


def test_images_are_decoded_once_for_each_source_and_setting(load, pictures, decoded):
    save_tree(pictures, ["0.png", "1.png", "2.png"])

    def read(**flags):
        decoded.clear()
        return read_all(load(train_data_dir=str(pictures), **{"resolution": "8", **flags}))

    first = read()
    assert len(decoded) == 3
    torch.testing.assert_close(read(seed=5), first, rtol=0, atol=0)
    assert decoded == []
    for changed in ({"resolution": "4"}, {"background": "black"}, {"max_train_samples": 2}, {"on_bad_image": "skip"}):
        read(**changed)
        assert decoded != [], changed
    Image.new("RGB", (8, 8), "red").save(pictures / "1.png")
    assert read()[1].tolist() == torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 8, 8).tolist()


def test_changed_array_is_read_anew(load, tmp_path, decoded):
    for level in (3, 4):
        np.save(tmp_path / "images.npy", np.full((2, 4, 4, 1), level, np.uint8))
        assert read_one(load(dataset_name=str(tmp_path / "images.npy"), resolution="4")).max() == level


def test_store_keeps_depth_size_channels_and_skipped_images(load, pictures, decoded):
    deep = np.linspace(0, 65535, 12 * 8).round().astype(np.uint16).reshape(8, 12)
    Image.fromarray(deep).save(pictures / "0.png")
    (pictures / "1.png").write_bytes(b"not an image")
    Image.new("RGB", (8, 8), (0, 128, 255)).save(pictures / "2.png")
    flags = {"train_data_dir": str(pictures), "resolution": "8", "on_bad_image": "skip", "seed": 1}
    first = load(**flags)
    again = load(**flags)
    assert len(decoded) == 2
    for data in (first, again):
        assert [name.rsplit("/")[-1] for name, _ in data.skipped_images] == ["1.png"]
        images = to_levels(read_all(data), 65535)
        left = int(data.dataset.offsets[0][1])
        np.testing.assert_array_equal(images[0], np.broadcast_to(deep[:, left : left + 8], (3, 8, 8)))
        np.testing.assert_array_equal(images[1, :, 0, 0], [0, 128 * 257, 65535])


def swap_rows(path):
    table = np.load(path)
    np.save(path, table[::-1])


DAMAGES = {
    "pixels truncated": lambda folder: os.truncate(folder / "pixels.bin", 1),
    "pixels of zeros": lambda folder: change_bytes(folder / "pixels.bin", lambda content: bytes(len(content))),
    "pixels inverted": lambda folder: change_bytes(
        folder / "pixels.bin", lambda content: bytes(255 - b for b in content)
    ),
    "one bit": lambda folder: change_bytes(
        folder / "pixels.bin", lambda content: content[:-1] + bytes([content[-1] ^ 1])
    ),
    "rows swapped": lambda folder: swap_rows(folder / "table.npy"),
    "table empty": lambda folder: (folder / "table.npy").write_bytes(b""),
    "table of one number": lambda folder: np.save(folder / "table.npy", 1),
    "table of other columns": lambda folder: np.save(folder / "table.npy", np.zeros((2, 2), np.int64)),
    "table of objects": lambda folder: np.save(folder / "table.npy", np.array([{}, {}]), allow_pickle=True),
    "no skipped images": lambda folder: (folder / "skipped.json").unlink(),
    "skipped images of another form": lambda folder: (folder / "skipped.json").write_text("[[1]]"),
    "skipped images not UTF-8": lambda folder: (folder / "skipped.json").write_bytes(b"\xff"),
    "digest empty": lambda folder: (folder / "xxh3.txt").write_text(""),
    "digest not UTF-8": lambda folder: (folder / "xxh3.txt").write_bytes(b"\xff"),
    "digest missing": lambda folder: (folder / "xxh3.txt").unlink(),
    "a folder for a file": lambda folder: ((folder / "table.npy").unlink(), (folder / "table.npy").mkdir()),
    "a file for the folder": lambda folder: (folder.rename(folder.with_name("other")), folder.touch()),
    "a process was killed while it wrote": lambda folder: folder.rename(folder.with_suffix(".partial")),
}


def change_bytes(path, change):
    path.write_bytes(change(path.read_bytes()))


def stores(tmp_path):
    """Returns the folders of stored images."""
    return [path for path in (tmp_path / "store").rglob("images/*") if path.is_dir()]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_store_is_written_anew(load, pictures, decoded, tmp_path, damage):
    save_tree(pictures, ["0.png", "1.png"])
    first = read_all(load(train_data_dir=str(pictures), resolution="8"))
    (folder,) = stores(tmp_path)
    DAMAGES[damage](folder)
    for num_decoded in (2, 0):
        decoded.clear()
        torch.testing.assert_close(read_all(load(train_data_dir=str(pictures), resolution="8")), first, rtol=0, atol=0)
        assert len(decoded) == num_decoded


@pytest.mark.parametrize("kind", ["folder", "array", "parquet", "dataset folder"])
def test_pixels_that_change_at_the_same_time_of_change_are_read_anew(load, pictures, tmp_path, kind):
    """`cp -p`, `rsync -t` and archives keep the time of modification."""
    path = {"folder": pictures / "0.png", "array": tmp_path / "images.npy"}.get(
        kind, tmp_path / "set" / "train.parquet"
    )
    path.parent.mkdir(exist_ok=True)
    flag = {"folder": {"train_data_dir": str(pictures)}, "dataset folder": {"dataset_name": str(path.parent)}}
    flags = flag.get(kind, {"dataset_name": str(path)})

    def write(level):
        if kind == "folder":
            Image.new("L", (8, 8), level).save(path)
        elif kind == "array":
            np.save(path, np.full((1, 8, 8, 1), level, np.uint8))
        else:
            features = datasets.Features(image=datasets.Image())
            images = [{"bytes": encode(Image.new("L", (8, 8), level)), "path": None}]
            datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(path)

    sizes = []
    for level in (100, 101):
        write(level)
        sizes.append(path.stat().st_size)
        os.utime(path, (1e9, 1e9))
        assert read_one(load(resolution="8", **flags)).max() == level
    assert sizes[0] == sizes[1]


def test_others_can_not_read_the_stored_pixels(load, pictures, decoded, tmp_path):
    save_tree(pictures, ["0.png"])
    load(train_data_dir=str(pictures), resolution="8")
    (folder,) = stores(tmp_path)
    cache = folder.parent.parent
    assert (cache.name, stat.S_IMODE(cache.stat().st_mode)) == ("sprite-diffusion", 0o700)
    cache.chmod(0o755)  # as earlier versions made it
    load(train_data_dir=str(pictures), resolution="8")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_the_cache_has_a_limit_and_holds_no_leftovers(load, pictures, decoded, tmp_path, monkeypatch):
    save_tree(pictures, ["0.png"])

    def read(side):
        load(train_data_dir=str(pictures), resolution=str(side))

    read(100)  # 10,000 bytes
    (oldest,) = stores(tmp_path)
    os.utime(oldest, (1e9, 1e9))
    (oldest.parent / "killed.partial").mkdir()
    (oldest.parent / "busy.partial").mkdir()
    with FileLock(oldest.parent / "busy.lock"):  # as of a process that decodes
        read(101)
        assert oldest in stores(tmp_path)
        assert not (oldest.parent / "killed.partial").exists()
        assert (oldest.parent / "busy.partial").exists()
    (other,) = set(stores(tmp_path)) - {oldest, oldest.parent / "busy.partial"}
    os.utime(other, (1e9 + 1, 1e9 + 1))  # within one tick of the file system's clock both would be as old
    read(100)  # which is used again, and is no longer the oldest
    monkeypatch.setenv("SPRITE_DIFFUSION_CACHE_GB", "0.000011")
    read(102)
    assert oldest in stores(tmp_path)
    assert len(stores(tmp_path)) == 2
    monkeypatch.setenv("SPRITE_DIFFUSION_CACHE_GB", "many")
    with pytest.raises(UserInputError, match="SPRITE_DIFFUSION_CACHE_GB is 'many': give gigabytes"):
        read(100)


def test_store_that_cannot_be_written(load, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserInputError, match="set XDG_CACHE_HOME"):
        load(dataset_name="sprites", max_train_samples=2, resolution="16")


@pytest.mark.parametrize("width", [73, 74])
def test_images_are_mapped_not_loaded(load, tmp_path, decoded, width):
    """Reads 64 MB of pixels in batches, which take no memory but that of a batch.

    An array of the resolution is mapped where it is; another one is copied into the store.
    """
    np.save(tmp_path / "images.npy", np.zeros((4000, 73, width, 3), np.uint8))
    flags = {"dataset_name": str(tmp_path / "images.npy"), "resolution": "73"}
    load(**flags)
    assert len(decoded) == (0 if width == 73 else 4000)

    def private_bytes():
        return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    before = private_bytes()
    data = load(**flags)
    for start in range(0, 4000, 500):
        data.dataset.__getitems__(list(range(start, start + 500)))
    assert private_bytes() - before < 32e6


def exchange_red_and_green(profile):
    """Returns an sRGB profile under another name, with red and green exchanged."""
    content = bytearray(profile)
    at = {tag: content.find(tag) for tag in (b"rXYZ", b"gXYZ")}  # in the table: signature, offset, size
    offsets = {tag: content[place + 4 : place + 12] for tag, place in at.items()}
    content[at[b"rXYZ"] + 4 : at[b"rXYZ"] + 12] = offsets[b"gXYZ"]
    content[at[b"gXYZ"] + 4 : at[b"gXYZ"] + 12] = offsets[b"rXYZ"]
    return bytes(content).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("mode", "profile", "expected"),
    [
        ("RGB", exchange_red_and_green(SRGB_PROFILE), (40, 200, 90)),
        ("RGBA", exchange_red_and_green(SRGB_PROFILE), (40, 200, 90)),
        ("P", exchange_red_and_green(SRGB_PROFILE), (40, 200, 90)),
        ("RGB", SRGB_PROFILE, (200, 40, 90)),
        ("RGB", b"broken", (200, 40, 90)),
        ("L", exchange_red_and_green(SRGB_PROFILE), (93, 93, 93)),  # a profile of another mode is ignored
    ],
)
def test_colour_profiles_are_converted_to_srgb(load, pictures, mode, profile, expected):
    image = Image.new("RGB", (8, 8), (200, 40, 90))
    image = image.quantize() if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putpixel((0, 0), (200, 40, 90, 0))  # its transparency stays
    image.save(pictures / "0.png", icc_profile=profile)
    pixels = read_one(load(train_data_dir=str(pictures), resolution="8", image_mode="RGB"))
    # lcms rounds the linear values and the result: half a level each, and the curve's steep end doubles the former.
    np.testing.assert_allclose(pixels[:, 4, 4], expected, atol=2)
    if mode == "RGBA":
        assert pixels[:, 0, 0].tolist() == [255, 255, 255]


def test_premultiplied_alpha(load, pictures):
    """A TIFF whose colours are multiplied by their opacity already shows what its straight twin shows."""
    image = Image.new("RGBA", (8, 8), (100, 50, 24, 128))
    image.save(pictures / "straight.tif")
    content = bytearray((pictures / "straight.tif").read_bytes())
    entry = content.find(struct.pack("<HHI", 338, 3, 1))  # ExtraSamples
    assert content[entry + 8] == 2
    content[entry + 8] = 1  # associated alpha: the same pixels stand for colours of 255 / 128 times as much
    (pictures / "straight.tif").write_bytes(content)
    pixels = read_one(load(train_data_dir=str(pictures), resolution="8"))
    # On white: c + (1 - 128 / 255) * 255 = c + 127. Dividing by the opacity and multiplying again rounds twice.
    np.testing.assert_allclose(pixels[:, 4, 4], (227, 177, 151), atol=1)


# Streams


def as_multiset(data):
    """Returns the images' levels and labels, sorted."""
    if data.num_images is None:
        items = [(item["images"][None], item.get("class_labels")) for item in data.dataset]
    else:
        batch = data.dataset.__getitems__(list(range(data.num_images)))
        items = zip(to_model_range(batch["images"]).split(1), batch["class_labels"], strict=True)
    return sorted((tuple(to_levels(image).flatten()), int(label)) for image, label in items)


@pytest.fixture
def coloured_tree(pictures):
    for index in range(24):
        path = pictures / f"class {index % 3}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random_pixels(6, 9, 3, seed=index)).save(path)
    return str(pictures)


def test_stream_gives_the_same_images(load, coloured_tree):
    flags = {"train_data_dir": coloured_tree, "resolution": "6", "center_crop": True}
    in_memory, stream = (load(with_labels=True, streaming=s, **flags) for s in (False, True))
    assert (stream.id2label, stream.num_channels) == (in_memory.id2label, in_memory.num_channels)
    assert stream.num_images is None
    assert as_multiset(stream) == as_multiset(in_memory)
    assert len(as_multiset(load(with_labels=True, streaming=True, max_train_samples=5, **flags))) == 5


def test_stream_with_transparency(load, pictures):
    """Images of any mode may come in any order: they all have four channels."""
    save_tree(pictures, [f"{k:02}.png" for k in range(20)])
    rgba = random_pixels(8, 8, 4)
    Image.fromarray(rgba).save(pictures / "99.png")
    data = load(train_data_dir=str(pictures), resolution="8", streaming=True, image_mode="RGBA")
    images = [to_levels(item["images"]) for item in data.dataset]
    assert (data.num_channels, len(images)) == (4, 21)
    assert sorted(image[:, 0, 0].tolist() for image in images if (image[3] == 255).all()) == [
        [k, k, k, 255] for k in range(20)
    ]
    assert any(np.array_equal(image, premultiplied(rgba.transpose(2, 0, 1))) for image in images)


def test_stream_depends_on_seed_and_epoch(load, coloured_tree):
    def read(epoch, seed=0, random_flip=False, **flags):
        data = load(train_data_dir=coloured_tree, resolution="6", streaming=True, **flags)
        data.dataset.begin_epoch(epoch, seed, random_flip)
        return [tuple(item["images"].flatten().tolist()) for item in data.dataset]

    whole = read(0, center_crop=True)  # without random crops only the order is random
    assert read(0, center_crop=True) == whole
    for other in (read(1, center_crop=True), read(0, center_crop=True, seed=1)):
        assert other != whole
        assert sorted(other) == sorted(whole)

    crops = read(0)
    assert read(0) == crops
    for other in (read(1), read(0, seed=1)):
        assert sorted(other) != sorted(crops)

    num_flipped = len(set(read(0, center_crop=True, random_flip=True)) - set(whole))
    assert 0 < num_flipped < 24  # none or all have probability 2**-23


def test_stream_of_grey_and_colour(load, pictures):
    save_tree(pictures, ["0.png", "1.png"])
    Image.new("RGB", (8, 8), "red").save(pictures / "2.png")
    data = load(train_data_dir=str(pictures), resolution="8", streaming=True)
    assert data.num_channels == 3
    corners = sorted(to_levels(item["images"])[:, 0, 0].tolist() for item in data.dataset)
    assert corners == [[0, 0, 0], [1, 1, 1], [255, 0, 0]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_in_a_dataloader(tmp_path, load, num_workers):
    labels = [k % 3 for k in range(20)]
    path = save_parquet(tmp_path / "data.parquet", label=labels)
    flags = {"dataset_name": path, "resolution": "8", "streaming": True, "max_train_steps": 1}
    data = load(with_labels=True, **flags)
    config = TrainingConfig(train_batch_size=8, dataloader_num_workers=num_workers, **flags)
    batches = list(make_dataloader(data, config.train_batch_size))
    assert batches[0]["images"].shape == (8, 1, 8, 8)
    pairs = [
        (level, label)
        for batch in batches
        for level, label in zip(to_levels(batch["images"])[:, 0, 0, 0], batch["class_labels"], strict=True)
    ]
    assert sorted(pairs) == list(enumerate(labels))
    assert pairs != list(enumerate(labels))


def test_stream_skips_bad_images(load, pictures, capsys):
    save_tree(pictures, [f"{k:02}.png" for k in range(20)])
    (pictures / "18.png").write_bytes(b"not an image")
    data = load(train_data_dir=str(pictures), resolution="8", streaming=True, on_bad_image="skip")
    assert sorted(to_levels(item["images"])[0, 0, 0] for item in data.dataset) == [*range(18), 19]
    error_lines = capsys.readouterr().err.splitlines()
    assert len(error_lines) == 2
    assert "18.png" in error_lines[0]
    assert "1 images skipped" in error_lines[1]


def test_stream_that_turns_to_colour(load, pictures):
    save_tree(pictures, [f"{k:02}.png" for k in range(20)])
    Image.new("RGB", (8, 8), "red").save(pictures / "99.png")
    data = load(train_data_dir=str(pictures), resolution="8", streaming=True)
    assert data.num_channels == 1
    with pytest.raises(UserInputError, match="--image_mode"):
        list(data.dataset)
    data = load(train_data_dir=str(pictures), resolution="8", streaming=True, image_mode="RGB")
    assert {item["images"].shape for item in data.dataset} == {(3, 8, 8)}


# Errors


def truncated_png():
    whole = encode(Image.fromarray(random_pixels(32, 32, 3)))
    return whole[: len(whole) // 2]


def folder_of(names, **contents):
    def make(tmp_path):
        save_tree(tmp_path / "in", names)
        for name, content in contents.items():
            (tmp_path / "in" / name.replace("__", ".")).write_bytes(content)

    return make


def parquet_of(**columns):
    return lambda tmp_path: save_parquet(tmp_path / "in.parquet", False, **columns)


def arrays_of(labels, images=None):
    def make(tmp_path):
        np.save(tmp_path / "in.npy", random_pixels(3, 8, 8, 3) if images is None else images)
        np.save(tmp_path / "labels.npy", labels, allow_pickle=True)

    return make


def bad_class_label(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    image = {"bytes": encode(Image.new("L", (8, 8))), "path": None}
    rows = {"image": [image] * 3, "label": [0, -1, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "in.parquet")


def two_image_columns(tmp_path):
    features = datasets.Features(left=datasets.Image(), right=datasets.Image())
    image = {"bytes": encode(Image.new("L", (8, 8))), "path": None}
    rows = {"left": [image], "right": [image]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "in.parquet")


def wide_float(tmp_path):
    save_tree(tmp_path / "in", [])
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((8, 8), 200, np.float32)).save(tmp_path / "in" / "deep.tiff")


FOLDER = {"train_data_dir": "in"}
UNLABELLED = {**FOLDER, "with_labels": False}
PARQUET = {"dataset_name": "in.parquet"}
ARRAYS = {"dataset_name": "in.npy", "labels_file": "labels.npy"}
IMAGE = {"image_column": "image"}
NOT_ONE_HOT = np.array([[1, 0], [1, 1], [0, 1]])
ERRORS = {
    "missing folder": (None, FOLDER, ["--train_data_dir", "in", "no such folder"]),
    "empty folder": (lambda path: (path / "in").mkdir(), FOLDER, ["--train_data_dir", "in", "no image"]),
    "no image in folder": (folder_of(["x.png"]), {**FOLDER, "dataset_split": "test"}, ["--dataset_split", "test"]),
    "undecodable image": (folder_of(["a.png"], bad__png=b"x"), UNLABELLED, ["bad.png", "--on_bad_image skip"]),
    "truncated image": (folder_of(["a.png"], cut__png=truncated_png()), UNLABELLED, ["cut.png", "truncated"]),
    "only bad images": (
        folder_of(["a.png"], a__png=b"x"),
        {**UNLABELLED, "on_bad_image": "skip"},
        ["in", "no image that can be decoded"],
    ),
    "float image out of range": (wide_float, UNLABELLED, ["deep.tiff", "200", "0 to 1"]),
    "image of another size": (
        folder_of(["a.png"]),
        {**UNLABELLED, "resize_mode": "none", "resolution": "8x4"},
        ["a.png", "8x8", "8x4", "--resize_mode"],
    ),
    "missing parquet": (None, PARQUET, ["--dataset_name", "in.parquet"]),
    "not a parquet": (lambda path: (path / "in.parquet").write_bytes(b"x"), PARQUET, ["--dataset_name in.parquet"]),
    "missing dataset folder": (None, {"dataset_name": "./in"}, ["--dataset_name ./in", "no such folder"]),
    "missing split": (parquet_of(x=[1]), {**PARQUET, "dataset_split": "test"}, ["--dataset_split test", "train"]),
    "no image column": (parquet_of(x=[1]), PARQUET, ["in.parquet", "--image_column", "image, x"]),
    "two image columns": (two_image_columns, PARQUET, ["left, right", "--image_column"]),
    "wrong image column": (parquet_of(x=[1]), {**PARQUET, "image_column": "img"}, ["--image_column img", "image, x"]),
    "image column of numbers": (
        parquet_of(x=[1]),
        {**PARQUET, "image_column": "x", "label_column": "x"},
        ["row 0", "not an image"],
    ),
    "no label column": (parquet_of(x=[1]), {**PARQUET, **IMAGE}, ["in.parquet", "--label_column", "image, x"]),
    "flat folder": (folder_of(["a.png"]), FOLDER, ["in", "--label_column", "folder of its own"]),
    "wrong label column": (parquet_of(x=[1]), {**PARQUET, **IMAGE, "label_column": "y"}, ["--label_column y", "x"]),
    "fractional labels": (parquet_of(x=[0.5]), {**PARQUET, **IMAGE, "label_column": "x"}, ["'x'", "integers"]),
    "unknown string": (
        parquet_of(x=["a", "b"]),
        {**PARQUET, **IMAGE, "label_column": "x", "class_names": ["a", "c"]},
        ["in.parquet", "'x'", "row 1", "'b'", "a, c"],
    ),
    "label missing": (parquet_of(x=["a", None]), {**PARQUET, **IMAGE, "label_column": "x"}, ["'x'", "row 1"]),
    "label too large": (
        parquet_of(x=[0, 2]),
        {**PARQUET, **IMAGE, "label_column": "x", "class_names": ["a", "b"]},
        ["'x'", "row 1", "label 2", "0 to 1"],
    ),
    "label of no class": (bad_class_label, PARQUET, ["in.parquet", "'label'", "row 1", "label -1", "0 to 1"]),
    "too few class names": (bad_class_label, {**PARQUET, "class_names": ["a"]}, ["--class_names", "1", "2 classes"]),
    "class names of a folder": (
        folder_of(["a/1.png", "b/1.png"]),
        {**FOLDER, "class_names": ["a", "b", "c"]},
        ["--class_names", "3", "2 classes"],
    ),
    "missing npy": (None, {"dataset_name": "in.npy"}, ["--dataset_name in.npy", "no such file"]),
    "not an npy": (lambda path: (path / "in.npy").write_bytes(b"x"), ARRAYS, ["--dataset_name in.npy"]),
    "float npy": (arrays_of([0], np.zeros((1, 8, 8, 3))), ARRAYS, ["--dataset_name in.npy", "float64", "uint8"]),
    "npy of 2 channels": (arrays_of([0], random_pixels(1, 8, 8, 2)), ARRAYS, ["in.npy", "1, 3 or 4 channels"]),
    "no labels file": (arrays_of([0]), {"dataset_name": "in.npy"}, ["in.npy", "--labels_file"]),
    "pickled labels": (arrays_of(np.array([0, "a"], object)), ARRAYS, ["--labels_file labels.npy"]),
    "too few labels": (arrays_of([0, 1]), ARRAYS, ["--labels_file labels.npy", "2 labels", "3 images"]),
    "not one-hot": (arrays_of(NOT_ONE_HOT), ARRAYS, ["--labels_file labels.npy", "row 1", "one-hot"]),
    "negative label": (arrays_of([0, 1, -1]), ARRAYS, ["--labels_file labels.npy", "row 2", "label -1"]),
    "fractional npy labels": (arrays_of([0, 0.5, 1]), ARRAYS, ["--labels_file labels.npy", "integers"]),
    "labels file of a folder": (folder_of(["a.png"]), {**FOLDER, "labels_file": "y.npy"}, ["--labels_file", ".npy"]),
    "unknown colour": (None, {"background": "whit"}, ["--background whit"]),
    "streamed sprites": (None, {"streaming": True}, ["--streaming", "sprites"]),
    "streamed empty folder": (
        lambda path: (path / "in").mkdir(),
        {**FOLDER, "streaming": True},
        ["--train_data_dir", "no image"],
    ),
    "streamed csv": (
        lambda path: [(path / "in").mkdir(), (path / "in" / "train.csv").write_text("image,label\na.png,1\n")],
        {"dataset_name": "./in", "streaming": True},
        ["--streaming", "columns"],
    ),
    "streamed integers": (
        parquet_of(x=[1]),
        {**PARQUET, **IMAGE, "label_column": "x", "streaming": True},
        ["in.parquet", "'x'", "--class_names"],
    ),
    "streamed label of no class": (bad_class_label, {**PARQUET, "streaming": True}, ["'label'", "label -1", "0 to 1"]),
    "streamed truncated image": (
        folder_of(["a/1.png", "b/1.png"], cut__png=truncated_png()),
        {**UNLABELLED, "streaming": True},
        ["cut.png", "--on_bad_image skip"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_names_what_to_change(case, load, tmp_path, monkeypatch):
    make, flags, parts = ERRORS[case]
    if make is not None:
        make(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserInputError) as raised:
        load(**{"with_labels": True, "resolution": "8", **flags})
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_unreachable_hub_names_the_flag(load, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'some/name' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserInputError, match=r"--dataset_name some/name: no such folder, .*Couldn't reach.*Hub$"):
        load(dataset_name="some/name")
