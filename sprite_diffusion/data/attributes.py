"""What a caption of the built-in sprites says, and which pairs of a colour and a part are left out of training.

The attributes are read from the caption alone, by the phrases of the drawings that the artist makes captions of. Much
of a sprite is in no caption: the skin, the legs, the colours of a weapon and of a beard, the side that all but walking
heroes turn to, and every part of which fewer than `MIN_VISIBLE` pixels can be seen.
"""

import re
from functools import cache
from hashlib import sha256
from typing import NamedTuple

from sprite_diffusion.data.sprites import KIND_FILES, RAMPS, SKINS, read_drawings

FEWEST_COLOURS = 3  # of a part, for some of them to be left out: others remain, whichever colours the rest has
LEFT_OUT_SHARE = 10  # one pair in so many
_COLOUR = re.compile(rf"\b(?:{'|'.join(RAMPS)})\b")
_HERO = re.compile(r"a hero(?: walking (left|right))? with (.+)")
_HEROES = ("hero", "walking hero")  # seen from the front, and from the side
_COLOUR_SLOTS = ("first colour", "second colour", "third colour")  # of a monster, a food or a spell, by ramp


class Attribute(NamedTuple):
    """A fact about a sprite."""

    slot: str  # "subject", "facing", a part such as "cloak", or the colour of one, "cloak colour"
    value: str
    part: str = ""  # of a colour: what has it, "cape"

    @property
    def pair(self) -> str:
        """Returns the name of a pair of a colour and what has it, "red cape"."""
        return f"{self.value} {self.part}"


class _Phrase(NamedTuple):
    """What a phrase names, and whose colours stand in it."""

    fact: Attribute
    coloured: tuple[tuple[str, str], ...]  # slot and part of each colour, in order


def read_caption(caption: str) -> list[Attribute]:
    """Returns the attributes that a caption names. Raises `ValueError` for a phrase that is none of the artist's."""
    hero = _HERO.fullmatch(caption)
    if hero is None:
        return _read_phrase(caption, _kind_phrases(), caption)
    if hero[1] is None:
        attributes = [Attribute("subject", _HEROES[0])]
    else:
        attributes = [Attribute("subject", _HEROES[1]), Attribute("facing", hero[1])]
    for phrase in re.split(", | and ", hero[2]):
        attributes += _read_phrase(phrase, _part_phrases(), caption)
    return attributes


def list_values() -> dict[str, list[str]]:
    """Returns every value that a caption can give to each slot."""
    values: dict[str, dict[str, None]] = {
        "subject": dict.fromkeys(_HEROES),
        "facing": dict.fromkeys(("left", "right")),
    }
    colours = dict.fromkeys(colour for colour in RAMPS if colour not in SKINS)
    for phrase in (*_part_phrases().values(), *_kind_phrases().values()):
        values.setdefault(phrase.fact.slot, {})[phrase.fact.value] = None
        values |= {slot: colours for slot, _ in phrase.coloured}
    return {slot: list(some) for slot, some in values.items()}


def is_left_out(pair: str) -> bool:
    """Returns whether a pair, such as "red cape", is one of the tenth that is left out of training.

    It is decided by a hash of the pair's name. Parts that have few colours keep all of them.
    """
    _, _, part = pair.partition(" ")
    hashed = int.from_bytes(sha256(pair.encode()).digest()[:8], "big")
    return _num_colours().get(part, len(RAMPS)) >= FEWEST_COLOURS and hashed % LEFT_OUT_SHARE == 0


def has_left_out_pair(caption: str) -> bool:
    """Returns whether a caption names a pair that is left out. Raises `ValueError` if it is none of the artist's."""
    return any(fact.part and is_left_out(fact.pair) for fact in read_caption(caption))


def _read_phrase(phrase: str, known: dict[str, _Phrase], caption: str) -> list[Attribute]:
    """Returns the attributes of a phrase of `caption` that is among the known ones but for its colours."""
    found = known.get(_normalise(phrase))
    if found is None:
        raise ValueError(f"'{phrase}' in '{caption}' is no phrase of the built-in sprites")
    colours = _COLOUR.findall(phrase)
    bound = [Attribute(slot, colour, part) for (slot, part), colour in zip(found.coloured, colours, strict=True)]
    return [found.fact, *bound]


def _normalise(phrase: str) -> str:
    """Returns a phrase with {} for each colour, and 'a' for 'an', which may have been there for the colour's sake."""
    return re.sub(r"\ban\b", "a", _COLOUR.sub("{}", phrase))


@cache
def _part_phrases() -> dict[str, _Phrase]:
    """Returns the phrases for the parts of heroes."""
    phrases = {}
    for file_name in ("heroes_front.txt", "heroes_side.txt", "weapons.txt"):
        for (name, _, phrase), _ in read_drawings(file_name):
            if not phrase:
                continue  # legs and heads have none
            slot, part = name.split()[-1], re.sub("^an? |{} ", "", phrase)  # loose hair and styled hair are hair
            coloured = ((f"{slot} colour", part),) if "{}" in phrase else ()
            phrases[_normalise(phrase)] = _Phrase(Attribute(slot, part), coloured)
    return phrases


@cache
def _kind_phrases() -> dict[str, _Phrase]:
    """Returns the captions of monsters, foods and spells."""
    phrases = {}
    for file_name in KIND_FILES.values():
        for (caption, *_), _ in read_drawings(file_name):
            kind = re.sub(r"\ban? |{\d} (and {\d} )?", "", caption)
            coloured = tuple((_COLOUR_SLOTS[ramp], part) for ramp, part in _coloured_parts(caption))
            phrases[_normalise(re.sub(r"{\d}", "{}", caption))] = _Phrase(Attribute("subject", kind), coloured)
    return phrases


def _coloured_parts(caption: str) -> list[tuple[int, str]]:
    """Returns the ramp and the part of each colour in the caption of a drawing such as 'a {0} imp with {1} wings'."""
    ends = " with| and| from| breathing|$"
    found = re.findall(rf"{{(\d)}}(?= (?:and {{\d}} )?(.+?)(?:{ends}))", caption)  # two colours may have one part
    return [(int(ramp), part) for ramp, part in found]


@cache
def _num_colours() -> dict[str, int]:
    """Returns how many colours parts of monsters, foods and spells have, in the drawing that gives them the fewest."""
    fewest: dict[str, int] = {}
    for file_name in KIND_FILES.values():
        for (caption, *palettes), _ in read_drawings(file_name):
            for ramp, part in _coloured_parts(caption):
                fewest[part] = min(fewest.get(part, len(RAMPS)), len(palettes[ramp].split()))
    return fewest
