"""A small network trained on the data itself, whose features and classes the metrics use: nothing is downloaded."""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import Conv2dNormActivation
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.files import DiskFullError, cache_dir, make_private_folder, written_beside
from sprite_diffusion.metrics.real_images import RealImages

DIGEST = "sha256"  # in the metadata of a cached file
VERSION = 1  # to be raised with any change below: features of different networks are not comparable
NUM_FEATURES = 128
TRAINING_STEPS = 800
BATCH_SIZE = 128
VALIDATION_BATCH = 256
LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.1
TEMPERATURE = 0.2  # of the contrastive loss


class Classifier(nn.Module):
    """A network from uint8 images (B, C, H, W) to features (B, 128), and a `head` from features to class scores.

    Where the data has no classes, the network is trained to tell images from one another whatever their place, size
    and brightness (SimCLR, Chen et al. 2020), and `head` is the projection that SimCLR compares images in.
    """

    def __init__(self, num_channels: int, num_outputs: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        num_halvings = min(4, max(1, round(math.log2(min(image_size) / 4))))  # to sides of about 4 pixels
        widths = [32, 64, *[NUM_FEATURES] * num_halvings][: num_halvings + 1]
        layers: list[nn.Module] = [Conv2dNormActivation(num_channels, widths[0])]
        for narrow, wide in zip(widths, [*widths[1:-1], NUM_FEATURES], strict=False):
            layers += [Conv2dNormActivation(narrow, wide, stride=2), Conv2dNormActivation(wide, wide)]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(NUM_FEATURES, num_outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.float() / 127.5 - 1)


def load_classifier(real: RealImages, device: torch.device) -> tuple[Classifier, float]:
    """Returns the classifier of the data and its accuracy on the held-out half.

    Trains the classifier unless the cache has it undamaged.

    Raises `UserInputError` if the cache can't be written.
    """
    path = cache_dir() / f"classifier-v{VERSION}-{real.key}.safetensors"
    num_classes = None if real.class_labels is None else int(real.class_labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(real.num_channels, num_classes or NUM_FEATURES, real.image_size).to(device)
        saved = load_tensors(path)
        if saved is None:
            _train(model, real)
            saved = model.state_dict(), {"accuracy": str(_validate(model, real))}
            save_tensors(saved[0], path, saved[1])
    tensors, metadata = saved
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False), float(metadata["accuracy"])


def is_weak(accuracy: float, real: RealImages) -> bool:
    """Returns whether the accuracy is nearer to that of guessing than to 1."""
    if real.class_labels is None:
        guess = 1 / VALIDATION_BATCH
    else:
        guess = float(real.class_labels[real.held_out].bincount().max()) / len(real.held_out)
    return accuracy < (1 + guess) / 2


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a file of the cache for `load_tensors`, whole or not at all. Processes that write the same take turns.

    The file is readable by its owner alone. Raises `UserInputError` if the cache can't be written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, DIGEST: _digest(tensors, metadata)}
    try:
        make_private_folder(path.parent)
        with FileLock(path.with_suffix(".lock"), mode=0o600), written_beside(path) as partial:
            save_file(tensors, partial, metadata)
            partial.chmod(0o600)
    except (OSError, SafetensorError, DiskFullError) as error:
        raise UserInputError(f"{path.parent} can't be written to ({first_line(error)}): set XDG_CACHE_HOME") from None


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Returns the tensors and the metadata of a file of `save_tensors`; None if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return (tensors, metadata) if metadata.pop(DIGEST) == _digest(tensors, metadata) else None
    except Exception:  # a damaged file can lead safetensors and torch to raise anything
        return None


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Returns the SHA-256 of tensors on the CPU with their names, types and shapes, and of metadata."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _train(model: Classifier, real: RealImages) -> None:
    """Trains on the reference half of the data."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=TRAINING_STEPS)
    rng = np.random.default_rng(0)
    batch_size = min(BATCH_SIZE, len(real.reference))
    model.train()
    for _ in tqdm(range(TRAINING_STEPS), desc="training the classifier", unit="step", dynamic_ncols=True, leave=False):
        indices = rng.choice(real.reference, batch_size, replace=False)
        images = real[indices].to(device)
        if real.class_labels is None:
            loss = _contrastive_loss(_project(model, _augment(images)), _project(model, _augment(images)))
        else:
            scores = model.head(model(_shift(images)))
            loss = F.cross_entropy(scores, real.class_labels[indices].to(device), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _validate(model: Classifier, real: RealImages) -> float:
    """Returns the share of held-out images that are put in their class.

    Without classes, returns the share whose two views find each other among those of a batch.
    """
    model.eval()
    device = next(model.parameters()).device
    num_correct = 0
    for start in range(0, len(real.held_out), VALIDATION_BATCH):
        indices = real.held_out[start : start + VALIDATION_BATCH]
        images = real[indices].to(device)
        if real.class_labels is None:
            similarity = _project(model, _augment(images)) @ _project(model, _augment(images)).T
            num_correct += int((similarity.argmax(1).cpu() == torch.arange(len(images))).sum())
        else:
            num_correct += int((model.head(model(images)).argmax(1).cpu() == real.class_labels[indices]).sum())
    return num_correct / len(real.held_out)


def _project(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Returns the output of the head as unit vectors (B, D)."""
    return F.normalize(model.head(model(images)), dim=1)


def _contrastive_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the loss of finding each image's other view among those of all images.

    `a` and `b` (B, D) are projections of two views of the same images. Equation 1 of Chen et al. 2020, without its
    comparisons inside of a set of views.
    """
    similarity = a @ b.T / TEMPERATURE
    targets = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.T, targets)) / 2


def _shift(images: torch.Tensor) -> torch.Tensor:
    """Moves each image by up to an eighth of its sides.

    It does not flip, as the side that a sprite faces may be its class, nor add noise, which the features have to show.
    """
    return _transform(images, scales=torch.ones(len(images)), max_shift=0.125)


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Returns another view of each image, moved, enlarged and darkened at random, and mirrored for half of them."""
    scales = torch.empty(len(images)).uniform_(0.6, 1)
    mirrored = 1 - 2 * torch.randint(2, (len(images),))
    gain = torch.empty(len(images), 1, 1, 1).uniform_(0.7, 1).to(images.device)
    views = _transform(images, scales * mirrored, max_shift=0.2, scales_y=scales)
    views[:, :3] *= gain  # alpha, the fourth channel, is no brightness
    return views


def _transform(
    images: torch.Tensor, scales: torch.Tensor, max_shift: float, scales_y: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns images (B, C, H, W) resampled at `scales` (B,) of their sides, moved by up to `max_shift` of a side."""
    affine = torch.zeros(len(images), 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = scales, scales if scales_y is None else scales_y
    # In the coordinates of affine_grid a side is 2 long.
    affine[:, :, 2] = torch.empty(len(images), 2).uniform_(-2 * max_shift, 2 * max_shift)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
