"""Tests how flags, YAML files and presets become a configuration and a network, as in diffusers' official script."""

import os
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.models.resnet import ResnetBlock2D
from launching import PYTHON, REPOSITORY, run_command
from PIL import Image

from sprite_diffusion.common.errors import UserInputError, mask_secrets
from sprite_diffusion.common.flags import default_of, read_yaml
from sprite_diffusion.data.config import parse_data_flags
from sprite_diffusion.runs import presets
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.presets import load_preset, parse_config
from sprite_diffusion.training.build import build_model, build_noise_scheduler, check_network

PRESETS = sorted((REPOSITORY / "configs").glob("*.yaml"))
# A billion items in ten lines, "the billion laughs".
NESTED_ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, 10))


def parse(flags: str = "", preset: str = "smoke_cpu.yaml") -> TrainingConfig:
    return parse_config(flags.split(), default_preset=preset)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_that_over_defaults(tmp_path):
    path = write(tmp_path, "learning_rate: 1e-4\nnum_epochs: 7\nblock_out_channels: [32, 64]\nuse_ema: true\n")
    config = parse(f"--config {path} --num_epochs 3")
    assert (config.num_epochs, config.learning_rate, config.block_out_channels) == (3, 1e-4, [32, 64])
    assert config.use_ema is True
    assert config.train_batch_size == TrainingConfig().train_batch_size


def test_a_length_on_the_command_line_takes_the_place_of_a_files_steps(tmp_path):
    path = write(tmp_path, "max_train_steps: 500\nsave_images_steps: 100\n")
    counted_in_steps = parse(f"--config {path}")
    assert (counted_in_steps.num_epochs, counted_in_steps.max_train_steps) == (None, 500)
    assert (counted_in_steps.save_images_epochs, counted_in_steps.save_model_epochs) == (None, None)
    for config in (parse(f"--config {path} --num_epochs 3"), load_preset(str(path), num_epochs=3)):
        assert (config.num_epochs, config.max_train_steps) == (3, None)
        assert (config.save_images_epochs, config.save_model_epochs, config.save_images_steps) == (10, 10, 100)
    both = parse(f"--config {path} --num_epochs 3 --max_train_steps 7")
    assert (both.num_epochs, both.max_train_steps) == (3, 7)
    assert TrainingConfig(train_data_dir="pictures").num_epochs == 100  # the official script's


def test_saved_config_is_the_config(tmp_path):
    path = tmp_path / "saved.yaml"
    config = parse("--learning_rate 3e-5 --class_names a b --max_train_steps 9 --local_rank -1 --snr_gamma 5")
    config.save(path)
    again = parse(f"--config {path}")
    assert {f.name for f in fields(config) if getattr(config, f.name) != getattr(again, f.name)} == {"config"}


def test_token_is_not_saved(tmp_path):
    path = tmp_path / "saved.yaml"
    parse("--hub_token hf_secret").save(path)
    assert "hf_secret" not in path.read_text()


def save_pictures(folder: Path, size: tuple[int, int], mode: str = "RGB", num_colours: int = 4) -> Path:
    """Writes six pictures of `num_colours` colours; in mode RGBA the first of them is transparent."""
    palette = np.random.default_rng(0).integers(0, 256, (num_colours, len(mode)), dtype=np.uint8)
    if mode == "RGBA":
        palette[:, 3] = 255
        palette[0, 3] = 0
    folder.mkdir(exist_ok=True)
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, num_colours, (size[1], size[0]))
        Image.fromarray(palette[pixels]).save(folder / f"{size[0]}x{size[1]}-{i}.png")
    return folder


