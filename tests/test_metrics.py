"""Tests calculate_metrics.py, --evaluate_every and their parts, on data and models of seconds."""

import itertools
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from launching import LAUNCH_TWO, PYTHON, TINY, complaints, finish, run_command, start
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from pipelines import UnconditionalDDPMPipeline
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.files import cache_dir
from sprite_diffusion.data.dataset import load_image_data
from sprite_diffusion.data.doubles import NEAR_COPY
from sprite_diffusion.metrics import classifier, pixel_art, real_images
from sprite_diffusion.metrics import judge as judging
from sprite_diffusion.metrics.classifier import Classifier, is_weak, load_classifier, load_tensors, save_tensors
from sprite_diffusion.metrics.distances import frechet_distance
from sprite_diffusion.metrics.evaluation import (
    choose_num_images,
    evaluate,
    generate,
    make_evaluation_sampler,
    match_conditions,
)
from sprite_diffusion.metrics.extractors import Extractor, make_extractor, real_features
from sprite_diffusion.metrics.pixel_art import CLEAR, PixelArt, encode
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.metrics.report import Measurement, Report, append_history, is_lowest
from sprite_diffusion.runs import outputs
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.sampling import samplers
from sprite_diffusion.sampling.pipeline_loading import load_pipeline
from sprite_diffusion.sharing.card import make_card

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, for tests of what is written there; the others share the classifiers of the session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sprite-diffusion"


def sprites(number: int = 300, with_labels: bool = True, **config) -> RealImages:
    values = {"dataset_name": "sprites", "max_train_samples": number, "resolution": "16", **config}
    return RealImages(load_image_data(TrainingConfig(**values), with_labels=with_labels))


def measure(real: RealImages, images: torch.Tensor, judge_classes: bool = False, extractor: Extractor | None = None):
    """Evaluates images in batches of different sizes."""
    extractor = extractor or make_extractor("classifier", "", real, CPU)
    rows = torch.arange(len(images)).split([7, len(images) - 7])
    return evaluate(real, extractor, iter((r, images[r]) for r in rows), len(images), judge_classes)


class TestRealImages:
    def test_halves_are_disjoint_and_random_and_the_same_each_time(self):
        real = sprites(301)
        assert len(real.reference) == len(real.held_out) == 150
        assert len({*real.reference, *real.held_out}) == 300
        assert (np.diff(real.reference) < 0).any()
        assert (real.reference == sprites(301).reference).all()

    def test_images_are_as_in_the_data_in_order_in_the_centre_and_never_flipped(self, tmp_path):
        images = np.random.default_rng(0).integers(256, size=(20, 10, 14, 3), dtype=np.uint8)
        np.save(tmp_path / "images.npy", images)
        real = sprites(dataset_name=str(tmp_path / "images.npy"), with_labels=False, resolution="10", random_flip=True)
        # An image of 14x10 covers 10x10 without a resize. Training crops it at random, and metrics in the centre.
        expected = images[[3, 11], :, 2:12].transpose(0, 3, 1, 2)
        assert (real[np.array([3, 11])].numpy() == expected).all()

    def test_deep_grey_is_rounded_to_8_bits(self, tmp_path):
        for i in range(20):
            # 257 levels of 16 bits make one of 8, so that 128.5 lies between two.
            values = np.array([[0, 128, 129, 65535]] * 4, dtype=np.uint16)
            Image.fromarray(values).save(tmp_path / f"{i:02d}.png")
        real = sprites(dataset_name=None, train_data_dir=str(tmp_path), with_labels=False, resolution="4")
        assert real[np.array([0])][0, 0, 0].tolist() == [0, 0, 1, 255]
        assert real[np.array([0])].dtype == torch.uint8

    def test_too_few_images(self):
        with pytest.raises(UserInputError, match="at least 20 images"):
            sprites(19)

    def test_the_key_is_of_pixels_labels_and_resolution(self):
        keys = [
            sprites().key,
            sprites(with_labels=False).key,
            sprites(301).key,
            sprites(resolution="8").key,
            sprites(resolution="8", interpolation="nearest").key,
        ]
        assert len(set(keys)) == len(keys)
        assert sprites().key == keys[0]

    def test_what_transparent_pixels_hide_makes_no_difference(self, tmp_path):
        images = np.random.default_rng(0).integers(256, size=(20, 8, 8, 4), dtype=np.uint8)
        images[..., 3] = np.random.default_rng(1).choice([0, 128, 255], images.shape[:3])
        keys = []
        for hidden in (0, 99):
            images[images[..., 3] == 0] = hidden, 0, hidden, 0
            np.save(tmp_path / "images.npy", images)
            flags = {"dataset_name": str(tmp_path / "images.npy"), "with_labels": False, "resolution": "8"}
            real = sprites(**flags, image_mode="RGBA")
            keys.append(real.key)
        assert keys[0] == keys[1]
        assert (real[np.arange(20)][:, :3] <= real[np.arange(20)][:, 3:]).all()

    @pytest.mark.parametrize("searched_at_once", [4096, 17])
    def test_nearest(self, monkeypatch, searched_at_once):
        monkeypatch.setattr(real_images, "SEARCHED_AT_ONCE", searched_at_once)
        real = sprites(60)
        everything = real[np.arange(60)].double() / 255
        images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        expected = (images[:, None].double() / 255 - everything).square().mean((2, 3, 4)).sqrt()  # (5, 60)
        distances, indices = real.find_nearest(images)
        assert indices.tolist() == expected.argmin(1).tolist()
        # The distance is the mean of 768 squares in float32.
        torch.testing.assert_close(distances.double(), expected.amin(1), rtol=768 * 2**-24, atol=0)

    def test_nearest_of_a_training_image_is_itself_unless_left_out(self):
        real = sprites(60)
        rows = np.array([30, 4, 59])
        distances, indices = real.find_nearest(real[rows])
        assert distances.tolist() == [0, 0, 0]
        assert indices.tolist() == rows.tolist()
        distances, indices = real.find_nearest(real[rows], exclude=torch.from_numpy(rows))
        assert (distances > 0).all()
        assert not set(indices.tolist()) & set(rows.tolist())


