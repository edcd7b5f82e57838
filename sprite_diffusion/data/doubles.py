"""Images that stand twice in the data, or nearly so: they are the first that a model copies."""

import torch
import xxhash

from sprite_diffusion.data.dataset import StoredImages

NEAR_COPY = 0.05  # root mean square, as a share of the pixels' range: a difference that the eye has to search for
COUNTED_AT_MOST = 20_000  # images; more of them take seconds, and are hardly copied
COMPARED_AT_MOST = 5_000  # images that are compared with each other
COMPARED_AT_ONCE = 500


def count_doubles(images: StoredImages) -> int:
    """Returns how many images have every pixel of an earlier one; 0 of more than `COUNTED_AT_MOST`."""
    if len(images) > COUNTED_AT_MOST:
        return 0
    stored = (images.store[i] for i in range(len(images)))
    return len(images) - len({(image.shape, xxhash.xxh3_128_digest(image.tobytes())) for image in stored})


def count_near_doubles(images: StoredImages) -> int:
    """Returns how many of the first `COMPARED_AT_MOST` images lie within `NEAR_COPY` of an earlier one."""
    flat = images.read_centred(range(min(len(images), COMPARED_AT_MOST))).flatten(1).float() / 255  # (N, D)
    number = 0
    for start in range(0, len(flat), COMPARED_AT_ONCE):
        block = flat[start : start + COMPARED_AT_ONCE]
        distances = torch.cdist(block, flat[: start + len(block)]) / flat.shape[1] ** 0.5
        is_earlier = torch.ones_like(distances, dtype=torch.bool).tril(start - 1)
        number += int(((distances <= NEAR_COPY) & is_earlier).any(dim=1).sum())
    return number
