"""Extractors, which turn images into the features that the images are compared by."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.files import cache_dir
from sprite_diffusion.metrics.classifier import is_weak, load_classifier, load_tensors, save_tensors
from sprite_diffusion.metrics.real_images import RealImages

BATCH_SIZE = 256
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Extractor:
    """A network for features, and the classifier that judges a conditional model's samples."""

    name: str  # one of `EXTRACTORS`
    key: str  # names the features in the cache
    description: str  # for people
    extract: Function  # from uint8 images (B, C, H, W) to features (B, D), float32, on their device
    classify: Function | None = None  # from the same images to class scores (B, K); None without classes
    accuracy: float | None = None  # of `classify` on the held-out half
    embed_texts: Callable[[Sequence[str]], torch.Tensor] | None = None  # from captions to features (B, D), by CLIP


def make_extractor(name: str, clip_model: str, real: RealImages, device: torch.device) -> Extractor:
    """Returns the extractor of `--extractor`; where the data has classes, with the classifier of the data.

    Warns of a classifier that is too weak to judge by. Raises `UserInputError` if a network can't be loaded.
    """
    if name == "classifier" or real.class_labels is not None:
        network, accuracy = load_classifier(real, device)
        if real.class_labels is None:
            kind = f"{accuracy:.1%} of held-out images found again, no classes"
        else:
            kind = f"{accuracy:.1%} of held-out images classified rightly"
        if is_weak(accuracy, real):
            tqdm.write(f"warning: the classifier is too weak to judge by ({kind}): more images may help")
        classify = None if real.class_labels is None else _in_batches(lambda x: network.head(network(x)))
        if name == "classifier":
            weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in network.state_dict().values())
            key = f"classifier-{hashlib.sha256(weights).hexdigest()[:8]}"  # other machines train other weights
            return Extractor(name, key, f"classifier ({kind})", _in_batches(network), classify, accuracy)
    else:
        classify = accuracy = None
    if name == "inception":
        return Extractor(name, name, "Inception v3", _in_batches(_load_inception(device)), classify, accuracy)
    key = "clip-" + "".join(c if c.isalnum() else "-" for c in clip_model)
    embed_texts = None if real.captions is None else _load_clip_text(clip_model, device)
    embed_images = _in_batches(_load_clip(clip_model, device))
    return Extractor(name, key, f"CLIP, {clip_model}", embed_images, classify, accuracy, embed_texts)


def real_features(extractor: Extractor, real: RealImages, indices: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns the features (N, D) of real images on the CPU; extracts them unless the cache has them undamaged.

    Args:
        extractor: The extractor.
        real: The images.
        indices: The positions (N,) of the first images of a half.
        device: The device to extract on.

    Raises:
        UserInputError: If the cache can't be written.
    """
    digest = f"{real.key}-{indices[0]}-{len(indices)}"  # the first index tells the halves apart
    path = cache_dir() / f"features-{extractor.key}-{digest}.safetensors"
    saved = load_tensors(path)
    if saved is None:
        batches = [indices[start : start + BATCH_SIZE] for start in range(0, len(indices), BATCH_SIZE)]
        bar = tqdm(batches, desc="features of real images", unit="batch", dynamic_ncols=True, leave=False)
        saved = {"features": torch.cat([extractor.extract(real[batch].to(device)).cpu() for batch in bar])}, {}
        save_tensors(saved[0], path, saved[1])
    return saved[0]["features"]


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Returns images (B, C, H, W) uint8 as (B, 3, H, W): grey three times, those with transparency on white."""
    if images.shape[1] == 4:
        return images[:, :3] + (255 - images[:, 3:])  # the colours are multiplied by alpha already
    return images.expand(-1, 3, -1, -1)


def _in_batches(function: Function) -> Function:
    """Returns the function applied to some images at a time, without gradients."""

    @torch.no_grad()
    def apply(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([function(batch).float() for batch in images.split(BATCH_SIZE)])

    return apply


def _load_inception(device: torch.device) -> Function:
    """Returns Inception v3 with the weights of FID, which are downloaded the first time."""
    if find_spec("torch_fidelity") is None:
        raise UserInputError("--extractor inception: run 'pip install torch-fidelity' first")
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        # FID is defined with the resize of TensorFlow 1, which does not antialias.
        network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"], antialias=False).to(device)
    except (OSError, RuntimeError) as error:  # of a missing network, a full disk or a damaged download
        raise UserInputError(f"--extractor inception: its weights can't be had ({first_line(error)})") from None
    return lambda images: network(to_rgb(images))


def _load_parts_of_clip(name: str, *classes: Any) -> list[Any]:
    """Returns parts of a CLIP model, one of each class; `name` is a Hub id or a folder."""
    try:
        return [part.from_pretrained(name) for part in classes]
    except (OSError, ValueError) as error:
        raise UserInputError(f"--clip_model {name} can't be loaded: {first_line(error)}") from None


def _load_clip(name: str, device: torch.device) -> Function:
    """Returns the image embeddings of a CLIP model, as unit vectors; `name` is a Hub id or a folder."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    processor, network = _load_parts_of_clip(name, CLIPImageProcessor, CLIPVisionModelWithProjection)
    network.eval().to(device)

    def embed(images: torch.Tensor) -> torch.Tensor:
        pixels = processor(images=list(to_rgb(images).cpu().numpy()), return_tensors="pt").pixel_values
        return torch.nn.functional.normalize(network(pixels.to(device)).image_embeds, dim=1)

    return embed


def _load_clip_text(name: str, device: torch.device) -> Callable[[Sequence[str]], torch.Tensor]:
    """Returns the text embeddings of a CLIP model, as unit vectors; `name` is a Hub id or a folder."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tokenizer, network = _load_parts_of_clip(name, AutoTokenizer, CLIPTextModelWithProjection)
    network.eval().to(device)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
        return torch.nn.functional.normalize(network(**tokens).text_embeds, dim=1)

    return embed
