"""The CLIP score: how near images are to their captions for a network that was trained on pictures of the web."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.metrics.extractors import load_clip

READ_AT_ONCE = 64


@torch.no_grad()
def clip_scores(name: str, images: torch.Tensor, captions: Sequence[str], device: torch.device) -> torch.Tensor:
    """Returns the CLIP score of each image with its caption: 100 max(cos, 0) of their embeddings.

    Equation 1 of Hessel et al. 2021, https://arxiv.org/abs/2104.08718, with w = 100 as in torchmetrics. It says which
    of two models obeys more, not how much: compare it with that of real images alone.

    Args:
        name: A Hub id or a folder of a CLIP model.
        images: uint8 (N, C, H, W), as in `RealImages`.
        captions: A caption for each image; words beyond those that the model takes are left out.
        device: The device to calculate on.

    Returns:
        Scores (N,) in [0, 100], on the CPU.

    Raises:
        UserInputError: If the model can't be loaded.
    """
    embed_images, embed_texts = load_clip(name, device), _load_clip_text(name, device)
    scores = [
        (embed_images(batch.to(device)) * embed_texts(captions[start : start + len(batch)])).sum(dim=1).cpu()
        for start, batch in zip(range(0, len(images), READ_AT_ONCE), images.split(READ_AT_ONCE), strict=True)
    ]
    return 100 * torch.cat(scores).clamp(min=0)


def _load_clip_text(name: str, device: torch.device) -> Callable[[Sequence[str]], torch.Tensor]:
    """Returns the text embeddings of a CLIP model, as unit vectors; `name` is a Hub id or a folder."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        network: Any = CLIPTextModelWithProjection.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserInputError(f"--clip_model {name} can't be loaded: {first_line(error)}") from None

    network.eval().to(device)

    def embed(texts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
        return torch.nn.functional.normalize(network(**tokens).text_embeds, dim=1)

    return embed
