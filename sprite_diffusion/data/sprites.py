"""A procedural pixel artist: an endless, seeded set of captioned 16x16 sprites in five classes.

A sprite is a stack of drawings in ASCII. `123`, `456` and `789` are the dark, middle and light tones of a
drawing's first, second and third colour ramp, `#` is the outline colour, `w` white, `c` cream, `r` red, `y`
yellow and `.` nothing. A header line says what a drawing is; the tables are at the end of the file. Drawings leave
the outermost pixels free for the outline, which `_compose` adds.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha512
from typing import NamedTuple, TypeVar

import numpy as np

CLASS_NAMES: tuple[str, ...] = ("hero", "non-hero", "food", "spell", "side-facing")
SIZE = 16

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
MIN_VISIBLE = 4  # pixels of a part that must be seen for the caption to name it
CODES = ".#" + "".join(LETTERS) + "123456789"

Drawing = tuple[tuple[str, ...], np.ndarray]  # the header's fields, and (H, W) indices into CODES


class Layer(NamedTuple):
    """A drawing placed and coloured; the caption names it by `phrase` where it can be seen."""

    codes: np.ndarray
    top: int
    left: int
    ramps: tuple[np.ndarray, ...]
    phrase: str = ""


@dataclass(frozen=True)
class Sprite:
    image: np.ndarray  # (16, 16, 3) uint8, on white
    class_label: int  # index into CLASS_NAMES
    caption: str


class _Dice:
    """The choices behind one sprite: the digits of a SHA-512 digest, hence the same on every machine and Python."""

    def __init__(self, seed: int, index: int) -> None:
        self._digits = int.from_bytes(sha512(f"{seed} {index}".encode()).digest(), "big")
        self._ramps: dict[str, np.ndarray] = {}

    def choice(self, options: Sequence[T]) -> T:
        self._digits, position = divmod(self._digits, len(options))
        return options[position]

    def distinct(self, options: Sequence[T], count: int) -> list[T]:
        left = list(options)
        return [left.pop(self.choice(range(len(left)))) for _ in range(count)]

    def ramp(self, colour: str) -> np.ndarray:
        """The ramp (3, 3) uint8 of a colour, in the tint that it has throughout this sprite."""
        if colour not in self._ramps:
            tint = [self.choice(TINTS) for _ in range(3)]
            self._ramps[colour] = np.clip(np.array(RAMPS[colour]) + tint, 0, 255).astype(np.uint8)
        return self._ramps[colour]


def _drawings(text: str) -> list[Drawing]:
    drawings = []
    for block in text.strip("\n").split("\n\n"):
        header, *rows = block.splitlines()
        fields = tuple(field.strip() for field in header.split("|"))
        drawings.append((fields, np.array([[CODES.index(letter) for letter in row] for row in rows])))
    return drawings


def _parts(text: str) -> dict[str, list[Drawing]]:
    parts: dict[str, list[Drawing]] = {}
    for (part, *fields), codes in _drawings(text):
        parts.setdefault(part, []).append((tuple(fields), codes))
    return parts


def _compose(layers: Sequence[Layer], ink: Colour, mirrored: bool) -> tuple[np.ndarray, list[str]]:
    """Paints the layers from back to front and outlines the silhouette. Returns the image and the visible phrases."""
    image = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    owner = np.full((SIZE, SIZE), -1)  # the layer seen at each pixel
    for number, (codes, top, left, ramps, _) in enumerate(layers):
        palette = np.concatenate([[ink, ink, *LETTERS.values()], *ramps])
        rows, columns = np.nonzero(codes)
        image[rows + top, columns + left] = palette[codes[rows, columns]]
        owner[rows + top, columns + left] = number
    drawn = np.pad(owner >= 0, 1)
    beside = drawn[:-2, 1:-1] | drawn[2:, 1:-1] | drawn[1:-1, :-2] | drawn[1:-1, 2:]
    image[beside & (owner < 0)] = ink
    visible = np.bincount(owner[owner >= 0], minlength=len(layers))
    phrases = [layer.phrase for layer, pixels in zip(layers, visible, strict=True) if pixels >= MIN_VISIBLE]
    return image[:, ::-1].copy() if mirrored else image, [phrase for phrase in phrases if phrase]


def _draw_humanoid(dice: _Dice, view: str) -> tuple[np.ndarray, str]:
    parts, mirrored = PARTS[view], dice.choice((False, True))
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
        add(PARTS["both"]["weapon"], metal, "brown", trim)
    if dice.choice((False, False, True)):
        add(parts["shield"], shield, metal)
    image, phrases = _compose(layers, dice.choice(INKS), mirrored)
    attributes = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    subject = "a hero" if view == "front" else f"a hero walking {'left' if mirrored else 'right'}"
    return image, f"{subject} with {attributes}"


def _draw_sparkles(dice: _Dice, colours: Sequence[str]) -> list[Layer]:
    """Sparkles in some of the corners, to lie behind a spell."""
    corners = ((1, 1), (1, 12), (12, 1), (12, 12))
    return [
        Layer(dice.choice(KINDS["sparkle"])[1], top, left, (dice.ramp(dice.choice(colours)),))
        for top, left in corners
        if dice.choice((False, True))
    ]


def _draw_kind(dice: _Dice, kinds: list[Drawing], is_spell: bool) -> tuple[np.ndarray, str]:
    (caption, *palettes), codes = dice.choice(kinds)
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
    if is_spell:
        ink = ramps[0][0]  # magic glows: its outline is a shade of its own colour
        layers = _draw_sparkles(dice, (colours[0], "white", "yellow")) + layers
    image, _ = _compose(layers, ink, mirrored=dice.choice((False, True)))
    return image, caption.format(*colours)


def draw_sprite(index: int, seed: int = 0, class_label: int | None = None) -> Sprite:
    """Draws sprite number `index` of the endless set `seed`.

    The classes take turns, so every run of five sprites holds one of each. `class_label` asks for another class
    than the one whose turn it is.
    """
    if class_label is None:
        class_label = index % len(CLASS_NAMES)
    name, dice = CLASS_NAMES[class_label], _Dice(seed, index)
    if name == "hero":
        image, caption = _draw_humanoid(dice, "front")
    elif name == "side-facing":
        image, caption = _draw_humanoid(dice, "side")
    else:
        image, caption = _draw_kind(dice, KINDS[name], is_spell=name == "spell")
    return Sprite(image, class_label, re.sub(r"\ba (?=[aeiou])", "an ", caption))


def draw_sprites(num_images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draws the first `num_images` sprites: images (N, 16, 16, 3) uint8, class labels (N,) int64 and captions."""
    sprites = [draw_sprite(index, seed) for index in range(num_images)]
    images = np.array([sprite.image for sprite in sprites], dtype=np.uint8).reshape(-1, SIZE, SIZE, 3)
    class_labels = np.array([sprite.class_label for sprite in sprites], dtype=np.int64)
    return images, class_labels, [sprite.caption for sprite in sprites]


