"""The figures of sample.py: each function samples the images of a figure and arranges them."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.common.run_files import TRAINED_PARTS
from sprite_diffusion.data.config import DataConfig, ImageMode
from sprite_diffusion.data.dataset import load_image_data
from sprite_diffusion.data.decoding import load_image_file, to_model_range
from sprite_diffusion.sampling.conditions import Condition, join_arguments
from sprite_diffusion.sampling.generation import Request, StepStills, sample_images, sample_noise, to_unit_range
from sprite_diffusion.sampling.pictures import labelled_grid, make_single_picture
from sprite_diffusion.sampling.pipeline_loading import Pipeline, load_pipeline
from sprite_diffusion.sampling.samplers import NoiselessDDPMScheduler, Sampler

NOISE_LEVELS = 10  # of the columns that go from an image to noise


@dataclass
class Figure:
    """Rows of images (N, C, H, W) in [0, 1] with labels, and a record of how they were made. Alpha is straight."""

    rows: list[torch.Tensor]
    row_labels: list[str]
    column_labels: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def render(self, scale: int | None) -> Image.Image:
        """Draws the figure with each image enlarged by `scale`, or by `choose_scale` if that is None."""
        return labelled_grid(self.rows, self.row_labels, self.column_labels, scale)


def compare_samplers(pipeline: Pipeline, samplers: list[Sampler], request: Request) -> Figure:
    """Returns a row per sampler, all from the same noise, labelled with its time and its calls of the network."""
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    noise = sample_noise(pipeline.sample_shape, generators)
    figure = Figure([to_unit_range(noise)], ["noise"], _column_labels(request))
    figure.record = {**request.record, "samplers": []}
    # The first call of a network is slower than the rest, and would count against the first sampler. The model's own
    # scheduler makes that call, since some samplers take no single step.
    sample_images(pipeline, Sampler("warm-up", pipeline.scheduler, 1), request)
    for sampler in samplers:
        with _counted_calls(pipeline.unet) as calls:
            start = time.perf_counter()
            images = sample_images(pipeline, sampler, request)
            seconds = (time.perf_counter() - start) / len(images)
        num_batches = -(-len(images) // request.batch_size)
        num_calls = calls.total() // num_batches
        figure.rows.append(images)
        figure.row_labels.append(
            f"{sampler.name}\n{sampler.num_inference_steps} steps\n"
            f"{seconds:.2g} s per image\n{num_calls} network calls"
        )
        cost = {"seconds_per_image": seconds, "network_calls": num_calls}
        figure.record["samplers"].append({**sampler.record, **cost})
    return figure


def comparison_table(figure: Figure) -> tuple[list[str], list[list[Any]]]:
    """Returns the columns and rows of a comparison, for trackers: a row per image."""
    pictures = [[make_single_picture(image) for image in row] for row in figure.rows]
    names = figure.column_labels or [""] * len(pictures[0])
    samplers = [f"{sampler['scheduler']}:{sampler['num_inference_steps']}" for sampler in figure.record["samplers"]]
    kind = "prompt" if "prompt" in figure.record["images"][0] else "class"
    return ["input_noise", *samplers, kind], [list(cells) for cells in zip(*pictures, names, strict=True)]


def show_learning(pipeline: Pipeline, snapshots: list[Path], sampler: Sampler, request: Request) -> Figure:
    """Returns a row per snapshot of a run, all from the same noise. The pipeline keeps the last one's network."""
    record = {**sampler.record, **request.record, "snapshots": [str(folder) for folder in snapshots]}
    figure = Figure([], [], _column_labels(request), record)
    for folder in snapshots:
        _take_network(pipeline, folder)
        figure.rows.append(sample_images(pipeline, sampler, request))
        figure.row_labels.append(_name_snapshot(folder))
    return figure


def _take_network(pipeline: Pipeline, snapshot: Path) -> None:
    """Puts the networks of a snapshot into a pipeline, in the pipeline's number format and on its device."""
    learned = load_pipeline(str(snapshot), pipeline.unet.dtype).to(pipeline.device)
    for name in TRAINED_PARTS:
        if hasattr(learned, name):
            setattr(pipeline, name, getattr(learned, name))


