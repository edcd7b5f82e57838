"""Flags: a dataclass of them becomes a command line and a YAML file; every fact about a flag stands with the flag."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sprite_diffusion.common.errors import SHORTEST_SECRET, UserInputError

MAX_SEED = 2**32 - 1  # NumPy's
MAX_COUNT = 2**31 - 1  # of steps, epochs or images: more than anyone counts, and safe in every integer type
MAX_FILE_SIZE = 2**18  # bytes of a YAML file of flags; the presets have about a thousand
TRACKERS = ("tensorboard", "wandb", "trackio")
MAX_THREADS = 1024
MAX_TIMESTEPS = 10**6  # each has a row in the scheduler's tables
ProcessClass = Literal["ClosedFormDDPMScheduler", "LinearCorruptionScheduler"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
AugmentationSet = Literal["none", "pixel_art", "photo"]
Changes = Literal["pixels", "numbers", "nothing"]


@dataclass(frozen=True)
class Range:
    """The values that a number may have; None where a side has no limit but that of an integer, `MAX_COUNT`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def check(self, name: str, value: float | None) -> None:
        """Raises `UserInputError` if the value of `--name` is not finite, or not in the range; None passes."""
        if value is None:
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise UserInputError(f"--{name} is {value}: it must be a finite number")
        at_most = MAX_COUNT if self.at_most is None and isinstance(value, int) else self.at_most
        limits = {
            "at least": (self.at_least, self.at_least is None or value >= self.at_least),
            "above": (self.above, self.above is None or value > self.above),
            "at most": (at_most, at_most is None or value <= at_most),
            "below": (self.below, self.below is None or value < self.below),
        }
        if not all(is_met for _, is_met in limits.values()):
            stated = [f"{words} {limit}" for words, (limit, _) in limits.items() if limit is not None]
            raise UserInputError(f"--{name} is {value}: it must be {' and '.join(stated)}")


SEED_RANGE = Range(at_least=0, at_most=MAX_SEED)
THREADS_RANGE = Range(at_least=1, at_most=MAX_THREADS)
THREADS_HELP = "Threads of each process on a CPU; default: OMP_NUM_THREADS, or else all cores."
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
        at_least, above, at_most, below: The limits of a number, or of each number in a list.
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


def check_values(config: Any) -> None:
    """Checks the fields of a configuration, which may come from a command line, a file or Python.

    Raises `UserInputError` for the first value that is of another type than its field, is an empty text, or is a
    number that is not finite or out of its range.
    """
    for flag in fields(config):
        value = getattr(config, flag.name)
        if not _is_of_type(value, flag.type):
            raise UserInputError(
                f"--{flag.name} is {value!r} ({type(value).__name__}): it must be {_describe_type(flag.type)}"
            )
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                check_text(flag.name, item)
            elif isinstance(item, int | float):
                flag.metadata["range"].check(flag.name, item)


def check_text(name: str, value: str) -> None:
    """Raises `UserInputError` if the text of `--name` is blank, or has a NUL, which no name of a file can have."""
    if not value.strip():
        raise UserInputError(f"--{name} is empty: give a value, or leave the flag out")
    if "\0" in value:
        raise UserInputError(f"--{name} {value}: take the NUL character out")


def _is_of_type(value: Any, kind: Any) -> bool:
    """Returns whether a value is of the type of a field; a whole number will do for a float."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of_type(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_is_of_type(value, part) for part in get_args(kind))
    # Subclasses do not pass: True would be a number, and NumPy's numbers can't be saved in the configuration.
    return type(value) in ((int, float) if kind is float else (kind,))


def _describe_type(kind: Any) -> str:
    """Returns the type of a field in words, for a message."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        return f"a list of {get_args(kind)[0].__name__}"
    if get_args(kind):
        return " or ".join(_describe_type(part) for part in get_args(kind))
    return {int: "an int", float: "a float or an int", bool: "True or False", str: "a str"}.get(kind, "None")


