"""A procedural pixel artist: an endless, seeded set of captioned 16x16 sprites in five classes.

A sprite is a stack of drawings, in chosen colours. The drawings are text files in `drawings/`, a letter for each
pixel; `drawings/heroes_front.txt` explains the letters.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha512
from itertools import count, cycle, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

CLASS_NAMES: tuple[str, ...] = ("hero", "non-hero", "food", "spell", "side-facing")
SIZE = 16
DRAWINGS_DIR = Path(__file__).with_name("drawings")
KIND_FILES = {"non-hero": "monsters.txt", "food": "foods.txt", "spell": "spells.txt"}

T = TypeVar("T")
Colour = tuple[int, int, int]

# colour -> its dark, middle and light tone
RAMPS: dict[str, tuple[Colour, Colour, Colour]] = {
    "red": ((128, 22, 34), (208, 44, 48), (244, 116, 100)),
    "orange": ((164, 74, 16), (236, 128, 32), (252, 184, 92)),
    "yellow": ((184, 128, 16), (244, 204, 52), (255, 240, 144)),
    "green": ((24, 92, 48), (60, 160, 68), (144, 216, 104)),
    "teal": ((16, 96, 108), (44, 172, 176), (140, 228, 216)),
    "blue": ((32, 52, 140), (60, 108, 216), (128, 184, 250)),
    "purple": ((76, 36, 124), (140, 72, 192), (200, 148, 236)),
    "pink": ((172, 60, 120), (236, 120, 172), (255, 188, 212)),
    "brown": ((84, 48, 28), (136, 84, 48), (184, 130, 84)),
    "black": ((26, 26, 36), (52, 52, 66), (96, 96, 114)),
    "grey": ((92, 98, 112), (146, 152, 166), (204, 208, 218)),
    "white": ((168, 178, 200), (224, 230, 240), (255, 255, 255)),
    "fair skin": ((204, 140, 112), (248, 200, 164), (255, 224, 196)),
    "tan skin": ((180, 116, 76), (232, 172, 120), (250, 204, 156)),
    "brown skin": ((140, 84, 52), (192, 128, 80), (220, 164, 112)),
    "dark skin": ((92, 52, 36), (140, 88, 60), (176, 120, 84)),
}
SKINS = ("fair skin", "tan skin", "brown skin", "dark skin")
HAIR_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CLOTH_COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey", "white")
METALS = ("grey", "white", "yellow", "teal")
INKS: tuple[Colour, ...] = ((20, 16, 24), (36, 30, 56), (52, 26, 22), (18, 42, 44))
LETTERS = {"w": (255, 255, 255), "c": (255, 240, 208), "r": (224, 48, 40), "y": (252, 208, 60)}
TINTS = (-8, 0, 8)  # added to each channel of a ramp, so that no two reds are quite the same
MIN_VISIBLE = 4  # pixels of a part that must be seen before the caption names it
CODES = ".#" + "".join(LETTERS) + "123456789"

Drawing = tuple[tuple[str, ...], np.ndarray]  # the header's fields, and (H, W) indices into CODES


class Layer(NamedTuple):
    """A drawing at its place and in its colours; the caption names it by `phrase` where enough of it can be seen."""

    codes: np.ndarray
    top: int
    left: int
    ramps: tuple[np.ndarray, ...]
    phrase: str = ""


@dataclass(frozen=True)
class Sprite:
    """A picture with its class and its caption."""

    image: np.ndarray  # (16, 16, 4) uint8: its colours are those of the sprite on white, its alpha is 0 or 255
    class_label: int  # index into CLASS_NAMES
    caption: str


class _Dice:
    """The choices behind one sprite, from the digits of a SHA-512 digest: every machine and Python makes the same."""

    def __init__(self, seed: int, index: int) -> None:
        self._digits = int.from_bytes(sha512(f"{seed} {index}".encode()).digest(), "big")
        self._ramps: dict[str, np.ndarray] = {}

    def choice(self, options: Sequence[T]) -> T:
        """Returns one of the options, each equally likely."""
        self._digits, position = divmod(self._digits, len(options))
        return options[position]

    def distinct(self, options: Sequence[T], count: int) -> list[T]:
        """Returns `count` of the options in random order, none of them twice."""
        left = list(options)
        return [left.pop(self.choice(range(len(left)))) for _ in range(count)]

    def ramp(self, colour: str) -> np.ndarray:
        """Returns the ramp (3, 3) uint8 of a colour, in the tint that the colour has throughout this sprite."""
        if colour not in self._ramps:
            tint = [self.choice(TINTS) for _ in range(3)]
            self._ramps[colour] = np.clip(np.array(RAMPS[colour]) + tint, 0, 255).astype(np.uint8)
        return self._ramps[colour]


@cache
def read_drawings(file_name: str, folder: Path = DRAWINGS_DIR) -> list[Drawing]:
    """Reads a file of drawings. Raises `ValueError` if a drawing has an unknown letter, no rows or uneven rows."""
    lines = (folder / file_name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("//"))
    drawings = []
    for block in re.split(r"\n\s*\n", text.strip()):
        header, *rows = block.splitlines()
        if len({len(row) for row in rows}) != 1 or not set().union(*rows).issubset(CODES):
            raise ValueError(f"{folder / file_name}: '{header}' needs rows of one length, of the letters {CODES}")
        fields = tuple(field.strip() for field in header.split("|"))
        drawings.append((fields, np.array([[CODES.index(letter) for letter in row] for row in rows])))
    return drawings


@cache
def _read_parts(file_name: str) -> dict[str, list[Drawing]]:
    """Returns a file's drawings by the part of the body or of the outfit that their headers begin with."""
    parts: dict[str, list[Drawing]] = {}
    for (part, *fields), codes in read_drawings(file_name):
        parts.setdefault(part, []).append((tuple(fields), codes))
    return parts