def _name_snapshot(folder: Path) -> str:
    return f"epoch {int(folder.name.removeprefix('epoch-'))}"


def find_snapshots(run_dir: Path) -> list[Path]:
    """Returns the snapshots of a run, oldest first. Raises `UserInputError` if there are none."""
    epochs = {path: path.name.removeprefix("epoch-") for path in (run_dir / "snapshots").glob("epoch-*")}
    folders = sorted((path for path, epoch in epochs.items() if epoch.isdecimal()), key=lambda path: int(epochs[path]))
    if not folders:
        raise UserInputError(f"--snapshots {run_dir}: no snapshots/epoch-* in it; train with --snapshot_epochs N")
    return folders


def show_steps(pipeline: Pipeline, sampler: Sampler, request: Request, interval: int) -> Figure:
    """Returns a row for every `interval`-th step and the last: the noisy images, and beside them their predictions."""
    stills = StepStills(interval)
    sample_images(pipeline, sampler, request, trajectory=stills)
    labels = [f"step {number}\nt = {timestep}" for number, timestep in stills.steps]
    names = _column_labels(request) or [""] * len(request.seeds)
    columns = [f"{kind}\n{name}".strip() for kind in ("noisy", "predicted") for name in names]
    record = {**sampler.record, **request.record, "steps": [number for number, _ in stills.steps]}
    return Figure(stills.rows, labels, columns, record)


def show_forward_process(scheduler: Any, clean_images: torch.Tensor, seed: int) -> Figure:
    """Returns images on their way to noise, a row each, with the share of signal at each step.

    Args:
        scheduler: The process that adds the noise.
        clean_images: The images, (N, C, H, W) in [-1, 1].
        seed: Image i gets the noise of `seed` + i.
    """
    timesteps, shares = _choose_noise_levels(scheduler)
    columns = [clean_images, *_add_noise(scheduler, clean_images, timesteps, seed)]
    rows = to_unit_range(torch.stack(columns, dim=1))  # (N, columns, C, H, W)
    record = {"seed": seed, "timesteps": timesteps, "signal_shares": shares}
    labels = ["image\n100% signal", *_label_noise_levels(timesteps, shares)]
    return Figure(list(rows), [""] * len(rows), labels, record)


def show_predictions(
    pipeline: Pipeline, snapshots: list[Path], clean_images: torch.Tensor, condition: Condition, seed: int
) -> Figure:
    """Returns what the network makes of noisy images in one step: a column for each level of noise.

    For each image there is a row of the noisy images, and one of the clean images that are predicted from them. A row
    of the errors follows or, with snapshots, a row of predictions for each snapshot stands in place of both.

    Args:
        pipeline: The model. It keeps the network of the last snapshot.
        snapshots: The folders of a run's snapshots; none for the model alone.
        clean_images: The images, (N, C, H, W) in [-1, 1].
        condition: What to predict.
        seed: Image i gets the noise of `seed` + i.
    """
    process = pipeline.scheduler
    if not isinstance(process, LinearCorruptionScheduler):
        process = ClosedFormDDPMScheduler.from_config(process.config)
    process.set_timesteps(len(process))
    timesteps, shares = _choose_noise_levels(process)
    noisy = _add_noise(process, clean_images, timesteps, seed)

    def predict() -> torch.Tensor:
        """Returns the clean images that are predicted at each level of noise, (levels, N, C, H, W)."""
        predictions = []
        tensors = join_arguments([condition.encoded(pipeline)] * len(clean_images))
        arguments = {name: tensor.to(pipeline.device) for name, tensor in tensors.items()}
        for t, images in zip(timesteps, noisy, strict=True):
            model_input = images.to(pipeline.device, pipeline.unet.dtype)
            with torch.no_grad(), pipeline.conditioned_on(**arguments):
                output = pipeline.predict(model_input, torch.tensor(t, device=pipeline.device))
            generator = torch.Generator().manual_seed(seed)  # of the noise of the step, which is not used
            step = process.step(output.cpu(), t, images, generator=generator)
            predictions.append(step.pred_original_sample)
        return torch.stack(predictions)

    rows_by_name = {"noisy": torch.stack(noisy)}
    for folder in snapshots:
        _take_network(pipeline, folder)
        rows_by_name[_name_snapshot(folder)] = predict()
    if not snapshots:
        rows_by_name["predicted"] = predict()
        error = (rows_by_name["predicted"] - clean_images).abs() - 1  # 0 is black, 2 is white
        if error.shape[2] == 4:  # (levels, N, C, H, W): an error of alpha alone is grey, and none is see-through
            error = torch.cat([error[:, :, :3].maximum(error[:, :, 3:]), torch.ones_like(error[:, :, 3:])], dim=2)
        rows_by_name["error"] = error
    errors = {
        name: (images - clean_images).square().mean(dim=(1, 2, 3, 4)).tolist()
        for name, images in rows_by_name.items()
        if name not in ("noisy", "error")
    }
    record = {"seed": seed, condition.kind: condition.name, "timesteps": timesteps, "mean_squared_errors": errors}
    rows = [to_unit_range(images[:, i]) for i in range(len(clean_images)) for images in rows_by_name.values()]
    labels = list(rows_by_name) * len(clean_images)
    return Figure(rows, labels, _label_noise_levels(timesteps, shares), record)


