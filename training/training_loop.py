"""The training loop: reads from top to bottom, knows nothing of classes."""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DataLoaderConfiguration
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from training.bad_steps import BadSteps
from training.checkpoint import Checkpoints, TrainState
from training.config import TrainingConfig
from training.dataset import ImageData, make_dataloader
from training.ema import ema_tensors, make_ema
from training.errors import UserInputError
from training.outputs import RunOutputs, SampleGrid
from training.shutdown import EXIT_STATUS, Signals

Batch = dict[str, torch.Tensor]  # "images" (B, C, H, W) float32 in [-1, 1], "class_labels" (B,) int64


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
        fused=True,  # it can be told on the device to leave out a step, see BadSteps
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

    checkpoints = Checkpoints(accelerator, config, model, lr_scheduler, ema)
    state = checkpoints.load()
    bad_steps = BadSteps(accelerator, optimizer, accelerator.unwrap_model(model), config.max_skipped_steps)
    signals = Signals(accelerator, config.shutdown_grace, checkpoints.describe_newest)
    outputs = RunOutputs(accelerator, config, data, model, ema, make_pipeline, grid, total_steps, checkpoints, signals)
    outputs.begin(state)

    losses: list[torch.Tensor] = []  # of the micro-batches since the last log, on the device
    grad_norm: Any = None
    images_logged, log_time = state.images_seen, time.perf_counter()
    micro_batch = 0  # since the last optimizer step

    def checkpoint_if_asked(place: TrainState) -> int:
        """Asks for signals after outputs, and returns that to stop for or 0. Those are done again from `place`."""
        is_asked_for, stop = signals.poll()
        if stop or is_asked_for:
            checkpoints.save(place, outputs.save_pipeline)
        return stop

    def write_step_outputs() -> int:
        samples = config.save_images_steps is not None and state.global_step % config.save_images_steps == 0
        is_due = state.global_step % config.checkpointing_steps == 0
        pipeline = is_due and config.push_to_hub and config.hub_strategy == "checkpoint"
        if not (samples or pipeline):
            return 0
        outputs.write(state, samples=samples, pipeline=pipeline)
        return checkpoint_if_asked(state)

    with (
        signals,
        tqdm(
            total=total_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_local_main_process,
        ) as progress_bar,
    ):
        # What follows a checkpoint may be missing where a run is resumed from it, also at the last step.
        resumed = checkpoints.newest is not None
        stop = write_step_outputs() if resumed and state.global_step < total_steps else 0
        while not stop and (resumed or state.global_step < total_steps):
            resumed = False
            train_dataloader.set_epoch(state.epoch)
            data.dataset.set_epoch(state.epoch)
            model.train()
            epoch_start = state.batches_done
            for batch in accelerator.skip_first_batches(train_dataloader, epoch_start):
                if state.global_step >= total_steps:
                    break
                with accelerator.accumulate(model):
                    clean_images = batch["images"]
                    noise, timesteps, uniform = draw_randomness(
                        accelerator, (config.seed, state.global_step, micro_batch), clean_images, len(noise_scheduler)
                    )
                    model_kwargs = get_model_kwargs(batch, uniform)
                    loss = loss_fn(model, noise_scheduler, clean_images, noise, timesteps, model_kwargs)
                    accelerator.backward(bad_steps.watch(loss))
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                        bad_steps.mark(grad_norm)
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
                lr_scheduler.step()
                if ema is not None:
                    ema.step(ema_tensors(accelerator.unwrap_model(model)))
                progress_bar.update(1)
                last = state.global_step >= total_steps
                if last or state.global_step % config.logging_steps == 0:
                    seconds = time.perf_counter() - log_time
                    rate = (state.images_seen - images_logged) / seconds
                    state.seconds += seconds
                    metrics = measure(accelerator, state, losses, grad_norm, lr_scheduler, ema, rate)
                    metrics |= bad_steps.read(state, checkpoints.describe_newest())
                    progress_bar.set_postfix_str(
                        "loss={loss:.4f}, lr={lr:.1e}, {images_per_second:.0f} images/s".format(**metrics)
                    )
                    outputs.log(metrics, state)
                    losses, images_logged, log_time = [], state.images_seen, log_time + seconds
                is_asked_for, stop = signals.poll()
                if last or stop or is_asked_for or state.global_step % config.checkpointing_steps == 0:
                    bad_steps.read(state, checkpoints.describe_newest())
                    checkpoints.save(state, outputs.save_pipeline)
                if not (last or stop):
                    stop = write_step_outputs()
                if last or stop:
                    break
            if stop:
                break
            if state.batches_done == 0:
                raise UserInputError(f"{data.source} gave no batch: there is no image to train on")

            # The outputs of an epoch are done again by a run that is resumed from a checkpoint at its end.
            end_of_epoch = replace(state)
            state.epoch, state.batches_done = state.epoch + 1, 0
            last = state.global_step >= total_steps
            outputs.write(
                state,
                metrics=config.evaluate_every is not None and (last or state.epoch % config.evaluate_every == 0),
                samples=last or state.epoch % config.save_images_epochs == 0,
                pipeline=last or state.epoch % config.save_model_epochs == 0,
                snapshot=config.snapshot_epochs is not None and (last or state.epoch % config.snapshot_epochs == 0),
            )
            if config.keep_best_checkpoint and outputs.is_best:
                checkpoints.save(end_of_epoch, outputs.save_pipeline, is_best=True)
            stop = checkpoint_if_asked(end_of_epoch)
        if stop:
            outputs.close()  # within the time that is left
    if not stop:
        outputs.finish()
    accelerator.end_training()
    if stop:
        sys.exit(EXIT_STATUS[stop])


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
    all_losses = torch.stack(losses)
    finite = all_losses.where(all_losses.isfinite(), torch.nan)
    loss = accelerator.reduce(finite.nanmean(), reduction="mean").item()  # NaN if there was no other
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
