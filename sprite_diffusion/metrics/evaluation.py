"""The evaluation of generated images: whether they are like the real ones, as varied, of their class, and copied."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from pipelines import to_straight_alpha
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.decoding import premultiply
from sprite_diffusion.data.doubles import NEAR_COPY
from sprite_diffusion.metrics.distances import (
    Distance,
    cmmd,
    frechet_distance,
    interval_of_distance,
    interval_of_mean,
    interval_of_median,
    kernel_distance,
    manifold_values,
    median,
)
from sprite_diffusion.metrics.extractors import Extractor, real_features
from sprite_diffusion.metrics.pixel_art import READ_AT_ONCE, PixelArt
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.metrics.report import NEAR_COPIES, Measurement, Report
from sprite_diffusion.sampling.conditions import Condition, one_hot
from sprite_diffusion.sampling.generation import Request, sample_images
from sprite_diffusion.sampling.pictures import labelled_grid, to_pixels
from sprite_diffusion.sampling.pipeline_loading import Pipeline
from sprite_diffusion.sampling.samplers import Sampler, make_sampler

DISTANCES = {  # by extractor; FID and KID are defined for Inception's features only
    "classifier": {"frechet_distance": frechet_distance, "kernel_distance": kernel_distance},
    "inception": {"fid": frechet_distance, "kid": kernel_distance},
    "clip": {"frechet_distance": frechet_distance, "cmmd": cmmd},
}
NUM_CLOSEST_PAIRS = 10
MIN_IMAGES_OF_A_CLASS = 2  # fewer have no covariance

Batch = tuple[torch.Tensor, torch.Tensor]  # rows of the evaluated set (B,), and their uint8 images (B, C, H, W)


class Pair(NamedTuple):
    """A generated image and the training image that is nearest to it."""

    distance: float  # see `RealImages.find_nearest`
    sample: torch.Tensor  # uint8 (C, H, W)
    training_index: int


@dataclass
class _Measured:
    """The values that are kept of generated images, by batch: of the images themselves the closest pairs alone."""

    rows: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    class_ids: list[torch.Tensor] = field(default_factory=list)  # as the classifier sees the images
    nearest: list[torch.Tensor] = field(default_factory=list)  # distances to the nearest training image
    pairs: list[Pair] = field(default_factory=list)
    pixel_art: list[dict[str, torch.Tensor]] = field(default_factory=list)  # of data that are, a value for each image

    def extend(self, other: "_Measured") -> None:
        """Adds the values that another process has measured."""
        for name in vars(self):
            getattr(self, name).extend(getattr(other, name))

    def in_order(self, batches: list[torch.Tensor]) -> torch.Tensor:
        """Returns the values of all images, sorted by the rows of the images."""
        return torch.cat(batches)[torch.cat(self.rows).argsort()]


class _Features(NamedTuple):
    """The features (N, D) of the three sets that are compared."""

    reference: torch.Tensor
    held_out: torch.Tensor
    generated: torch.Tensor


def evaluate(
    real: RealImages, extractor: Extractor, images: Iterator[Batch], num_images: int, judge_classes: bool = False
) -> tuple[Report, Image.Image] | None:
    """Measures generated images against as many of the reference half, `num_images`.

    Every process calls this with its share of the images. With `judge_classes`, row i is an image asked for by the
    class or caption of `real.reference[i]`. Returns the report and a picture of the samples that are closest to
    training images; None but on the main process.
    """
    state = PartialState()
    pixel_art = PixelArt.of_data(real)
    parts = gather_object([_measure(real, extractor, pixel_art, images, state.device, judge_classes)])
    result = None
    if state.is_main_process:
        measured = _Measured()
        for part in parts:
            measured.extend(part)
        report = _make_report(real, extractor, measured, num_images, state.device, judge_classes)
        if pixel_art is not None:
            _report_pixel_art(report, pixel_art, measured, real, num_images)
        result = report, _draw_pairs(real, measured.pairs)
    state.wait_for_everyone()
    return result


def choose_num_images(real: RealImages, wanted: int) -> int:
    """Returns at most half of the data, so that the held-out floor can use the same number."""
    return min(wanted, len(real.reference))


def make_evaluation_sampler(pipeline: Pipeline, name: str | None, num_inference_steps: int | None) -> Sampler:
    """Returns the sampler of `--scheduler`; without a name DDIM, or the only one that the model's process has.

    Raises `UserInputError` for an unknown name or too many steps.
    """
    if name is None and pipeline.scheduler.compatibles:
        name = "ddim"
    return make_sampler("--scheduler", pipeline, name, num_inference_steps)


def sampling_facts(
    pipeline: Pipeline, sampler: Sampler, guidance_scale: float, seed: int, guide: str | None = None
) -> dict[str, Any]:
    """Returns the entries about sampling in the record of an evaluation, with the model of `--guide` by its name."""
    guidance: dict[str, Any] = {}
    if pipeline.is_conditional or guide is not None:
        guidance["guidance_scale"] = guidance_scale
    if guide is not None:
        guidance["guide"] = Path(guide).name  # the folders above it are nobody's business
    dtype = str(pipeline.unet.dtype).removeprefix("torch.")
    return {"sampler": sampler.label, **guidance, "seed": seed, "dtype": dtype}


def generate(
    pipeline: Pipeline,
    sampler: Sampler,
    conditions: Sequence[Condition],
    batch_size: int,
    guidance_scale: float,
    seed: int,
    guide: Any = None,
) -> Iterator[Batch]:
    """Yields this process's share of the images to be evaluated, one for each condition, the i-th from `seed` + i."""
    state = PartialState()
    num_images = len(conditions)
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
            guide=guide,
        )
        images = sample_images(pipeline, sampler, request, show_progress=False)
        yield torch.tensor(rows), premultiply(to_pixels(images, scale=1))  # as a file of them would be read
        bar.update(len(rows))
    bar.close()


