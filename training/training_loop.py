"""The training loop: reads from top to bottom, knows nothing of classes."""

import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DataLoaderConfiguration
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from training.checkpoint import (
    SUMMARY_FILE,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    prepare_output_dir,
    save_checkpoint,
)
from training.config import TrainingConfig
from training.dataset import ImageData, make_dataloader
from training.ema import ema_tensors, ema_weights, make_ema
from training.errors import UserInputError
from training.grid import make_picture
from training.hub import HubUploader, create_repository
from training.tracking import Trackers

Batch = dict[str, torch.Tensor]  # "images" (B, C, H, W) float32 in [-1, 1], "class_labels" (B,) int64


@dataclass(frozen=True)
class SampleGrid:
    """A picture of samples, `columns` in a row, what it shows, and what the pipeline is called with for it."""

    num_images: int
    columns: int
    caption: str
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)


def training_loop(
    config: TrainingConfig,
    data: ImageData,
    model: Any,
    noise_scheduler: Any,
    loss_fn: Callable[..., torch.Tensor],
    get_model_kwargs: Callable[[Batch, torch.Tensor], dict[str, torch.Tensor]],
    make_pipeline: Callable[[Any], DiffusionPipeline],
    grid: SampleGrid,
) -> None:
    """Trains `model` and writes checkpoints, sample grids and the pipeline into `config.output_dir`.

    What makes a run conditional is in the callables. `get_model_kwargs` turns a batch, and a random number in [0, 1)
    for each of its images, into what the model is called with besides images and timesteps. `make_pipeline` puts a
    model into a pipeline, and `grid` says what that is called with for a sample grid.
    """
    accelerator = make_accelerator(config)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    train_dataloader = make_dataloader(data, config)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    total_steps = count_steps(config, train_dataloader)
    # Not prepared: accelerate would step it once per process, and the schedule is counted in optimizer steps.
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer.optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    ema = make_ema(accelerator.unwrap_model(model), config) if config.use_ema else None

    checkpoint = find_checkpoint(config)
    state = TrainState() if checkpoint is None else load_checkpoint(accelerator, checkpoint, model, lr_scheduler, ema)
    uploader = None
    if accelerator.is_main_process:
        if config.push_to_hub:
            uploader = HubUploader(create_repository(config), config)
        prepare_output_dir(config)
        start = f"from {checkpoint}" if checkpoint else "from the start"
        print_summary(accelerator, config, data, model, total_steps, start)
    trackers = make_trackers(accelerator, config, resumed_from=None if checkpoint is None else state.global_step)
    accelerator.wait_for_everyone()

    def save_pipeline(folder: Path) -> None:
        with averaged_pipeline(accelerator, model, ema, make_pipeline) as averaged:
            averaged.save_pretrained(str(folder))

    def write_outputs(samples: bool = False, pipeline: bool = False, snapshot: bool = False) -> None:
        output_dir = Path(config.output_dir)
        if accelerator.is_main_process and (samples or pipeline or snapshot):
            with averaged_pipeline(accelerator, model, ema, make_pipeline) as averaged:
                if samples:
                    write_samples(trackers, config, averaged, grid, state)
                if pipeline:
                    write_pipeline(averaged, output_dir)
                    write_summary(accelerator, config, data, model, state, metrics)
                    if uploader is not None and (state.global_step == total_steps or config.hub_strategy != "end"):
                        uploader.push(state.global_step)
                    trackers.log_model(output_dir, f"epoch_{state.epoch}", metadata=asdict(state))
                if snapshot:
                    write_pipeline(averaged, output_dir / "snapshots" / f"epoch-{state.epoch:04d}")
        accelerator.wait_for_everyone()

    losses: list[torch.Tensor] = []  # of the micro-batches since the last log, on the device
    grad_norm: Any = None
    metrics: dict[str, float] = {}  # the last that were logged
    images_logged, log_time = state.images_seen, time.perf_counter()
    micro_batch = 0  # since the last optimizer step
    with tqdm(
        total=total_steps,
        initial=state.global_step,
        desc="training",
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_local_main_process,
    ) as progress_bar:
        while state.global_step < total_steps:
            train_dataloader.set_epoch(state.epoch)
            data.dataset.set_epoch(state.epoch)
            model.train()
            epoch_start = state.batches_done
            for batch in accelerator.skip_first_batches(train_dataloader, epoch_start):
                with accelerator.accumulate(model):
                    clean_images = batch["images"]
                    noise, timesteps, uniform = draw_randomness(
                        accelerator, (config.seed, state.global_step, micro_batch), clean_images, len(noise_scheduler)
                    )
                    model_kwargs = get_model_kwargs(batch, uniform)
                    loss = loss_fn(model, noise_scheduler, clean_images, noise, timesteps, model_kwargs)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
                state.images_seen += len(clean_images) * accelerator.num_processes
                state.batches_done += 1
                micro_batch += 1
                if not accelerator.sync_gradients:
                    continue

                micro_batch = 0
                state.global_step += 1
                if not accelerator.optimizer_step_was_skipped:  # fp16 overflow: the weights did not move
                    lr_scheduler.step()
                    if ema is not None:
                        ema.step(ema_tensors(accelerator.unwrap_model(model)))
                progress_bar.update(1)
                last = state.global_step == total_steps
                if last or state.global_step % config.logging_steps == 0:
                    seconds = time.perf_counter() - log_time
                    rate = (state.images_seen - images_logged) / seconds
                    state.seconds += seconds
                    metrics = measure(accelerator, state, losses, grad_norm, lr_scheduler, ema, rate)
                    progress_bar.set_postfix_str(
                        "loss={loss:.4f}, lr={lr:.1e}, {images_per_second:.0f} images/s".format(**metrics)
                    )
                    trackers.log(metrics, state.global_step)
                    losses, images_logged, log_time = [], state.images_seen, log_time + seconds
                if last or state.global_step % config.checkpointing_steps == 0:
                    save_checkpoint(accelerator, config, state, lr_scheduler, ema, save_pipeline)
                    if not last and config.push_to_hub and config.hub_strategy == "checkpoint":
                        write_outputs(pipeline=True)
                if last:
                    break
                if config.save_images_steps and state.global_step % config.save_images_steps == 0:
                    write_outputs(samples=True)
            if state.batches_done == 0:
                raise UserInputError(f"{data.source} gave no batch: there is no image to train on")

            state.epoch, state.batches_done = state.epoch + 1, 0
            last = state.global_step == total_steps
            write_outputs(
                samples=last or state.epoch % config.save_images_epochs == 0,
                pipeline=last or state.epoch % config.save_model_epochs == 0,
                snapshot=config.snapshot_epochs is not None and (last or state.epoch % config.snapshot_epochs == 0),
            )
    if uploader is not None:
        uploader.finish()
    trackers.finish()
    accelerator.end_training()


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Processes, devices and precision, as `accelerate config` and the flags say."""
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=choose_precision(config.mixed_precision),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        # Sampling on the main process may take long while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        # `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise: a quarter of a small machine.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def choose_precision(mixed_precision: str) -> str:
    """'auto' -> what `accelerate config` says, else bf16 where the hardware has it, else fp16 on a GPU."""
    if mixed_precision != "auto":
        return mixed_precision
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured != "no":
        return configured
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    native_bf16 = cpuinfo.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpuinfo.read_text().split())
    return "bf16" if native_bf16 else "no"


def count_steps(config: TrainingConfig, train_dataloader: Any) -> int:
    """Optimizer steps of the run."""
    if config.streaming:  # no length; the configuration has made sure of `max_train_steps`
        return config.max_train_steps or 0
    steps_per_epoch = math.ceil(len(train_dataloader) / config.gradient_accumulation_steps)
    return min(config.num_epochs * steps_per_epoch, config.max_train_steps or sys.maxsize)


def draw_randomness(
    accelerator: Accelerator, entropy: tuple[int, int, int], clean_images: torch.Tensor, num_train_timesteps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise (B, C, H, W), timesteps (B,) in 0..T-1 and a number in [0, 1) for each image.

    They are a function of `entropy` = (seed, step, micro-batch) and the image's place in the global batch: every
    process draws for all processes and keeps its rows, so that two processes see what one with twice the batch sees.
    """
    seed, model_seed = (int(s) for s in np.random.SeedSequence(entropy).generate_state(2, np.uint64))
    device, batch_size = clean_images.device, len(clean_images)
    generator = torch.Generator(device).manual_seed(seed)
    total = batch_size * accelerator.num_processes
    rows = slice(accelerator.process_index * batch_size, (accelerator.process_index + 1) * batch_size)
    noise = torch.randn((total, *clean_images.shape[1:]), generator=generator, device=device)  # float32
    timesteps = torch.randint(num_train_timesteps, (total,), generator=generator, device=device)
    uniform = torch.rand(total, generator=generator, device=device)
    torch.manual_seed((model_seed >> 1) + accelerator.process_index)  # dropout inside the network
    return noise[rows], timesteps[rows], uniform[rows]


def make_trackers(accelerator: Accelerator, config: TrainingConfig, resumed_from: int | None) -> Trackers:
    """The trackers, on the main process; none on the others."""
    values = {name: value for name, value in asdict(config).items() if name != "hub_token"}
    logger = config.logger if accelerator.is_main_process else "none"
    return Trackers(logger, Path(config.output_dir, config.logging_dir), values, resumed_from)


def measure(
    accelerator: Accelerator,
    state: TrainState,
    losses: list[torch.Tensor],
    grad_norm: torch.Tensor,
    lr_scheduler: Any,
    ema: Any,
    images_per_second: float,
) -> dict[str, float]:
    """What is logged, with the mean loss since the last log; the only place that waits for the device."""
    loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
    if not math.isfinite(loss):
        raise UserInputError(
            f"the loss is {loss} at step {state.global_step}: lower --learning_rate, or give --mixed_precision no"
        )
    metrics = {
        "loss": loss,
        "lr": lr_scheduler.get_last_lr()[0],
        "epoch": state.epoch,
        "grad_norm": float(grad_norm),
        "images_per_second": images_per_second,
    }
    if ema is not None:
        metrics["ema_decay"] = ema.cur_decay_value
    return metrics


@contextmanager
def averaged_pipeline(
    accelerator: Accelerator, model: Any, ema: Any, make_pipeline: Callable[[Any], DiffusionPipeline]
) -> Iterator[DiffusionPipeline]:
    """The pipeline of the model as it is to be used: averaged weights, evaluation mode."""
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.eval()
    try:
        with ema_weights(ema, unwrapped):
            yield make_pipeline(unwrapped)
    finally:
        unwrapped.train()


def write_samples(
    trackers: Trackers, config: TrainingConfig, pipeline: DiffusionPipeline, grid: SampleGrid, state: TrainState
) -> None:
    """A sample grid, from the same noise each time, as a PNG and to the trackers."""
    pipeline.set_progress_bar_config(desc="sampling", unit="step", leave=False, dynamic_ncols=True)
    images = pipeline(
        **grid.pipeline_kwargs,
        batch_size=grid.num_images,
        num_inference_steps=config.ddpm_num_inference_steps,
        generator=[torch.Generator().manual_seed(config.seed + i) for i in range(grid.num_images)],
        output_type="pt",
    ).images  # (N, C, H, W) in [0, 1]
    path = Path(config.output_dir, "samples", f"step-{state.global_step:06d}.png")
    caption = f"epoch {state.epoch}, step {state.global_step}; {grid.caption}"
    picture = make_picture(images, grid.columns)
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    trackers.log_image("samples", picture, caption, state.global_step)
    tqdm.write(f"wrote {path}")


def write_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """The pipeline folder that `DiffusionPipeline.from_pretrained` loads."""
    pipeline.save_pretrained(str(folder))
    tqdm.write(f"wrote {folder}")


def write_summary(
    accelerator: Accelerator, config: TrainingConfig, data: ImageData, model: Any, state: TrainState, metrics: dict
) -> None:
    """What the model card says of a run besides its configuration."""
    summary = {
        **asdict(state),
        "loss": metrics.get("loss"),
        "script": Path(sys.argv[0]).name,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_images": data.num_images,
        "data_source": data.source,
        "data_license": data.license,
        "num_processes": accelerator.num_processes,
        "device": describe_device(accelerator.device),
        "precision": accelerator.mixed_precision,
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "datasets")},
    }
    Path(config.output_dir, SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")


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
    skipped = f", {data.num_skipped} skipped as undecodable" if data.num_skipped else ""
    classes = "" if data.id2label is None else f", {len(data.id2label)} classes"
    batch = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    num_params = sum(p.numel() for p in model.parameters())
    print(
        f"data       {data.source}: {images} of {width}x{height}, {data.num_channels} channel(s){classes}{skipped}\n"
        f"model      {config.model_class}, {num_params / 1e6:.2f} M parameters\n"
        f"device     {accelerator.device}, {accelerator.num_processes} process(es), "
        f"precision {accelerator.mixed_precision}\n"
        f"training   {total_steps:,} steps of {batch} images, seed {config.seed}, {start}\n"
        f"output     {config.output_dir}"
    )
