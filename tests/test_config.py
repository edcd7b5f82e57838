"""Tests how flags, YAML files and presets become a configuration and a network, as in diffusers' official script."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from launching import REPOSITORY

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.runs.config import TrainingConfig, parse_config
from sprite_diffusion.training.build import build_model, build_noise_scheduler, check_network

PRESETS = sorted((REPOSITORY / "configs").glob("*.yaml"))


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


def test_data_of_the_user_gets_the_official_defaults_and_built_in_data_the_preset():
    assert parse("--train_data_dir pictures").learning_rate == 1e-4
    assert parse("--dataset_name me/pictures").resolution == "64"
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
        ("learning_rate: .nan", "--learning_rate is nan"),
        ("label_dropout: 1", "--label_dropout is 1.0"),
        ("beta_end: 1e-5", "--beta_end"),
        ("streaming: true", "--streaming needs --max_train_steps"),
        ("ddpm_num_steps: 10", "--ddpm_num_inference_steps is 1000: it can't exceed --ddpm_num_steps"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    with pytest.raises(UserInputError, match=message) as error:
        parse(f"--config {write(tmp_path, text)}")
    assert "\n" not in str(error.value)


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
        conditional = None if config.model_class == "BasicUNet2DModel" else build_model(config, channels, 5)
        height, width = config.image_size
        sample, t = torch.zeros(2, channels, height, width), torch.zeros(2, dtype=torch.long)
        assert model(sample, t).sample.shape == sample.shape
        if conditional is not None:
            assert conditional(sample, t, class_labels=t).sample.shape == sample.shape
    assert len(build_noise_scheduler(config)) == config.ddpm_num_steps
    assert set(yaml.safe_load(path.read_text())) <= {f.name for f in fields(TrainingConfig)}


def test_presets_hold_the_numbers_that_they_are_known_for():
    """The presets of tutorials keep the tutorials' numbers; those of the built-in sprites may be tuned."""
    course = parse(f"--config {REPOSITORY}/configs/course_context_unet.yaml")
    assert (course.ddpm_num_steps, course.train_batch_size, course.num_epochs) == (500, 100, 32)
    assert (course.label_dropout, course.snapshot_epochs) == (pytest.approx(0.2), 4)
    faces = parse(f"--config {REPOSITORY}/configs/anime_faces_64.yaml")
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
    unet = build_model(config, 3, num_classes=2).eval()
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
