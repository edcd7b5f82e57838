"""Text from data, such as the names of classes and files, inside of Markdown: shown as it is, and never acted upon."""

import re

from sprite_diffusion.common.errors import printable

# What means nothing in Markdown, wherever it stands: a dot only before a digit, as in a version, since www.a.b would
# become a link, and an underscore only within a word, where it emphasises nothing.
PLAIN = re.compile(r"(?:[^\W_]|[ (),+-]|(?<=[^\W_])_(?=[^\W_])|\.(?=\d)|@(?= ))+")


def escape(text: str) -> str:
    """Returns Markdown that shows `text` as one line: as it stands if it is plain, else as code.

    Code is the one place in which neither HTML nor links nor emphasis work.
    """
    text = printable(text).strip()
    if PLAIN.fullmatch(text):
        return text
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text or ' '}{padding}{fence}"


def quote(text: str) -> str:
    """Returns a literal of Python, on one line, for `text` in a program that a reader copies."""
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def table_row(*cells: str) -> str:
    """Returns a row of a table whose cells are Markdown; a table takes a bar for the end of a cell, in code too."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
