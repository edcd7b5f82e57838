"""Errors that a user can cause, and how the programs report them."""

import sys
from collections.abc import Callable
from functools import wraps

from tqdm.auto import tqdm


class UserInputError(Exception):
    """A flag, file or column that the user has to change.

    The message is one line: it names the flag, file or column and says what would be right.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, to become part of a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: str) -> str:
    """Returns `text` as one line: a file's name may hold line breaks, or bytes that are no character."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def warn(message: str) -> None:
    """Prints a line on standard error, above a progress bar if there is one; one process of each machine prints."""
    from accelerate import PartialState  # it imports torch, which `--help` can do without

    if PartialState().is_local_main_process:
        tqdm.write(f"warning: {message}", file=sys.stderr)


def exits_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a `main`: a `UserInputError` becomes one line on standard error and exit status 2.

    Ctrl-C ends the program with status 130 and no traceback. Any other exception is a fault of ours and keeps its
    traceback.
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