def _compose(layers: Sequence[Layer], ink: Colour, mirrored: bool) -> tuple[np.ndarray, list[str]]:
    """Paints the layers from back to front and outlines the silhouette. Returns the image and the visible phrases."""
    image = np.full((SIZE, SIZE, 4), (255, 255, 255, 0), dtype=np.uint8)
    owner = np.full((SIZE, SIZE), -1)  # the layer seen at each pixel
    for number, (codes, top, left, ramps, _) in enumerate(layers):
        palette = np.concatenate([[ink, ink, *LETTERS.values()], *ramps])
        rows, columns = np.nonzero(codes)
        image[rows + top, columns + left, :3] = palette[codes[rows, columns]]
        owner[rows + top, columns + left] = number
    drawn = np.pad(owner >= 0, 1)
    beside = drawn[:-2, 1:-1] | drawn[2:, 1:-1] | drawn[1:-1, :-2] | drawn[1:-1, 2:]
    image[beside & (owner < 0), :3] = ink
    image[beside | (owner >= 0), 3] = 255
    visible = np.bincount(owner[owner >= 0], minlength=len(layers))
    phrases = [layer.phrase for layer, pixels in zip(layers, visible, strict=True) if pixels >= MIN_VISIBLE]
    return image[:, ::-1].copy() if mirrored else image, [phrase for phrase in phrases if phrase]


def _draw_humanoid(dice: _Dice, view: str) -> tuple[np.ndarray, str]:
    """Draws a hero from the 'front' or the 'side'. Returns the image and its caption."""
    parts, mirrored = _read_parts(f"heroes_{view}.txt"), dice.choice((False, True))
    skin, hair, metal = dice.choice(SKINS), dice.choice(HAIR_COLOURS), dice.choice(METALS)
    clothes, cloak, headgear, shield, legs, trim = dice.distinct(CLOTH_COLOURS, 6)
    layers: list[Layer] = []

    def add(drawings: list[Drawing], *colours: str) -> None:
        (top, phrase), codes = dice.choice(drawings)
        ramps = tuple(dice.ramp(colour) for colour in colours)
        layers.append(Layer(codes, int(top), 0, ramps, phrase.format(colours[0])))

    has_headgear = dice.choice((False, True))
    if dice.choice((False, True)):
        add(parts["cloak"], cloak)
    add(parts["legs"], legs, dice.choice(("brown", "black", "grey")))
    add(parts["clothes"], clothes, skin, trim)
    add(parts["head"], skin)
    if dice.choice((False, False, False, True)):
        add(parts["beard"], hair)
    add(parts["loose hair"] + ([] if has_headgear else parts["styled hair"]), hair)
    if has_headgear:
        add(parts["headgear"], headgear, trim)
    if dice.choice((False, True, True)):
        add(_read_parts("weapons.txt")["weapon"], metal, "brown", trim)
    if dice.choice((False, False, True)):
        add(parts["shield"], shield, metal)
    image, phrases = _compose(layers, dice.choice(INKS), mirrored)
    attributes = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    subject = "a hero" if view == "front" else f"a hero walking {'left' if mirrored else 'right'}"
    return image, f"{subject} with {attributes}"