@pytest.mark.parametrize(
    ("picture", "flags", "expected"),
    [
        (
            {"size": (16, 16)},
            "",
            {"resolution": "16", "attention_levels": [3], "interpolation": "lanczos"},
        ),
        ({"size": (32, 24)}, "", {"resolution": "32x24", "block_out_channels": [32, 64, 128], "image_mode": "auto"}),
        ({"size": (32, 32), "mode": "RGBA"}, "", {"resolution": "32", "image_mode": "RGBA", "max_train_steps": 2000}),
        ({"size": (32, 32), "mode": "RGBA"}, "--background black", {"image_mode": "auto"}),
        ({"size": (90, 70), "num_colours": 99}, "", {"resolution": "64", "interpolation": "lanczos"}),
        ({"size": (90, 70)}, "", {"resolution": "64", "interpolation": "nearest"}),
        ({"size": (500, 20)}, "", {"resolution": "16"}),
        ({"size": (30, 30)}, "", {"resolution": "16"}),
        ({"size": (8, 8)}, "", {"resolution": "8", "block_out_channels": [32, 64]}),
        ({"size": (16, 16)}, "--resolution 32", {"resolution": "32", "block_out_channels": [32, 64, 128, 256]}),
        ({"size": (16, 16)}, "--block_out_channels 32 32 32", {"block_out_channels": [32, 32, 32]}),
        ({"size": (16, 16)}, "--num_epochs 3", {"num_epochs": 3, "max_train_steps": None}),
        ({"size": (16, 16)}, "--max-train-steps 7 --output-dir x", {"max_train_steps": 7, "output_dir": "x"}),
        ({"size": (16, 16)}, "--streaming", {"resolution": "16", "max_train_steps": 1200}),
        ({"size": (16, 16)}, "--model_class ContextUNet2DModel --block_out_channels 8", {"block_out_channels": [8]}),
    ],
)
def test_images_of_the_user_get_the_preset_and_what_fits_them(tmp_path, capsys, picture, flags, expected):
    folder = save_pictures(tmp_path / "mine", **picture)
    config = parse(f"--train_data_dir {folder} {flags}", "sprites_unconditional.yaml")
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.prediction_type == "sample"  # the preset's
    assert config.output_dir == expected.get("output_dir", "runs/mine")
    assert config.max_train_samples is None
    check_network(config)
    facts, chosen = capsys.readouterr().out.splitlines()
    assert facts.startswith(f"{folder}: {'a stream of' if config.streaming else 6} images of ")
    given = re.findall(r"--[\w-]+", flags)
    assert not any(name.replace("-", "_") in chosen.replace("-", "_") for name in given)


def test_what_a_preset_has_for_the_built_in_sprites_is_not_for_images_of_the_user(tmp_path, monkeypatch):
    text = (presets.presets_dir() / "sprites_conditional.yaml").read_text()
    (tmp_path / "words.yaml").write_text(
        f"{text}leave_out_pairs: true\nmax_train_samples: 5\ncaption_column: caption\n"
    )
    monkeypatch.setattr(presets, "presets_dir", lambda: tmp_path)
    folder = save_pictures(tmp_path / "mine", size=(16, 16))
    next(folder.glob("*.png")).with_suffix(".txt").write_text("a cat")
    for flags, expected in (("", (True, 5, "caption")), (f"--train_data_dir {folder}", (False, None, "auto"))):
        config = parse(flags, "words.yaml")
        assert (config.leave_out_pairs, config.max_train_samples, config.caption_column) == expected


