"""Flags: a dataclass of them becomes a command line and a YAML file; every fact about a flag stands with the flag."""

import argparse
import difflib
import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from sprite_diffusion.common.errors import UserInputError

MAX_SEED = 2**32 - 1  # NumPy's
TRACKERS = ("tensorboard", "wandb", "trackio")
Changes = Literal["pixels", "numbers", "nothing"]


@dataclass(frozen=True)
class Range:
    """The values that a number may have; None where a side has no limit."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def check(self, name: str, value: float | None) -> None:
        """Raises `UserInputError` if the value of `--name` is not finite, or not in the range; None passes."""
        if value is None:
            return
        if not math.isfinite(value):
            raise UserInputError(f"--{name} is {value}: it must be a finite number")
        limits = {
            "at least": (self.at_least, self.at_least is None or value >= self.at_least),
            "above": (self.above, self.above is None or value > self.above),
            "at most": (self.at_most, self.at_most is None or value <= self.at_most),
            "below": (self.below, self.below is None or value < self.below),
        }
        if not all(is_met for _, is_met in limits.values()):
            stated = [f"{words} {limit}" for words, (limit, _) in limits.items() if limit is not None]
            raise UserInputError(f"--{name} is {value}: it must be {' and '.join(stated)}")


SEED_RANGE = Range(at_least=0, at_most=MAX_SEED)
FROM_ONE = Range(at_least=1)


def flag(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    changes: Changes = "numbers",
    saved: bool = True,
) -> Any:
    """Declares a flag: a field of a dataclass.

    Args:
        default: The value where neither the command line nor a file gives one.
        help: What `--help` says.
        at_least, above, at_most, below: The limits of a number.
        changes: What another value changes: "pixels" (a decoded image, and with it the numbers), "numbers" (weights,
            samples or figures of a run), or "nothing" of these.
        saved: Whether the flag stands in the saved configuration. How to start is not part of a run, nor is a token.
    """
    limits = Range(at_least, above, at_most, below)
    metadata = {"help": help, "range": limits, "changes": changes, "saved": saved}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(flag: Field) -> Any:
    """Returns the default of a field that `flag` has made."""
    return flag.default if flag.default_factory is MISSING else flag.default_factory()


def check_ranges(config: Any) -> None:
    """Raises `UserInputError` for the first number of a configuration that is not finite, or out of its range."""
    for flag in fields(config):
        value = getattr(config, flag.name)
        if isinstance(value, int | float):
            flag.metadata["range"].check(flag.name, value)


def check_tracker(logger: str) -> None:
    """Raises `UserInputError` if the package of `--logger` is missing."""
    if logger in TRACKERS and find_spec(logger) is None:
        raise UserInputError(f"--logger {logger}: run 'pip install {logger}', or give --logger none")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserInputError(message)


class _DataclassParser(ArgumentParser, HfArgumentParser):
    """Flags from the fields of a dataclass."""


def make_parser(config_class: type) -> argparse.ArgumentParser:
    """Returns the parser of a dataclass of flags."""
    # HfArgumentParser hands all metadata of a field to argparse, which knows no ranges: it gets the help alone.
    plain = [
        (
            flag.name,
            flag.type,
            field(
                default=flag.default,
                default_factory=flag.default_factory,  # one of the two is MISSING
                metadata={"help": flag.metadata["help"]},
            ),
        )
        for flag in fields(config_class)
    ]
    return _DataclassParser(make_dataclass(config_class.__name__, plain), allow_abbrev=False)  # type: ignore[arg-type]


def parse_known(parser: argparse.ArgumentParser, argv: list[str], names: Iterable[str]) -> argparse.Namespace:
    """Parses flags, and raises `UserInputError` with the most similar of `names` for one that the parser lacks."""
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]  # without the value, which may be a token
        raise UserInputError(f"unknown flag '{name}'{suggest(name.lstrip('-'), names, prefix='--')}")
    return flags


def read_yaml(path: Path) -> dict[Any, Any]:
    """Returns the lines of a `--config` file. Raises `UserInputError` if it has no 'name: value' lines."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"--config {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserInputError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserInputError(f"--config {path} must hold 'name: value' lines")
    return values


def as_flags(values: dict[Any, Any], path: Path, parser: argparse.ArgumentParser, names: Iterable[str]) -> list[str]:
    """Returns what `read_yaml` has read as a command line, so that flags and files are checked and refused alike.

    Raises `UserInputError` for a key that is not in `names`, and for a value that the parser refuses.
    """
    names = list(names)
    argv = []
    for name, value in values.items():
        if name not in names:
            raise UserInputError(f"--config {path}: unknown key '{name}'{suggest(str(name), names)}")
        if value is None:  # every field that can be None is None by default
            continue
        items = value if isinstance(value, list) else [value]
        # `--name=value` for a single value, so that a negative number is not taken for a flag.
        flag = [f"--{name}={items[0]}"] if len(items) == 1 else [f"--{name}", *map(str, items)]
        try:
            _, rest = parser.parse_known_args(flag)
        except UserInputError as error:
            raise UserInputError(f"--config {path}: {error}") from None
        if rest:
            raise UserInputError(f"--config {path}: '{name}' takes one value, not {len(items)}")
        argv += flag
    return argv


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns the end of a message about an unknown name: the most similar of the known ones."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{prefix}{nearest[0]}'?" if nearest else "; --help lists the known ones"