def read_in_order(images: RealImages, num_images: int, batch_size: int) -> Iterator[Batch]:
    """Yields this process's share of the first `num_images` of a folder."""
    state = PartialState()
    for start in range(0, num_images, batch_size)[state.process_index :: state.num_processes]:
        rows = np.arange(start, min(start + batch_size, num_images))
        yield torch.from_numpy(rows), images[rows]


def match_conditions(pipeline: Pipeline, real: RealImages, num_images: int) -> list[Condition]:
    """Returns for image i the class or caption of `real.reference[i]`, so that each is as frequent as in the data.

    Raises `UserInputError` if the data has none, or other classes than the model.
    """
    if not pipeline.is_conditional:
        return [Condition()] * num_images
    if pipeline.num_classes == 0:
        if real.captions is None:
            raise UserInputError(f"{real.source} has no captions, which this model reads: name their --caption_column")
        return [Condition.of_prompt(real.captions[i]) for i in real.reference[:num_images]]
    if real.class_labels is None or real.id2label is None:
        raise UserInputError(
            f"{real.source} has no classes, which this model samples by: name them by --label_column or --labels_file"
        )
    try:
        ids = {id: pipeline.get_class_id(name) for id, name in real.id2label.items()}
    except ValueError as error:
        raise UserInputError(f"{real.source} has other classes than the model: {error}; see --class_names") from None
    labels = real.class_labels[real.reference[:num_images]].tolist()
    return [Condition.of_classes(real.id2label[label], one_hot(ids[label], pipeline.num_classes)) for label in labels]


@torch.no_grad()
def _measure(
    real: RealImages,
    extractor: Extractor,
    pixel_art: PixelArt | None,
    images: Iterator[Batch],
    device: torch.device,
    judge_classes: bool,
) -> _Measured:
    """Extracts features from generated images, and finds the training image nearest to each."""
    measured = _Measured()
    for rows, pixels in images:
        if pixel_art is not None:
            measured.pixel_art.append(pixel_art.measure(pixels))
        pixels = pixels.to(device)
        measured.rows.append(rows)
        measured.features.append(extractor.extract(pixels).cpu())
        if judge_classes and extractor.classify is not None:
            measured.class_ids.append(extractor.classify(pixels).argmax(1).cpu())
        distances, indices = (values.cpu() for values in real.find_nearest(pixels))
        measured.nearest.append(distances)
        pairs = map(Pair, distances.tolist(), pixels.cpu(), indices.tolist())
        measured.pairs = _closest([*measured.pairs, *pairs])
    return measured


def _closest(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: pair.distance)[:NUM_CLOSEST_PAIRS]


def _make_report(
    real: RealImages,
    extractor: Extractor,
    measured: _Measured,
    num_images: int,
    device: torch.device,
    judge_classes: bool,
) -> Report:
    """Returns the measurements of the images of all processes, each beside that of as many held-out real images."""
    reference, held_out = real.reference[:num_images], real.held_out[:num_images]
    features = _Features(
        reference=real_features(extractor, real, reference, device),
        held_out=real_features(extractor, real, held_out, device),
        generated=measured.in_order(measured.features),
    )
    report = Report(num_images=len(features.generated), extractor=extractor.description)
    for name, distance in DISTANCES[extractor.name].items():
        report.figures[name] = _measure_distance(distance, features)
    floors = manifold_values(features.reference, features.held_out)
    for name, values in manifold_values(features.reference, features.generated).items():
        report.figures[name] = _measure_mean(values, floors[name])
    if judge_classes:
        _report_classes(report, real, extractor, measured, features, device)
        if extractor.embed_texts is not None and real.captions is not None:
            asked, of_held_out = ([real.captions[i] for i in rows] for rows in (reference, held_out))
            report.figures["clip_score"] = _measure_mean(
                clip_scores(extractor.embed_texts, features.generated, asked),
                clip_scores(extractor.embed_texts, features.held_out, of_held_out),
            )
    nearest = measured.in_order(measured.nearest)
    floor, _ = real.find_nearest(real[held_out].to(device), exclude=torch.from_numpy(held_out))
    report.figures["nearest_distance"] = _measure_mean(nearest, floor.cpu())
    report.figures[NEAR_COPIES] = _measure_mean(nearest <= NEAR_COPY, floor.cpu() <= NEAR_COPY)
    return report


