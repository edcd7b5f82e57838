"""The judge of the built-in sprites: a small network that reads each attribute off an image.

It is trained on sprites of the artist with another seed than any training set, so that all that it judges is new.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation
from tqdm.auto import tqdm

from sprite_diffusion.common.files import cache_dir
from sprite_diffusion.data.attributes import list_values, read_caption
from sprite_diffusion.data.sprites import CLASS_NAMES, SIZE, draw_sprite
from sprite_diffusion.metrics.classifier import load_tensors, save_tensors
from sprite_diffusion.metrics.extractors import to_rgb

VERSION = 1  # to be raised with any change below: judgements of different networks are not comparable
MIN_ACCURACY = 0.97  # of a slot on held-out sprites, for it to be judged
SEED, HELD_OUT_SEED = 1, 2  # of the artist
NUM_SPRITES, NUM_HELD_OUT = 42_000, 8_000
TURNS = ("hero", "side-facing", "hero", "side-facing", "non-hero", "food", "spell")  # heroes are the hardest to judge
TRAINING_STEPS = 1000
BATCH_SIZE = 128
READ_AT_ONCE = 512
LEARNING_RATE = 4e-3
SHADE = 4.0  # levels by which each channel of an image is shifted in training, in standard deviations
NOISE = 12.0  # levels that are added to each pixel, at most, in standard deviations: less than is between two colours
NUM_FEATURES = 256
NUM_PIXEL_FEATURES = 32
UNSAID = 0  # the number of the value that says nothing; those of `list_values` follow
COLOUR = " colour"  # at the end of the slots of colours


class JudgeNetwork(nn.Module):
    """A network from images (B, 3, 16, 16), 0 to 255, to the scores (B, values) of each slot, in a list.

    A colour is read off pixels: for each slot the network says how much each pixel counts, and one small network, the
    same for all slots, turns the features of the pixels so weighted into a colour.
    """

    def __init__(self, num_values: dict[str, int]) -> None:
        super().__init__()
        self.num_values = num_values
        self.colour_slots = [slot for slot in num_values if slot.endswith(COLOUR)]
        num_colours = max(num_values[slot] for slot in self.colour_slots) - 1
        self.layers = nn.Sequential(
            Conv2dNormActivation(3, 32),
            Conv2dNormActivation(32, 64, stride=2),
            Conv2dNormActivation(64, 128, stride=2),
            nn.Flatten(),  # not pooled: the place of a part says what it is
            nn.Linear(128 * (SIZE // 4) ** 2, NUM_FEATURES, bias=False),
            nn.BatchNorm1d(NUM_FEATURES),
            nn.ReLU(),
        )
        self.heads = nn.Linear(NUM_FEATURES, sum(num_values.values()))
        self.places = nn.Linear(NUM_FEATURES, len(self.colour_slots) * SIZE**2)
        self.pixels = nn.Sequential(
            nn.Conv2d(3, NUM_PIXEL_FEATURES, 1),
            nn.ReLU(),
            nn.Conv2d(NUM_PIXEL_FEATURES, NUM_PIXEL_FEATURES, 1),
            nn.ReLU(),
        )
        self.colours = nn.Linear(NUM_PIXEL_FEATURES, num_colours)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        images = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)  # faster on a CPU
        features = self.layers(images)  # (B, F)
        scores = dict(
            zip(self.num_values, self.heads(features).split([*self.num_values.values()], dim=1), strict=True)
        )
        weights = self.places(features).unflatten(1, (len(self.colour_slots), SIZE**2)).softmax(dim=2)  # (B, S, P)
        colours = self.colours(weights @ self.pixels(images).flatten(2).transpose(1, 2))  # (B, S, colours)
        for i, slot in enumerate(self.colour_slots):
            scores[slot] = scores[slot] + F.pad(colours[:, i], (1, 0))  # what is not there has no colour
        return [*scores.values()]


@dataclass(frozen=True)
class Judge:
    """A trained network, and how far it can be trusted."""

    network: JudgeNetwork
    accuracy: dict[str, float]  # of each slot, see `_validate`

    @property
    def slots(self) -> list[str]:
        """The names of the slots, in the order of `encode_captions`."""
        return [*self.accuracy]

    @property
    def refused(self) -> list[str]:
        """The slots that it judges too badly to judge them at all."""
        return [slot for slot, accuracy in self.accuracy.items() if accuracy < MIN_ACCURACY]

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> torch.Tensor:
        """Returns what is seen in images (B, C, 16, 16) uint8: the number of the value of each slot (B, slots) int64.

        It is on the CPU, wherever the images are. As in `RealImages`, the colours of images with transparency are
        multiplied by alpha.
        """
        device = next(self.network.parameters()).device
        batches = [self.network(to_rgb(batch.to(device))) for batch in images.split(READ_AT_ONCE)]
        return torch.cat([torch.stack([scores.argmax(1) for scores in batch], dim=1) for batch in batches]).cpu()


def load_judge(device: torch.device) -> Judge:
    """Returns the judge; trains it unless the cache has it undamaged.

    Raises `UserInputError` if the cache can't be written.
    """
    path = cache_dir() / f"judge-v{VERSION}-{_key()}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = JudgeNetwork({slot: 1 + len(values) for slot, values in list_values().items()}).to(device)
        saved = load_tensors(path)
        if saved is None:
            _train(network, device)
            saved = network.state_dict(), {"accuracy": json.dumps(_validate(network))}
            save_tensors(saved[0], path, saved[1])
    tensors, metadata = saved
    network.load_state_dict(tensors)
    return Judge(network.eval().requires_grad_(False), json.loads(metadata["accuracy"]))


def encode_captions(captions: Sequence[str]) -> torch.Tensor:
    """Returns the number of the value that each caption gives to each slot, (N, slots) int64, or `UNSAID`.

    Raises `ValueError` for a caption that is none of the artist's.
    """
    values = list_values()
    numbers = {(slot, value): i for slot, some in values.items() for i, value in enumerate(some, start=1)}
    columns = {slot: i for i, slot in enumerate(values)}
    asked = torch.full((len(captions), len(values)), UNSAID)
    for row, caption in enumerate(captions):
        for fact in read_caption(caption):
            asked[row, columns[fact.slot]] = numbers[fact.slot, fact.value]
    return asked


def _draw(num_sprites: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws sprites of the classes in `TURNS`.

    Returns images (N, 3, 16, 16) uint8 on white, `encode_captions`, and class labels (N,).
    """
    turns = [CLASS_NAMES.index(name) for name in TURNS]
    bar = tqdm(range(num_sprites), desc="drawing sprites", unit="sprite", dynamic_ncols=True, leave=False)
    sprites = [draw_sprite(index, seed, turns[index % len(turns)]) for index in bar]
    images = np.stack([sprite.image[..., :3] for sprite in sprites]).transpose(0, 3, 1, 2)
    captions = [sprite.caption for sprite in sprites]
    labels = torch.tensor([sprite.class_label for sprite in sprites])
    return torch.from_numpy(np.ascontiguousarray(images)), encode_captions(captions), labels


def _key() -> str:
    """Returns a hash of what the artist draws and says, of the first sprites that the judge would learn."""
    digest = hashlib.sha256(repr((NUM_SPRITES, TRAINING_STEPS, list_values())).encode())
    for index in range(BATCH_SIZE * 4):
        sprite = draw_sprite(index, SEED)
        digest.update(sprite.image.tobytes() + sprite.caption.encode())
    return digest.hexdigest()[:16]


def _train(network: JudgeNetwork, device: torch.device) -> None:
    """Trains on sprites whose colours are a little off, as those of generated images are."""
    images, values, _ = _draw(NUM_SPRITES, SEED)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=TRAINING_STEPS)
    network.train()
    for _ in tqdm(range(TRAINING_STEPS), desc="training the judge", unit="step", dynamic_ncols=True, leave=False):
        rows = torch.randint(len(images), (BATCH_SIZE,))
        pixels = images[rows].float()
        pixels = pixels + SHADE * torch.randn(BATCH_SIZE, 3, 1, 1)
        pixels = pixels + NOISE * torch.rand(BATCH_SIZE, 1, 1, 1) * torch.randn(pixels.shape)
        scores = network(pixels.clamp(0, 255).to(device))
        targets = values[rows].to(device)
        loss = torch.stack([F.cross_entropy(slot, targets[:, i]) for i, slot in enumerate(scores)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _validate(network: JudgeNetwork) -> dict[str, float]:
    """Returns how often the judge is right about each slot on held-out sprites.

    That is the lower of two shares: of the sprites whose caption gives the slot a value, and of all sprites of the
    classes that ever have one. So a judge that sees a beard on everybody is no good judge of beards.
    """
    images, values, labels = _draw(NUM_HELD_OUT, HELD_OUT_SEED)
    is_right = Judge(network.eval(), {}).read(images) == values
    accuracy = {}
    for i, slot in enumerate(network.num_values):
        is_said = values[:, i] != UNSAID
        in_class = torch.isin(labels, labels[is_said])
        accuracy[slot] = min(float(is_right[rows, i].double().mean()) for rows in (is_said, in_class))
    return accuracy
