"""Figures of pixel art, of which the features say nothing: how many colours, of which palette, how clean."""

import torch

from sprite_diffusion.data.advise import PIXEL_ART_COLOURS
from sprite_diffusion.metrics.distances import median
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.sampling.palettes import encode_colours

READ_AT_ONCE = 512  # images; the first of them say whether the data are pixel art
LOOKED_AT = 10_000  # images: more than are measured, as a colour may stand in one of a thousand
HALF_OPAQUE = 128  # alpha from which a pixel counts as one of the sprite
CLEAR = 2**24  # the code of a transparent pixel, whatever colour is hidden there: that of no colour


class PixelArt:
    """The palette and the background of data that are pixel art: what generated images are measured beside."""

    def __init__(self, palette: torch.Tensor, background: int) -> None:
        self.palette = palette  # (K,), as `encode` numbers colours
        self.background = background

    @classmethod
    def of_data(cls, real: RealImages) -> "PixelArt | None":
        """Returns the palette and background of the reference images; None if the first of them are no pixel art."""
        palettes: list[torch.Tensor] = []
        borders: list[torch.Tensor] = []
        for images in real.in_batches(real.reference[:LOOKED_AT], READ_AT_ONCE):
            codes = encode(images)
            if not palettes and median(count_colours(codes)) > PIXEL_ART_COLOURS:
                return None
            palettes.append(codes.unique())
            borders += [codes[:, [0, -1]].flatten(), codes[:, :, [0, -1]].flatten()]
        return cls(torch.cat(palettes).unique(), int(torch.cat(borders).mode().values))

    def measure(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns each figure of each of the images (B, C, H, W) uint8, as values (B,) in float64."""
        codes = encode(images)
        pixels = {"off_palette": ~torch.isin(codes, self.palette) & (codes != CLEAR)}
        if images.shape[1] == 4:
            pixels["partly_transparent"] = (images[:, 3] > 0) & (images[:, 3] < 255)
        pixels |= {"background": codes == self.background, "lone_pixels": find_lone(codes)}
        shares = {name: found.double().mean(dim=(1, 2)) for name, found in pixels.items()}
        outlines = {"outline_brightness": outline_brightness(images)} if images.shape[1] == 4 else {}
        return {"colours": count_colours(codes), **shares, **outlines}


def outline_brightness(images: torch.Tensor) -> torch.Tensor:
    """Returns the mean brightness of each image's pixels beside transparency, (B,) in [0, 1]; 0 where it has none.

    Images (B, 4, H, W) have colours multiplied by alpha, which is undone here: a halo is a seam that is too bright or
    too dark, whatever its alpha.
    """
    alpha = images[:, 3].double()
    is_solid = alpha >= HALF_OPAQUE
    clear = torch.nn.functional.pad(~is_solid, (1, 1, 1, 1), value=True)  # outside of the image
    beside = clear[:, :-2, 1:-1] | clear[:, 2:, 1:-1] | clear[:, 1:-1, :-2] | clear[:, 1:-1, 2:]
    outline = is_solid & beside
    brightness, opacity = (
        (values * outline).sum(dim=(1, 2)) for values in (images[:, :3].double().mean(dim=1), alpha)
    )
    return brightness / opacity.clamp(min=1)


def encode(images: torch.Tensor) -> torch.Tensor:
    """Returns what `encode_colours` does, with `CLEAR` for a pixel whose alpha, the fourth channel, is 0."""
    codes = encode_colours(images)
    return codes if images.shape[1] < 4 else codes.where(images[:, 3] > 0, CLEAR)


def count_colours(codes: torch.Tensor) -> torch.Tensor:
    """Returns how many colours each image of `encode` has, (B,) float64; what is transparent is none."""
    ordered = codes.flatten(1).sort(dim=1).values
    is_first = torch.cat([torch.ones_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] != ordered[:, :-1]], dim=1)
    return (is_first & (ordered != CLEAR)).sum(dim=1).double()


def find_lone(codes: torch.Tensor) -> torch.Tensor:
    """Returns where a pixel of `encode` has no neighbour of its own colour beside, above or below it, (B, H, W)."""
    padded = torch.nn.functional.pad(codes, (1, 1, 1, 1), value=-1)
    neighbours = (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    return torch.stack([codes != neighbour for neighbour in neighbours]).all(dim=0)