def _choose_noise_levels(scheduler: Any) -> tuple[list[int], list[float]]:
    """Returns timesteps from the first to the last of a process, and the share of signal at each."""
    timesteps = np.linspace(0, len(scheduler) - 1, NOISE_LEVELS).round().astype(int).tolist()
    if isinstance(scheduler, LinearCorruptionScheduler):
        return timesteps, [1 - (t + 1) / len(scheduler) for t in timesteps]  # the weights of image and noise sum to 1
    return timesteps, scheduler.alphas_cumprod[timesteps].tolist()  # the variances of image and noise sum to 1


def _add_noise(scheduler: Any, clean_images: torch.Tensor, timesteps: list[int], seed: int) -> list[torch.Tensor]:
    """Returns the images (N, C, H, W) at each timestep, image i with the noise of `seed` + i."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(clean_images))]
    noise = sample_noise(clean_images.shape[1:], generators)
    return [scheduler.add_noise(clean_images, noise, torch.full((len(noise),), t)) for t in timesteps]


def _label_noise_levels(timesteps: list[int], shares: list[float]) -> list[str]:
    return [f"t = {t}\n{100 * share:.3g}% signal" for t, share in zip(timesteps, shares, strict=True)]


def load_clean_images(flag: str, source: str, num_images: int, resolution: str, image_mode: ImageMode) -> torch.Tensor:
    """Returns the first images of a file, folder or dataset, (N, C, H, W) in [-1, 1].

    Args:
        flag: The flag that names `source`.
        source: An image file, a folder of images or a dataset.
        num_images: The most images to return.
        resolution: The size of the images, as `--resolution` takes it.
        image_mode: Their channels.

    Raises:
        UserInputError: If there are no such images, about `flag`.
    """
    path = Path(source)
    try:
        options = DataConfig(
            dataset_name=None if path.is_dir() else source,
            train_data_dir=source if path.is_dir() else None,
            resolution=resolution,
            center_crop=True,
            image_mode=image_mode,
            max_train_samples=num_images,
        )
        if path.is_file() and path.suffix not in (".npy", ".parquet"):
            return load_image_file(source, options)[None]
        dataset = load_image_data(options, with_labels=False).dataset
        batch = dataset.__getitems__(list(range(min(num_images, len(dataset)))))  # type: ignore
        return to_model_range(batch["images"])
    except UserInputError as error:
        message = str(error)
        for name in ("--train_data_dir", "--dataset_name"):
            message = message.replace(name, flag)
        raise UserInputError(message) from None


def show_collapse(pipeline: Pipeline, sampler: Sampler, request: Request) -> Figure:
    """Returns DDPM's reverse process, and below it the same without the noise that each step adds.

    Raises `UserInputError` for a process that adds none.
    """
    if not hasattr(sampler.scheduler, "alphas_cumprod"):
        name = type(sampler.scheduler).__name__
        raise UserInputError(f"--no-noise: {name} adds no noise on its way, there is none to leave out")
    noiseless_scheduler = NoiselessDDPMScheduler.from_config(sampler.scheduler.config)
    noiseless = Sampler("no noise", noiseless_scheduler, sampler.num_inference_steps)
    rows = [sample_images(pipeline, s, request) for s in (sampler, noiseless)]
    record = {**sampler.record, **request.record}
    return Figure(rows, ["with the noise\nof each step", "without it"], _column_labels(request), record)


def interpolate(
    pipeline: Pipeline, sampler: Sampler, seeds: list[int], ends: list[Condition], size: int, request: Request
) -> Figure:
    """Returns images between two seeds, from left to right, and between two conditions, from top to bottom.

    Args:
        pipeline: The model.
        sampler: A sampler that adds no noise at its steps, which would hide what changes from image to image.
        seeds: The two seeds whose noise lies at the ends of each row.
        ends: The classes, mixes or prompts at the top and the bottom; one for all rows; or none.
        size: The number of images in a row, and of rows between two `ends`.
        request: The options of sampling; its seeds and conditions are not used.

    Raises:
        UserInputError: For more than two `ends`.
    """
    if len(ends) > 2:
        raise UserInputError(f"--interpolate goes between 2 classes, mixes or prompts: {len(ends)} are given")
    first, last = sample_noise(pipeline.sample_shape, [torch.Generator().manual_seed(seed) for seed in seeds])
    fractions = [k / (size - 1) for k in range(size)]
    noise = torch.stack([slerp(first, last, fraction) for fraction in fractions])
    conditions = ends or [Condition()]
    if len(ends) == 2:
        top, bottom = (end.encoded(pipeline) for end in ends)
        between = [top.between(bottom, fraction) for fraction in fractions[1:-1]]
        conditions = [ends[0], *between, ends[1]]
    column_labels = [f"seed {seeds[0]}", *(f"{fraction:.0%}" for fraction in fractions[1:-1]), f"seed {seeds[1]}"]
    record = {**sampler.record, "seeds": seeds, "guidance_scale": request.guidance_scale}
    figure = Figure([], [], column_labels, {**record, "conditions": [condition.name for condition in conditions]})
    for condition in conditions:
        row = replace(request, seeds=[seeds[0]] * size, conditions=[condition] * size)
        figure.rows.append(sample_images(pipeline, sampler, row, noise))
        figure.row_labels.append(condition.label)
    return figure


def slerp(first: torch.Tensor, last: torch.Tensor, fraction: float) -> torch.Tensor:
    """Returns noise between two noises, `first` at a fraction of 0 and `last` at 1, by spherical interpolation.

    The noise between them is as long as they are, as the model expects (Shoemake 1985, "Animating Rotation with
    Quaternion Curves").
    """
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if torch.sin(angle) < 1e-4:  # for one direction the formula divides 0 by 0, and a straight line is the same
        return torch.lerp(first, last, fraction)
    return (torch.sin((1 - fraction) * angle) * first + torch.sin(fraction * angle) * last) / torch.sin(angle)


@contextmanager
def _counted_calls(module: torch.nn.Module) -> Iterator[Counter]:
    """Counts the calls of a module inside of the `with`."""
    calls: Counter = Counter()
    hook = module.register_forward_pre_hook(lambda module, args: calls.update(["call"]))
    try:
        yield calls
    finally:
        hook.remove()


def _column_labels(request: Request) -> list[str]:
    """Returns the labels of the images' conditions; none of a model that can't be asked."""
    labels = [condition.label for condition in request.conditions]
    return labels if any(labels) else []