# Parts of humanoids: part | top row | phrase for the caption. One weapon serves both views.
WEAPONS = """
weapon | 3 | a sword
.............3..
.............3..
.............3..
.............3..
.............2..
.............2..
............555.
.............4..

weapon | 2 | a broadsword
.............3..
............332.
............332.
............332.
............332.
............332.
............332.
............565.
.............4..

weapon | 1 | a spear
.............3..
............332.
............332.
.............2..
.............5..
.............5..
.............5..
.............5..
.............5..
.............5..
.............5..
.............4..
.............4..

weapon | 2 | an axe
.............5..
...........3352.
...........3352.
...........3352.
...........3.5..
.............5..
.............5..
.............5..
.............4..
.............4..
.............4..

weapon | 3 | a hammer
............332.
............332.
............322.
............321.
.............5..
.............5..
.............5..
.............4..
.............4..

weapon | 1 | a staff
............898.
............988.
............887.
.............5..
.............5..
.............5..
.............5..
.............5..
.............5..
.............5..
.............4..
.............4..
.............4..

weapon | 4 | a bow
............w5..
............w.5.
............w.5.
............w.5.
............w.5.
............w.5.
............w.5.
............w.5.
............w4..
"""

FRONT = """
cloak | 9 | a {} cloak
...3222222221...
..322222222221..
..322222222221..
..322222222221..
..321112211121..
..32.111111.21..

cloak | 9 | a {} cape
...3222222221...
...3222222221...
..322222222221..
.33222222222211.
.32221111112211.

legs | 12 |
.....222221.....
.....22..21.....
....555..554....

legs | 12 |
.....222221.....
....22....21....
....55....54....

clothes | 9 | a {} tunic
....32222221....
...3232222121...
...5188998815...
.....322221.....

clothes | 9 | a {} robe
....32299221....
...3232982121...
...5132982115...
....32298221....
....32298221....
...3322982211...

clothes | 9 | a {} dress
.....523325.....
....53322215....
....51899815....
....33222221....
...3322222211...
...9898989898...

clothes | 9 | {} armour
...3332222221...
..332132212211..
...5132982115...
.....788887.....

clothes | 9 | a {} coat
....32899821....
...3232981121...
...5132981115...
....32288221....
....32....21....

head | 3 |
.....222222.....
....22222222....
....23222222....
....22#22#21....
....22#22#21....
.....222211.....

head | 3 |
.....222222.....
....22222222....
....23222222....
....2w#22#w1....
....22222221....
.....2#1112.....

head | 3 |
.....222222.....
....22222222....
....22222222....
....2ww22ww1....
....3w#22#w1....
.....221121.....

head | 3 |
.....222222.....
....22222222....
....23222222....
....22222221....
....2##22##1....
.....221121.....

beard | 7 | a beard
....2......1....
....22233221....
.....322221.....
......3221......

loose hair | 1 | short {} hair
.....222222.....
....23322222....
...2333222221...
...2322222221...
...22.22.2.21...
...2........1...

loose hair | 1 | long {} hair
.....222222.....
....23322222....
...2333222221...
...2322222221...
...222.2..221...
...22......21...
...22......21...
...22......21...
...22......21...
...12......11...

styled hair | 1 | spiky {} hair
....2..2..2..2..
..2.22232222.2..
..22233322221...
.2223322222211..
..22.22.22.221..
...2........1...

styled hair | 1 | curly {} hair
....22322122....
...2332222221...
..233222322221..
..232222222221..
.22322.22.22221.
.2222......2221.
.2122......2121.
..12........11..

styled hair | 1 | tied {} hair
......2332......
.....122221.....
...2333222221...
.2223322222212..
.22222.22.22221.
.232........221.
.22..........21.
.22..........21.

styled hair | 1 | a {} mohawk
......3322......
......3322......
......3222......
......3221......
.......22.......

headgear | 1 | a {} helmet
.....223222.....
....23322222....
...2333222221...
...2332222221...
...5566666554...
...22..22..21...
...22..22..21...
...122....211...

headgear | 1 | a horned {} helmet
.c............c.
.cc..222222..cc.
..cc23322221cc..
...2333222221...
...5566666554...
...2........1...

headgear | 1 | a {} wizard hat
........322.....
......33222.....
.....3332221....
....45566554....
..333222222211..

headgear | 1 | a {} crown
...3..3..3..2...
...33233232.1...
...3325225221...
....22222211....

headgear | 1 | a {} hood
.....222222.....
....23322222....
...2333222221...
...2321111221...
...221....121...
...22......21...
...22......21...
...222....221...
....22222211....

headgear | 4 | a {} headband
...2233322221...
............122.
.............21.

headgear | 1 | a feathered {} cap
...........66...
.....222226654..
....33222265....
...3332222241...
..333322222211..

shield | 9 | a round {} shield
..222#..........
.23322#.........
.32552#.........
.22552#.........
.12221#.........
..111#..........

shield | 8 | a {} kite shield
.66666#.........
.63252#.........
.65555#.........
.63252#.........
.43251#.........
..451#..........
...4#...........
"""

