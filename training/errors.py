"""Errors that a user can cause, and how the command-line programs report them."""

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn


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


class ArgumentParser(argparse.ArgumentParser):
    """argparse with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserInputError(message)


def exits_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a `main`: a `UserInputError` becomes one line on standard error and exit status 2.

    Any other exception is a fault of ours and keeps its traceback.
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

    return wrapper
