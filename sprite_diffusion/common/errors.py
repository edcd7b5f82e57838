"""Errors that a user can cause, how the programs report them, and the tokens that no message or record may show."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TRACKIO_WRITE_TOKEN")
HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")  # as the Hub makes them
SHORTEST_SECRET = 8  # characters; anything shorter would also be found in words that are no secret
MASK = "***"
# What a damaged file of JSON leads a reader to who takes its values for what they should be: int(inf) overflows.
DAMAGED_JSON = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

_kept_secrets: set[str] = set()


class UserInputError(Exception):
    """A flag, file or column that the user has to change.

    The message is one line: it names the flag, file or column and says what would be right.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, to become part of a message."""
    text = str(error).strip() or type(error).__name__
    if "weights_only" in text:  # torch goes on to say how to switch off its protection against foreign code
        return "it is damaged, or holds other objects than weights, which are not loaded, as they can run any program"
    return printable(mask_secrets(text).splitlines()[0].rstrip("."))


def printable(text: str) -> str:
    """Returns `text` as one line: a name may hold line breaks, a terminal's control codes, or no characters."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def keep_secret(token: str) -> None:
    """Has `mask_secrets` mask a token that was given in a flag or a file."""
    _kept_secrets.add(token)


def mask_secrets(text: str) -> str:
    """Returns `text` with *** in place of every token: given in a flag, in the environment, or of `hf auth login`."""
    for secret in sorted(_secrets(), key=len, reverse=True):  # a token may be a part of another
        text = text.replace(secret, MASK)
    return HUB_TOKEN.sub(MASK, text)


def mask_value(value: Any) -> Any:
    """Returns the value of a flag, which may be a list, without the tokens that may stand in its text."""
    if isinstance(value, list):
        return [mask_value(item) for item in value]
    return mask_secrets(value) if isinstance(value, str) else value


def _secrets() -> set[str]:
    """Returns every known token, as it was given and as libraries send and print it."""
    from huggingface_hub.constants import HF_TOKEN_PATH  # not at the top: it would slow down every `--help`

    tokens = _kept_secrets | {os.environ.get(name, "") for name in SECRET_VARIABLES}
    with suppress(OSError, UnicodeDecodeError):
        tokens.add(Path(HF_TOKEN_PATH).read_text())
    forms = {form for token in tokens for form in (token, token.strip(), "".join(token.split()), printable(token))}
    return {form for form in forms if len(form) >= SHORTEST_SECRET}


def warn(message: str) -> None:
    """Prints a line on standard error, above a progress bar if there is one; one process of each machine prints."""
    from accelerate import PartialState  # it imports torch, which `--help` can do without

    if PartialState().is_local_main_process:
        tqdm.write(f"warning: {printable(mask_secrets(message))}", file=sys.stderr)


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
            _close_progress_bars()
            print(f"error: {printable(mask_secrets(message))}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return wrapper


def _close_progress_bars() -> None:
    """Ends the line of each progress bar, so that what is printed next begins on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