SIDE = """
cloak | 9 | a {} cloak
...332..........
..33221.........
..32221.........
.332221.........
.32221..........
.2211...........

cloak | 9 | a {} cape
....32..........
..33221.........
.332211.........
.32221..........
.221............

legs | 12 |
....222222......
...22211222.....
..555....555....

legs | 12 |
....222221......
..5211..221.....
..5.....555.....

legs | 12 |
....222221......
....1222555.....
...555..........

clothes | 9 | a {} tunic
....322221......
....3211122255..
....322221......
....889987......

clothes | 9 | a {} robe
....322221......
....3221133255..
....322221111...
....322229......
...33222298.....
..3322222298....

clothes | 9 | a {} dress
....322225......
....3215555555..
....899981......
...3322221......
..332222221.....
..989898989.....

clothes | 9 | {} armour
....3332221.....
....3332222255..
....3211111.....
....788887......

clothes | 9 | a {} coat
....322289......
....3211122255..
....322281......
...3322281......
...3221.........

head | 3 |
....222222......
...22222222.....
...22222222.....
...222222#2.....
...221222#233...
....2122222.....

head | 3 |
....222222......
...22222222.....
...22222222.....
...22222ww2.....
...22122w#233...
....212222#.....

head | 3 |
....222222......
...22222222.....
...22222222.....
...22222w#233...
...2212222223...
....2122221.....

beard | 7 | a beard
......2.........
......2222322...
.......222221...
........2221....

loose hair | 1 | short {} hair
.....22222......
...223322222....
..22333222222...
..2233222221....
..222222.2......
..22222.........
..12222.........
...111..........

loose hair | 1 | long {} hair
.....22222......
...223322222....
..22333222222...
..2233222222....
..223222..2.....
..22222.........
..22222.........
.232221.........
.22221..........
.22211..........
.1211...........

styled hair | 1 | spiky {} hair
..2..22..22.2...
..22.2222222....
.2.222333222....
..22233322222...
.22222222.2.....
..22222.........
.2.2222.........
...21...........

styled hair | 1 | curly {} hair
....2232212.....
..223322222.....
.22332232222....
.2232222222.....
.22222222.......
.2222122........
.1222212........
..12121.........

styled hair | 1 | tied {} hair
.....22222......
...223322222....
.2223332222.....
.222332222......
.21222222.......
.22.2222........
.22.121.........
.21.............
.1..............

styled hair | 1 | a {} mohawk
...3322332233...
..332222222221..
..3222..........
..221...........
..21............

headgear | 1 | a {} helmet
....223322......
..2233322222....
..23333222222...
..23332222222...
..55566665555...
..22222.........
..22222.........
..12221.........
...111..........

headgear | 1 | a horned {} helmet
.....222ccc.....
...22332.ccc....
..2333ccc2cc....
..2333cc22222...
..55566665555...
..2221..........

headgear | 1 | a {} wizard hat
.332............
..333222........
...3332222......
...4556655......
.3333222222221..

headgear | 1 | a {} crown
...3..3..3.2....
...33233232.....
...33252252.....
...22222221.....

headgear | 1 | a {} hood
....22222.......
..223322222.....
..2333222222....
..2332222211....
..233221........
..23221.........
..22221.........
..12221.........
...112211.......

headgear | 4 | a {} headband
..233322222.....
.222............
.2..............

headgear | 1 | a feathered {} cap
..66............
..5662222.......
...563332222....
..2263322222....
..222222222222..

shield | 9 | a round {} shield
....#222#.......
...#23322#......
...#32552#......
...#22552#......
....#122#.......

shield | 9 | a {} kite shield
...#66666#......
...#65555#......
...#43251#......
....#451#.......
.....#4#........
"""

