"""Every figure of a set of images: how near to the real ones, how much of them, of the class asked for, and copied?"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.metrics.distances import (
    Distance,
    cmmd,
    frechet_distance,
    interval_of_distance,
    interval_of_mean,
    kernel_distance,
    manifold_values,
)
from sprite_diffusion.metrics.extractors import Extractor, real_features
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.metrics.report import NEAR_COPIES, Measurement, Report
from sprite_diffusion.sampling.conditions import Condition
from sprite_diffusion.sampling.generation import Request, sample_images
from sprite_diffusion.sampling.pictures import labelled_grid, to_pixels
from sprite_diffusion.sampling.pipeline_loading import Pipeline
from sprite_diffusion.sampling.samplers import Sampler, make_sampler

DISTANCES = {  # by extractor: only with Inception's features are they called FID and KID
    "classifier": {"frechet_distance": frechet_distance, "kernel_distance": kernel_distance},
    "inception": {"fid": frechet_distance, "kid": kernel_distance},
    "clip": {"frechet_distance": frechet_distance, "cmmd": cmmd},
}
NEAR_COPY = 0.05  # of the pixels' range, root mean square: a difference that has to be searched for
NUM_CLOSEST_PAIRS = 10
MIN_IMAGES_OF_A_CLASS = 2  # for a covariance

Batch = tuple[torch.Tensor, torch.Tensor]  # rows of the evaluated set (B,), and their uint8 images (B, C, H, W)


@dataclass
class _Measured:
    """What is kept of generated images: never the images themselves, but for the closest pairs."""

    rows: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    classes: list[torch.Tensor] = field(default_factory=list)  # as the classifier sees them
    nearest: list[torch.Tensor] = field(default_factory=list)  # distances to the nearest training image
    pairs: list[tuple[float, torch.Tensor, int]] = field(default_factory=list)  # distance, image, its nearest


def evaluate(
    real: RealImages, extractor: Extractor, images: Iterator[Batch], num_images: int, judge_classes: bool = False
) -> tuple[Report, Image.Image] | None:
    """Measures images against `num_images` of the reference half; call it in every process, each with its share.

    Row i of a conditional model's images is of the class of `real.reference[i]`. Returns the report and a picture of
    the samples that are closest to training images; None but on the main process.
    """
    state = PartialState()
    measured = _measure(real, extractor, images, state.device, judge_classes)
    parts: list[_Measured] = gather_object([measured])
    if not state.is_main_process:
        state.wait_for_everyone()
        return None
    order = torch.cat([rows for part in parts for rows in part.rows]).argsort()

    def joined(name: str) -> torch.Tensor:
        return torch.cat([tensor for part in parts for tensor in getattr(part, name)])[order]

    reference, held_out = real.reference[:num_images], real.held_out[:num_images]
    features = joined("features")
    real_reference = real_features(extractor, real, reference, state.device)
    real_held_out = real_features(extractor, real, held_out, state.device)
    report = Report(num_images=len(features), extractor=extractor.description)
    for name, distance in DISTANCES[extractor.name].items():
        report.figures[name] = _measure_distance(distance, real_reference, real_held_out, features)
    floors = manifold_values(real_reference, real_held_out)
    for name, values in manifold_values(real_reference, features).items():
        report.figures[name] = _measure_mean(values, floors[name])
    if judge_classes and extractor.classify is not None and real.class_labels is not None:
        labels = real.class_labels[reference]
        floor = real.class_labels[held_out] == extractor.classify(real[held_out].to(state.device)).argmax(1).cpu()
        report.figures["class_accuracy"] = _measure_mean(joined("classes") == labels, floor)
        report.of_class = _distances_of_classes(real, extractor, real_reference, real_held_out, features, labels)
    floor, _ = real.find_nearest(real[held_out].to(state.device), but=torch.from_numpy(held_out))
    nearest = joined("nearest")
    report.figures["nearest_distance"] = _measure_mean(nearest, floor.cpu())
    report.figures[NEAR_COPIES] = _measure_mean(nearest <= NEAR_COPY, floor.cpu() <= NEAR_COPY)
    picture = _draw_pairs(real, [pair for part in parts for pair in part.pairs])
    state.wait_for_everyone()
    return report, picture


def choose_num_images(real: RealImages, wanted: int) -> int:
    """As many as wanted, and no more than there are in each half of the data: so that the floor has as many."""
    return min(wanted, len(real.reference))


def make_evaluation_sampler(pipeline: Pipeline, name: str | None, num_inference_steps: int | None) -> Sampler:
    """The sampler of `--scheduler`; else DDIM, or the only one that the model's process has."""
    if name is None and pipeline.scheduler.compatibles:
        name = "ddim"
    return make_sampler("--scheduler", pipeline, name, num_inference_steps)


def sampling_facts(pipeline: Pipeline, sampler: Sampler, guidance_scale: float, seed: int) -> dict[str, Any]:
    """How images are drawn, for the record."""
    guidance = {"guidance_scale": guidance_scale} if pipeline.num_classes > 0 else {}
    dtype = str(pipeline.unet.dtype).removeprefix("torch.")
    return {"sampler": sampler.label, **guidance, "seed": seed, "dtype": dtype}


