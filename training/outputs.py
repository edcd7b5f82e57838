"""What a run leaves in its folder besides checkpoints, and sends to trackers and the Hub."""

import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from metrics.evaluation import choose_num_images, evaluate, generate, make_evaluation_sampler, sampling_facts
from metrics.extractors import CLIP_MODEL, make_extractor
from metrics.real_images import RealImages
from metrics.report import append_history, is_lowest, write_report
from pipelines import ConditionalDDPMPipeline
from training.checkpoint import (
    SKIPPED_IMAGES_FILE,
    SUMMARY_FILE,
    Checkpoints,
    TrainState,
    check_room,
    prepare_output_dir,
)
from training.config import TrainingConfig
from training.dataset import ImageData
from training.ema import ema_weights
from training.errors import UserInputError
from training.files import PARTIAL, FullDiskWarning, remove, write_text, written_beside
from training.grid import make_picture
from training.hub import HubUploader, create_repository
from training.shutdown import SamplingInterrupted, Signals
from training.tracking import Trackers

IMAGES_PER_EVALUATION = 500


@dataclass(frozen=True)
class SampleGrid:
    """A picture of samples, `columns` in a row, what it shows, and what the pipeline is called with for it."""

    num_images: int
    columns: int
    caption: str
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)


class RunOutputs:
    """Writes sample grids, the pipeline, its summary and snapshots. The main process writes, the others wait."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainingConfig,
        data: ImageData,
        model: Any,
        ema: Any,
        make_pipeline: Callable[[Any], DiffusionPipeline],
        grid: SampleGrid,
        total_steps: int,
        checkpoints: Checkpoints,
        signals: Signals,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.data = data
        self.model = model
        self.ema = ema
        self.make_pipeline = make_pipeline
        self.grid = grid
        self.total_steps = total_steps
        self.checkpoints = checkpoints
        self.signals = signals
        self.disk = FullDiskWarning()
        self.uploader: HubUploader | None = None
        self.is_best = False  # what was evaluated last

    def begin(self, state: TrainState) -> None:
        """Makes the folder, opens the trackers and the repository, and says what is about to be trained."""
        config, checkpoint = self.config, self.checkpoints.newest
        check_room(config, self.model, state.global_step, self.total_steps)
        logger = "none"
        if self.accelerator.is_main_process:
            logger = config.logger
            if config.push_to_hub:
                self.uploader = HubUploader(create_repository(config), config)
            prepare_output_dir(config)
            start = f"from {checkpoint}" if checkpoint else "from the start"
            print_summary(self.accelerator, config, self.data, self.model, self.total_steps, start)
            self._write_skipped_images()
        self.trackers = Trackers(
            logger,
            self.output_dir / config.logging_dir,
            {name: value for name, value in asdict(config).items() if name != "hub_token"},
            resumed_from=None if checkpoint is None else state.global_step,
        )
        if config.evaluate_every is not None:  # here, so that what is wrong with the data shows before the training
            self.real = RealImages(self.data)
            with self.accelerator.local_main_process_first():
                self.extractor = make_extractor("classifier", CLIP_MODEL, self.real, self.accelerator.device)
        self.accelerator.wait_for_everyone()

    def _write_skipped_images(self) -> None:
        path = self.output_dir / SKIPPED_IMAGES_FILE
        if not self.data.skipped_images:
            path.unlink(missing_ok=True)  # of the run that is resumed
            return
        lines = [json.dumps({"image": name, "reason": reason}) for name, reason in self.data.skipped_images]
        write_text(path, "\n".join(lines) + "\n")
        tqdm.write(f"wrote {path}")

    def log(self, metrics: dict[str, float], state: TrainState) -> None:
        """Numbers for the trackers."""
        if math.isfinite(metrics["loss"]):
            state.loss = metrics["loss"]
        self.trackers.log(metrics, state.global_step)

    def write(
        self,
        state: TrainState,
        metrics: bool = False,
        samples: bool = False,
        pipeline: bool = False,
        snapshot: bool = False,
    ) -> None:
        """Writes what is asked for, of the averaged weights.

        A signal to stop interrupts what is sampled: the checkpoint to stop with must be one that this is done again
        from.
        """
        self.checkpoints.check_weights(state.global_step)
        self.is_best = False
        with suppress(SamplingInterrupted):
            if metrics:
                with self._averaged_pipeline() as averaged:
                    self._evaluate(averaged, state)
            if self.accelerator.is_main_process and (samples or pipeline or snapshot):
                with self._averaged_pipeline() as averaged:
                    if samples:
                        with self.disk.instead_of_error("samples"):
                            self._write_samples(averaged, state)
                    if snapshot:
                        with self.disk.instead_of_error("snapshot"):
                            self._write_snapshot(averaged, state)
                    if pipeline:  # last, as its summary says that a run is finished
                        with self.disk.instead_of_error("pipeline"):
                            self._write_pipeline(averaged, state)
        self.accelerator.wait_for_everyone()

    def save_pipeline(self, folder: Path) -> None:
        """The folder that `DiffusionPipeline.from_pretrained` loads, of the averaged weights."""
        with self._averaged_pipeline() as averaged:
            averaged.save_pretrained(str(folder))

    def close(self) -> None:
        """Closes the trackers."""
        self.trackers.finish()

    def finish(self) -> None:
        """Waits for what is still to be sent, and closes. Raises if the disk had no room for the pipeline."""
        if self.uploader is not None:
            self.uploader.finish()
        self.close()
        if "pipeline" in self.disk.unwritten:
            raise UserInputError(
                f"--output_dir {self.output_dir}: the disk is full, the pipeline was not written; free some and give "
                "the same command again"
            )

    @contextmanager
    def _averaged_pipeline(self) -> Iterator[DiffusionPipeline]:
        """The pipeline of the model as it is to be used: averaged weights, evaluation mode."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        unwrapped.eval()
        try:
            with ema_weights(self.ema, unwrapped):
                yield self.make_pipeline(unwrapped)
        finally:
            unwrapped.train()

    def _evaluate(self, pipeline: DiffusionPipeline, state: TrainState) -> None:
        """Figures of some images, drawn by all processes: to the trackers, and for the card."""
        config, real = self.config, self.real
        num_images = choose_num_images(real, IMAGES_PER_EVALUATION)
        sampler = make_evaluation_sampler(pipeline, None, None)
        # One of several processes must not leave the others waiting for its images.
        alone = self.accelerator.num_processes == 1
        with self.signals.interruptible() if alone else nullcontext():
            images = generate(
                pipeline, sampler, real, num_images, config.train_batch_size, config.guidance_scale, config.seed
            )
            result = evaluate(real, self.extractor, images, num_images, isinstance(pipeline, ConditionalDDPMPipeline))
        if result is None:
            return
        report, closest_pairs = result
        facts = {
            "global_step": state.global_step,
            "data": Path(real.source).name,
            "num_training_images": len(real),
            **sampling_facts(pipeline, sampler, config.guidance_scale, config.seed),
        }
        self.is_best = is_lowest(report, self.output_dir, state.global_step)
        with self.disk.instead_of_error("metrics"):
            append_history(report, self.output_dir, facts)
            for path in write_report(report, closest_pairs, self.output_dir, facts):
                tqdm.write(f"wrote {path}")
        self.trackers.log(report.scalars(), state.global_step)

    def _write_samples(self, pipeline: DiffusionPipeline, state: TrainState) -> None:
        """A sample grid, from the same noise each time, as a PNG and to the trackers."""
        config, grid = self.config, self.grid
        pipeline.set_progress_bar_config(desc="sampling", unit="step", leave=False, dynamic_ncols=True)
        with self.signals.interruptible():
            images = pipeline(
                **grid.pipeline_kwargs,
                batch_size=grid.num_images,
                num_inference_steps=config.ddpm_num_inference_steps,
                generator=[torch.Generator().manual_seed(config.seed + i) for i in range(grid.num_images)],
                output_type="pt",
            ).images  # (N, C, H, W) in [0, 1]
        path = self.output_dir / "samples" / f"step-{state.global_step:06d}.png"
        picture = make_picture(images, grid.columns)
        with written_beside(path) as partial:
            picture.save(partial, format="PNG")
        caption = f"epoch {state.epoch}, step {state.global_step}; {grid.caption}"
        self.trackers.log_image("samples", picture, caption, state.global_step)
        tqdm.write(f"wrote {path}")

    def _write_snapshot(self, pipeline: DiffusionPipeline, state: TrainState) -> None:
        folder = self.output_dir / "snapshots" / f"epoch-{state.epoch:04d}"
        with written_beside(folder) as partial:
            pipeline.save_pretrained(str(partial))
        tqdm.write(f"wrote {folder}")

    def _write_pipeline(self, pipeline: DiffusionPipeline, state: TrainState) -> None:
        """The pipeline in the output folder, its summary, and both to the Hub and as an artifact."""
        staged = self.output_dir / f"staged{PARTIAL}"
        with written_beside(staged) as partial:
            pipeline.save_pretrained(str(partial))
        # File by file: but for the weights, which are one file, they are the same at every step.
        for file in [path for path in sorted(staged.rglob("*")) if path.is_file()]:
            target = self.output_dir / file.relative_to(staged)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
        remove(staged)
        summary = {
            **asdict(state),
            "total_steps": self.total_steps,
            "script": Path(sys.argv[0]).name,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "num_images": self.data.num_images,
            "data_source": self.data.source,
            "data_license": self.data.license,
            "num_processes": self.accelerator.num_processes,
            "device": describe_device(self.accelerator.device),
            "precision": self.accelerator.mixed_precision,
            "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "datasets")},
        }
        write_text(self.output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        tqdm.write(f"wrote {self.output_dir}")
        is_last = state.global_step >= self.total_steps
        if self.uploader is not None and (is_last or self.config.hub_strategy != "end"):
            self.uploader.push(state.global_step)
        self.trackers.log_model(self.output_dir, f"epoch_{state.epoch}", metadata=asdict(state))


def describe_device(device: torch.device) -> str:
    """The name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def print_summary(
    accelerator: Accelerator, config: TrainingConfig, data: ImageData, model: Any, total_steps: int, start: str
) -> None:
    """What is about to be trained, on what and for how long."""
    height, width = config.image_size
    images = "a stream of images" if data.num_images is None else f"{data.num_images:,} images"
    skipped = f", {len(data.skipped_images)} skipped" if data.skipped_images else ""
    classes = "" if data.id2label is None else f", {len(data.id2label)} classes"
    total_batch_size = config.total_batch_size(accelerator.num_processes)
    num_params = sum(p.numel() for p in model.parameters())
    print(
        f"data       {data.source}: {images} of {width}x{height}, {data.num_channels} channel(s){classes}{skipped}\n"
        f"model      {config.model_class}, {num_params / 1e6:.2f} M parameters\n"
        f"device     {accelerator.device}, {accelerator.num_processes} process(es), "
        f"precision {accelerator.mixed_precision}\n"
        f"training   {total_steps:,} steps of {total_batch_size} images, seed {config.seed}, {start}\n"
        f"output     {config.output_dir}"
    )