def test_images_of_many_sizes_get_the_side_that_most_can_fill(tmp_path, capsys):
    for size in ((40, 40), (33, 50), (70, 36)):
        save_pictures(tmp_path / "mine", size)
    assert parse(f"--train_data_dir {tmp_path / 'mine'}", "sprites_unconditional.yaml").resolution == "32"
    assert "18 images of sizes around 36, pixel art of 4 colours each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "output_dir"),
    [
        ("--train_data_dir {0}/my.pictures", "runs/my.pictures"),
        ("--train_data_dir {0}/split", "runs/split"),  # and not that of split/train
        ("--train_data_dir {0}/split/train/", "runs/train"),
        ("--train_data_dir {0}/$", "runs/images"),
        ("--dataset_name {0}/a-b.npy", "runs/a-b"),
    ],
)
def test_output_folder_has_the_name_of_the_images(tmp_path, data, output_dir):
    for name in ("my.pictures", "split/train", "$"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_pictures(tmp_path / name, (8, 8))
    np.save(tmp_path / "a-b.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert parse(data.format(tmp_path), "sprites_unconditional.yaml").output_dir == output_dir


def test_images_that_can_not_be_decoded_are_left_to_the_training_to_name(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.png").write_bytes(b"no picture")
    config = parse(f"--train_data_dir {tmp_path / 'mine'}", "sprites_unconditional.yaml")
    assert config.resolution == "16"


def test_the_official_scripts_defaults_are_a_preset(tmp_path):
    official = parse("--config official.yaml --train_data_dir pictures")
    different = {f.name for f in fields(official) if getattr(official, f.name) != default_of(f)}
    assert different == {"config", "train_data_dir", "num_epochs", "save_images_epochs", "save_model_epochs"}
    assert (official.num_epochs, official.save_images_epochs, official.save_model_epochs) == (100, 10, 10)


@pytest.mark.parametrize(("script", "classes"), [("unconditional", []), ("conditional", ["cats", "dogs"])])
def test_advice_is_a_command_that_can_be_typed(tmp_path, script, classes):
    folder = tmp_path / "my pictures"
    for name in classes:
        (folder / name).mkdir(parents=True)
        save_pictures(folder / name, (32, 32), "RGBA")
    if not classes:
        save_pictures(folder, (32, 32), "RGBA")
    result = run_command([*PYTHON, "-m", "sprite_diffusion.data.advise", str(folder), "--center-crop"])
    facts, *hints, command = result.stdout.splitlines()
    number = 12 if classes else 6
    assert facts == f"{folder}: {number} images of 32x32, pixel art of 3 colours each, with transparency"
    assert "--init_from MODEL" in hints.pop()
    doubles = "6 of them are doubles, or nearly so, of others, which a model copies first"
    assert hints == (["they are in 2 classes: cats, dogs", doubles] if classes else [])
    accelerate, launch, file, *argv = shlex.split(command)
    assert (accelerate, launch, file) == ("accelerate", "launch", f"train_{script}.py")
    typed = parse_config(argv, f"sprites_{script}.yaml")
    chosen = parse_config(["--train_data_dir", str(folder), "--center_crop"], f"sprites_{script}.yaml")
    assert typed == chosen


def test_built_in_data_get_the_preset():
    for flags in ("", "--dataset_name sprites", "--num_epochs 1"):
        assert parse(flags).resolution == "16"
    both = parse(f"--train_data_dir pictures --config {REPOSITORY}/configs/smoke_cpu.yaml")
    assert (both.train_data_dir, both.dataset_name, both.resolution) == ("pictures", None, "16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("zzz: 1", "unknown key 'zzz'"),
        ("learning_rate: fast", "learning_rate.*invalid float value: 'fast'"),
        ("num_epochs: 1.5", "num_epochs.*invalid int value: '1.5'"),
        ("model_class: GAN", "invalid choice: 'GAN'"),
        ("block_out_channels: {a: 1}", "block_out_channels.*invalid int value"),
        ("use_ema: perhaps", "use_ema"),
        ("- 1", "must hold 'name: value' lines"),
        ("a: [", "is not YAML"),
        ("resolution: 3y4", "--resolution is '3y4'"),
        ("train_batch_size: 0", "--train_batch_size is 0: it must be at least 1"),
        ("learning_rate: -1", r"--learning_rate is -1.0: it must be above 0"),
        ("learning_rate: .nan", "learning_rate.*invalid float value: '.nan'"),
        ("learning_rate: nan", "--learning_rate is nan"),
        ("label_dropout: 1", "--label_dropout is 1.0"),
        ("beta_end: 1e-5", "--beta_end"),
        ("streaming: true", "--streaming needs --max_train_steps"),
        ("ddpm_num_steps: 10", "--ddpm_num_inference_steps is 1000: it can't exceed --ddpm_num_steps"),
        ("seed: 1\nnum_epochs: 2\nseed: 3", "line 3: the key 'seed' stands there twice"),
        ("seed: 16:16", "seed.*invalid int value: '16:16'"),
        ("seed: 0x10", "seed.*invalid int value: '0x10'"),
        ("seed: !!int 010", "'seed' takes a value or a list of values, plain and without tags"),
        ("output_dir: {a: 1}", "'output_dir' takes a value or a list of values"),
        ("class_names: [a, [b]]", "'class_names' takes a value or a list of values"),
        ("class_names: [a, null]", "'class_names' takes a value or a list of values"),
        ("use_ema: []", "'use_ema' takes one value, not 0"),
        ("config: other.yaml", "take 'config' out: one such file can't name another"),
        ("seed: &a 1\nnum_epochs: *a", "line 1: anchors and aliases are not taken"),
        ("seed: " + 3000 * "[", "brackets are nested too deeply|expected the node content"),
        ("output_dir: ' '", "--output_dir is empty"),
        ('output_dir: "a\\0b"', "--output_dir.*NUL"),
        ("hub_token: hf_secret [", "config.yaml is not YAML.*line 1|--hub_token is not a token"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    with pytest.raises(UserInputError, match=message) as error:
        parse(f"--config {write(tmp_path, text)}")
    assert "\n" not in str(error.value)


def test_values_of_a_file_are_read_as_people_read_them(tmp_path):
    """PyYAML takes 010 for 8, 16:16 for 976, 1_0 for 10, and yes, no, on and off for bools."""
    text = """
        seed: 010
        learning_rate: 1e-3
        class_names: [010, 1.50, yes, off, true, 16:16, 0x10, 2020-01-01]
        dataset_config_name: 1.10
        compile: off
        mixed_precision: no
        use_ema: on
        random_flip: yes
        center_crop: true
        snr_gamma: null
        max_train_steps:
    """
    config = parse(f"--config {write(tmp_path, text)} --dataset_name me/pictures")
    assert (config.seed, config.learning_rate, config.dataset_config_name) == (10, 1e-3, "1.10")
    assert config.class_names == ["010", "1.50", "yes", "off", "true", "16:16", "0x10", "2020-01-01"]
    assert (config.compile, config.mixed_precision) == ("off", "no")
    assert config.use_ema is config.random_flip is config.center_crop is True
    assert config.snr_gamma is config.max_train_steps is None


@pytest.mark.parametrize(
    "text", ["010", "1e5", "1.50", "16:16", "no", "on", "null", "~", "- a", "a: b", "# a", "'", "é"]
)
def test_saved_text_comes_back_as_it_was(text, tmp_path):
    path = tmp_path / "saved.yaml"
    config = TrainingConfig(dataset_name=text, class_names=[text, "other"], hub_model_id=text)
    config.save(path)
    again = load_preset(str(path))
    assert (again.dataset_name, again.class_names, again.hub_model_id) == (text, [text, "other"], text)
    assert config.differences(read_yaml(path, typed=True)) == {}


def test_token_is_in_no_message_about_its_file(tmp_path):
    token = "hf_" + 34 * "a"
    for text in (f"hub_token: {token} [", f"hub_token: [{token}", f"hub_token: {token} b", f"{token}: 1"):
        with pytest.raises(UserInputError) as error:
            parse(f"--config {write(tmp_path, text)}")
        assert token not in mask_secrets(str(error.value))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "it is not a regular file"),
        (os.mkfifo, "it is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
        (lambda path: path.symlink_to(path), "can't be read"),
        (lambda path: path.write_text("# much\n" * 2**16), "at most 262,144 bytes"),
        (lambda path: path.write_bytes("output_dir: é".encode("latin-1")), "can't be read: 'utf-8'"),
        (lambda path: path.write_text(NESTED_ALIASES), "aliases are not taken"),
        (lambda path: path.write_text("seed: " + 3000 * "[" + 3000 * "]"), "nested too deeply"),
        (lambda path: path.write_text("seed: " + 3000 * "{a: " + 3000 * "}"), "nested too deeply"),
        (lambda path: path.write_text("seed: " + 5000 * "9"), "seed: invalid int value"),
    ],
)
def test_no_file_hangs_or_breaks_the_reader(make, message, tmp_path):
    path = tmp_path / "config.yaml"
    make(path)
    with pytest.raises(UserInputError, match=message):
        parse(f"--config {path}")
    with pytest.raises(UserInputError, match=re.escape(str(path))) as error:
        parse_data_flags([], path)
    assert "--config" not in str(error.value)  # a run's saved flags are named by their file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "x"}, r"--seed is 'x' \(str\): it must be an int"),
        ({"seed": 1.0}, r"--seed is 1.0 \(float\)"),
        ({"seed": True}, r"--seed is True \(bool\)"),
        ({"seed": None}, r"--seed is None"),
        ({"seed": np.int64(1)}, r"--seed is .*\(int64\): it must be an int"),
        ({"learning_rate": "1e-4"}, r"--learning_rate is '1e-4' \(str\): it must be a float or an int"),
        ({"use_ema": "yes"}, r"--use_ema is 'yes' \(str\): it must be True or False"),
        ({"use_ema": 1}, r"--use_ema is 1 \(int\)"),
        ({"max_train_steps": "9"}, r"--max_train_steps is '9' \(str\): it must be an int or None"),
        ({"output_dir": Path("runs")}, r"--output_dir is .*Path\('runs'\).*: it must be a str"),
        ({"class_names": "ab"}, r"--class_names is 'ab' \(str\): it must be a list of str or None"),
        ({"class_names": [1]}, r"--class_names is \[1\]"),
        ({"class_names": [""]}, "--class_names is empty"),
        ({"block_out_channels": (8, 8)}, r"--block_out_channels is \(8, 8\) \(tuple\): it must be a list of int"),
        ({"block_out_channels": [8, "8"]}, "--block_out_channels is"),
        ({"model_class": "GAN"}, r"--model_class is 'GAN' .*: it must be one of UNet2DModel"),
        ({"compile": True}, "--compile is True .*: it must be one of auto, on, off"),
        ({"resolution": 0}, "--resolution is '0'"),
        ({"resolution": 16.0}, r"--resolution is 16.0 \(float\)"),
        ({"resolution": True}, r"--resolution is True \(bool\)"),
        ({"num_epochs": 10**400}, "--num_epochs is 1"),
        ({"hub_token": b"hf_secret_one"}, r"--hub_token is .* \(bytes\)"),
    ],
)
def test_wrong_types_from_python(changes, message):
    with pytest.raises(UserInputError, match=message) as error:
        TrainingConfig(**changes)
    assert "secret" not in mask_secrets(str(error.value))


def test_a_resolution_may_be_a_number():
    assert TrainingConfig(resolution=16) == TrainingConfig(resolution="16")


INTEGERS = [field.name for field in fields(TrainingConfig) if field.type in (int, int | None, list[int])]


@pytest.mark.parametrize("name", INTEGERS)
def test_every_integer_has_a_limit(name):
    """Attention levels are those that the network has."""
    value = [10**30] if isinstance(getattr(TrainingConfig(), name), list) else 10**30
    with pytest.raises(UserInputError, match=rf"--{name} .*10{{30}}"):
        build_model(TrainingConfig(**{name: value}), 3)


@pytest.mark.parametrize(
    "name", [field.name for field in fields(TrainingConfig) if field.type in (str, str | None, list[str] | None)]
)
def test_no_text_may_be_empty(name):
    with pytest.raises(UserInputError, match=f"--{name} is empty: give a value, or leave the flag out"):
        parse_config([f"--{name}="], default_preset="smoke_cpu.yaml")


def test_wrong_flags():
    with pytest.raises(UserInputError, match="unknown flag '--learning_rat'; did you mean '--learning_rate'"):
        parse("--learning_rat 1")
    with pytest.raises(UserInputError, match=r"no-such\.yaml can't be read"):
        parse("--config no-such.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_parses_builds_and_can_be_shortened(path):
    config = parse(f"--config {path} --max_train_steps 3 --output_dir elsewhere")
    assert (config.max_train_steps, config.output_dir) == (3, "elsewhere")
    channels = 1 if config.image_mode == "L" else 3
    with torch.device("meta"):  # without weights, of which the largest network would have half a gigabyte
        model = build_model(config, channels)
        conditional = (
            None
            if config.model_class == "BasicUNet2DModel"
            else build_model(config, channels, dict(enumerate("abcde")))
        )
        height, width = config.image_size
        sample, t = torch.zeros(2, channels, height, width), torch.zeros(2, dtype=torch.long)
        assert model(sample, t).sample.shape == sample.shape
        if conditional is not None:
            assert conditional(sample, t, class_labels=t).sample.shape == sample.shape
    assert len(build_noise_scheduler(config)) == config.ddpm_num_steps
    assert set(yaml.safe_load(path.read_text())) <= {f.name for f in fields(TrainingConfig)}


def test_presets_hold_the_numbers_that_they_are_known_for():
    """The presets of tutorials keep the tutorials' numbers; those of the built-in sprites may be tuned."""
    for name, dropout in (("t0_sprites_wandb", 0.2), ("t2_sprites_context", 0.1)):
        course = parse(f"--config {REPOSITORY}/configs/{name}.yaml")
        assert (course.ddpm_num_steps, course.train_batch_size, course.num_epochs) == (500, 100, 32)
        assert (course.lr_scheduler, course.lr_scheduler_interval, course.learning_rate) == ("linear", "epoch", 1e-3)
        assert (course.label_dropout, course.norm_type, course.use_ema) == (dropout, "batch", False)
        assert (course.save_images_epochs, course.save_model_epochs) == (4, 4)
    sizes = {"t3_faces_64": 113_673_219, "t4_digits_unet2d": 1_707_009, "t4_cifar10": 18_536_323}
    for name, size in sizes.items():
        config = parse(f"--config {REPOSITORY}/configs/{name}.yaml")
        with torch.device("meta"):
            unet = build_model(config, 1 if config.image_mode == "L" else 3)
        assert sum(parameter.numel() for parameter in unet.parameters()) == size
    faces = parse(f"--config {REPOSITORY}/configs/t3_faces_64.yaml")
    assert (faces.adam_beta1, faces.adam_beta2, faces.adam_weight_decay) == (0.9, 0.999, 0.01)
    assert (faces.clip_sample, faces.use_ema, faces.mixed_precision) == (False, False, "fp16")
    with torch.device("meta"):
        unet = build_model(faces, 3)
    assert unet.config.down_block_types[4] == "AttnDownBlock2D"
    assert unet.config.up_block_types[1] == "AttnUpBlock2D"
    assert sum("Attn" in name for name in (*unet.config.down_block_types, *unet.config.up_block_types)) == 2


def test_default_network_is_the_official_one():
    """Diffusers' official script has these numbers."""
    with torch.device("meta"):
        unet = build_model(TrainingConfig(train_data_dir="pictures"), 3)
    config = unet.config
    assert list(config.block_out_channels) == [128, 128, 256, 256, 512, 512]
    assert list(config.down_block_types) == ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]
    assert list(config.up_block_types) == ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4
    assert (config.layers_per_block, config.attention_head_dim, config.norm_num_groups) == (2, 8, 32)


@pytest.mark.parametrize("words", [None, 24])
@pytest.mark.parametrize(("way", "numbers"), [("default", 1), ("scale_shift", 2)])
def test_the_time_enters_the_blocks_as_the_flag_says(way, numbers, words):
    """Behind the second norm by two numbers for each channel, before it by one."""
    config = TrainingConfig(
        model_class="UNet2DModel" if words is None else "UNet2DConditionModel",
        block_out_channels=[32, 64],
        attention_levels=[2],
        resnet_time_scale_shift=way,
    )
    with torch.device("meta"):
        unet = build_model(config, 3, cross_attention_dim=words)
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    assert len(blocks) == 12  # two of each level on the way down, two in the middle, three on the way up
    for block in blocks:
        assert block.time_embedding_norm == way
        assert block.time_emb_proj.out_features == numbers * block.out_channels


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resolution 30", "multiples of 4 .*28, 32"),
        ("--resolution 16x18", "16x18: .*halves the sides 2 times"),
        ("--attention_levels 4", "the levels are 1 to 3"),
        ("--attention_head_dim 48", "does not divide the 64 channels"),
        ("--model_config_name_or_path no/such/place", "can't be loaded"),
        ("--model_class ContextUNet2DModel --block_out_channels 12", "multiple of 8"),
        ("--model_class ContextUNet2DModel --block_out_channels 16 --resolution 18", "multiples of 4"),
    ],
)
def test_networks_that_can_not_be_built(flags, message):
    config = parse(f"--block_out_channels 32 32 64 --attention_levels 3 --attention_head_dim 32 {flags}")
    with pytest.raises(UserInputError, match=message):
        check_network(config)