def save_noise_and_labels(folder: Path) -> None:
    """Writes an array of noise for data, and a folder of the same images as what is to be measured."""
    images = np.random.default_rng(0).integers(256, size=(60, 16, 16, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{i:02d}.png")


def overwrite(file: Path, start: int, end: int, change) -> None:
    content = bytearray(file.read_bytes())
    content[start:end] = bytes(change(byte) for byte in content[start:end])
    file.write_bytes(content)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


# Each way of damage to a file of the cache.
DAMAGE = {
    "zeros in the data": lambda file: overwrite(file, -4000, -2000, lambda byte: 0),
    "an inverted byte": lambda file: overwrite(file, -9, -8, lambda byte: byte ^ 255),
    "zeros in the header": lambda file: overwrite(file, 0, 200, lambda byte: 0),
    "another name in the header": lambda file: file.write_bytes(file.read_bytes().replace(b"weight", b"weighs")),
    "inverted": lambda file: overwrite(file, 0, None, lambda byte: byte ^ 255),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(np.random.default_rng(0).bytes(3000)),
    "tensors without a digest": lambda file: save_file(load_file(file), file, {"accuracy": "0.5"}),
    "tensors without metadata": lambda file: save_file(load_file(file), file),
    "a folder": replace_by_folder,
}


class TestClassifier:
    def test_learns_classes_and_is_trained_once(self, cache, monkeypatch):
        real = sprites(600)
        network, accuracy = load_classifier(real, CPU)
        scores = network.head(network(real[real.held_out]))
        right = (scores.argmax(1) == real.class_labels[real.held_out]).double().mean().item()
        assert accuracy == pytest.approx(right)
        assert not is_weak(accuracy, real)
        monkeypatch.setattr(classifier, "_train", None)  # a call would fail
        again, _ = load_classifier(sprites(600), CPU)
        images = real[real.reference[:10]]
        assert torch.equal(again(images), network(images))

    def test_does_not_touch_the_random_state(self, cache, monkeypatch):
        monkeypatch.setattr(classifier, "TRAINING_STEPS", 2)
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        load_classifier(sprites(60), CPU)
        assert torch.rand(1) == expected

    def test_without_classes_it_learns_to_find_images_again(self, cache):
        real = sprites(600, with_labels=False)
        network, accuracy = load_classifier(real, CPU)
        assert real.class_labels is None
        assert network(real[real.held_out[:3]]).shape == (3, 128)
        assert accuracy > 20 / 256  # 20 times what guessing gives, after a second

    def test_a_weak_one_is_warned_of(self, cache, capsys, tmp_path):
        labels = np.random.default_rng(0).integers(4, size=400)  # nothing can be learned
        images = np.random.default_rng(1).integers(256, size=(400, 8, 8, 3), dtype=np.uint8)
        np.save(tmp_path / "images.npy", images)
        np.save(tmp_path / "labels.npy", labels)
        files = {"dataset_name": str(tmp_path / "images.npy"), "labels_file": str(tmp_path / "labels.npy")}
        make_extractor("classifier", "", sprites(None, **files, resolution="8"), CPU)
        assert "warning: the classifier is too weak" in capsys.readouterr().out

    def test_a_cache_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(UserInputError, match="set XDG_CACHE_HOME"):
            load_classifier(sprites(60), CPU)

    def test_a_cache_file_may_be_written_twice_at_the_same_time(self, tmp_path, monkeypatch):
        def save_slowly(tensors, path, metadata):
            save_file(tensors, path, metadata)
            time.sleep(0.2)

        monkeypatch.setattr(classifier, "save_file", save_slowly)
        with ThreadPoolExecutor() as threads:
            writes = [
                threads.submit(save_tensors, {"a": torch.full((3,), float(i))}, tmp_path / "a.safetensors", {})
                for i in range(3)
            ]
        assert [write.exception() for write in writes] == [None] * 3
        (tensor,) = load_file(tmp_path / "a.safetensors").values()
        assert tensor.unique() in torch.arange(3.0)

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_one_is_trained_again(self, cache, damage, monkeypatch):
        monkeypatch.setattr(classifier, "TRAINING_STEPS", 2)
        network, accuracy = load_classifier(sprites(60), CPU)
        (file,) = cache.glob("classifier-*.safetensors")
        DAMAGE[damage](file)
        assert load_tensors(file) is None
        again, accuracy_again = load_classifier(sprites(60), CPU)
        assert accuracy_again == accuracy
        for name, tensor in network.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert load_tensors(file) is not None

    def test_the_cache_is_its_owners(self, tmp_path):
        save_tensors({"a": torch.zeros(3)}, tmp_path / "new" / "a.safetensors", {})
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
        assert modes == dict.fromkeys(modes, 0o600)
        assert "a.safetensors" in modes

    @pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
    def test_a_signal_while_it_is_trained_ends_the_program_and_leaves_nothing(self, tmp_path, signal_number, status):
        def classifiers() -> set[Path]:
            return {path for path in cache_dir().glob("*classifier*") if path.suffix != ".lock"}

        save_noise_and_labels(tmp_path)
        before = classifiers()
        flags = f"{tmp_path / 'images'} --dataset_name {tmp_path / 'images.npy'} --resolution 16"
        process = start("calculate_metrics", flags, tmp_path / "out")
        assert process.stderr is not None
        text = ""
        while "training the classifier" not in text:
            text += os.read(process.stderr.fileno(), 1000).decode()
        process.send_signal(signal_number)
        result = finish(process, status)
        assert not (tmp_path / "out").exists()
        assert classifiers() == before
        assert not complaints(result.stderr)

    @pytest.mark.parametrize("size", [(1, 1), (8, 20), (16, 16), (28, 28), (64, 48)])
    def test_takes_images_of_any_size(self, size):
        network = Classifier(1, 3, size).eval()
        assert network(torch.zeros(2, 1, *size, dtype=torch.uint8)).shape == (2, 128)


class TestEvaluate:
    def test_training_images_are_reported_as_copies(self):
        real = sprites(200)
        report, _ = measure(real, real[real.reference])
        assert report.figures["nearest_distance"].value == 0
        assert report.figures["near_copies"].value == 1
        assert report.figures["near_copies"].interval == (1, 1)
        assert report.figures["nearest_distance"].real > 0  # held-out images must not find themselves
        assert report.figures["near_copies"].real < 1
        assert report.figures["frechet_distance"].value < 1e-6
        assert report.figures["precision"].value == report.figures["recall"].value == 1

    def test_held_out_images_score_as_the_floor_and_worse_images_worse(self, cache, monkeypatch):
        monkeypatch.setattr(classifier, "TRAINING_STEPS", 200)
        real = sprites(1000)
        extractor = make_extractor("classifier", "", real, CPU)
        images = real[real.held_out]
        held_out, _ = measure(real, images, extractor=extractor)
        names = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
        for name in names:
            assert held_out.figures[name].value == pytest.approx(held_out.figures[name].real)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        noisy = [(images + noise * level).round().clamp(0, 255).to(torch.uint8) for level in (50, 100)]
        blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1).round().to(torch.uint8)
        for worse in ([images, *noisy], [images, blurred]):
            reports = [measure(real, versions, extractor=extractor)[0] for versions in worse]
            for better, worse in itertools.pairwise(report.figures for report in reports):
                for name in ("frechet_distance", "kernel_distance", "nearest_distance"):
                    assert worse[name].value > better[name].interval[1]
                for name in ("precision", "recall", "density", "coverage"):
                    assert worse[name].value < better[name].interval[0]

    def test_fewer_kinds_of_images_cost_recall_and_coverage(self):
        real = sprites(400)
        few = real[real.held_out[:10]].repeat(20, 1, 1, 1)
        report, _ = measure(real, few)
        assert report.figures["recall"].value < 0.5 * report.figures["recall"].real
        assert report.figures["coverage"].value < 0.5 * report.figures["coverage"].real
        assert report.figures["precision"].value > 0.5

    def test_near_copies_are_those_within_the_threshold(self):
        real = sprites(60)
        images = real[real.reference]
        level = NEAR_COPY * 255
        # Every pixel is moved by as much, towards the middle, as a level beyond 255 would be cut off.
        move = lambda levels: torch.where(images > 127, images - levels, images + levels).to(torch.uint8)  # noqa: E731
        near, _ = measure(real, move(int(level)))
        far, _ = measure(real, move(int(level) + 1))
        assert near.figures["near_copies"].value == 1
        assert far.figures["near_copies"].value == 0
        assert near.figures["nearest_distance"].value == pytest.approx(int(level) / 255)

    def test_doubles_in_the_data_show_in_the_floor(self, tmp_path):
        images = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
        images[1::2] = images[::2]
        np.save(tmp_path / "images.npy", images)
        real = sprites(None, dataset_name=str(tmp_path / "images.npy"), with_labels=False, resolution="8")
        report, _ = measure(real, 255 - real[real.reference])
        assert report.figures["near_copies"].real == 1
        assert report.figures["near_copies"].value == 0

    def test_classes(self):
        real = sprites(400)
        extractor = make_extractor("classifier", "", real, CPU)
        labels = real.class_labels[real.reference]
        right, _ = measure(real, real[real.reference], judge_classes=True, extractor=extractor)
        seen = extractor.classify(real[real.reference]).argmax(1)
        assert right.figures["class_accuracy"].value == pytest.approx((seen == labels).double().mean().item())
        assert right.figures["class_accuracy"].real == pytest.approx(extractor.accuracy)
        assert {name: figure.num_images for name, figure in right.of_class.items()} == {
            name: int((labels == id).sum()) for id, name in real.id2label.items()
        }
        assert max(figure.value for figure in right.of_class.values()) < 1e-6
        of_class = lambda half, id: extractor.extract(real[half[real.class_labels[half] == id]])  # noqa: E731
        for id, name in real.id2label.items():
            floor = frechet_distance(of_class(real.reference, id), of_class(real.held_out, id))
            assert right.of_class[name].real == pytest.approx(floor, rel=1e-4)
        shuffled, _ = measure(real, real[real.reference[::-1].copy()], judge_classes=True, extractor=extractor)
        assert shuffled.figures["class_accuracy"].value < 0.5
        assert shuffled.figures["frechet_distance"].value < 1e-6  # the same images, of other classes than asked for
        assert min(figure.value for figure in shuffled.of_class.values()) > 0.01

    def test_the_closest_pairs_are_drawn(self):
        real = sprites(60)
        images = 255 - real[real.reference]
        images[[4, 12]] = real[real.reference[[4, 12]]]
        images[12, :, 3, 3] ^= 8
        _, picture = measure(real, images)
        pixels = np.asarray(picture.convert("RGB"))
        # The picture has two rows of 64-pixel squares, and the exact copy in the first column.
        left = next(x for x in range(pixels.shape[1]) if (pixels[2:66, x : x + 64] == enlarged(images[4])).all())
        assert (pixels[70:134, left : left + 64] == enlarged(images[4])).all()
        assert any((pixels[2:66, x : x + 64] == enlarged(images[12])).all() for x in range(left + 60, left + 80))


@pytest.mark.parametrize(("low", "exceeds"), [(0.1, False), (0.11, True)])
def test_a_figure_exceeds_its_floor_with_its_whole_interval(low, exceeds):
    assert Measurement(0.2, (low, 0.3), real=0.1, num_images=9).exceeds_floor == exceeds


class TestPixelArt:
    RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)

    def picture(self, text: str, alpha: dict[tuple[int, int], int] | None = None) -> torch.Tensor:
        """Returns an image (C, H, W) uint8 of letters, with alpha where a letter is '.' or a value is given."""
        colours = {"r": self.RED, "b": self.BLUE, "w": self.WHITE, "g": (0, 255, 0), ".": (1, 2, 3)}
        rows = text.split()
        image = torch.tensor([[colours[letter] for letter in row] for row in rows], dtype=torch.uint8).permute(2, 0, 1)
        if alpha is None:
            return image
        opacity = torch.tensor([[0 if letter == "." else 255 for letter in row] for row in rows], dtype=torch.uint8)
        for place, value in alpha.items():
            opacity[place] = value
        return torch.cat([image, opacity[None]])

    def test_figures_of_a_picture(self):
        """The letters are counted by hand: green is not of the palette, and one blue and one green pixel are alone."""
        reference = encode(self.picture("wwww wrrw wrbw wwww")[None])
        art = PixelArt(reference.unique(), background=int(reference[0, 0, 0]))
        figures = art.measure(torch.stack([self.picture("wwww wrrw wbgw wwww"), self.picture("wwww wwww wwww wwww")]))
        assert {name: values.tolist() for name, values in figures.items()} == {
            "colours": [4, 1],
            "off_palette": [1 / 16, 0],
            "background": [12 / 16, 1],
            "lone_pixels": [2 / 16, 0],
        }

    def test_figures_of_a_picture_with_alpha(self):
        """What is transparent has no colour, and is the background here."""
        art = PixelArt(encode(self.picture("..rb", {})[None]).unique(), CLEAR)
        image = self.picture(".r.. .rrg .... ....", {(0, 1): 254, (1, 1): 1})
        image[:3, 3, 3] = 77  # hidden
        figures = art.measure(image[None])
        assert {name: values.tolist() for name, values in figures.items()} == {
            "colours": [2],
            "off_palette": [1 / 16],
            "partly_transparent": [2 / 16],
            "background": [12 / 16],
            "lone_pixels": [1 / 16],
            # Beside transparency: red of alpha 254, red, and green; their colours are not multiplied here. The red of
            # alpha 1 counts as transparent.
            "outline_brightness": [pytest.approx((255 / 3 * 3) / (254 + 255 + 255))],
        }

    def test_a_halo_changes_the_brightness_beside_transparency_and_nothing_else_does(self):
        dark, white = (torch.zeros(1, 4, 8, 8, dtype=torch.uint8) for _ in range(2))
        dark[:, :, 2:6, 2:6] = torch.tensor([40, 60, 80, 255])[:, None, None]
        dark[:, :3, 3:5, 3:5] = 255  # inside
        white[:] = dark
        white[:, :3, 2, 2:6] = 255  # a seam along one of four sides, whose ends belong to two others: 4 of 12 pixels
        before, after = (pixel_art.outline_brightness(image).item() for image in (dark, white))
        assert before == pytest.approx(60 / 255)
        assert after == pytest.approx((8 * 60 + 4 * 255) / 12 / 255)
        faint = dark.float()
        faint[:, :, 2:6, 2:6] *= 0.6  # less opaque, as multiplied colours are then
        assert pixel_art.outline_brightness(faint.round().byte()).item() == pytest.approx(60 / 255, abs=1 / 255)
        assert pixel_art.outline_brightness(torch.zeros(1, 4, 8, 8, dtype=torch.uint8)).item() == 0
        framed = torch.full((1, 4, 8, 8), 255, dtype=torch.uint8)  # what is outside of an image is transparent
        framed[:, :3, 1:7, 1:7] = 0
        assert pixel_art.outline_brightness(framed).item() == 1

    def test_grey_is_a_colour(self):
        image = torch.tensor([[[0, 0], [9, 0]]], dtype=torch.uint8)
        assert PixelArt(encode(image[None]).unique(), 0).measure(image[None])["colours"].tolist() == [2]

    def test_sprites_are_pixel_art_and_held_out_ones_are_the_floor(self):
        real = sprites(100)
        report, _ = measure(real, real[real.held_out])
        for name in ("colours", "off_palette", "background", "lone_pixels"):
            figure = report.figures[name]
            assert figure.value == figure.real
            assert figure.interval[0] <= figure.value <= figure.interval[1]
        images = real[real.held_out].permute(0, 2, 3, 1).numpy()
        colours = [len(np.unique(image.reshape(-1, 3), axis=0)) for image in images]
        assert report.figures["colours"].value == np.median(colours)
        known = {*map(tuple, real[real.reference].permute(0, 2, 3, 1).reshape(-1, 3).tolist())}
        off = np.mean([tuple(pixel) not in known for pixel in images.reshape(-1, 3).tolist()])
        assert report.figures["off_palette"].value == pytest.approx(off)
        assert report.figures["background"].value == pytest.approx((images == 255).all(-1).mean())
        assert "partly_transparent" not in report.figures
        noisy, _ = measure(real, real[real.held_out] ^ torch.randint(0, 4, (50, 3, 16, 16), dtype=torch.uint8))
        assert noisy.figures["colours"].value > 50
        assert noisy.figures["lone_pixels"].value > 0.5

    @pytest.mark.parametrize("read_at_once", [512, 7])
    def test_the_palette_and_background_are_those_of_all_reference_images(self, monkeypatch, read_at_once):
        monkeypatch.setattr(pixel_art, "READ_AT_ONCE", read_at_once)
        real = sprites(60)
        art = PixelArt.of_data(real)
        assert torch.equal(art.palette, encode(real[real.reference]).unique())
        assert art.background == 0xFFFFFF

    def test_images_of_many_colours_are_none(self, tmp_path):
        images = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
        images[:, :, :4] = 0
        images[:, 0, 4] = 0  # 31 colours and black
        np.save(tmp_path / "images.npy", images)
        files = {"dataset_name": str(tmp_path / "images.npy"), "with_labels": False, "resolution": "8"}
        assert PixelArt.of_data(sprites(None, **files)) is not None
        images[:, 0, 4] = (1, 2, 3)
        np.save(tmp_path / "images.npy", images)
        assert PixelArt.of_data(sprites(None, **files)) is None