def check_token(hub_token: str | None) -> None:
    """Raises `UserInputError` if a token for the Hub can't be one; the token is not in the message.

    Args:
        hub_token: The value of `--hub_token`. If it is None, the environment is checked.
    """
    given = {"--hub_token": hub_token}
    if hub_token is None:  # line breaks at the end of these are no error, as huggingface_hub takes them off
        given = {name: os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    for source, token in given.items():
        if token and (len(token) < SHORTEST_SECRET or not re.fullmatch(r"[!-~]+", token)):
            raise UserInputError(
                f"{source} is not a token: it has fewer than {SHORTEST_SECRET} characters, or one that is a blank, a "
                "line break or not ASCII; copy it again from https://huggingface.co/settings/tokens"
            )


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

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Adds a flag as argparse does; one that is true or false is read by `parse_switch`."""
        if options.get("type") is string_to_bool:
            options["type"] = parse_switch
        return super().add_argument(*names, **options)


def parse_switch(text: str) -> bool:
    """Returns the value of a flag that is true or false: besides what transformers takes, 'on' and 'off', as in YAML.

    Raises argparse's error for anything else.
    """
    return string_to_bool({"on": "true", "off": "false"}.get(text.lower(), text))


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


def names_of(argv: list[str]) -> list[str]:
    """Returns the names of the flags of a command line, with underscores, in their order."""
    return [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]


def as_argv(flags: dict[str, Any]) -> list[str]:
    """Returns flags as the words of a command line."""
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return argv


class _StrictLoader(yaml.SafeLoader):
    """YAML in which no key stands twice, and without anchors and aliases, by which few lines can mean billions."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Returns the next node as PyYAML does. Raises `ComposerError` if it is an alias or has an anchor."""
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not taken", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping as PyYAML does. Raises `ConstructorError` if a key stands in it twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands there twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _TextLoader(_StrictLoader):
    """Strict YAML whose values are the text that stands there, but for null: the flag's own type reads it.

    PyYAML follows YAML 1.1, where 010 is 8, 16:16 is 976, and 'no' is false.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's class attribute)
        first: [(tag, form) for tag, form in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: Path, source: str | None = None, typed: bool = False) -> dict[Any, Any]:
    """Returns the 'name: value' lines of a YAML file of flags.

    Args:
        path: A file that a person or `TrainingConfig.save` has written.
        source: The file's name in messages; None for the path alone.
        typed: Whether values have the types that `TrainingConfig.save` gave them. Else each is None, its text, or a
            list of these.

    Raises:
        UserInputError: If `path` is no regular file of at most `MAX_FILE_SIZE` bytes, or holds something else.
    """
    source = source or str(path)
    text = _read_small_file(path, source)
    try:
        values = yaml.load(text, Loader=_StrictLoader if typed else _TextLoader)
    except yaml.MarkedYAMLError as error:  # whose own text would quote the line, and with it perhaps a token
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise UserInputError(f"{source} is not YAML of flags: {line}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserInputError(f"{source} is not YAML of flags: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserInputError(f"{source} is not YAML of flags: brackets are nested too deeply") from None
    if not isinstance(values, dict):
        raise UserInputError(f"{source} must hold 'name: value' lines")
    return values


def _read_small_file(path: Path, source: str) -> str:
    """Returns the text of a file. Raises `UserInputError` if it can't be read, or is too large for a file of flags."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe might never end
            raise UserInputError(f"{source} can't be read: it is not a regular file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_SIZE + 1)
        if len(content) > MAX_FILE_SIZE:
            raise UserInputError(f"{source} can't be read: a file of flags has at most {MAX_FILE_SIZE:,} bytes")
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserInputError(f"{source} can't be read: {error}") from None


def as_flags(
    values: dict[Any, Any], source: object, parser: argparse.ArgumentParser, names: Iterable[str]
) -> list[str]:
    """Returns what `read_yaml` has read as a command line, so that flags and files are checked and refused alike.

    Raises `UserInputError`, which names the `source`, for a key that is not in `names`, and for a value that the
    parser refuses.
    """
    names = list(names)
    argv = []
    for name, value in values.items():
        if name not in names:
            raise UserInputError(f"{source}: unknown key '{name}'{suggest(str(name), names)}")
        if value is None:  # every field that can be None is None by default
            continue
        items = value if isinstance(value, list) else [value]
        # `--name=value` for a single value, so that a negative number is not taken for a flag.
        flag = [f"--{name}={items[0]}"] if len(items) == 1 else [f"--{name}", *map(str, items)]
        try:
            _, rest = parser.parse_known_args(flag)
        except UserInputError as error:
            raise UserInputError(f"{source}: {error}") from None
        if rest or not items:
            raise UserInputError(f"{source}: '{name}' takes one value, not {len(items)}")
        if not all(isinstance(item, str) for item in items):
            raise UserInputError(f"{source}: '{name}' takes a value or a list of values, plain and without tags")
        argv += flag
    return argv


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns the end of a message about an unknown name: the most similar of the known ones."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{prefix}{nearest[0]}'?" if nearest else "; --help lists the known ones"