def clip_scores(
    embed_texts: Callable[[Sequence[str]], torch.Tensor], features: torch.Tensor, captions: Sequence[str]
) -> torch.Tensor:
    """Returns the CLIP score (N,) of each image with its caption: 100 max(cos, 0) of their embeddings.

    Equation 1 of Hessel et al. 2021, https://arxiv.org/abs/2104.08718, with a weight of 100 as in torchmetrics. It
    tells which of two models obeys more, not how much: compare it with that of real images alone.

    Args:
        embed_texts: From captions to unit vectors (B, D).
        features: The images' unit vectors (N, D), on the CPU.
        captions: N captions.
    """
    starts = range(0, len(captions), READ_AT_ONCE)
    texts = torch.cat([embed_texts(captions[start : start + READ_AT_ONCE]).cpu() for start in starts])
    return 100 * (features * texts).sum(dim=1).clamp(min=0)


def _report_classes(
    report: Report,
    real: RealImages,
    extractor: Extractor,
    measured: _Measured,
    features: _Features,
    device: torch.device,
) -> None:
    """Adds to a report how many images are of the class asked for, and the first distance for each class alone."""
    if extractor.classify is None or real.class_labels is None or real.id2label is None:
        return
    held_out = real.held_out[: len(features.held_out)]
    labels = real.class_labels[real.reference[: len(features.reference)]]
    held_out_labels = real.class_labels[held_out]
    seen_in_held_out = extractor.classify(real[held_out].to(device)).argmax(1).cpu()
    report.figures["class_accuracy"] = _measure_mean(
        measured.in_order(measured.class_ids) == labels, held_out_labels == seen_in_held_out
    )
    distance = next(iter(DISTANCES[extractor.name].values()))
    for id, name in real.id2label.items():
        rows, held_out_rows = labels == id, held_out_labels == id
        if min(rows.sum(), held_out_rows.sum()) >= MIN_IMAGES_OF_A_CLASS:
            of_class = _Features(features.reference[rows], features.held_out[held_out_rows], features.generated[rows])
            report.of_class[name] = _measure_distance(distance, of_class)


def _report_pixel_art(
    report: Report, pixel_art: PixelArt, measured: _Measured, real: RealImages, num_images: int
) -> None:
    """Adds to a report the figures of pixel art, beside those of as many held-out images."""
    batches = [pixel_art.measure(batch) for batch in real.in_batches(real.held_out[:num_images], READ_AT_ONCE)]
    for name in batches[0]:
        values = measured.in_order([batch[name] for batch in measured.pixel_art])
        floor = torch.cat([batch[name] for batch in batches])
        if name == "colours":
            report.figures[name] = Measurement(
                float(median(values)), interval_of_median(values), float(median(floor)), len(values)
            )
        else:
            report.figures[name] = _measure_mean(values, floor)


def _measure_distance(distance: Distance, features: _Features) -> Measurement:
    """Returns the distance of the generated images from the reference, beside that of the held-out images."""
    return Measurement(
        value=distance(features.reference, features.generated),
        interval=interval_of_distance(distance, features.reference, features.generated),
        real=distance(features.reference, features.held_out),
        num_images=len(features.generated),
    )


def _measure_mean(values: torch.Tensor, floor: torch.Tensor) -> Measurement:
    """Returns the mean of `values` (N,) of generated images, beside the mean of `floor` (M,) of held-out ones."""
    values = values.double()
    return Measurement(float(values.mean()), interval_of_mean(values), float(floor.double().mean()), len(values))


def _draw_pairs(real: RealImages, pairs: list[Pair]) -> Image.Image:
    """Draws the closest pairs: a sample above, and the training image that is nearest to it below."""
    closest = _closest(pairs)
    samples = torch.stack([pair.sample for pair in closest])
    nearest = real[np.array([pair.training_index for pair in closest])]
    rows = [to_straight_alpha(images / 255) for images in (samples, nearest)]
    distances = [f"{pair.distance:.3f}" for pair in closest]
    return labelled_grid(rows, ["sample", "nearest\ntraining image"], distances)
