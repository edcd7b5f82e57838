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
            # From a DataLoader's worker the message comes as the last line of a traceback.
            message = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.{type(error).__name__}: ")
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapper
