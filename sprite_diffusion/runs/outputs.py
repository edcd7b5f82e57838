"""What a run leaves in its folder besides checkpoints, and sends to trackers and the Hub."""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from sprite_diffusion.common.errors import UserInputError, warn
from sprite_diffusion.common.files import PARTIAL, FullDiskWarning
from sprite_diffusion.common.run_files import (
    CONFIG_FILE,
    HISTORY_FILE,
    INDEX_FILE,
    LOSS_FILE,
    METRICS_FILE,
    PAIRS_FILE,
    PALETTE_FILE,
    PROMPT_PICTURE,
    REPORT_FILE,
    SAMPLES_DIR,
    SKIPPED_IMAGES_FILE,
    SNAPSHOTS_DIR,
    SUMMARY_FILE,
    TRAINING_LOG_FILE,
)
from sprite_diffusion.data.dataset import ImageData, StoredImages
from sprite_diffusion.metrics.evaluation import (
    choose_num_images,
    evaluate,
    generate,
    make_evaluation_sampler,
    match_conditions,
    sampling_facts,
)
from sprite_diffusion.metrics.extractors import Extractor, make_extractor
from sprite_diffusion.metrics.flags import CLIP_MODEL
from sprite_diffusion.metrics.obedience import choose_groups, measure_obedience
from sprite_diffusion.metrics.real_images import RealImages
from sprite_diffusion.metrics.report import NEAR_COPIES, Losses, append_history, is_lowest, write_report
from sprite_diffusion.runs.base_model import describe_base
from sprite_diffusion.runs.checkpoint import Checkpoints
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.folder import check_room, prepare_output_dir
from sprite_diffusion.runs.signals import SamplingInterrupted, Signals
from sprite_diffusion.runs.state import Due, TrainState
from sprite_diffusion.runs.summary import make_summary, print_summary
from sprite_diffusion.runs.weights import Weights
from sprite_diffusion.sampling.conditions import Condition
from sprite_diffusion.sampling.generation import Request, sample_images
from sprite_diffusion.sampling.palettes import format_palette, learn_pixel_art
from sprite_diffusion.sampling.pictures import make_picture, make_single_picture
from sprite_diffusion.sampling.pipeline_loading import Pipeline
from sprite_diffusion.sampling.samplers import make_sampler
from sprite_diffusion.sharing.hub import HubUploader, create_repository
from sprite_diffusion.sharing.report import draw_losses, make_report, read_training_log, summarize_epochs
from sprite_diffusion.sharing.trackers import Trackers

IMAGES_PER_EVALUATION = 500
JUDGED_PER_EVALUATION = 100  # captions of each group, which name several attributes each
SECONDS_BEFORE_ESTIMATE = 10.0  # the first steps are slow
# Seconds of an epoch that has a line of its own: of shorter ones there are too many to read, and a run that is counted
# in steps may have hundreds.
SHORTEST_PRINTED_EPOCH, SHORTEST_PRINTED_EPOCH_OF_STEPS = 1.0, 20.0


@dataclass(frozen=True)
class SampleGrid:
    """A picture of samples: the class or prompt of each, how many are in a row, and what the picture shows."""

    conditions: list[Condition]
    columns: int
    caption: str
    guidance_scale: float = 1.0

    @property
    def rows_of_prompts(self) -> range:
        """Returns the first image of each row, if a row shows a prompt."""
        return range(0, len(self.conditions) if self.conditions[0].kind == "prompt" else 0, self.columns)


class Judgement(NamedTuple):
    """What an evaluation says of the weights, on every process; nothing where there was none."""

    is_best: bool = False  # its distance is the lowest so far
    is_copying: bool = False  # near-copies of training images are more than among real ones, beyond chance


class RunOutputs:
    """Writes sample grids, the pipeline, its summary and snapshots. The main process writes, the others wait."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainingConfig,
        data: ImageData,
        weights: Weights,
        grid: SampleGrid,
        total_steps: int,
        checkpoints: Checkpoints,
        signals: Signals,
        measure_losses: Callable[[], Losses | None],
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.data = data
        self.weights = weights
        self.grid = grid
        self.total_steps = total_steps
        self.checkpoints = checkpoints
        self.signals = signals
        self.measure_losses = measure_losses
        self.disk = FullDiskWarning()
        self.uploader: HubUploader | None = None

    def begin(self, state: TrainState) -> None:
        """Makes the folder, opens the trackers and the repository, and says what is about to be trained."""
        config, checkpoint, model = self.config, self.checkpoints.newest, self.weights.model
        check_room(config, model, state.global_step, self.total_steps)
        logger = "none"
        if self.accelerator.is_main_process:
            logger = config.logger
            if config.push_to_hub:
                name = config.hub_model_id or self.output_dir.name
                repo_id = create_repository(name, config.hub_private_repo, config.hub_token)
                self.uploader = HubUploader(repo_id, self.output_dir, config.hub_private_repo, config.hub_token)
            self.folder = prepare_output_dir(config, self.checkpoints.known)
            self.checkpoints.begin(self.folder.files)
            if config.lr_warmup_steps >= self.total_steps:
                warn(
                    f"--lr_warmup_steps {config.lr_warmup_steps} of {self.total_steps} steps: the learning rate will "
                    f"never reach --learning_rate {config.learning_rate:g}; train longer, or give less warm-up"
                )
            start = f"from {checkpoint}" if checkpoint else "from the start"
            print_summary(self.accelerator, config, self.data, model, self.total_steps, start)
            self._write_skipped_images()
            self._write_palette()
            self.log_entries = [
                entry for entry in read_training_log(self.output_dir) if entry["global_step"] <= state.global_step
            ]
            lines = [json.dumps(entry) + "\n" for entry in self.log_entries]
            self.folder.files.write_text(self.output_dir / TRAINING_LOG_FILE, "".join(lines))
        self.logging_dir = self.output_dir / config.logging_dir
        self.earlier_logs = set(self.logging_dir.rglob("*"))
        self.trackers = Trackers(
            logger,
            self.logging_dir,
            {name: value for name, value in asdict(config).items() if name != "hub_token"},
            config.tracker_project,
            config.tracker_job_type,
            # Also of a run that was killed before its first checkpoint: its steps come again.
            resumed_from=state.global_step if self.earlier_logs else None,
        )
        self._claim_logs()
        if config.evaluate_every is not None:  # here, so that an error in the data shows before the training
            self.real = RealImages(self.data)
        self.accelerator.wait_for_everyone()
        self._begun: float | None = time.perf_counter()

    def _write_skipped_images(self) -> None:
        path = self.output_dir / SKIPPED_IMAGES_FILE
        if not self.data.skipped_images:
            self.folder.files.remove(path)  # of the run that is resumed
            return
        lines = [json.dumps({"image": image.name, "reason": image.reason}) for image in self.data.skipped_images]
        self.folder.files.write_text(path, "\n".join(lines) + "\n")
        tqdm.write(f"wrote {path}")

    def _write_palette(self) -> None:
        """Keeps the colours of pixel art with the model, for whoever has the model and not the images."""
        images = self.data.dataset
        palette = learn_pixel_art(images) if isinstance(images, StoredImages) else None
        path = self.output_dir / PALETTE_FILE
        if palette is None:
            self.folder.files.remove(path)  # of the run that is resumed, whose images were others
            return
        self.folder.files.write_text(path, format_palette(palette))
        tqdm.write(f"wrote {path}")

    def log(self, metrics: dict[str, float], state: TrainState) -> None:
        """Gives numbers to the trackers and the log, keeps the loss for the summary, and prints a line per epoch."""
        if math.isfinite(metrics["loss"]):
            state.loss = metrics["loss"]
        self.trackers.log(metrics, state.global_step)
        if not self.accelerator.is_main_process:
            return
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        facts = {"global_step": state.global_step, "images_seen": state.images_seen, "seconds": state.seconds}
        self.log_entries.append({**facts, **numbers})
        with self.disk.instead_of_error("training log"):
            line = json.dumps(self.log_entries[-1]) + "\n"
            self.folder.files.append_text(self.output_dir / TRAINING_LOG_FILE, line)
        self._estimate_time(metrics["images_per_second"], state)
        if state.ends_epoch:
            epoch = summarize_epochs(self.log_entries)[-1]
            counts_steps = self.config.num_epochs is None
            if epoch.seconds >= (SHORTEST_PRINTED_EPOCH_OF_STEPS if counts_steps else SHORTEST_PRINTED_EPOCH):
                tqdm.write(str(epoch))

    def _estimate_time(self, images_per_second: float, state: TrainState) -> None:
        """Says once, as soon as the speed is known, how long the run will take."""
        if self._begun is None or time.perf_counter() - self._begun < SECONDS_BEFORE_ESTIMATE:
            return
        self._begun = None
        steps_left = self.total_steps - state.global_step
        seconds = steps_left * self.config.total_batch_size(self.accelerator.num_processes) / images_per_second
        if steps_left:
            left = tqdm.format_interval(seconds)
            tqdm.write(f"time left  {left} at {images_per_second:.0f} images/s, without the samples")

    def _claim_logs(self) -> None:
        """Lists the trackers' files as the run's: their libraries choose the names."""
        if self.accelerator.is_main_process:
            self.folder.files.claim_all_but(self.logging_dir, self.earlier_logs)

    def write(self, due: Due, state: TrainState) -> Judgement:
        """Writes what is due, of the averaged weights, and returns what their evaluation says of them.

        A signal to stop interrupts sampling: a resumed run writes all of it again.
        """
        self.weights.check_finite(state.global_step, self.checkpoints.describe_newest())
        epochs_done = state.epochs_done(due.end)
        judgement = Judgement()
        with suppress(SamplingInterrupted), self.weights.pipeline() as pipeline:
            if due.metrics:
                judgement = self._evaluate(pipeline, state)
            if due.samples:
                self._write_samples(pipeline, state.global_step, epochs_done)
            if due.snapshot:
                self._write_snapshot(pipeline, epochs_done)
            if due.pipeline:  # last, as its summary says that a run is finished
                self._write_pipeline(pipeline, state, due.end)
        self._claim_logs()
        return broadcast_object_list([judgement])[0]  # which waits for every process

    def close(self) -> None:
        """Closes the trackers, and lets other runs have the folder."""
        self.trackers.finish()
        self._claim_logs()
        if self.accelerator.is_main_process:
            self.folder.release()

    def finish(self) -> None:
        """Waits for what is still to be sent, and closes.

        Raises `UserInputError` if the disk had no room for the pipeline.
        """
        if self.uploader is not None:
            self.uploader.finish()
        self.close()
        if "pipeline" in self.disk.unwritten:
            raise UserInputError(
                f"--output_dir {self.output_dir}: the disk is full, the pipeline was not written; free some and give "
                "the same command again"
            )

    def _evaluate(self, pipeline: Pipeline, state: TrainState) -> Judgement:
        """Measures some images, sampled by all processes, for the trackers and the card; the main process judges."""
        config, real = self.config, self.real
        num_images = choose_num_images(real, IMAGES_PER_EVALUATION)
        sampler = make_evaluation_sampler(pipeline, None, None)
        # One of several processes must not leave the others waiting for its images.
        with self.signals.interruptible() if self.accelerator.num_processes == 1 else nullcontext():
            size, guidance = config.train_batch_size, config.guidance_scale
            draw = partial(generate, pipeline, sampler, batch_size=size, guidance_scale=guidance, seed=config.seed)
            images = draw(match_conditions(pipeline, real, num_images))
            result = evaluate(real, self._extractor, images, num_images, judge_classes=pipeline.is_conditional)
            groups = choose_groups(pipeline, real, config.leave_out_pairs)
            obedience = measure_obedience(draw, min(num_images, JUDGED_PER_EVALUATION), groups)
        if result is None:
            return Judgement()
        report, closest_pairs = result
        report.figures |= obedience
        losses = self.measure_losses()
        scalars = {} if losses is None else losses.to_dict()
        if losses is not None and losses.gap_grows(self.output_dir, state.global_step):
            tqdm.write(
                f"step {state.global_step}: the loss is {losses.training:.4g} for images that are trained on and "
                f"{losses.held_out:.4g} for others, and the gap grows: the network learns its images by heart"
            )
        facts = {
            "global_step": state.global_step,
            "data": Path(real.source).name,
            "num_training_images": len(real),
            **sampling_facts(pipeline, sampler, config.guidance_scale, config.seed),
            **scalars,
        }
        is_best = is_lowest(report, self.output_dir, state.global_step)
        with self.disk.instead_of_error("metrics"):
            self.folder.files.claim(*(self.output_dir / name for name in (METRICS_FILE, HISTORY_FILE, PAIRS_FILE)))
            append_history(report, self.output_dir, facts)
            for path in write_report(report, closest_pairs, self.output_dir, facts):
                tqdm.write(f"wrote {path}")
        scalars = {f"metrics/{name}": value for name, value in scalars.items()}
        self.trackers.log(report.scalars() | scalars, state.global_step)
        return Judgement(is_best, is_copying=report.figures[NEAR_COPIES].exceeds_floor)

    @cached_property
    def _extractor(self) -> Extractor:
        """The classifier of the data, trained at the first evaluation so that the first step need not wait for it."""
        with self.accelerator.local_main_process_first():
            return make_extractor("classifier", CLIP_MODEL, self.real, self.accelerator.device)

    @cached_property
    def _base(self) -> dict[str, Any]:
        """Asked for once, as the card of the model may have to come from the Hub."""
        return describe_base(self.config.init_from)

    def _write_samples(self, pipeline: Pipeline, global_step: int, epochs_done: int) -> None:
        """Writes a sample grid, from the same noise each time, as a PNG and to the trackers."""
        if not self.accelerator.is_main_process:
            return
        config, grid = self.config, self.grid
        sampler = make_sampler("--ddpm_num_inference_steps", pipeline, None, config.ddpm_num_inference_steps)
        seeds = [config.seed + i for i in range(len(grid.conditions))]
        request = Request(seeds, grid.conditions, guidance_scale=grid.guidance_scale)
        with self.signals.interruptible():
            images = sample_images(pipeline, sampler, request)  # (N, C, H, W) in [0, 1]
        path = self.output_dir / SAMPLES_DIR / f"step-{global_step:06d}.png"
        picture = make_picture(images, grid.columns)
        with self.disk.instead_of_error("samples"):
            with self.folder.files.writing(path) as partial:
                picture.save(partial, format="PNG")
            caption = f"epoch {epochs_done}, step {global_step}; {grid.caption}"
            self.trackers.log_image("samples", picture, caption, global_step)
            singles = [make_single_picture(image) for image in images]
            captions = [
                condition.name or f"seed {seed}" for condition, seed in zip(grid.conditions, seeds, strict=True)
            ]
            for number, i in enumerate(grid.rows_of_prompts):  # for the card, whose text has the prompt
                with self.folder.files.writing(path.with_name(PROMPT_PICTURE.format(number))) as partial:
                    singles[i].save(partial, format="PNG")
            self.trackers.log_single_images("samples_one_by_one", singles, captions, global_step)
            tqdm.write(f"wrote {path}")

    def _write_snapshot(self, pipeline: Pipeline, epochs_done: int) -> None:
        if not self.accelerator.is_main_process:
            return
        folder = self.output_dir / SNAPSHOTS_DIR / f"epoch-{epochs_done:04d}"
        with self.disk.instead_of_error("snapshot"):
            with self.folder.files.writing(folder) as partial:
                pipeline.save_pretrained(str(partial))
            tqdm.write(f"wrote {folder}")

    def _write_pipeline(self, pipeline: Pipeline, state: TrainState, is_end: bool) -> None:
        """Writes the pipeline into the output folder, then its summary; sends both to the Hub and to W&B."""
        if not self.accelerator.is_main_process:
            return
        with self.disk.instead_of_error("pipeline"):
            staged = self.output_dir / f"staged{PARTIAL}"
            files = self.folder.files
            with files.writing(staged) as partial:
                pipeline.save_pretrained(str(partial))
            staged_files = sorted(path for path in staged.rglob("*") if path.is_file())
            if sum(path.suffix == ".safetensors" for path in staged_files) > 1:
                # A kill would leave networks of two steps, which would load.
                files.remove(self.output_dir / INDEX_FILE)
            # File by file, the index last: but for the weights they are the same at every step.
            for file in sorted(staged_files, key=lambda path: path.name == INDEX_FILE):
                target = self.output_dir / file.relative_to(staged)
                target.parent.mkdir(exist_ok=True)
                files.claim(target)
                file.replace(target)
            files.remove_folder(staged)
            if not (self.output_dir / CONFIG_FILE).exists():  # the folder was moved or removed while the run lasts
                with files.writing(self.output_dir / CONFIG_FILE) as partial:
                    self.config.save(partial)
            summary = make_summary(
                self.accelerator, self.data, self.weights.model, state, self.total_steps, self._base
            )
            if is_end:
                with self.disk.instead_of_error("report"):
                    self._write_report(pipeline, summary)
            # Last, as it says that a run is finished.
            files.write_text(self.output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
            tqdm.write(f"wrote {self.output_dir}")
            if self.uploader is not None and (is_end or self.config.hub_strategy != "end"):
                self.uploader.push(state.global_step)
            alias = f"epoch_{state.epochs_done(is_end)}"
            self.trackers.log_model(self.output_dir, alias, metadata=state.record(is_end))

    def _write_report(self, pipeline: Pipeline, summary: dict[str, Any]) -> None:
        """Writes the picture of the losses, and the page of the whole run."""
        files = self.folder.files
        with files.writing(self.output_dir / LOSS_FILE) as partial:
            draw_losses(self.log_entries, partial)
        with self.signals.interruptible():
            page = make_report(self.output_dir, pipeline, summary)
        files.write_text(self.output_dir / REPORT_FILE, page)
        tqdm.write(f"wrote {self.output_dir / LOSS_FILE}\nwrote {self.output_dir / REPORT_FILE}")