def enlarged(image: torch.Tensor) -> np.ndarray:
    return image.repeat_interleave(4, 1).repeat_interleave(4, 2).permute(1, 2, 0).numpy()


class TestExtractors:
    def test_features_of_real_images_are_kept_and_belong_to_their_half(self, cache):
        real = sprites(100)
        extractor = make_extractor("classifier", "", real, CPU)
        first = {half: real_features(extractor, real, getattr(real, half), CPU) for half in ("reference", "held_out")}
        fails = SimpleNamespace(key=extractor.key, extract=None)
        for half, features in first.items():
            assert torch.equal(real_features(fails, sprites(100), getattr(real, half), CPU), features)
            assert torch.equal(features, extractor.extract(real[getattr(real, half)]))
        assert not torch.equal(*first.values())

    @pytest.mark.parametrize("damage", ["zeros in the data", "cut", "garbage", "tensors without a digest"])
    def test_damaged_features_are_extracted_again(self, cache, damage, monkeypatch):
        monkeypatch.setattr(classifier, "TRAINING_STEPS", 2)
        real = sprites(100)
        extractor = make_extractor("classifier", "", real, CPU)
        features = real_features(extractor, real, real.reference, CPU)
        (file,) = cache.glob("features-*.safetensors")
        DAMAGE[damage](file)
        assert torch.equal(real_features(extractor, real, real.reference, CPU), features)

    def test_inception_is_torch_fidelitys_by_the_weights_that_it_downloads(self, tmp_path, monkeypatch):
        with monkeypatch.context() as without_weights:
            without_weights.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
            without_weights.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
            torch.manual_seed(0)
            network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # torch looks for a download there
        file = tmp_path / "hub" / "checkpoints" / fidelity.URL_INCEPTION_V3.rpartition("/")[2]
        file.parent.mkdir(parents=True)
        torch.save(network.state_dict(), file)
        real = sprites(20, with_labels=False, image_mode="L")
        extractor = make_extractor("inception", "", real, CPU)
        images = real[np.arange(3)]
        assert images.shape == (3, 1, 16, 16)
        (expected,) = network(images.repeat(1, 3, 1, 1))
        assert extractor.extract(images).shape == (3, 2048)
        # Two libraries do the same operations after the same resize, so that images differ by as much in both.
        spread = (expected[0] - expected[1]).abs().max()
        assert spread > 0
        torch.testing.assert_close(extractor.extract(images), expected, rtol=1e-5, atol=float(spread) / 1000)
        report, _ = measure(real, real[real.reference], extractor=extractor)
        assert list(report.figures)[:2] == ["fid", "kid"]
        assert report.figures["fid"].value == pytest.approx(0, abs=1e-6)

    def test_inception_without_its_weights_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens
        with pytest.raises(UserInputError, match="weights can't be had"):
            make_extractor("inception", "", sprites(20, with_labels=False), CPU)

    def test_clip(self, tmp_path):
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, projection_dim=6, num_hidden_layers=1, num_attention_heads=2,
            image_size=32, patch_size=16,
        )  # fmt: skip
        network = CLIPVisionModelWithProjection(config).eval()
        network.save_pretrained(tmp_path / "clip")
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        processor.save_pretrained(tmp_path / "clip")
        real = sprites(60, with_labels=False)
        extractor = make_extractor("clip", str(tmp_path / "clip"), real, CPU)
        images = real[real.reference]
        files = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        with torch.no_grad():
            expected = network(processor(files, return_tensors="pt").pixel_values).image_embeds
        expected /= expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(extractor.extract(images), expected, rtol=0, atol=1e-5)
        report, _ = measure(real, images, extractor=extractor)
        assert report.figures["cmmd"].value == pytest.approx(0, abs=1e-6)
        assert list(report.figures)[:2] == ["frechet_distance", "cmmd"]  # and not FID
        transparent = sprites(60, with_labels=False, image_mode="RGBA")[real.reference]
        assert transparent.shape[1] == 4
        assert torch.equal(extractor.extract(transparent), extractor.extract(images))  # is laid on white

    def test_a_clip_model_that_is_not_there(self, tmp_path):
        with pytest.raises(UserInputError, match="--clip_model"):
            make_extractor("clip", str(tmp_path), sprites(20, with_labels=False), CPU)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of seconds, with all files of a run; their samples are noise."""
    folder = tmp_path_factory.mktemp("runs")
    for script in ("train_unconditional", "train_conditional"):
        finish(start(script, f"{TINY} --max_train_samples 60 --train_batch_size 20", folder / script))
    return folder


class TestGenerate:
    def test_images_are_those_of_their_seed_and_class_in_the_proportions_of_the_data(self, runs):
        real = sprites(60)
        pipeline = load_pipeline(str(runs / "train_conditional"))
        sampler = make_evaluation_sampler(pipeline, "ddim", 2)
        conditions = match_conditions(pipeline, real, 24)
        batches = list(generate(pipeline, sampler, conditions, batch_size=10, guidance_scale=2.0, seed=5))
        assert [len(rows) for rows, _ in batches] == [10, 10, 4]
        images = torch.cat([pixels for _, pixels in batches])
        assert images.dtype == torch.uint8
        label = int(real.class_labels[real.reference[13]])
        pipeline.scheduler = sampler.scheduler
        (expected,) = pipeline(
            class_labels=[label], num_inference_steps=2, guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(5 + 13)], output_type="pt",
        ).images  # fmt: skip
        # Levels are rounded, not cut off. Another batch size may move a value across the border between two.
        assert ((images[13] / 255 - expected).abs() <= (0.5 + 1e-3) / 255).all()

    def test_classes_are_found_by_name_and_must_be_the_models(self, runs):
        pipeline = load_pipeline(str(runs / "train_conditional"))
        names = list(reversed(pipeline.id2label.values()))
        swapped = sprites(60, class_names=names)
        conditions = match_conditions(pipeline, swapped, 30)
        for condition, label in zip(conditions, swapped.class_labels[swapped.reference], strict=True):
            assert condition.name == names[label]
            assert pipeline.id2label[int(condition.arguments["context"].argmax())] == names[label]
        with pytest.raises(UserInputError, match="other classes"):
            match_conditions(pipeline, sprites(60, class_names=[*names[:-1], "dragon"]), 30)
        with pytest.raises(UserInputError, match="no classes"):
            match_conditions(pipeline, sprites(60, with_labels=False), 30)

    def test_no_more_images_than_half_of_the_data(self):
        assert choose_num_images(sprites(60), 5000) == 30
        assert choose_num_images(sprites(60), 12) == 12


class TestHistory:
    @staticmethod
    def report(value: float) -> Report:
        measurement = Measurement(value, (value - 1, value + 1), real=0.5, num_images=20)
        return Report(20, "classifier", {"frechet_distance": measurement, "near_copies": measurement})

    @pytest.mark.parametrize(
        "line",
        [
            '{"global_step": 16, "fig',
            "[]",
            "null",
            '{"global_step": 3}',
            "\x00\xff",
            "",
            "[" * 10**5,
            '{"figures": {}}',
        ],
        ids=range(8),
    )
    def test_lines_that_can_not_be_read_are_left_out_with_a_warning(self, tmp_path, capsys, line):
        path = tmp_path / "metrics.jsonl"
        append_history(self.report(3), tmp_path, {"global_step": 1})
        append_history(self.report(2), tmp_path, {"global_step": 2})
        path.write_bytes(line.encode("latin-1") + b"\n" + path.read_bytes())
        assert is_lowest(self.report(1), tmp_path, 3)
        assert not is_lowest(self.report(2.5), tmp_path, 3)
        append_history(self.report(1), tmp_path, {"global_step": 3})
        assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == [1, 2, 3]
        assert "metrics.jsonl: 1 line(s) can't be read and are left out" in capsys.readouterr().err
        append_history(self.report(1), tmp_path, {"global_step": 3})
        assert not capsys.readouterr().err


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


class TestCalculateMetrics:
    FLAGS = "--num_images 20 --num_inference_steps 2"

    def test_a_guide_is_named_in_the_card(self, runs, run_script, tmp_path):
        folder, guide = (shutil.copytree(runs / "train_unconditional", tmp_path / name) for name in ("run", "weaker"))
        run_script("calculate_metrics", f"{folder} {self.FLAGS} --guide {guide}")
        metrics = read_metrics(folder)
        assert (metrics["guide"], metrics["guidance_scale"]) == ("weaker", 2)
        assert "by `ddim:2`, guidance 2 by weaker, against" in (folder / "README.md").read_text()

    def test_a_run_by_what_it_was_trained_on(self, runs, run_script, capsys, tmp_path):
        folder = runs / "train_conditional"
        run_script("calculate_metrics", f"{folder} {self.FLAGS} --guidance_scale 2")
        output = capsys.readouterr().out
        metrics = read_metrics(folder)
        assert metrics["num_images"] == 20
        assert metrics["num_training_images"] == 60
        assert metrics["sampler"] == "ddim:2"
        assert metrics["guidance_scale"] == 2
        assert metrics["global_step"] == 6
        figures = metrics["figures"]
        assert list(figures) == [
            *("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "class_accuracy"),
            *("nearest_distance", "near_copies", "colours", "off_palette", "background", "lone_pixels"),
        ]
        for figure in [*figures.values(), *metrics["of_class"].values()]:
            assert figure["interval"][0] <= figure["value"] <= figure["interval"][1]
        # After six steps of training the samples are noise.
        assert figures["frechet_distance"]["value"] > 3 * figures["frechet_distance"]["real"]
        assert figures["near_copies"]["value"] == 0
        assert f"{figures['frechet_distance']['value']:.4g}" in output
        assert f"wrote {folder / 'metrics.json'}" in output
        assert Image.open(folder / "closest_pairs.png").width > 64 * 10
        card = ModelCard((folder / "README.md").read_text())
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results["frechet_distance"] == pytest.approx(figures["frechet_distance"]["value"], abs=1e-6)
        assert set(results) == {"loss", *figures}
        assert "of 20 samples, 0.0% were near-copies" in card.text

    def test_a_checkpoint_is_measured_like_the_run_and_leaves_its_card_alone(self, runs, run_script):
        checkpoint = runs / "train_unconditional" / "checkpoint-6"
        run_script("calculate_metrics", f"{checkpoint} {self.FLAGS} --seed 3")
        run_script("calculate_metrics", f"{runs / 'train_unconditional'} {self.FLAGS} --seed 3")
        assert read_metrics(checkpoint)["figures"] == read_metrics(runs / "train_unconditional")["figures"]
        assert not (checkpoint / "README.md").exists()

    def test_the_card_leaves_out_what_was_measured_of_earlier_weights(self, runs, run_script, tmp_path):
        folder = shutil.copytree(runs / "train_unconditional", tmp_path / "run")
        run_script("calculate_metrics", f"{folder} {self.FLAGS}")
        assert "| coverage |" in make_card(folder, None, None)
        summary = json.loads((folder / "training_summary.json").read_text())
        (folder / "training_summary.json").write_text(json.dumps({**summary, "global_step": 12}))
        card = make_card(folder, None, None)
        assert "| coverage |" not in card
        assert "was not measured" in card

    def test_a_folder_of_images_scores_as_the_model_that_sampled_them(self, runs, run_script, tmp_path, capsys):
        model, data = runs / "train_unconditional", "--dataset_name sprites --max_train_samples 60"
        run_script("calculate_metrics", f"{model} {self.FLAGS}")
        for scale in (1, 2):
            folder = tmp_path / f"scale-{scale}"
            flags = f"--num_images 20 --scheduler ddim --num_inference_steps 2 --scale {scale} --output {folder}"
            run_script("sample", f"{model} {flags}")
        run_script("calculate_metrics", f"{tmp_path / 'scale-1'} {data}", tmp_path / "out")
        assert read_metrics(tmp_path / "out")["figures"] == read_metrics(model)["figures"]
        assert not (tmp_path / "scale-1" / "metrics.json").exists()
        assert "warning: images of" not in capsys.readouterr().out
        run_script("calculate_metrics", f"{tmp_path / 'scale-2'} {data} --resolution 16", tmp_path / "out")
        assert "warning: images of 32x32" in capsys.readouterr().out

    def test_a_run_with_transparency_and_a_folder_of_its_files(self, run_script, tmp_path):
        data = "--dataset_name sprites --max_train_samples 60 --image_mode RGBA"
        run_script("train_unconditional", f"{TINY} {data} --num_epochs 1 --save_images_epochs 1", tmp_path / "run")
        run_script("calculate_metrics", f"{tmp_path / 'run'} {self.FLAGS}")
        flags = f"--num_images 20 --scheduler ddim --num_inference_steps 2 --scale 1 --output {tmp_path / 'files'}"
        run_script("sample", f"{tmp_path / 'run'} {flags}")
        assert Image.open(tmp_path / "files" / "00000.png").mode == "RGBA"
        run_script("calculate_metrics", f"{tmp_path / 'files'} {data}", tmp_path / "out")
        assert read_metrics(tmp_path / "out")["figures"] == read_metrics(tmp_path / "run")["figures"]
        pairs = Image.open(tmp_path / "out" / "closest_pairs.png")
        # The board is on the picture, under the transparent corners of the training images at least.
        assert (pairs.mode, (204, 204, 204) in {colour for _, colour in pairs.getcolors(2**20)}) == ("RGB", True)
        card = (tmp_path / "run" / "README.md").read_text()
        assert "of 16x16 RGBA images" in card
        assert "Its images have straight alpha" in card

    def test_grey_images_that_are_not_square(self, run_script, tmp_path):
        images = np.random.default_rng(0).integers(256, size=(40, 8, 12, 1), dtype=np.uint8)
        np.save(tmp_path / "images.npy", images)
        data = f"--dataset_name {tmp_path / 'images.npy'} --resolution 12x8"
        run_script("train_unconditional", f"{TINY.replace('--max_train_samples 20', '')} {data}", tmp_path / "run")
        run_script("calculate_metrics", f"{tmp_path / 'run'} {self.FLAGS}")
        assert read_metrics(tmp_path / "run")["figures"]["near_copies"]["num_images"] == 20

    def test_images_that_are_not_finite_are_not_measured(self, runs, run_script, tmp_path, capsys, monkeypatch):
        folder = shutil.copytree(runs / "train_unconditional", tmp_path / "run")
        monkeypatch.setattr(UnconditionalDDPMPipeline, "predict", lambda self, sample, timestep: sample * torch.nan)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(SystemExit) as exit:
            run_script("calculate_metrics", f"{folder} {self.FLAGS}")
        assert exit.value.code == 2
        assert "that the model samples with ddim:2 are not finite" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    def test_two_processes_find_what_one_finds(self, runs, run_script, tmp_path):
        model = runs / "train_conditional"
        run_script("calculate_metrics", f"{model} {self.FLAGS} --batch_size 4", tmp_path / "one")  # fills the cache
        flags = f"{model} {self.FLAGS} --batch_size 4"
        finish(start("calculate_metrics", flags, tmp_path / "two", LAUNCH_TWO))
        for group in ("figures", "of_class"):
            one, two = (read_metrics(tmp_path / name)[group] for name in ("one", "two"))
            assert one.keys() == two.keys()
            for name, figure in one.items():
                assert two[name]["value"] == pytest.approx(figure["value"], rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize(
        ("flags", "fragment"),
        [
            ("{run} --num_images 3", "--num_images"),
            ("{run} --scheduler no-such", "no-such"),
            ("{run} --num_inference_steps 2000", "2000"),
            ("{run} --learning_rate 1", "--learning_rate"),
            ("{run} --dataset_nam x", "--dataset_name"),
            ("{run} --extractor no-such", "--extractor"),
            ("{run} --extractor clip --clip_model {run}/no-such", "no-such"),
            ("{run}/samples", "--dataset_name or --train_data_dir"),
            ("{run}/samples --dataset_name sprites --guide {run}", "--guide"),
            ("{run}/samples --dataset_name sprites --guidance_scale 2", "--guidance_scale"),
            ("{run}/samples --dataset_name sprites --clip_sample false", "--clip_sample"),
            ("{run}/unet --dataset_name sprites --max_train_samples 60", "unet is a part of a pipeline"),
            ("{run}/no-such --dataset_name sprites", "no-such"),
            ("{run} --dataset_name sprites --max_train_samples 10", "at least 20 images"),
            ("{run} --dataset_name no-such.npy", "no-such.npy"),
        ],
    )
    def test_what_users_get_wrong_is_one_line(self, runs, run_script, tmp_path, capsys, flags, fragment):
        if "{run}/samples" in flags:
            shutil.copytree(runs / "train_unconditional" / "samples", tmp_path / "samples")
            flags = flags.replace("{run}/samples", str(tmp_path / "samples"))
        before = sorted(runs.rglob("*"))
        with pytest.raises(SystemExit) as exit:
            run_script(
                "calculate_metrics", flags.replace("{run}", str(runs / "train_unconditional")), tmp_path / "out"
            )
        assert exit.value.code == 2
        error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert fragment in error
        assert sorted(runs.rglob("*")) == before
        assert not (tmp_path / "out").exists()


MAIN = """
import sys
from importlib import import_module
sys.argv.pop(0)
try:
    import_module(sys.argv[0]).main()