def test_official_flags_keep_their_defaults():
    """The flags and defaults of diffusers' script, which docs/flags.md lists, are ours too."""
    rows = re.findall(r"^\| `--(\w+)` \| `(.+?)` \|", (REPOSITORY / "docs" / "flags.md").read_text(), re.MULTILINE)
    assert len(rows) == 45
    defaults = TrainingConfig(train_data_dir="pictures")
    for name, default in rows:
        if name != "train_data_dir":
            assert str(getattr(defaults, name)) == default, name
    assert dict(rows)["checkpoints_total_limit"] == "3"  # the only one that differs: there, None, which keeps all


@pytest.mark.parametrize("channels", [[8], [32], [32, 64], [48, 96], [64], [128, 256]])
def test_networks_of_any_width_see_the_time_and_the_class(channels):
    """A normalisation of single channels would take away what the time and the class add to a channel."""
    config = TrainingConfig(block_out_channels=channels, attention_levels=[0], attention_head_dim=8, resolution="8")
    torch.manual_seed(0)
    unet = build_model(config, 3, {0: "a", 1: "b"}).eval()
    noisy = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        outputs = [
            unet(noisy, timestep, class_labels=torch.tensor([label])).sample
            for timestep, label in [(10, 0), (900, 0), (10, 1)]
        ]
    # The output of a network that does not see them changes by rounding, about 1e-6 of its size.
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() > 1e-3 * outputs[0].abs().max()
    assert 32 % unet.config.norm_num_groups == 0
