"""Palettes: a few colours that every pixel of a sample is snapped to."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import HfHubHTTPError, HFValidationError
from PIL import Image

from pipelines import clear_hidden, find_nearest, to_oklab
from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.run_files import CONFIG_FILE, PALETTE_FILE, find_run
from sprite_diffusion.data.advise import PIXEL_ART_COLOURS
from sprite_diffusion.data.config import parse_data_flags
from sprite_diffusion.data.dataset import StoredImages, load_image_data
from sprite_diffusion.sampling.flags import MAX_COLOURS, MIN_COLOURS

NUM_CLUSTERS = 32  # where the data have more colours than that, and no number is asked for
LOOKED_AT = 512  # images, which say whether a set is pixel art
READ_AT_ONCE = 4096  # images whose colours are in memory at a time
CLUSTERED_PIXELS = 2**17  # drawn at random, so that the clusters of a large set take seconds
CLUSTER_STEPS = 30
MEDOID_PIXELS = 1024  # of a cluster
MAX_FILE_SIZE = 2**16  # bytes of a text file of colours; 256 named ones take about ten thousand


@dataclass(frozen=True)
class Palette:
    """Colours, and where they are from."""

    colours: np.ndarray  # (K, 3) uint8
    source: str
    colours_per_image: int | None = None  # at most; None for all

    def snap(self, images: torch.Tensor) -> torch.Tensor:
        """Returns images (N, C, H, W) in [0, 1] with each pixel's colour the nearest of the palette, in OKLab.

        With `colours_per_image` an image has the colours of the palette that fit it best. The first channel or the
        first three are the colour; alpha, if there is a channel of it, stays as it is.
        """
        num_channels = 1 if images.shape[1] == 1 else 3
        levels = (images[:, :num_channels] * 255).round().to(torch.uint8)
        pixels = levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        # Thousands of pixels that nobody sees, as their alpha is a level or two above 0, have colours of noise.
        opacity = images[:, 3:] if images.shape[1] == 4 else torch.ones_like(images[:, :1])
        groups = 1 if self.colours_per_image is None else len(images)  # of images that share their colours
        snapped = [
            self._snap_pixels(*group)
            for group in zip(pixels.reshape(groups, -1, 3), opacity.reshape(groups, -1).numpy(), strict=True)
        ]
        colours = torch.from_numpy(np.concatenate(snapped).reshape(pixels.shape)).permute(0, 3, 1, 2)
        return torch.cat([colours[:, :num_channels].float() / 255, images[:, num_channels:]], dim=1)

    def _snap_pixels(self, pixels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
        """Returns pixels (P, 3) uint8 in colours of the palette, which of them is decided by their opacity (P,)."""
        found, index = np.unique(pixels, axis=0, return_inverse=True)
        lab, palette = _to_oklab(found), self.colours
        if self.colours_per_image is not None:
            counts = np.bincount(index.ravel(), opacity)
            palette = palette[
                _choose_columns(_square_distances(lab, _to_oklab(palette)), counts, self.colours_per_image)
            ]
        return palette[_find_nearest(lab, _to_oklab(palette))][index.ravel()]

    @property
    def record(self) -> dict[str, object]:
        """The entry about the palette in the record of a picture."""
        limit = {} if self.colours_per_image is None else {"colours_per_image": self.colours_per_image}
        return {"source": self.source, "colours": [f"#{bytes(colour).hex()}" for colour in self.colours], **limit}


@dataclass(frozen=True)
class Finish:
    """What is done to samples after they are drawn."""

    palette: Palette | None = None
    binary_alpha: bool = False  # of images of four channels

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns images (N, C, H, W) in [0, 1] with an alpha of 0 or 1 and the palette's colours, if asked for.

        Where alpha is 0, they are black.
        """
        if self.binary_alpha:
            images = torch.cat([images[:, :3], (images[:, 3:] >= 0.5).to(images.dtype)], dim=1)
        return clear_hidden(images if self.palette is None else self.palette.snap(images))

    @property
    def record(self) -> dict[str, object]:
        """The entries in the record of a picture."""
        palette = {} if self.palette is None else {"palette": self.palette.record}
        return {**palette, **({"binary_alpha": True} if self.binary_alpha else {})}