def _draw_sparkles(dice: _Dice, colours: Sequence[str]) -> list[Layer]:
    """Returns sparkles in some of the corners, to lie behind a spell."""
    corners = ((1, 1), (1, 12), (12, 1), (12, 12))
    sparkles = read_drawings("sparkles.txt")
    return [
        Layer(dice.choice(sparkles)[1], top, left, (dice.ramp(dice.choice(colours)),))
        for top, left in corners
        if dice.choice((False, True))
    ]


def _draw_kind(dice: _Dice, name: str) -> tuple[np.ndarray, str]:
    """Draws a sprite of a class that has whole figures. Returns its image and its caption."""
    (caption, *palettes), codes = dice.choice(read_drawings(KIND_FILES[name]))
    colours: list[str] = []
    for palette in palettes:
        distinct = [colour for colour in palette.split() if colour not in colours]
        colours.append(dice.choice(distinct or palette.split()))
    ramps = tuple(dice.ramp(colour) for colour in colours)
    top, left = (
        min(max((SIZE - length) // 2 + dice.choice((-1, 0, 1)), 1), SIZE - 1 - length) for length in codes.shape
    )
    layers = [Layer(codes, top, left, ramps)]
    ink = dice.choice(INKS)
    if name == "spell":
        ink = ramps[0][0]  # magic glows: its outline is a shade of its own colour
        layers = _draw_sparkles(dice, (colours[0], "white", "yellow")) + layers
    image, _ = _compose(layers, ink, mirrored=dice.choice((False, True)))
    return image, caption.format(*colours)


def draw_sprite(index: int, seed: int = 0, class_label: int | None = None) -> Sprite:
    """Draws sprite number `index` of the endless set `seed`, the same on every machine.

    The classes take turns, so every run of five sprites holds one of each. `class_label`, 0 to 4, asks for another
    class than the one whose turn it is. Raises `IndexError` for any other label.
    """
    if class_label is None:
        class_label = index % len(CLASS_NAMES)
    name, dice = CLASS_NAMES[class_label], _Dice(seed, index)
    if name == "hero":
        image, caption = _draw_humanoid(dice, "front")
    elif name == "side-facing":
        image, caption = _draw_humanoid(dice, "side")
    else:
        image, caption = _draw_kind(dice, name)
    return Sprite(image, class_label, re.sub(r"\ba (?=[aeiou])", "an ", caption))


def draw_sprites(
    num_images: int,
    seed: int = 0,
    transparent: bool = False,
    leave_out: Callable[[str], bool] | None = None,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draws the first `num_images` sprites of a set, or the first that `leave_out` does not leave out by the caption.

    Returns images (N, 16, 16, 3) uint8 on white or, if they are to be transparent around the sprite, (N, 16, 16, 4);
    class labels (N,) int64, indices into `CLASS_NAMES`, which take turns; and captions.
    """
    turns = cycle([_draw_class(label, seed, leave_out) for label in range(len(CLASS_NAMES))])
    sprites = [next(of_class) for of_class in islice(turns, num_images)]
    images = np.array([sprite.image for sprite in sprites], dtype=np.uint8).reshape(-1, SIZE, SIZE, 4)
    if not transparent:
        images = np.ascontiguousarray(images[..., :3])
    class_labels = np.array([sprite.class_label for sprite in sprites], dtype=np.int64)
    return images, class_labels, [sprite.caption for sprite in sprites]


def _draw_class(class_label: int, seed: int, leave_out: Callable[[str], bool] | None) -> Iterator[Sprite]:
    """Yields the sprites of a set whose turn is that of a class, without those that are left out."""
    for index in count(class_label, len(CLASS_NAMES)):
        sprite = draw_sprite(index, seed)
        if leave_out is None or not leave_out(sprite.caption):
            yield sprite