# Whole figures: caption | colours of the first ramp | of the second | of the third.
MONSTERS = """
a {0} slime with {1} eyes | green blue pink purple orange teal red | yellow red white
.....2222.....
...22332222...
..2333222222..
.233322222222.
.233222222222.
23322662266221
23322#622#6221
22222222222221
222222####2221
12222222222211
.111111111111.

a one-eyed {0} slime with a {1} eye | green blue pink purple orange teal red | yellow red blue
......3...2...
......2..22...
....22222222..
..23322wwww22.
.2333wwwwwww2.
.2332ww55www2.
23322w5##5ww21
22222ww55www21
222222wwww2221
222#22222222#1
1222#######211
.111111111111.

a {0} ghost with {1} eyes | white blue purple teal pink | red yellow black blue
....2222....
..22333222..
.2333222222.
.2332222222.
233552255221
232542254221
222222222221
222222222221
22222##22221
222222222221
222222222211
22.222.22.11
2...2...2..1

a laughing {0} ghost with {1} eyes | white blue purple teal pink | red yellow black blue
.....2222....
...22333222..
..23332222222
..23255225521
.222254225421
2222222222221
222222#####21
22222#w#w##21
222222####221
.22222222221.
..2222222211.
21222222111..
.122211111...
...1111......

a {0} bat with {1} wings and {2} eyes | purple black brown blue | red pink orange teal yellow | yellow red white
....2....2....
6...32..22...6
66..222222..66
656.232222.656
65622982982656
65562#22#25556
65562222225556
455.2w22w2.554
45..222221..54
4....2221....4
......21......

a {0} bat with {1} wings and {2} eyes | purple black brown blue | red pink orange teal yellow | yellow red white
.....2..2.....
.....3222.....
....232222....
...29822982...
..662#22#266..
.666222222656.
66562w22w26556
65552222215556
65.5522215.556
5...5.21.5...5
4...4....4...4

a {0} skeleton with {1} eyes | white grey yellow | red teal yellow
...233222....
..23332221...
..22222221...
..25#22#51...
..2##22##1...
..222##221...
...2#2#21....
.....22......
.22.2222.21..
.2.2#22#1.1..
.2..2222..1..
22.2#22#1.21.
.....22......
..222##221...

a {0} skeleton with {1} eyes and a {1} sword | white grey yellow | red teal yellow | brown
...233222....6
..23332221..66
..22222221..66
..25#22#51..66
..2##22##1..66
..222##221..66
...2#2#21...66
.....22....898
.22.2222.22.7.
.2.2#22#1..22.
.2..2222......
22.2#22#1.....
.....22.......
..222##221....

a {0} spider with {1} eyes | black brown purple red green | red yellow green white
...2......2...
..2..2222..2..
2.2.233222.2.2
.22233222222..
..222222222..2
22.22222222.22
..222222222...
.2.22222222.2.
2.2.652562.2.2
..2.2#22#2.2..
.2...2ww2...2.
.2..........2.

a {0} spider with {1} markings | black brown purple red green | red yellow orange white
2...........2
.2..22222..2.
..223366222..
2..2265622..2
.2223566522.2
..22222222222
.2.2222222.2.
2.2.22222.2.2
..2.w#2w#.2..
.2..22222..2.
2....w.w....2

a floating {0} eye with a {1} iris | red purple green brown | blue green yellow teal
....2222222...
..222wwwww22..
.22wwwwwwww22.
22wwww555www22
2wwww56655ww21
2www566##55w21
2www556##55w21
2wwww55555ww21
22wwww555www21
.22wwwwwwww21.
..222wwww221..
...22222211...
..2..2..2..1..
.2..2....1..1.

a winged {0} eye with {1} wings | red purple green brown orange | blue teal purple pink
6............6
66...2222...66
656.233222.656
6562wwwwww2656
65562w##w25556
45562w##w25554
.452wwwwww254.
.4.2wwwwww1.4.
....2wwww1....
.....2221.....
......21......

a {0} mushroom man with {1} spots | red blue purple brown orange | white yellow pink
....22222.....
..223356222...
.23333662222..
2355332222562.
2366222256662.
22222222666221
12222222222211
..1cccccccc1..
...c#cccc#c...
...c#cccc#c...
...ccc##ccc...
....cccccc....
...cc....cc...

an angry {0} mushroom man with {1} spots | red blue purple brown orange | white yellow pink
.....2222.....
....233222....
...23356222...
..2333662222..
.233222222562.
2356222225662.
26622222222221
.1c#ccccc#c11.
c.cc#ccc#cc.c.
cccc#ccc#ccccc
..ccccccccc...
..cc#w#w#cc...
...cccccccc...
..ccc...ccc...

a {0} dragon with {1} wings | red green blue purple black teal | orange yellow pink grey
..2..2.....66.
..23322..66655
.233222.666555
23##2222.65545
322222226555.5
2w2w22322655.2
...2233225...2
....2cc222..22
...22ccc22222.
..2.2ccc22221.
..2.cccc2221..
...22cc2222...
...222.222....
..222..222....

a {0} dragon with {1} wings breathing fire | red green blue purple black teal | orange yellow pink grey
......2..2....
......2332....
....233222.666
...23##2226655
y.222222226545
yy22222.226555
yrr.223322555.
yyrr.cc222215.
.yyy.ccc22215.
..y..cccc22212
....22cc222211
...22.2222222.
......22.222..
.....222.222..

a {0} snake with {1} stripes | green red purple blue yellow | yellow black white orange
....2222......
..22332222....
.233222222....
.2#222#222....
.222222222....
..2ww22221....
..r.225521....
.rr..22221....
....225521.2..
..2222222..21.
.225522552221.
22255225522221
12222222222211
.111111111111.

a {0} cobra with a {1} hood | green red purple blue brown | yellow orange pink teal
....2222....
...233222...
..23322222..
.22#222#221.
.252222252..
255622265521
255566655521
.2556665521.
..25666521..
...266621.2.
..2266622.21
.22222222221
122211122211
.1111111111.

a {0} imp with {1} wings | red purple blue green black | orange yellow pink grey
.c.........c..
.cc.22222.cc..
..c2332222c...
6..2y#2y#2..6.
66.2y#2y#1.66.
656.2222221656
65562#w#w25556
6545.2222.5456
65.22222212.56
6.2.23221.1..6
..2.22221.1...
....22.21...2.
....2..22.222.
...22...22....

a {0} crab with {1} eyes | red orange blue purple teal | yellow green white
22..........22
232........232
2.2.66..66.2.2
222.6#..6#.222
.22..2..2..22.
..2222222222..
.223333222221.
.233332222221.
.222222222221.
.2222####2221.
..1222222221..
.2.11222211.2.
2..2......2..2
..2........2..

a {0} frog with a {1} belly | green teal purple orange blue | yellow white pink
..222....222..
.2ww22..2ww22.
.2w##2222w##2.
.222222222222.
2233222222221.
2322222222221.
2#2222222222#1
22##########21
.222566665221.
.225666666521.
22256666665221
23225666652221
22212555512221
222.22..22.222

a {0} golem with {1} eyes | grey brown blue black orange | yellow teal red green
....233222....
...23322222...
...25622652...
.2.22222221.2.
2321######1232
23222#22#22221
22123332222121
22.23322221.21
21.22221211.21
222.222211.221
231..2221..231
221.22.221.221
....32..21....
...222..221...

a {0} plant with a {1} flower | green teal | red pink purple yellow orange blue
.....5665.....
..56556655665.
.5665566556655
.556655555665.
..5555##55555.
.665#w##w#566.
5665######5665
5565#w##w#5655
.555.5555.555.
.....5225.....
.22...22...22.
23322232222221
.2222232222211
...22222221...
"""

