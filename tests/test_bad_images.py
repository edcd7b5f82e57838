"""Tests that of a folder with damaged, hostile and odd files each bad one is named and each good one used."""

import errno
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from launching import PYTHON, TINY, finish, start
from PIL import Image

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.dataset import load_image_data
from sprite_diffusion.data.decoding import to_model_range
from sprite_diffusion.runs.config import TrainingConfig

# Without these capabilities root may not read every file.
AS_USER = [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


def noise_image(side=16):
    return Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8))


def png_header(path, width, height):
    """Writes a PNG file of a few bytes that promises many pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def truncated(path):
    noise_image(64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unreadable(path):
    noise_image().save(path)
    path.chmod(0)


def linked_folder(path):
    (path.parent.parent / "elsewhere").mkdir(exist_ok=True)
    path.symlink_to(path.parent.parent / "elsewhere")


# kind: the ending of the file's name, how the file is made, a part of the reason to be printed
BAD = {
    "empty": (".png", lambda path: path.touch(), "not an image"),
    "text": (".png", lambda path: path.write_text("hello"), "not an image"),
    "html": (".jpg", lambda path: path.write_text("<html>404</html>"), "not an image"),
    "random bytes": (".gif", lambda path: path.write_bytes(np.random.default_rng(0).bytes(500)), "not an image"),
    "truncated": (".png", truncated, "truncated"),
    "truncated jpg": (".jpg", truncated, "truncated"),
    "bomb": (".png", lambda path: png_header(path, 60000, 60000), "more than 67,108,864 pixels"),
    "half a bomb": (".png", lambda path: png_header(path, 10000, 10000), "more than 67,108,864 pixels"),
    "bomb by resizing": (".png", lambda path: Image.new("L", (1, 400_000)).save(path), "too thin"),
    "nan": (".tif", lambda path: Image.new("F", (16, 16), float("nan")).save(path), "nan"),
    "dangling link": (".png", lambda path: path.symlink_to("missing.png"), os.strerror(errno.ENOENT)),
    "link to itself": (".png", lambda path: path.symlink_to(path), os.strerror(errno.ELOOP)),
    "link in a circle": ("", lambda path: path.symlink_to(path.parent), "link to a folder"),
    "linked folder": ("", linked_folder, "link to a folder"),
    "pipe": (".png", os.mkfifo, "not a file"),
    "broken\nname": (".png", lambda path: path.write_text("hello"), "not an image"),
    "unreadable": (".png", unreadable, os.strerror(errno.EACCES)),
}
# an odd file's name, and how the file is made; each is red
ODD = {
    "print.jpg": lambda path: Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=100),
    "animated.gif": lambda path: save_animated(path, "P"),
    "animated.png": lambda path: save_animated(path, "RGB"),
    "animated.webp": lambda path: save_animated(path, "RGB", lossless=True),
    "jpeg.png": lambda path: Image.new("RGB", (16, 16), "red").save(path, "JPEG", quality=100),
    "png.jpg": lambda path: Image.new("RGB", (16, 16), "red").save(path, "PNG"),
    "UPPER.PNG": lambda path: Image.new("RGB", (16, 16), "red").save(path),
    "line\nbreak [1]*.png": lambda path: Image.new("RGB", (16, 16), "red").save(path),
    "link.png": lambda path: path.symlink_to("jpeg.png"),
    "wide.png": lambda path: Image.new("RGB", (3000, 16), "red").save(path),
    "palette.png": lambda path: Image.new("RGB", (16, 16), "red").convert("P").save(path),
}


def save_animated(path, mode, **options):
    first, second = (Image.new("RGB", (16, 16), colour).convert(mode) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second], **options)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def make_bad(folder, kind, number=0):
    ending, make, _ = BAD[kind]
    path = folder / f"{number:04} {kind}{ending}"
    make(path)
    return path


def fill_folder(folder, num_good, num_bad):
    """Makes good and bad images. Returns the bad files, each with a part of the reason to be printed."""
    for number in range(num_good):
        Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(folder / f"{number:04}.png")
    kinds = [kind for kind in BAD if kind != "unreadable" or not AS_USER or shutil.which(AS_USER[0])]
    bad = {}
    for number in range(num_bad):
        kind = kinds[number % len(kinds)]
        bad[str(make_bad(folder, kind, number))] = BAD[kind][2]
    return bad


def check_skipping_run(folder, num_good, bad, output_dir):
    data_flags = f"--train_data_dir {folder} --on_bad_image skip --max_train_samples 5000 --max_train_steps 4"
    flags = TINY.replace("--max_train_samples 20", data_flags)
    prefix = AS_USER if not AS_USER or shutil.which(AS_USER[0]) else []
    result = finish(start("train_unconditional", flags, output_dir, [*prefix, *PYTHON]))
    assert f"{num_good:,} images of 16x16, 3 channel(s), {len(bad)} skipped\n" in result.stdout
    assert (output_dir / "model_index.json").is_file()
    lines = [json.loads(line) for line in (output_dir / "skipped_images.jsonl").read_text().splitlines()]
    assert sorted(line["image"] for line in lines) == sorted(bad)
    error_lines = result.stderr.replace("\r", "\n").splitlines()
    for line in lines:
        assert bad[line["image"]] in line["reason"]
        image = line["image"].replace("\n", "\\n")
        assert sum(f"skipped: {image} {line['reason']}" in error_line for error_line in error_lines) == 1
    assert sum("skipped: " in error_line for error_line in error_lines) == len(bad)
    assert not [line for line in error_lines if "Warning" in line or "Traceback" in line]


def test_training_goes_on_without_the_bad(pictures, tmp_path):
    bad = fill_folder(pictures, 80, len(BAD))
    check_skipping_run(pictures, 80, bad, tmp_path / "run")


@pytest.mark.slow
def test_training_goes_on_without_the_bad_of_thousands(pictures, tmp_path):
    bad = fill_folder(pictures, 4900, 100)
    check_skipping_run(pictures, 4900, bad, tmp_path / "run")


def test_resumed_run_lists_what_it_skips_itself(run_script, pictures, tmp_path):
    bad = fill_folder(pictures, 20, 1)
    flags = f"{TINY} --train_data_dir {pictures} --on_bad_image skip"
    run_script("train_unconditional", flags + " --num_epochs 1", tmp_path / "run")
    assert (tmp_path / "run" / "skipped_images.jsonl").is_file()
    os.remove(next(iter(bad)))
    run_script("train_unconditional", flags + " --resume_from_checkpoint latest", tmp_path / "run")
    assert not (tmp_path / "run" / "skipped_images.jsonl").exists()


@pytest.mark.parametrize("kind", BAD)
def test_training_stops_at_the_bad(kind, run_script, pictures, tmp_path, capsys):
    fill_folder(pictures, 2, 0)
    path = make_bad(pictures, kind)
    if path.is_file() and kind == "unreadable" and os.access(path, os.R_OK):
        pytest.skip("root may read it")
    flags = TINY.replace("--max_train_samples 20", f"--train_data_dir {pictures}")
    with pytest.raises(SystemExit) as exit:
        run_script("train_unconditional", flags, tmp_path / "run")
    assert exit.value.code == 2
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert error.startswith("error: " + str(path).replace("\n", "\\n"))
    assert BAD[kind][2] in error
    assert error.endswith(": replace it, or give --on_bad_image skip")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_odd_files_are_used(streaming, pictures, tmp_path):
    for name, make in ODD.items():
        make(pictures / name)
    config = TrainingConfig(
        train_data_dir=str(pictures),
        resolution="16",
        cache_dir=str(tmp_path / "cache"),
        streaming=streaming,
        max_train_steps=1,
    )
    data = load_image_data(config, with_labels=False, streaming=config.streaming)
    items = list(data.dataset) if streaming else [data.dataset.__getitems__([i]) for i in range(data.num_images)]
    assert len(items) == len(ODD)
    assert data.skipped_images == []
    for item in items:
        # Red, up to the level or two that JPEG loses at quality 100.
        np.testing.assert_allclose(to_model_range(item["images"]).reshape(3, -1).mean(1), [1, -1, -1], atol=4 / 127.5)


def test_names_in_no_encoding_are_refused(pictures, tmp_path):
    os.close(os.open(bytes(pictures) + b"/\xff.png", os.O_CREAT))
    config = TrainingConfig(train_data_dir=str(pictures), on_bad_image="skip", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserInputError, match=r"\.png: the name is not UTF-8, rename this file"):
        load_image_data(config, with_labels=False)


def test_broken_archive(pictures, tmp_path):
    fill_folder(pictures, 2, 0)
    (pictures / "more.zip").write_bytes(b"PK")
    config = TrainingConfig(train_data_dir=str(pictures), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserInputError, match=rf"--train_data_dir {pictures}: .*zip"):
        load_image_data(config, with_labels=False)


def test_streams_name_links_before_and_images_while_reading(pictures, tmp_path, capsys):
    fill_folder(pictures, 20, 0)
    text, link = make_bad(pictures, "text"), make_bad(pictures, "dangling link")
    config = TrainingConfig(
        train_data_dir=str(pictures),
        resolution="16",
        streaming=True,
        max_train_steps=1,
        on_bad_image="skip",
        cache_dir=str(tmp_path / "cache"),
    )
    data = load_image_data(config, with_labels=False, streaming=config.streaming)
    assert [name for name, _ in data.skipped_images] == [str(link)]
    capsys.readouterr()
    assert len(list(data.dataset)) == 20
    named, counted = capsys.readouterr().err.splitlines()
    assert str(text) in named
    assert "1 images skipped" in counted