def generate(
    pipeline: Pipeline,
    sampler: Sampler,
    real: RealImages,
    num_images: int,
    batch_size: int,
    guidance_scale: float,
    seed: int,
) -> Iterator[Batch]:
    """This process's share of the images to be evaluated; image i is drawn from `seed` + i."""
    state = PartialState()
    conditions = _match_conditions(pipeline, real, num_images)
    starts = range(0, num_images, batch_size)[state.process_index :: state.num_processes]
    bar = tqdm(
        total=sum(min(batch_size, num_images - start) for start in starts),
        desc=f"generating with {sampler.label}",
        unit="image",
        dynamic_ncols=True,
        leave=False,
        disable=not state.is_main_process,
    )
    for start in starts:
        rows = range(start, min(start + batch_size, num_images))
        request = Request(
            seeds=[seed + i for i in rows],
            conditions=[conditions[i] for i in rows],
            batch_size=batch_size,
            guidance_scale=guidance_scale,
        )
        images = sample_images(pipeline, sampler, request, show_progress=False)
        yield torch.tensor(rows), to_pixels(images, scale=1)
        bar.update(len(rows))
    bar.close()


def read_in_order(images: RealImages, num_images: int, batch_size: int) -> Iterator[Batch]:
    """This process's share of the first images of a folder."""
    state = PartialState()
    for start in range(0, num_images, batch_size)[state.process_index :: state.num_processes]:
        rows = np.arange(start, min(start + batch_size, num_images))
        yield torch.from_numpy(rows), images[rows]


def _match_conditions(pipeline: Pipeline, real: RealImages, num_images: int) -> list[Condition]:
    """For each image the class of the real one that stands in its place: so classes are as frequent as in the data."""
    if pipeline.num_classes == 0:
        return [Condition()] * num_images
    if real.class_labels is None or real.id2label is None:
        raise UserInputError(
            f"{real.source} has no classes, which this model draws by: name them by --label_column or --labels_file"
        )
    try:
        ids = {id: pipeline.get_class_id(name) for id, name in real.id2label.items()}
    except ValueError as error:
        raise UserInputError(f"{real.source} has other classes than the model: {error}; see --class_names") from None
    one_hot = torch.eye(pipeline.num_classes)
    labels = real.class_labels[real.reference[:num_images]].tolist()
    return [Condition(real.id2label[label], one_hot[ids[label]]) for label in labels]


@torch.no_grad()
def _measure(
    real: RealImages, extractor: Extractor, images: Iterator[Batch], device: torch.device, judge_classes: bool
) -> _Measured:
    measured = _Measured()
    for rows, pixels in images:
        pixels = pixels.to(device)
        measured.rows.append(rows)
        measured.features.append(extractor.extract(pixels).cpu())
        if judge_classes and extractor.classify is not None:
            measured.classes.append(extractor.classify(pixels).argmax(1).cpu())
        distances, indices = (values.cpu() for values in real.find_nearest(pixels))
        measured.nearest.append(distances)
        pairs = zip(distances.tolist(), pixels.cpu(), indices.tolist(), strict=True)
        measured.pairs = _closest([*measured.pairs, *pairs])
    return measured


def _closest(pairs: list[tuple[float, torch.Tensor, int]]) -> list[tuple[float, torch.Tensor, int]]:
    return sorted(pairs, key=lambda pair: pair[0])[:NUM_CLOSEST_PAIRS]


def _measure_distance(
    distance: Distance, reference: torch.Tensor, held_out: torch.Tensor, features: torch.Tensor
) -> Measurement:
    interval = interval_of_distance(distance, reference, features)
    return Measurement(distance(reference, features), interval, distance(reference, held_out), len(features))


def _measure_mean(values: torch.Tensor, floor: torch.Tensor) -> Measurement:
    values = values.double()
    return Measurement(float(values.mean()), interval_of_mean(values), float(floor.double().mean()), len(values))


def _distances_of_classes(
    real: RealImages,
    extractor: Extractor,
    real_reference: torch.Tensor,
    real_held_out: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, Measurement]:
    """The first distance, of each class's images to the same class's real ones."""
    assert real.class_labels is not None
    assert real.id2label is not None
    distance = next(iter(DISTANCES[extractor.name].values()))
    held_out_labels = real.class_labels[real.held_out[: len(real_held_out)]]
    figures = {}
    for id, name in real.id2label.items():
        own, own_held_out = labels == id, held_out_labels == id
        if min(own.sum(), own_held_out.sum()) < MIN_IMAGES_OF_A_CLASS:
            continue
        figures[name] = _measure_distance(distance, real_reference[own], real_held_out[own_held_out], features[own])
    return figures


def _draw_pairs(real: RealImages, pairs: list[tuple[float, torch.Tensor, int]]) -> Image.Image:
    """The closest pairs: a sample above, and the training image that is nearest to it below."""
    closest = _closest(pairs)
    samples = torch.stack([pixels for _, pixels, _ in closest]) / 255
    nearest = real[np.array([index for _, _, index in closest])] / 255
    return labelled_grid(
        [samples, nearest], ["sample", "nearest\ntraining image"], [f"{distance:.3f}" for distance, _, _ in closest]
    )