def choose_palette(text: str, model: str, num_channels: int, colours_per_image: int | None = None) -> Palette:
    """Returns the palette of `--palette`: the colours of a file, or those of the images that a model was trained on.

    Args:
        text: 'auto', a number of colours or a file.
        model: The model, which has a palette with it if the images are pixel art, and whose run tells the images.
        num_channels: The channels of the model's images.
        colours_per_image: The most that an image is to have of them; None for all.

    Raises:
        UserInputError: If the file or the images can't be read, or a model of grey images is given colours.
    """
    saved = find_saved_palette(model) if text == "auto" else None
    if saved is not None:
        return Palette(read_palette(saved), text, colours_per_image)
    if text != "auto" and not text.isdecimal():
        palette = Palette(read_palette(Path(text)), text, colours_per_image)
        if num_channels == 1 and (palette.colours != palette.colours[:, :1]).any():
            raise UserInputError(f"--palette {text} has colours, and {model} draws in grey: give a palette of greys")
        return palette
    run_dir = find_run(Path(model))
    if run_dir is None:
        raise UserInputError(
            f"--palette {text}: {model} is not the folder of a run, which would tell the images that it was trained "
            "on; name a file of colours"
        )
    try:
        data = load_image_data(parse_data_flags([], run_dir / CONFIG_FILE), with_labels=False)
    except UserInputError as error:
        raise UserInputError(f"--palette {text}: the images of the run can't be read; name a file ({error})") from None
    assert isinstance(data.dataset, StoredImages)
    limit = None if text == "auto" else int(text)
    return Palette(learn_palette(data.dataset, limit), text, colours_per_image)


def find_saved_palette(model: str) -> Path | None:
    """Returns the file of the palette that a run has left in its folder, or in a repository on the Hub, or None."""
    path = Path(model)
    for folder in filter(None, (path, find_run(path))):
        if (folder / PALETTE_FILE).is_file():
            return folder / PALETTE_FILE
    if path.exists():
        return None
    with suppress(HfHubHTTPError, HFValidationError, OSError):  # no such repository or file, or no network
        return Path(hf_hub_download(model, PALETTE_FILE))
    return None


def learn_pixel_art(images: StoredImages) -> np.ndarray | None:
    """Returns the palette of images that are pixel art, as `learn_palette` does; None if they are not."""
    some = range(0, len(images), math.ceil(len(images) / LOOKED_AT))
    colours = [len(codes.unique()) for codes in encode_colours(images.read_centred(some))]
    palette = learn_palette(images, None) if median(colours) <= PIXEL_ART_COLOURS else np.empty((0, 3), np.uint8)
    return palette if len(palette) >= MIN_COLOURS else None


def format_palette(colours: np.ndarray) -> str:
    """Returns colours (K, 3) uint8 as the text of a .hex file."""
    return "".join(f"{bytes(colour).hex()}\n" for colour in colours)


def learn_palette(images: StoredImages, num_colours: int | None) -> np.ndarray:
    """Returns the colours (K, 3) uint8 of a palette of images; each is a colour that the images have.

    Args:
        images: The images. Of those with alpha the opaque pixels count.
        num_colours: The colours of the palette; None for all that the images have or, if these are more than
            `MAX_COLOURS`, `NUM_CLUSTERS`. Images of fewer colours have them all in the palette.
    """
    colours, counts = _count_colours(images)
    if len(colours) <= (num_colours or MAX_COLOURS):
        return colours
    from scipy.cluster.vq import kmeans2  # here, as most commands have no use for it

    rng = np.random.default_rng(0)
    lab = _to_oklab(colours)
    drawn = rng.choice(len(lab), min(CLUSTERED_PIXELS, int(counts.sum())), p=counts / counts.sum())
    centres, _ = kmeans2(lab[drawn], num_colours or NUM_CLUSTERS, CLUSTER_STEPS, minit="++", rng=rng)
    cluster = _find_nearest(lab[drawn], centres)
    return colours[np.unique([_find_medoid(drawn[cluster == k], lab) for k in np.unique(cluster)])]


def _find_medoid(pixels: np.ndarray, lab: np.ndarray) -> int:
    """Returns the colour that the pixels of a cluster, indices (P,) of rows of lab (K, 3), are nearest to on average.

    Not the centre: white pixels and some of nearly white would make a ground that is not white.
    """
    some = pixels[:MEDOID_PIXELS]  # which were drawn at random
    candidates = np.unique(some)
    return candidates[np.sqrt(_square_distances(lab[candidates], lab[some])).mean(axis=1).argmin()]


def _to_oklab(colours: np.ndarray) -> np.ndarray:
    """Returns colours (..., 3) uint8 in OKLab, float64."""
    return to_oklab(torch.from_numpy(colours / 255)).numpy()