except SystemExit as exit:
    print(exit.code, *sorted({"torch", "diffusers", "datasets"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("sprite_diffusion.sharing.hub --help", "0"),
        ("sprite_diffusion.sharing.hub push --help", "0"),
        ("sprite_diffusion.sharing.hub card . --no_such_flag", "2"),
        ("calculate_metrics --help", "0"),
        ("calculate_metrics --no_such_flag", "2"),
        ("calculate_metrics model --num_images 3", "2"),
        ("calculate_metrics model --scheduler no-such", "2"),
        ("calculate_metrics model --dataset_nam x", "2"),
    ],
)
def test_help_and_wrong_flags_do_not_wait_for_torch(command, status):
    result = run_command([*PYTHON, "-c", MAIN, *command.split()], fork=False)
    assert result.stdout.splitlines()[-1] == status


class TestEvaluateEvery:
    FLAGS = f"{TINY} --max_train_samples 40 --num_epochs 3 --evaluate_every 2 --checkpointing_steps 8"

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setattr(outputs, "IMAGES_PER_EVALUATION", 10)
        monkeypatch.setattr(samplers, "FEW_STEPS", 2)

    @pytest.mark.parametrize("script", ["train_unconditional", "train_conditional"])
    def test_history_last_figures_trackers_and_card(self, run_script, tmp_path, script):
        run_script(script, f"{self.FLAGS} --logger tensorboard", tmp_path / "run")
        history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["global_step"] for line in history] == [16, 24]  # after epochs 2 and 3, of 8 steps
        assert history[-1] == read_metrics(tmp_path / "run")
        assert ("class_accuracy" in history[0]["figures"]) == (script == "train_conditional")
        assert history[0]["figures"] != history[1]["figures"]
        assert "classified rightly" in history[0]["extractor"]  # both scripts' classifiers learn the labels
        logs = EventAccumulator(str(next((tmp_path / "run" / "logs").rglob("events*")).parent)).Reload()
        logged = {event.step: event.value for event in logs.Scalars("metrics/precision")}
        assert logged == pytest.approx(
            {line["global_step"]: line["figures"]["precision"]["value"] for line in history}
        )
        assert "| coverage |" in make_card(tmp_path / "run", None, None)

    def test_words_are_judged_too(self, run_script, tmp_path, monkeypatch):
        monkeypatch.setattr(judging, "TRAINING_STEPS", 2)
        monkeypatch.setattr(judging, "NUM_SPRITES", 200)
        monkeypatch.setattr(judging, "NUM_HELD_OUT", 100)
        monkeypatch.setattr(judging, "MIN_ACCURACY", 0)
        flags = f"{self.FLAGS} --guidance_scale 2 --train_batch_size 5 --caption_column caption --logger tensorboard"
        run_script("train_conditional", f"{flags} --leave_out_pairs", tmp_path / "run")
        during = read_metrics(tmp_path / "run")["figures"]
        assert {"attributes_seen", "colours_seen", "attributes_unseen", "colours_unseen"} < during.keys()
        logs = EventAccumulator(str(next((tmp_path / "run" / "logs").rglob("events*")).parent)).Reload()
        last = logs.Scalars("metrics/colours_seen")[-1].value
        assert last == pytest.approx(during["colours_seen"]["value"])
        flags = "--num_images 10 --num_inference_steps 2 --guidance_scale 2 --batch_size 5"
        run_script("calculate_metrics", f"{tmp_path / 'run'} {flags}")
        after = read_metrics(tmp_path / "run")["figures"]
        assert {name: figure["value"] for name, figure in during.items()} == pytest.approx(
            {name: figure["value"] for name, figure in after.items()}, rel=1e-4
        )

    def test_they_are_of_the_averaged_weights_and_those_of_calculate_metrics(self, run_script, tmp_path, monkeypatch):
        run_script("train_conditional", f"{self.FLAGS} --guidance_scale 2 --train_batch_size 5", tmp_path / "run")
        during = read_metrics(tmp_path / "run")
        flags = "--num_images 10 --num_inference_steps 2 --guidance_scale 2 --batch_size 5"
        run_script("calculate_metrics", f"{tmp_path / 'run'} {flags}")
        after = read_metrics(tmp_path / "run")
        assert {name: figure["value"] for name, figure in during["figures"].items()} == pytest.approx(
            {name: figure["value"] for name, figure in after["figures"].items()}, rel=1e-4
        )
        assert during["extractor"] == after["extractor"]

    def test_the_training_is_the_same_with_and_without(self, cache, run_script, tmp_path, monkeypatch):
        monkeypatch.setattr(classifier, "TRAINING_STEPS", 2)
        run_script("train_unconditional", self.FLAGS, tmp_path / "with")
        run_script("train_unconditional", self.FLAGS.replace("--evaluate_every 2", ""), tmp_path / "without")
        one, other = (
            load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("with", "without")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_the_first_step_does_not_wait_for_the_classifier(self, run_script, tmp_path, monkeypatch):
        steps_before = []

        def make(*args):
            steps_before.append(len((tmp_path / "run" / "training_log.jsonl").read_text().splitlines()))
            return make_extractor(*args)

        monkeypatch.setattr(outputs, "make_extractor", make)
        run_script("train_unconditional", self.FLAGS, tmp_path / "run")
        assert steps_before == [16]  # made once, for the first evaluation

    def test_a_resumed_run_measures_again_what_it_trains_again(self, run_script, tmp_path):
        run_script("train_unconditional", self.FLAGS, tmp_path / "run")
        history = (tmp_path / "run" / "metrics.jsonl").read_text()
        run_script("train_unconditional", f"{self.FLAGS} --resume_from_checkpoint checkpoint-8", tmp_path / "run")
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == history

    def test_a_torn_last_line_of_the_history_is_measured_again(self, run_script, tmp_path, capsys):
        run_script("train_unconditional", self.FLAGS, tmp_path / "run")
        path = tmp_path / "run" / "metrics.jsonl"
        whole = path.read_text()
        path.write_text(whole[:-100])
        run_script("train_unconditional", f"{self.FLAGS} --resume_from_checkpoint checkpoint-16", tmp_path / "run")
        assert path.read_text() == whole
        assert "metrics.jsonl: 1 line(s) can't be read and are left out" in capsys.readouterr().err

    def test_an_overwritten_run_leaves_no_history(self, run_script, tmp_path):
        run_script("train_unconditional", self.FLAGS, tmp_path / "run")
        flags = self.FLAGS.replace("--evaluate_every 2", "--evaluate_every 3")
        run_script("train_unconditional", f"{flags} --overwrite_output_dir", tmp_path / "run")
        history = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["global_step"] for line in history] == [24]

    def test_not_of_a_stream(self, run_script, capsys):
        with pytest.raises(SystemExit):
            run_script("train_unconditional", "--train_data_dir x --streaming --max_train_steps 5 --evaluate_every 1")
        assert "--evaluate_every does not go with --streaming" in capsys.readouterr().err
