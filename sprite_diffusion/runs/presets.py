"""The flags of a run from the command line and from files: defaults < `--config FILE.yaml` < flags."""

import os
import re
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

from sprite_diffusion.common.errors import UserInputError, mask_secrets, printable
from sprite_diffusion.common.flags import as_argv, as_flags, check_text, make_parser, names_of, parse_known, read_yaml
from sprite_diffusion.data.config import BUILT_IN_DATASET, FIND_CAPTIONS
from sprite_diffusion.runs.config import TrainingConfig


def parse_config(argv: list[str], default_preset: str) -> TrainingConfig:
    """Reads the command line.

    Without `--config` it reads `default_preset`, a file in configs/, and adds what fits images of the user's own. With
    `--init_from` it adds what follows from the model.
    """
    parser = make_parser(TrainingConfig)
    if "pretrained_model_name_or_path" in names_of(argv):  # of diffusers' other scripts
        raise UserInputError("--pretrained_model_name_or_path: a run begins with the weights of --init_from")
    flags = parse_known(parser, argv, [flag.name for flag in fields(TrainingConfig)])
    if flags.config is not None:
        check_text("config", flags.config)
    path = presets_dir() / default_preset if flags.config is None else find_preset(flags.config)
    preset_argv = _read_preset(path, parser, flags.dataset_name, flags.train_data_dir)
    has_own_data = (flags.dataset_name or flags.train_data_dir) not in (None, BUILT_IN_DATASET)
    dropped = () if flags.num_epochs is None else ("--max_train_steps=",)
    if flags.config is None and has_own_data:  # which decide by themselves whether they are transparent
        preset_argv = [argument for argument in preset_argv if not argument.startswith("--image_mode=")]

    def merge(*argvs: list[str]) -> list[str]:
        return [argument for argument in chain(*argvs) if not argument.startswith(dropped)] + argv

    values = vars(parser.parse_args(merge(preset_argv)))
    # argparse takes `--no_clip_sample` as well.
    chosen = {name if name in values else name.removeprefix("no_") for name in names_of(argv)}
    of_model = _flags_of_model(values, chosen, set() if flags.config is None else {*names_of(preset_argv)})
    if of_model and not has_own_data and flags.config is None and "output_dir" not in chosen:
        of_model["output_dir"] = f"runs/{Path(flags.init_from).name}-tuned"
    preset_argv += as_argv(of_model)
    config = TrainingConfig(**vars(parser.parse_args(merge(preset_argv))))
    if flags.config is not None or not has_own_data:
        return config
    advised = _advise(config, chosen | of_model.keys())
    return TrainingConfig(**vars(parser.parse_args(merge(preset_argv, advised))))


def _flags_of_model(values: Mapping[str, Any], chosen: set[str], of_file: set[str]) -> dict[str, Any]:
    """Returns the flags that follow from the model of `init_from` in `values`, and prints them; {} without a model.

    The network is the model's in any case. The process is the model's but for the `chosen` flags, the length and the
    learning rate are those of a short training but for these and those `of_file`. A file that names the model itself
    has been chosen for it.

    Raises `UserInputError` if there is no such model, or the shape of its network is to be another.
    """
    if values["init_from"] is None:
        return {}
    check_text("init_from", values["init_from"])
    # Imported here, as it takes seconds, which a wrong flag need not wait for.
    from sprite_diffusion.runs.base_model import SHAPE_FLAGS, SHORT_SCHEDULE, flags_of_model, load_base

    if shape := chosen.intersection(SHAPE_FLAGS):
        raise UserInputError(f"--{min(shape)}: the network is that of --init_from, leave the flag out")
    if "init_from" in of_file:
        chosen = chosen | of_file - {*SHAPE_FLAGS}
    base = load_base(values["init_from"], {name: values[name] for name in chosen})
    taken = {name: value for name, value in flags_of_model(base).items() if name not in chosen}
    scheduled = chosen | of_file | ({"max_train_steps"} if "num_epochs" in chosen | of_file else set())
    taken |= {name: value for name, value in SHORT_SCHEDULE.items() if name not in scheduled}
    if changed := {name: value for name, value in taken.items() if value != values[name]}:
        _print_once(f"taken from {values['init_from']}: {' '.join(as_argv(changed))}; flags win")
    return taken


def _advise(config: TrainingConfig, given: set[str]) -> list[str]:
    """Returns the flags that fit the images of `config` and are not `given`, and prints them."""
    # Imported here, as it takes seconds, which a wrong flag need not wait for.
    from sprite_diffusion.data.advise import choose_flags, look_at_images

    facts = look_at_images(config, config.streaming)
    if facts is None:
        return []
    advised = as_argv(choose_flags(facts, config, given))
    _print_once(facts.describe())
    if advised:
        _print_once(f"chosen for them: {' '.join(advised)}; flags or --config win")
    return advised


def _print_once(line: str) -> None:
    """Prints a line in the first of several processes, before they have joined."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(mask_secrets(line)))


def load_preset(name: str, **changes: Any) -> TrainingConfig:
    """Returns the configuration of a file in configs/, or of any `--config` file, with some flags changed.

    Args:
        name: Such as "sprites_unconditional.yaml".
        **changes: Flags by name, which win over the file; with `init_from` the file also gives way to the model.

    Raises:
        UserInputError: If there is no such file or model, or a value in the file or in `changes` is wrong.
    """
    path, parser = find_preset(name), make_parser(TrainingConfig)
    preset_argv = _read_preset(path, parser, changes.get("dataset_name"), changes.get("train_data_dir"))
    values = vars(parser.parse_args(preset_argv))
    if changes.get("num_epochs") is not None:
        values["max_train_steps"] = None
    of_file = {*names_of(preset_argv)} if values["init_from"] is not None else set()
    of_model = _flags_of_model(values | changes, {*changes}, of_file)
    return TrainingConfig(**{**values, **of_model, **changes})


def _read_preset(
    path: Path, parser: ArgumentParser, dataset_name: str | None, train_data_dir: str | None
) -> list[str]:
    """Returns the `--config` file as a command line, without what is not true of the images that the user names."""
    preset_argv = _read_as_flags(path, parser)
    dropped: tuple[str, ...] = ()
    if train_data_dir is not None and dataset_name is None:  # else a preset's dataset would win over it
        dropped += ("--dataset_name=",)
    if path.resolve().parent == presets_dir() and (dataset_name or train_data_dir) not in (None, BUILT_IN_DATASET):
        dropped += ("--max_train_samples=", "--leave_out_pairs=")
        preset_argv = [re.sub("(?<=--caption_column=).*", FIND_CAPTIONS, argument) for argument in preset_argv]
    return [argument for argument in preset_argv if not argument.startswith(dropped)]


def _read_as_flags(path: Path, parser: ArgumentParser) -> list[str]:
    """Returns the `--config` file as a command line. Raises `UserInputError` if it is not one of flags."""
    source = f"--config {path}"
    values = read_yaml(path, source)
    if "config" in values:
        raise UserInputError(f"{source}: take 'config' out: one such file can't name another")
    return as_flags(values, source, parser, [flag.name for flag in fields(TrainingConfig)])


def presets_dir() -> Path:
    """Returns the folder of the presets: in an installed package inside of it, in the repository at the top."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def find_preset(name: str) -> Path:
    """Returns the file of `--config`, which may be a preset's name with or without the folder, from any folder."""
    path = Path(name)
    preset = presets_dir() / path.name
    return preset if not path.exists() and path.parent in (Path(), Path("configs")) and preset.is_file() else path
