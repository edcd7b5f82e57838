"""Tests sprite sheets, written and cut, and palettes: on pictures and colours whose right answer is known."""

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import TINY
from PIL import Image
from tiny_network import make_tiny_network

import pipelines
from pipelines import ConditionalDDPMPipeline, UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import DataConfig
from sprite_diffusion.data.dataset import load_image_data, load_tensor
from sprite_diffusion.sampling.flags import parse_args
from sprite_diffusion.sampling.palettes import Palette, learn_palette, learn_pixel_art, read_palette
from sprite_diffusion.sampling.sheets import draw_sheet, write_sheet
from sprite_diffusion.sampling.views import choose_finish

NAMES = ("hero", "food")
RECTANGLE = {"x": int, "y": int, "w": int, "h": int}
# The types of "json-array", in which Aseprite exports; TexturePacker's has the same keys but for durations and tags.
FRAME = {
    "filename": str,
    "frame": RECTANGLE,
    "rotated": bool,
    "trimmed": bool,
    "spriteSourceSize": RECTANGLE,
    "sourceSize": {"w": int, "h": int},
    "duration": int,
}
META = {
    "app": str,
    "version": str,
    "image": str,
    "format": str,
    "size": {"w": int, "h": int},
    "scale": str,
    "frameTags": list,
}
TAG = {"name": str, "from": int, "to": int, "direction": str}


def check_types(value, types) -> None:
    """Fails unless a value has all keys of `types`, each of its type and no other."""
    if isinstance(types, dict):
        for name, kind in types.items():
            check_types(value[name], kind)
    else:
        assert type(value) is types


def random_images(number: int, *shape: int) -> torch.Tensor:
    """Returns images whose levels are whole, no two pixels of which are likely to be equal."""
    return torch.randint(0, 256, (number, *shape), generator=torch.Generator().manual_seed(0)) / 255