def _find_nearest(points: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Returns for each of the points (N, 3) the index of the nearest row of the palette (K, 3)."""
    return find_nearest(torch.from_numpy(points), torch.from_numpy(palette)).numpy()


def _square_distances(points: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Returns the squared distances (N, K) of points (N, 3) from the rows of a palette (K, 3)."""
    return np.square(points[:, None] - palette).sum(axis=2)


def _choose_columns(distances: np.ndarray, counts: np.ndarray, limit: int) -> np.ndarray:
    """Returns at most `limit` columns of distances (N, K), so that each row, counted (N,) times, is near to one.

    Of all columns that are the nearest to a row, the one that is missed least is dropped until few enough are left.
    """
    kept = np.unique(distances[counts > 0].argmin(axis=1)) if counts.any() else np.arange(1)
    while len(kept) > limit:
        left = distances[:, kept]
        nearest, second = np.partition(left, 1, axis=1)[:, :2].T
        lost = np.bincount(left.argmin(axis=1), (second - nearest) * counts, len(kept))
        kept = np.delete(kept, lost.argmin())
    return kept


def encode_colours(images: torch.Tensor) -> torch.Tensor:
    """Returns the colour of each pixel of uint8 images (B, C, H, W) as a number below 2^24, (B, H, W) int64.

    The channels are grey, or red, green and blue. A fourth, alpha, counts for nothing.
    """
    red, green, blue = (images[:, min(k, images.shape[1] - 1)].long() for k in range(3))
    return red << 16 | green << 8 | blue


def _count_colours(images: StoredImages) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct colours (K, 3) uint8 of all images, cropped in the centre, and how many pixels each has."""
    parts = []  # of each batch its codes, and how many pixels each has
    for start in range(0, len(images), READ_AT_ONCE):
        pixels = images.read_centred(range(start, min(start + READ_AT_ONCE, len(images))))
        codes = encode_colours(pixels)
        opaque = codes[pixels[:, 3] == 255] if pixels.shape[1] == 4 else codes.flatten()
        parts.append(np.unique(opaque.numpy(), return_counts=True))
    found, positions = np.unique(np.concatenate([codes for codes, _ in parts]), return_inverse=True)
    counts = np.zeros(len(found), np.int64)
    np.add.at(counts, positions, np.concatenate([numbers for _, numbers in parts]))
    return np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.uint8), counts


def read_palette(path: Path) -> np.ndarray:
    """Returns the distinct colours (K, 3) uint8 of a file, in its order: GIMP's .gpl, .hex, JASC's .pal, or a .png.

    Raises `UserInputError` if it is not such a file, or has other than 2 to 256 colours.
    """
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4)
            rows = pixels[pixels[:, 3] > 0, :3].tolist()
        else:
            rows = _parse_colours(path)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UserInputError(
            f"--palette {path} can't be read ({first_line(error)}): give a .gpl, a .hex or JASC's .pal, with a colour "
            "on each line, or a .png"
        ) from None
    colours = list(dict.fromkeys(map(tuple, rows)))
    if not all(0 <= level <= 255 for colour in colours for level in colour):
        raise UserInputError(f"--palette {path} has levels above 255: give colours of three levels from 0 to 255")
    if not MIN_COLOURS <= len(colours) <= MAX_COLOURS:
        raise UserInputError(
            f"--palette {path}: colours found: {len(colours):,}; it must have {MIN_COLOURS} to {MAX_COLOURS}"
        )
    return np.array(colours, np.uint8)


def _parse_colours(path: Path) -> list[tuple[int, ...]]:
    """Returns the colours of a text file. Raises `ValueError` for a line that is none."""
    with path.open("rb") as file:
        lines = file.read(MAX_FILE_SIZE).decode("utf-8-sig").splitlines()
    ending = path.suffix.lower()
    heads = {".gpl": "GIMP Palette", ".pal": "JASC-PAL", ".hex": ""}
    if not "".join(lines[:1]).startswith(heads[ending]):
        raise ValueError(f"its first line is not '{heads[ending]}'")
    if ending == ".gpl":
        lines = [line for line in lines[1:] if not line.startswith(("#", "Name:", "Columns:", "Channels:"))]
    elif ending == ".pal":
        lines = lines[3:]  # after the version and the number of colours
    pattern = (
        r"#?([0-9a-fA-F]{2})" + 2 * "([0-9a-fA-F]{2})" if ending == ".hex" else r"(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})"
    )
    end = r"(?:\s.*)?" if ending == ".gpl" else ""  # the colour's name
    colours = []
    for line in filter(str.strip, lines):
        match = re.fullmatch(pattern + end, line.strip())
        if match is None:
            raise ValueError(f"'{line.strip()[:40]}' is no colour")
        colours.append(tuple(int(level, 16 if ending == ".hex" else 10) for level in match.groups()))
    return colours