FOODS = """
a {0} apple with a {1} leaf | red green yellow | green | brown
......7.66..
.....7.665..
.....7665...
.2222722221.
233222222221
233322222221
233222222221
222222222221
222222222221
122222222211
.1222222211.
..1112111...

a bitten {0} apple with a {1} leaf | red green yellow | green | brown
.....7.66...
.....7665...
.22227222...
233222222c..
2333222ccc..
23322ccc....
2222222cc...
22222222ccc.
222222222221
122222222211
.1222222211.
..1112111...

a {0} banana | yellow green | brown
..........55
.........22.
........322.
.......3321.
.......3321.
......33221.
.....332221.
5..3333221..
2333333221..
.22222221...
..111111....

a bunch of {0} bananas | yellow green | brown
.......55....
.......55....
......3221...
.....332321..
....3322321..
...332213321.
..3322133221.
.33221332221.
53221.332221.
.221.5332221.
......32221..
......52211..
.......111...

a {0} loaf of bread | orange brown yellow | yellow white
....22222222..
..22333333222.
.2336433643321
23364336433642
23643364336421
22222222222221
22222222222221
12222222222211
.111111111111.

a slice of {0} toast with {1} jam | brown orange | red purple orange yellow green
..2222.2222..
.22ccc2ccc22.
22ccccccccc21
2cccc566cccc1
22cc56665cc21
.2c5666655c1.
.2c5566555c1.
.2cc555556c1.
.2ccc5555cc1.
.2ccccc5ccc1.
.22ccccccc21.
..111111111..

a wedge of {0} cheese | yellow orange white
.........222..
.......223332.
.....22333332.
...2233333333.
.2233333333333
22222222222222
21122222222221
21122222112221
22222222112221
22221222222221
11111111111111

a hot dog with a {0} sausage and {2} sauce | red brown orange | orange brown yellow | yellow red green
..5666666665..
.566666666665.
.556666666655.
33333333333333
33299332993321
29922299222991
12222222222211
.566666666665.
.556666666654.
..4555555544..

a {0} drumstick | brown orange red
...22222......
.222333222....
.2333322222...
23333222222...
23332222222...
22322222221...
22222222211...
.2222222111...
.1222221111...
..11111111cc..
.....111.ccwc.
..........cwww
...........wwc
...........ww.

a {0} steak | red brown pink
...ccccccc....
.cc3333222cc..
c3333322222cc.
c33332222222cc
c332222ww2222c
c22222wccw222c
cc2222wccw212c
.cc2222ww2212c
..cc22222211cc
...ccc2111ccc.
.....cccccc...

a {0} fish with {1} fins | blue teal orange pink grey | yellow red purple green
.....5666.....
....566665....
...22222222..6
.223333222..66
.2333332222665
2w#23232222665
2##22323222265
222232322226.5
.cc3222222.665
..ccccccc..666
...566.....565
....56......5.

a fish skewer with {0} and {1} pieces | orange pink red | white yellow green | brown
...........88.
..........88..
.......2222...
......233222..
......232221..
....5552221...
...5665521....
...565554.....
.2225554......
233224........
23222.........
222218........
.221..........
.8............

a slice of {0} cake with {1} sponge and a {2} berry | pink white brown purple green | yellow brown | red blue purple
......98......
.....9887.....
......87......
...33333333...
.333333333332.
32222222222222
21222122212221
45545554555454
56555555555554
33323333323331
56555555555554
45555555555544

a {0} cupcake with a {2} berry | pink white brown purple green | brown yellow red | red blue purple
.....98.....
....9887....
....3872....
...333222...
..33322221..
.3332222221.
.2222222211.
332222222211
222222222111
.4656565654.
.4656565654.
..46565654..
..46565654..
...444444...

a pair of {0} cherries with a {1} leaf | red purple pink yellow | green | brown
........7665.
.......77665.
......7..755.
.....7...7...
....7....7...
..2722...7...
.233222.2722.
2332222233222
2322222332222
2222221322221
1222212222221
.112212222211
......122221.
.......1111..

a {0} carrot with {1} leaves | orange red yellow purple | green
..........5.6.
........5.6565
.......5656655
........56656.
......2.55565.
.....23325555.
....2333221...
...23133221...
...2332211....
..2332212.....
.2321221......
.222221.......
2222..........
22............

a slice of {1} pizza with {2} topping | orange brown | yellow orange | red green purple black
..2222222222..
.233333333322.
22222222222221
15666666666641
.566988666654.
.568887669854.
..568776888...
..5666668875..
...56666676...
...56698665...
....588866....
....568765....
.....5665.....
......55......

a {1} pizza with {2} topping | orange brown | yellow orange | red green purple black
....222222....
..2233333322..
.226666666622.
.2698666698621
22688666688662
23666666666662
23666698666661
23698688666981
22688666666881
22666666986661
.2269866886621
.1266866666211
..1122222211..
....111111....

a fried egg with a {0} yolk | yellow orange red
...wwwwww.....
..wwwwwwwwww..
.wwwwwwwwwwww.
.wwww2222wwwww
wwww233222wwww
www23322222www
www23222222wwc
wwww222221wwwc
.wwww2211wwwwc
.wwwwwwwwwwwc.
..cwwwwwwccc..
...cccccc.....

a bunch of {0} grapes with a {1} leaf | purple green red blue | green | brown
......7.66..
......76656.
..3272725655
.32212322555
.221232213.2
.3223222122.
322232223222
221222132221
.3221322132.
.2213222122.
..322232221.
..221222121.
....322221..
.....2221...

a slice of {0} melon with {1} rind | red orange yellow pink | green
46333222222264
463#322#222264
46332222222264
46322#222#2264
.463222222264.
.466#222#2664.
..4662222664..
...46666664...
....445544....

an ice cream with a {0} scoop | pink white green brown blue purple yellow | orange brown
....3322....
..33332222..
.3333322221.
.3333222221.
332222222211
222222222211
.2222122121.
.1656516151.
..65656564..
..56565654..
...556564...
...565654...
....5564....
.....54.....

an ice cream with {0} and {2} scoops | pink white green brown blue purple yellow | orange brown | red white green blue
....9988....
...998888...
..99888887..
..88888887..
.3377887721.
333322222211
332222222211
222222222211
.1212212121.
..65656564..
..56565654..
...556564...
....5654....
.....54.....

a donut with {0} icing and {2} sprinkles | pink brown white purple teal green | orange brown | yellow blue red white
....222222....
..3333322822..
.333822222222.
33322228222821
38222....22221
3222......2221
5282......2824
5222......2224
5622....222284
56622282282244
.566822222844.
.466662266544.
..4455555544..
....444444....

a {0} strawberry with {1} leaves | red pink | green
.....65.....
.66.665.665.
..56665665..
..25566552..
.2225665222.
23322552c222
23c222222221
2322c222c221
22222222222.
.2c222c2221.
.22222222c1.
..22c22221..
...222221...
....2211....

a burger with {1} lettuce and {2} cheese | orange brown | green | yellow orange white
...33333322...
.333c3322c222.
33c3323c222c21
33332222222221
22222222222211
56656656665665
5##5##5#####54
##############
99899889998899
.98..88..88.8.
22222222222221
22222222222211
.122222222111.

a {0} cookie with {1} chips | orange brown yellow | brown black red
....222222...
..2233333222.
.23365332222.
2333543222652
2333322226541
2365322222221
2354222652221
2332222542221
2322652222651
.222542222541
.122222652211
..1122254111.
....111111...

a {0} pear with a {1} leaf | green yellow red | green | brown
......7.66.
......7665.
.....7765..
....2272...
...233221..
...233221..
...2332221.
..23322222.
.2333222221
23332222221
23322222221
23222222221
12222222211
.112222111.

a sushi roll with {0} filling | orange red green yellow pink | teal
...wwwwwww....
.wwwwwwwwwww..
wwwwww22wwwww.
#wwww3322wwww#
##www2221wwww#
####wwwwwwww##
#####wwwww####
##44########4#
#4############
##########4###
.############.
...########...

a shrimp sushi with {0} topping | orange red pink yellow
.....33333....
...333323322..
.333223322332.
33322332233221
32233223322321
22332233223221
.22##2222##11.
wwwww##wwwwww.
wwwwwwwwwwwww.
cwwwwwwwwwwcc.
.cccwwwwcccc..

a bowl of {1} soup | red blue white teal brown | orange yellow green red
.666666666666.
66556666565566
22555565555522
32222222222221
33222222222221
.322222222221.
..2222222211..
...12222111...
....111111....

a {0} candy with {1} stripes | red green blue pink purple | white yellow
..........6.2.
..........2262
...........662
....2266222222
...22366226.2.
..2263226662..
..2662226622..
..6622266221..
..6226622211..
.262266221....
222222211.....
266...........
2622..........
.2.6..........

a {0} tomato with {1} leaves | red orange yellow green | green
.....5......
..5..65.66..
...6565665..
.2256665522.
233225652222
233322522221
233222222221
232222222221
222222222221
222222222221
122222222211
.1222222111.
..11111111..

a {0} pumpkin with a {1} stem | orange yellow green | green brown
.......66....
......665....
.22222552222.
2332233223221
3322333222322
3321333122321
3321332122321
2321232122221
2221222122221
2221222122211
.221222122111
.112111121111

a corn cob with {0} grains | yellow orange white red purple | green
.........2322.
.......232322.
......2323221.
.....2323221..
....232322165.
..5.23222166..
.65.3222165...
.66.2221665...
.665.21665....
.56656655.....
..56656655....
...55566555...
.....55.......
.....5........

a {0} pretzel with salt | brown orange
..2222..2222..
.233222232222.
232..2332..221
32....32....21
22...2222...21
22..22.222..21
.22w21...22w1.
.2221.....221.
..w22....222..
.222222w2222..
22...2222..22.
"""

