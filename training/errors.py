"""Errors that a user can cause, and how the command-line programs report them."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import NoReturn

MAX_SEED = 2**32 - 1  # NumPy's


class UserInputError(Exception):
    """A flag, file or column that the user has to change.

    The message is one line: it names the flag, file or column and says what would be right.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, to be part of a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: str) -> str:
    """`text` in one line: a file's name may hold line breaks, or bytes that are no character."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def check_numbers(seed: int, guidance_scale: float | None) -> None:
    """Raises for a seed or a guidance scale that nothing can be drawn with."""
    if not 0 <= seed <= MAX_SEED:
        raise UserInputError(f"--seed is {seed}: it must be at least 0 and at most {MAX_SEED}")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UserInputError(f"--guidance_scale is {guidance_scale}: it must be a finite number")


def check_writable(flag: str, path: Path | None) -> None:
    """Raises if `path` can't be made. Makes nothing."""
    existing = next(folder for folder in (path or Path()).absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserInputError(f"{flag} {path}: {existing} is not a folder that can be written to")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserInputError(message)


def exits_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a `main`: a `UserInputError` becomes one line on standard error and exit status 2.

    Ctrl-C ends it with status 130 and no traceback. Any other exception is a fault of ours and keeps its traceback.
    """

    @wraps(main)
    def wrapper() -> None:
        try:
            main()
        except UserInputError as error:
            # From a DataLoader's worker the message comes at the end of a traceback.
            message = str(error).strip().rpartition(f"\n{__name__}.{type(error).__name__}: ")[2]
            print(f"error: {printable(message)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapper
