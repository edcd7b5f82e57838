"""A network that begins with the weights of another one, which may have other channels, classes or sides."""

from collections.abc import Mapping
from typing import Any

import torch

from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.sampling.pipeline_loading import Pipeline

CLASS_ROWS = "class_embedding.weight"  # of UNet2DModel: a row for each class, and one for "no class"
CLASS_COLUMNS = "context_embeddings.{}.0.weight"  # of ContextUNet2DModel: a column for each class
TIME_BIAS = "time_embedding.linear_2.bias"


def adapt_network(
    base: Pipeline, config: TrainingConfig, num_channels: int, id2label: Mapping[int, str] | None
) -> tuple[torch.nn.Module, str]:
    """Returns a network of the shape of a model's, with its weights where they fit, and in words what was changed.

    On images and classes that both know, the network is at first the same function as the model's: grey is laid on
    three channels or their mean taken, a new alpha is not looked at, classes keep their names, and a network without
    classes predicts what the model predicted for "no class".

    Args:
        base: The model.
        config: Has the sides of the images, T, and the dropout.
        num_channels: 1 for grey, 3 for colour, 4 for colour multiplied by alpha, and alpha.
        id2label: The names of the classes; None for a network without classes.
    """
    network = dict(base.unet.config)
    network.pop("_use_default_values", None)  # what the file of the model leaves out, of which some is given here
    height, width = config.image_size
    shape: dict[str, Any] = {"in_channels": num_channels, "out_channels": num_channels, "sample_size": [height, width]}
    if "num_class_embeds" in network:
        shape["num_class_embeds"] = None if id2label is None else len(id2label) + 1
        shape["dropout"] = config.dropout or network.get("dropout", 0.0)
    if "context_dim" in network:
        shape |= {"context_dim": len(id2label or "_"), "num_train_timesteps": config.ddpm_num_steps}
        shape |= {"shortcut_seed": None}
        shape["pool_size"] = network["pool_size"] if base.sample_shape[1:] == config.image_size else None
    model = type(base.unet).from_config({**network, **shape})
    changes: list[str] = []
    weights = model.state_dict()
    of_classes = _convert_classes(base, weights, id2label, changes)
    before = {**base.unet.state_dict(), **_convert_channels(base, weights, num_channels, changes), **of_classes}
    anew = [name for name in weights if name not in before or before[name].shape != weights[name].shape]
    if anew:
        changes.append(f"{len(anew)} of {len(weights)} weights begin at random ({', '.join(anew[:3])})")
    model.load_state_dict({name: weights[name] if name in anew else before[name] for name in weights})
    if base.sample_shape[1:] != config.image_size:
        changes.append(f"images of {width}x{height} in place of {base.sample_shape[2]}x{base.sample_shape[1]}")
    return model, "; ".join(changes) or "every weight as it was"


def _convert_classes(
    base: Pipeline, weights: Mapping[str, torch.Tensor], id2label: Mapping[int, str] | None, changes: list[str]
) -> dict[str, torch.Tensor]:
    """Returns the weights of a network's classes: known names keep theirs, others begin at random about their mean.

    At the mean itself they would all begin as one class, and a short training does not lead them far from each other.
    `weights` are those that a new network of this shape begins with.
    """
    before = base.unet.state_dict()
    tables = {name: before[name] for name in (CLASS_ROWS, *map(CLASS_COLUMNS.format, range(2))) if name in before}
    labels = {} if base.num_classes == 0 else base.id2label or {id: str(id) for id in range(base.num_classes)}
    ids = {name: id for id, name in labels.items()}
    if id2label is None:
        if not ids:
            return {}
        changes.append("its classes are left out, and what it knows of no class is kept")
        if CLASS_ROWS in tables:
            return {TIME_BIAS: before[TIME_BIAS] + tables[CLASS_ROWS][-1]}
        return {name: torch.zeros_like(table[:, :1]) for name, table in tables.items()}
    names = list(id2label.values())
    new = [name for name in names if name not in ids]
    if gone := [name for name in ids if name not in names]:
        changes.append(f"without the classes {', '.join(gone)}")
    if not ids:
        changes.append(f'the classes {", ".join(names)} begin at random, "no class" as the model without classes')
        if tables:  # a context of zeros is "no class"
            return {name: weights[name] for name in tables}
        return {CLASS_ROWS: torch.cat((weights[CLASS_ROWS][:-1], torch.zeros_like(weights[CLASS_ROWS][-1:])))}
    if new:
        changes.append(f"the classes {', '.join(new)} begin at random about the mean of its classes")
    converted = {}
    for name, table in tables.items():
        is_rows = name == CLASS_ROWS
        rows, random_rows = (table[:-1], weights[name][:-1]) if is_rows else (table.T, weights[name].T)  # (K, D)
        mean = rows.mean(dim=0)
        kept = [rows[ids[label]] if label in ids else mean + random_rows[i] for i, label in enumerate(names)]
        converted[name] = torch.cat((torch.stack(kept), table[-1:])) if is_rows else torch.stack(kept).T
    return converted


def _convert_channels(
    base: Pipeline, weights: Mapping[str, torch.Tensor], num_channels: int, changes: list[str]
) -> dict[str, torch.Tensor]:
    """Returns the first and the last convolution for images of other channels; nothing if they are the same."""
    before = base.sample_shape[0]
    if num_channels == before:
        return {}
    converted = {}
    for name, old in base.unet.state_dict().items():
        shape = weights[name].shape if name in weights else old.shape
        if old.ndim == 4 and (old.shape[1], shape[1]) == (before, num_channels):  # takes images
            converted[name] = torch.einsum("oikl,in->onkl", old, channel_map(num_channels, before))
        elif (old.shape[:1], shape[:1]) == ((before,), (num_channels,)):  # gives what is predicted of them
            converted[name] = torch.tensordot(channel_map(before, num_channels), old, dims=1)
            if num_channels == 4 and old.ndim == 1 and base.scheduler.config["prediction_type"] == "sample":
                converted[name][3] = 1.0  # alpha begins opaque
    changes.append(f"images of {num_channels} channel(s) in place of {before}")
    return converted


def channel_map(before: int, after: int) -> torch.Tensor:
    """Returns the matrix (after, before) that makes pixels of other channels: grey, colour, or colour and alpha.

    Grey is laid on the three colours, and is their mean; an alpha is left out, and begins as nothing.
    """
    to_colour = torch.ones(3, 1) if before == 1 else torch.eye(3, before)
    from_colour = torch.full((1, 3), 1 / 3) if after == 1 else torch.eye(after, 3)
    return from_colour @ to_colour