SPELLS = """
a {0} fireball with a {1} core | red orange blue green purple | yellow white pink teal orange
..........3.2.
.......2.32...
..2.2..322..2.
....32332.32..
..2333322222..
.23355322221..
2335665322.2..
2356w66532.2..
235666653222..
23356653222...
.233553222....
.22333221.2...
..222221......
....221.......

a {0} comet with a {1} core | red orange blue green purple pink | yellow white pink teal orange
............3.
.........2.32.
.......2..32..
.....3...32..2
....32..332.2.
...3323332.2..
..333333222...
.3355533222...
.35666533222..
335www653222..
335wwww53221..
.356ww6532.2..
.335565332....
...33333......

a {0} flame with a {1} core | red orange blue green purple pink | yellow white pink teal orange
......2.......
.....32...2...
..2..332..2...
..3.2332.32...
..322333.332..
.2333333323322
.3333533333322
23335533353321
23355653355321
23356665565321
2335666w665321
.23566www6531.
..2356666531..
...12222211...

a {0} lightning bolt | yellow blue purple teal pink
......333332.
.....333332..
....333322...
...333322....
..333322.....
.3333333332..
.2222333322..
....333322...
...333322....
...33322.....
..33322......
..3322.......
.332.........
.32..........

{0} lightning from a {1} cloud | yellow blue purple teal pink | grey white black
....6666......
..66666666....
.6666665666.66
66655566655666
56555556555556
.555555555554.
...44.444.44..
..333.332..33.
..32..3332.32.
.3332.2332333.
..332..32..33.
..32..332...3.
..2...32...32.
......2....2..

a cluster of {0} crystals | teal blue purple pink green
......33......
.....3322.....
.....3322.....
.....33221....
.3...33221..3.
.33..33221.33.
.3323332213321
.3322332213221
..322332213211
..332232213211
..232322123211
...3232212321.
...1332212211.
....11111111..

a {0} icicle with {1} frost | teal blue purple | white
..........3333
........333331
......33w33221
.....3w332221.
....33332221..
...3w3322211..
...333222.1...
..3w3322211...
.6333222111...
663322266.....
.6632266..6...
..66666.......
6..666...6....
..6...6.......

a {0} snowflake | blue teal purple pink
......2.......
....2.3.2.....
.2...232...2..
..2...3...2...
.2.3..3..3.2..
....3.3.3.....
..2..333..2...
233333w333332.
..2..333..2...
....3.3.3.....
.2.3..3..3.2..
..2...3...2...
.2...232...2..
....2.3.2.....

a {0} magic circle with a {1} star | purple blue red green teal pink orange | yellow white pink teal orange
....222222....
..2233333322..
.233..55..332.
.23...55...32.
23...5665...32
235556ww655532
23.556ww655.32
23..56ww65..32
23..56ww65..32
23.556..655.32
.2355....5532.
.233......332.
..2233333322..
....222222....

a {0} star | yellow orange pink blue teal green purple red
......33......
......32......
.....3322.....
.....3322.....
33333332222222
.333ww3222221.
..33w3332221..
...33332221...
...33332221...
..333322222...
..3332.12221..
.332......221.
.3..........1.

a {0} swirl | purple blue teal green pink red orange
....333333....
..3322222233..
.332.....2233.
.32..3332..223
32..332233..23
32.332..23..23
32.32.3.23..23
32.3233323.223
32.3322233.23.
.32.333...22..
.332.....22...
..3322222222..
....3333333...

a {0} orb with a {1} glow | purple blue teal green pink red orange yellow | white yellow pink
....222222....
..2233332222..
.233355322221.
.235665322221.
23566w65322221
23356653222221
23335532222221
22333222232221
22222222333221
22222223322221
.122222222211.
.112222222111.
..1112221111..
....111111....

a {0} beam | red orange yellow green teal blue purple pink
...........333
..........33w3
.........33ww3
........33ww32
.......33ww32.
..2...33ww32..
.....33ww32...
....33ww32....
.2.33ww32...2.
..33ww32......
.33ww322......
33ww32...2....
3ww322........
33322.........

three {0} magic arrows with {1} fletching | red orange yellow green teal blue purple pink | white yellow
.......3......
66.....33.....
.633333333....
66.....22.....
.......2...3..
....66.....33.
.....633333333
....66.....22.
.......3...2..
66.....33.....
.633333333....
66.....22.....
.......2......

a magic {0} arrow with {1} fletching | red orange yellow green teal blue purple pink | white yellow
.......3333333
........333332
..........3332
.........33232
...2....332.22
.......332..12
..2...332....2
.....332...2..
.66.332...2...
.66632........
66632..2......
.662666.......
6666666.......
..6.66........

a {0} explosion with a {1} core | orange red purple blue green pink | yellow white pink teal orange
......2....2..
.2....3...32..
.33..232.332..
..3323333332..
..2335553332..
...3556653333.
2333566w65332.
.233566w655333
..335666665332
.333556665332.
332.33555332..
2..33233.332..
..332.32...2..
..2....2......

a {0} heart with a {1} glow | red pink purple green blue | white yellow
...222...222..
..23332.23332.
.2366332333322
.3663333333221
.3663333332221
.3333333322221
.2333333322221
..23333222221.
...233322221..
....2332221...
.....23221....
......221.....
.......1......

a {0} crescent moon with a {1} star | yellow blue purple teal pink orange white | white yellow orange
.....2222.....
...223332.....
..233322......
.23332.....6..
.23332....666.
233322...66666
233322....666.
233322.....6..
233322........
.233322......2
.2233322....22
..222333222221
...2222222221.
.....1111111..

a {0} tornado with {1} dust | grey blue teal purple green pink | brown yellow white
..3333333333..
.322222222223.
33322222222211
.113333331111.
...32222223...
..3332222211..
..11133311....
....322223....
....33322111..
.6...1133.....
......3223..6.
.66...1111....
..66.322.666..
...666116666..

a {0} water drop with {1} ripples | blue teal purple green | white blue teal
......3.......
......33......
.....3332.....
.....3322.....
....33322.....
...3332222....
...33322221...
..3w3322221...
..3w3222221...
..33w222211...
...3222211....
.56.1111..65..
56..........65
.555666666555.

a {0} shield spell with a {1} rune | blue teal purple green pink yellow red orange | white yellow
.33333333333..
.322222222221.
.32...66...21.
.32...666..21.
.32..66.66.21.
.32..6...6.21.
.32.66666..21.
.32..66....21.
..32..66..21..
..322..6..21..
...322...21...
....322.21....
.....3221.....
......21......

a {0} skull curse with {1} eyes | purple green blue red pink teal | yellow white orange
....333333....
..3333332222..
.333333222222.
.333333222222.
.3366332266221
.3665632665621
.3655632655621
.2333326222221
..22333222211.
...3232323.2..
2..2.2.2.1....
...3232321..2.
.2..22221..2..
..2......2....
"""

SPARKLES = """
star
.3.
3w3
.3.

dot
...
.3.
...
"""

PARTS = {"both": _parts(WEAPONS), "front": _parts(FRONT), "side": _parts(SIDE)}
KINDS = {
    "non-hero": _drawings(MONSTERS),
    "food": _drawings(FOODS),
    "spell": _drawings(SPELLS),
    "sparkle": _drawings(SPARKLES),
}