def to_array(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A conditional model."""
    folder = tmp_path_factory.mktemp("models")
    process = ClosedFormDDPMScheduler(prediction_type="v_prediction")
    network = make_tiny_network(num_class_embeds=len(NAMES) + 1)
    ConditionalDDPMPipeline(network, process, dict(enumerate(NAMES))).save_pretrained(folder / "conditional")
    return folder


@pytest.fixture
def sample(run_script, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(model: str, flags: str) -> None:
        run_script("sample", f"{folders / model} --num_inference_steps 2 {flags}")

    return run


def complaint(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


class TestWrittenSheets:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("scale", [1, 3])
    def test_each_frame_is_its_image(self, tmp_path, channels, scale):
        images = random_images(5, channels, 2, 4)
        record = {"model": "m", "images": [{"seed": i, "class": None} for i in range(5)]}
        write_sheet(images, tmp_path / "a.png", 3, scale, record)
        data = json.loads((tmp_path / "a.json").read_text())
        sheet = Image.open(tmp_path / data["meta"]["image"])
        assert (sheet.width, sheet.height) == (3 * 4 * scale, 2 * 2 * scale)
        assert sheet.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        for image, frame in zip(to_array(images), data["frames"], strict=True):
            x, y, w, h = (frame["frame"][name] for name in "xywh")
            cut = np.asarray(sheet.crop((x, y, x + w, y + h))).reshape(h, w, channels)
            assert (cut == image.repeat(scale, 0).repeat(scale, 1)).all()
        assert data["meta"]["frameTags"] == []

    @pytest.mark.parametrize(("channels", "empty"), [(1, "first"), (3, "first"), (4, "transparent")])
    def test_cells_that_are_left_over_are_empty(self, channels, empty):
        images = random_images(3, channels, 2, 2)
        pixels = np.asarray(draw_sheet(images, 2, 1)).reshape(4, 4, channels)
        expected = to_array(images)[0, 0, 0] if empty == "first" else [0, 0, 0, 0]
        assert (pixels[2:, 2:] == expected).all()

    def test_samples_as_a_sheet(self, sample, folders):
        sample("conditional", "--num_images 3 --seed 7 --sheet new/a.png")
        sample("conditional", "--num_images 3 --seed 7 --scale 1 --output single")
        data = json.loads(Path("new/a.json").read_text())
        assert list(data) == ["frames", "meta"]
        check_types(data["meta"], META)
        for frame in data["frames"]:
            check_types(frame, FRAME)
        for tag in data["meta"]["frameTags"]:
            check_types(tag, TAG)
        assert [(tag["name"], tag["from"], tag["to"]) for tag in data["meta"]["frameTags"]] == [
            ("hero", 0, 2),
            ("food", 3, 5),
        ]
        assert [(frame["seed"], frame["class"]) for frame in data["frames"]] == [
            *((7, "hero"), (8, "hero"), (9, "hero"), (10, "food"), (11, "food"), (12, "food"))
        ]
        sheet = Image.open("new/a.png")
        assert sheet.size == (data["meta"]["size"]["w"], data["meta"]["size"]["h"]) == (24, 16)  # a class per row
        assert sheet.text["model"] == str(folders / "conditional") == data["meta"]["generation"]["model"]
        for i, frame in enumerate(data["frames"]):
            x, y = frame["frame"]["x"], frame["frame"]["y"]
            written = Image.open(f"single/{i:05d}.png")
            assert (np.asarray(sheet.crop((x, y, x + 8, y + 8))) == np.asarray(written)).all()
        assert {path.name for path in Path.cwd().iterdir()} == {"new", "single"}

    def test_columns_and_scale(self, sample):
        sample("conditional", "--num_images 3 --columns 5 --scale 2 --sheet a.png")
        assert Image.open("a.png").size == (5 * 16, 2 * 16)
        assert json.loads(Path("a.json").read_text())["frames"][5]["frame"] == {"x": 0, "y": 16, "w": 16, "h": 16}

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--sheet a.png --output b.png", "--sheet FILE takes no --output"),
            ("--sheet a.gif", "--sheet a.gif: name a .png file"),
            ("--sheet a.png --compare ddim:2", "--compare: not allowed with argument --sheet"),
            ("--columns 3", "--columns belongs to --sheet FILE"),
            ("--sheet a.png --columns 0", "--columns is 0"),
            ("--colours_per_image 3", "--colours_per_image N belongs to --palette"),
            ("--palette 8 --colours_per_image 1", "--colours_per_image is 1: it must be at least 2"),
            ("--palette 8 --compare ddim:2", "--palette and --binary_alpha are for samples, not for --compare"),
            ("--palette 8 --animate a.gif", "--palette and --binary_alpha are for samples, not for --animate"),
            ("--palette 1", "--palette is 1: it must be at least 2 and at most 256"),
            ("--palette colours.txt", "--palette colours.txt: give 'auto', a number or a .gpl"),
            ("--palette missing.gpl", "--palette missing.gpl: no such file"),
        ],
    )
    def test_flags_that_do_not_go_together(self, tmp_path, monkeypatch, flags, message):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sample.py", "model", *flags.split()])
        with pytest.raises(UserInputError, match=re.escape(message)):
            parse_args(None)


class TestCutSheets:
    @pytest.fixture
    def sheet(self, tmp_path):
        """Writes a sheet of three rows of four cells, 2 high and 3 wide. Returns its file and its cells (12, ...)."""
        cells = np.random.default_rng(0).integers(1, 256, (12, 2, 3, 4), dtype=np.uint8)
        cells[..., 3] = 255
        cells[5] = (9, 8, 7, 255)  # of one colour
        cells[6, ..., 3] = 0  # hidden colours
        (tmp_path / "sheets").mkdir()
        path = tmp_path / "sheets" / "sheet.png"
        Image.fromarray(cells.reshape(3, 4, 2, 3, 4).swapaxes(1, 2).reshape(6, 12, 4)).save(path)
        return path, cells

    def read(self, with_labels: bool | None = None, **flags):
        config = DataConfig(**{"cell": "3x2", "resolution": "3x2", **flags})
        data = load_image_data(config, with_labels)
        images = data.dataset.gather(range(len(data.dataset)), np.zeros((len(data.dataset), 2), int))
        return data, images.transpose(0, 2, 3, 1)

    @pytest.mark.parametrize("named", ["dataset_name", "train_data_dir", "folder"])
    def test_cells_come_in_reading_order_without_the_empty_ones(self, sheet, named):
        path, cells = sheet
        flags = {"train_data_dir": str(path.parent)} if named == "folder" else {named: str(path)}
        data, images = self.read(**flags)
        np.testing.assert_array_equal(images, np.delete(cells, [5, 6], axis=0)[..., :3])
        assert data.class_names is None
        assert data.num_available == 10

    def test_labels_by_row(self, sheet):
        data, _ = self.read(dataset_name=str(sheet[0]), sheet_labels=["tree", "cat", "tree"])
        assert data.class_names == ["cat", "tree"]
        assert data.dataset.class_labels.tolist() == [1] * 4 + [0] * 2 + [1] * 4  # the second row has two empty cells
        few, _ = self.read(dataset_name=str(sheet[0]), sheet_labels=["tree", "cat", "tree"], max_train_samples=4)
        assert sorted(few.dataset.class_labels) == [0, 0, 1, 1]

    def test_a_palette_is_looked_up_and_its_transparent_colour_is_empty(self, tmp_path):
        image = Image.fromarray(np.array([[0, 1, 2, 2], [1, 1, 2, 2]], np.uint8))
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        image.save(tmp_path / "a.png", transparency=2)
        _, images = self.read(dataset_name=str(tmp_path / "a.png"), cell="2", resolution="2")
        assert images.tolist() == [[[[10, 20, 30], [40, 50, 60]], [[40, 50, 60], [40, 50, 60]]]]

    def test_a_sheet_that_was_written_is_read_back(self, tmp_path):
        images = random_images(7, 3, 4, 4)
        write_sheet(images, tmp_path / "a.png", 3, 1, {"images": [{"seed": 0, "class": None}] * 7})
        _, read = self.read(dataset_name=str(tmp_path / "a.png"), cell="4x4", resolution="4")
        np.testing.assert_array_equal(read, to_array(images))  # without the two cells that are left over

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"cell": "5x2"}, "sheet.png is 12x6, no multiple of it: give the size of a cell"),
            ({"cell": "big"}, "--cell is 'big': give a side (32) or WIDTHxHEIGHT (24x16)"),
            ({"sheet_labels": ["a", "b"]}, "--sheet_labels gives 2 names: "),
            ({"dataset_name": "sprites"}, "--dataset_name sprites is no .png file"),
            ({"resize_mode": "none", "resolution": "8"}, "cell 0,0 of "),
            ({"cell": None, "sheet_labels": ["a"]}, "--sheet_labels belongs to --cell"),
        ],
    )
    def test_sheets_that_can_not_be_cut(self, sheet, flags, message):
        with pytest.raises(UserInputError, match=re.escape(message)):
            self.read(**{"dataset_name": str(sheet[0]), **flags})

    def test_a_conditional_training_needs_the_labels(self, sheet):
        with pytest.raises(UserInputError, match="name the class of each row of a sheet by --sheet_labels"):
            self.read(with_labels=True, dataset_name=str(sheet[0]))

    def test_a_sheet_of_nothing(self, tmp_path):
        Image.new("RGBA", (6, 2)).save(tmp_path / "a.png")
        with pytest.raises(UserInputError, match=r"every cell of .* is empty"):
            self.read(dataset_name=str(tmp_path / "a.png"))

    def test_a_damaged_sheet_is_skipped_if_asked_for(self, sheet, tmp_path):
        (sheet[0].parent / "b.png").write_bytes(b"no image")
        flags = {"train_data_dir": str(sheet[0].parent)}
        with pytest.raises(UserInputError, match=r"b\.png is not an image"):
            self.read(**flags)
        data, images = self.read(**flags, on_bad_image="skip")
        assert len(images) == 10
        assert [Path(image.name).name for image in data.skipped_images] == ["b.png"]

    def test_another_sheet_of_the_same_name_is_decoded_anew(self, sheet):
        path, _ = sheet
        _, before = self.read(dataset_name=str(path))
        Image.fromarray(255 - np.asarray(Image.open(path).convert("RGB"))).save(path)
        _, after = self.read(dataset_name=str(path))
        np.testing.assert_array_equal(after[0], 255 - before[0])

    def test_a_run_from_a_sheet_gives_its_palette(self, run_script, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        colours = np.array([(255, 255, 255), (200, 0, 0), (0, 0, 200)], np.uint8)
        cells = colours[np.random.default_rng(0).integers(3, size=(16, 160))]
        Image.fromarray(cells).save("sheet.png")
        run_script("train_unconditional", f"{TINY} --dataset_name sheet.png --cell 16", tmp_path / "run")
        run_script("sample", "run --num_images 4 --num_inference_steps 2 --palette auto --sheet a.png")
        written = np.asarray(Image.open("a.png")).reshape(-1, 3)
        assert {*map(tuple, written.tolist())} == {*map(tuple, colours.tolist())}
        assert json.loads(Image.open("a.png").text["palette"]) == {
            "source": "auto",
            "colours": ["#0000c8", "#c80000", "#ffffff"],
        }
        assert Path("run/palette.hex").read_text() == "0000c8\nc80000\nffffff\n"
        Path("sheet.png").unlink()  # the palette is kept with the model
        run_script("sample", "run/checkpoint-3 --num_images 4 --num_inference_steps 2 --palette auto --sheet b.png")
        written = np.asarray(Image.open("b.png")).reshape(-1, 3)
        assert {*map(tuple, written.tolist())} <= {*map(tuple, colours.tolist())}

    def test_a_resumed_run_on_other_images_keeps_no_palette_of_the_first(self, run_script, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 2, (16, 160, 3), np.uint8) * 255).save("sheet.png")
        flags = f"{TINY} --logger none --dataset_name sheet.png --cell 16"
        run_script("train_unconditional", f"{flags} --max_train_steps 3", tmp_path / "run")
        assert len(Path("run/palette.hex").read_text().split()) == 8
        Image.fromarray(rng.integers(0, 256, (16, 160, 3), np.uint8)).save("sheet.png")
        run_script("train_unconditional", f"{flags} --resume_from_checkpoint latest", tmp_path / "run")
        assert not Path("run/palette.hex").exists()


def to_oklab(colours: np.ndarray) -> np.ndarray:
    """Returns colours (..., 3) uint8 in OKLab."""
    return pipelines.to_oklab(torch.from_numpy(colours / 255)).numpy()


RANDOM_GREEN_OR_BLUE = np.random.default_rng(0).integers(2, 4, size=(8, 8))


class TestPalettes:
    @pytest.mark.parametrize(
        ("colour", "expected"),
        [  # of CSS Color Module Level 4, whose examples have five digits
            ((255, 255, 255), (1, 0, 0)),
            ((0, 0, 0), (0, 0, 0)),
            ((128, 128, 128), (0.59987, 0, 0)),  # the cube root of a linear level of 0.21586
            ((255, 0, 0), (0.62796, 0.22486, 0.12585)),
            ((0, 255, 0), (0.86644, -0.23389, 0.17950)),
            ((0, 0, 255), (0.45201, -0.03246, -0.31153)),
        ],
    )
    def test_oklab(self, colour, expected):
        np.testing.assert_allclose(to_oklab(np.array(colour, np.uint8)), expected, atol=1e-5)

    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_each_pixel_takes_the_nearest_colour_and_keeps_its_alpha(self, channels):
        colours = np.array([(0, 0, 0), (255, 255, 255), (120, 120, 120), (90, 90, 90)], np.uint8)
        if channels > 1:
            colours = np.concatenate([colours, np.random.default_rng(1).integers(256, size=(9, 3), dtype=np.uint8)])
        images = random_images(6, channels, 5, 7)
        snapped = Palette(colours, "").snap(images)
        assert snapped.shape == images.shape
        pixels = to_array(images)[..., :3] if channels > 1 else to_array(images).repeat(3, axis=-1)
        distances = np.square(to_oklab(pixels)[..., None, :] - to_oklab(colours)).sum(-1)
        expected = colours[distances.argmin(-1)]
        np.testing.assert_array_equal(to_array(snapped)[..., :3], expected[..., : min(channels, 3)])
        assert torch.equal(snapped[:, 3:], images[:, 3:])

    def test_each_image_keeps_the_colours_that_fit_it_best(self):
        """As the best of all choices of three where one step decides; and no more than three in any case."""
        colours = np.array([(0, 0, 0), (255, 255, 255), (255, 0, 0), (250, 20, 0)], np.uint8)
        palette = Palette(colours, "", colours_per_image=3)
        image = colours[np.array([[0, 0, 0, 1], [1, 1, 2, 2], [2, 2, 3, 1]])]  # one pixel of the second red

        def loss(kept) -> float:
            distances = np.square(to_oklab(image)[..., None, :] - to_oklab(colours[list(kept)])).sum(-1)
            return distances.min(-1).sum()

        best = colours[list(min(itertools.combinations(range(4), 3), key=loss))]
        images = torch.from_numpy(np.stack([image, image[::-1]])).permute(0, 3, 1, 2) / 255
        snapped = to_array(palette.snap(images))
        assert {*map(tuple, snapped.reshape(-1, 3).tolist())} == {*map(tuple, best.tolist())}
        np.testing.assert_array_equal(snapped[0][image[..., 1] != 20], image[image[..., 1] != 20])

        noise = random_images(5, 3, 8, 8)
        many = np.random.default_rng(2).integers(256, size=(40, 3), dtype=np.uint8)
        few, all_of_them = (to_array(Palette(many, "", limit).snap(noise)) for limit in (3, None))
        assert [len(np.unique(picture.reshape(-1, 3), axis=0)) for picture in few] == [3] * 5
        assert min(len(np.unique(picture.reshape(-1, 3), axis=0)) for picture in all_of_them) > 3

    def test_colours_that_nobody_sees_are_not_among_them(self):
        colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)
        hidden = torch.zeros(1, 4, 2, 4)  # black and transparent; below it red, blue and a dark red
        hidden[0, :, 1, :] = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [0.9, 0, 0, 1], [1, 0, 0, 1.0]]).T
        seen = to_array(Palette(colours, "", colours_per_image=2).snap(hidden))[0, 1]
        assert seen[:, :3].tolist() == [[255, 0, 0], [0, 0, 255], [255, 0, 0], [255, 0, 0]]
        assert to_array(Palette(colours, "", colours_per_image=2).snap(0 * hidden)).shape == (1, 2, 4, 4)

    def test_what_can_hardly_be_seen_hardly_counts(self):
        """As a network leaves it around a sprite: many pixels of other colours, a level or two above no alpha."""
        colours = np.array([(255, 0, 0), (255, 255, 255), (0, 255, 0), (0, 0, 255)], np.uint8)
        image = torch.zeros(1, 4, 8, 8)
        image[0, :3] = torch.from_numpy(colours[RANDOM_GREEN_OR_BLUE]).permute(2, 0, 1) / 255
        image[0, 3] = 2 / 255
        image[0, :, 0, :2] = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]).T
        snapped = to_array(Palette(colours, "", colours_per_image=2).snap(image))
        np.testing.assert_array_equal(snapped[0, 0, :2, :3], colours[:2])

    def test_nearness_is_the_eyes(self):
        """Dark blue is near black to the eye, and nearer to mid blue than to black in RGB."""
        image = torch.tensor([0, 0, 100]).view(1, 3, 1, 1) / 255
        palette = np.array([(0, 0, 0), (0, 0, 255), (0, 90, 40)], np.uint8)
        rgb = np.square(palette.astype(int) - [0, 0, 100]).sum(1).argmin()
        lab = np.square(to_oklab(palette) - to_oklab(np.array([0, 0, 100], np.uint8))).sum(1).argmin()
        assert rgb != lab
        assert (to_array(Palette(palette, "").snap(image))[0, 0, 0] == palette[lab]).all()

    def images(self, pixels: np.ndarray, **config):
        """Returns pixels (N, H, W, C) uint8 as a dataset."""
        size = f"{pixels.shape[2]}x{pixels.shape[1]}"
        return load_tensor(torch.from_numpy(pixels).permute(0, 3, 1, 2), DataConfig(resolution=size, **config)).dataset

    def test_few_colours_are_the_palette(self):
        colours = np.random.default_rng(0).integers(256, size=(200, 3), dtype=np.uint8)
        pixels = np.concatenate([colours, colours[::-1]]).reshape(4, 10, 10, 3)
        assert {*map(tuple, learn_palette(self.images(pixels), None))} == {*map(tuple, colours)}
        grey = np.arange(200, dtype=np.uint8).reshape(2, 10, 10, 1)
        np.testing.assert_array_equal(learn_palette(self.images(grey), 256), np.arange(200)[:, None].repeat(3, 1))

    def test_many_colours_are_clustered_and_each_is_of_the_data(self):
        """Eight colours with noise of two levels around them, and a ground of pure white: one colour near each."""
        rng = np.random.default_rng(0)
        centres = np.array([(r, g, b) for r in (30, 220) for g in (30, 220) for b in (30, 220)])
        noisy = centres[rng.integers(8, size=3000)] + rng.integers(-2, 3, (3000, 3))
        pixels = np.concatenate([noisy, np.full((1000, 3), 255)]).astype(np.uint8).reshape(10, 20, 20, 3)
        palette = learn_palette(self.images(pixels), 9)
        assert {*map(tuple, palette)} <= {*map(tuple, pixels.reshape(-1, 3))}
        distances = np.abs(palette[:, None].astype(int) - [*centres, (255, 255, 255)]).max(-1)
        assert sorted(distances.argmin(1)) == [*range(9)]
        assert distances.min(1).max() <= 2
        assert (255, 255, 255) in {*map(tuple, palette.tolist())}
        assert (learn_palette(self.images(pixels), 9) == palette).all()
        assert len(learn_palette(self.images(pixels), None)) == 32
        assert learn_pixel_art(self.images(pixels)) is None  # an image has a hundred colours

    def test_pixel_art_has_few_colours_in_an_image_however_many_in_all(self):
        colours = np.random.default_rng(0).integers(256, size=(60, 4, 3), dtype=np.uint8)
        pixels = colours[np.arange(60)[:, None], np.arange(64) % 4].reshape(60, 8, 8, 3)
        palette = learn_pixel_art(self.images(pixels))
        assert {*map(tuple, palette)} == {*map(tuple, colours.reshape(-1, 3))}
        assert learn_pixel_art(self.images(np.zeros((2, 8, 8, 3), np.uint8))) is None  # of one colour

    def test_files(self, tmp_path):
        colours = [(26, 28, 44), (93, 39, 93), (177, 62, 83)]
        texts = {
            "a.gpl": "GIMP Palette\nName: A\nColumns: 16\n#\n 26  28  44\tnight\n93 39 93\n177\t62\t83\tred 1\n",
            "a.hex": "1a1c2c\r\n5D275D\r\n\r\n#b13e53\r\n1a1c2c",
            "a.PAL": "JASC-PAL\r\n0100\r\n3\r\n26 28 44\r\n93 39 93\r\n177 62 83\r\n",
        }
        for name, text in texts.items():
            (tmp_path / name).write_bytes(text.encode())
        swatches = Image.new("RGBA", (4, 2))  # transparent where there is no swatch
        for i, colour in enumerate(colours):
            swatches.putpixel((i, 0), (*colour, 255))
        swatches.save(tmp_path / "a.png")
        for name in (*texts, "a.png"):
            assert read_palette(tmp_path / name).tolist() == [list(colour) for colour in colours], name

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.gpl", b"1 2 3\n4 5 6\n", " can't be read (its first line is not 'GIMP Palette')"),
            ("a.pal", b"RIFF\x00\x01", " can't be read (its first line is not 'JASC-PAL')"),
            ("a.pal", b"\xff\xfe\x00", " can't be read ("),
            ("a.hex", b"ffffff\nred\n", " can't be read ('red' is no colour)"),
            ("a.hex", b"", ": colours found: 0"),
            ("a.hex", b"ffffff\n", ": colours found: 1; it must have 2 to 256"),
            ("a.gpl", b"GIMP Palette\n1 2 300\n4 5 6\n", " has levels above 255"),
            ("a.hex", "\n".join(f"{i:06x}" for i in range(257)).encode(), ": colours found: 257"),
            ("a.png", b"no image", " can't be read ("),
        ],
    )
    def test_files_that_hold_no_palette(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserInputError, match=re.escape(f"--palette {tmp_path / name}{message}")):
            read_palette(tmp_path / name)

    def test_samples_snapped_to_a_file(self, sample, tmp_path):
        (tmp_path / "two.hex").write_text("102030\nf0e0d0\n")
        sample("conditional", "--num_images 2 --palette two.hex --output grid --scale 1")
        for i in range(4):
            picture = Image.open(f"grid/{i:05d}.png")
            assert {colour for _, colour in picture.getcolors()} <= {(16, 32, 48), (240, 224, 208)}
            assert json.loads(picture.text["palette"]) == {"source": "two.hex", "colours": ["#102030", "#f0e0d0"]}
        sample("conditional", "--num_images 2 --output raw --scale 1")
        assert len(Image.open("raw/00000.png").getcolors()) > 32

    def test_alpha_is_all_or_nothing_where_asked_for(self, tmp_path):
        (tmp_path / "two.hex").write_text("102030\nf0e0d0\n")
        network = make_tiny_network(in_channels=4, out_channels=4)
        pipeline = UnconditionalDDPMPipeline(network, ClosedFormDDPMScheduler())
        flags = SimpleNamespace(
            model="model", palette=str(tmp_path / "two.hex"), colours_per_image=None, binary_alpha=True
        )
        finish = choose_finish(flags, pipeline)
        images = random_images(3, 4, 8, 8)
        levels, finished = to_array(images), to_array(finish(images))
        np.testing.assert_array_equal(finished[..., 3], np.where(levels[..., 3] >= 128, 255, 0))
        colours = finished[finished[..., 3] == 255][:, :3]
        assert {*map(tuple, colours.tolist())} == {(16, 32, 48), (240, 224, 208)}
        assert not finished[finished[..., 3] == 0].any()
        assert finish.record["binary_alpha"] is True

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--palette auto", "is not the folder of a run"),
            ("--palette 8", "is not the folder of a run"),
            ("--binary_alpha", "--binary_alpha: "),
        ],
    )
    def test_models_that_have_no_palette_or_no_alpha(self, sample, capsys, flags, message):
        with pytest.raises(SystemExit):
            sample("conditional", f"--num_images 1 {flags}")
        error = complaint(capsys)
        assert error.startswith("error: --")
        assert message in error
        assert not list(Path.cwd().iterdir())
