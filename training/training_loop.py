"""The training loop: reads from top to bottom, knows nothing of classes."""

import math
import sys
import time
from collections.abc import Callable, Sized
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from training.bad_steps import BadSteps
from training.checkpoint import Checkpoints, TrainState
from training.config import TrainingConfig
from training.dataset import ImageData, make_dataloader, to_model_range
from training.ema import ema_tensors, make_ema
from training.errors import UserInputError
from training.outputs import RunOutputs, SampleGrid
from training.performance import compile_model, make_accelerator, prepare_attention
from training.processes import take_share
from training.shutdown import EXIT_STATUS, Signals

Batch = dict[str, torch.Tensor]  # "images" (B, C, H, W) uint8, uint16 or float32 in [-1, 1], "class_labels" (B,) int64


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
    prepare_attention(model, accelerator)
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
    train_model = compile_model(model, config, accelerator, total_steps)
    ema = make_ema(accelerator.unwrap_model(model), config) if config.use_ema else None

    checkpoints = Checkpoints(accelerator, config, model, lr_scheduler, ema)
    state = checkpoints.load()
    bad_steps = BadSteps(accelerator, optimizer, accelerator.unwrap_model(model), config.max_skipped_steps)
    signals = Signals(accelerator, config.shutdown_grace, checkpoints.describe_newest)
    outputs = RunOutputs(accelerator, config, data, model, ema, make_pipeline, grid, total_steps, checkpoints, signals)
    outputs.begin(state)

    total_batch_size = config.total_batch_size(accelerator.num_processes)
    num_images = len(data.dataset) if isinstance(data.dataset, Sized) else None
    losses: list[tuple[torch.Tensor, int]] = []  # since the last log, on the device, and of how many images
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
            batches_done = state.steps_done * config.gradient_accumulation_steps
            for batch in accelerator.skip_first_batches(train_dataloader, batches_done):
                if state.global_step >= total_steps:
                    break
                images_left = None if num_images is None else num_images - state.steps_done * total_batch_size
                batch, share = take_share(batch, accelerator, config, micro_batch, images_left)
                with accelerator.accumulate(model):
                    clean_images = to_model_range(batch["images"])
                    noise, timesteps, uniform = draw_randomness(
                        (config.seed, state.global_step),
                        clean_images,
                        len(noise_scheduler),
                        share.first_row,
                        total_batch_size,
                    )
                    model_kwargs = get_model_kwargs(batch, uniform)
                    loss = loss_fn(train_model, noise_scheduler, clean_images, noise, timesteps, model_kwargs)
                    accelerator.backward(bad_steps.watch(share.loss_weight * loss))
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                        bad_steps.mark(grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append((loss.detach(), share.num_images))
                state.images_seen += share.num_images_of_all
                micro_batch += 1
                if not accelerator.sync_gradients:
                    continue

                micro_batch = 0
                state.global_step += 1
                state.steps_done += 1
                lr_scheduler.step()
                if ema is not None:
                    ema.step(ema_tensors(accelerator.unwrap_model(model)))
                progress_bar.update(1)
                last = state.global_step >= total_steps
                if last or state.global_step % config.logging_steps == 0:
                    seconds = time.perf_counter() - log_time
                    state.seconds += seconds
                    images = state.images_seen - images_logged
                    metrics = measure(accelerator, state, losses, images / seconds, grad_norm, lr_scheduler, ema)
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
            if state.steps_done == 0:
                raise UserInputError(f"{data.source} gave no batch: there is no image to train on")

            # The outputs of an epoch are done again by a run that is resumed from a checkpoint at its end.
            end_of_epoch = replace(state)
            state.epoch, state.steps_done = state.epoch + 1, 0
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


def count_steps(config: TrainingConfig, train_dataloader: Any) -> int:
    """Optimizer steps of the run."""
    if config.streaming:  # no length; the configuration has made sure of `max_train_steps`
        return config.max_train_steps or 0
    steps_per_epoch = math.ceil(len(train_dataloader) / config.gradient_accumulation_steps)
    return min(config.num_epochs * steps_per_epoch, config.max_train_steps or sys.maxsize)


def draw_randomness(
    entropy: tuple[int, int],
    clean_images: torch.Tensor,
    num_train_timesteps: int,
    first_row: int,
    total_batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise (B, C, H, W), timesteps (B,) in 0..T-1 and a number in [0, 1) for each image.

    They are a function of `entropy` = (seed, step) and the image's row among the `total_batch_size` of the step: all
    rows are drawn and the B from `first_row` on are kept, so that it does not matter how a step is divided among
    processes and micro-batches.
    """
    seed, model_seed = (int(s) for s in np.random.SeedSequence(entropy).generate_state(2, np.uint64))
    device = clean_images.device
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn((total_batch_size, *clean_images.shape[1:]), generator=generator, device=device)  # float32
    timesteps = torch.randint(num_train_timesteps, (total_batch_size,), generator=generator, device=device)
    uniform = torch.rand(total_batch_size, generator=generator, device=device)
    torch.manual_seed((model_seed >> 1) + first_row)  # dropout inside the network
    rows = slice(first_row, first_row + len(clean_images))
    return noise[rows], timesteps[rows], uniform[rows]


def measure(
    accelerator: Accelerator,
    state: TrainState,
    losses: list[tuple[torch.Tensor, int]],
    images_per_second: float,
    grad_norm: torch.Tensor,
    lr_scheduler: Any,
    ema: Any,
) -> dict[str, float]:
    """What is logged, with the mean loss of the images since the last log; waits for the device, as nothing else.

    Losses that are not finite are left out; the mean is NaN if there was no other.
    """
    means = torch.stack([loss for loss, _ in losses])
    num_images = torch.tensor([images for _, images in losses], device=means.device)
    finite = means.isfinite()
    sums = torch.stack([(means * num_images).where(finite, 0.0).sum(), (num_images * finite).sum()])
    loss_sum, num_finite = accelerator.reduce(sums, reduction="sum").tolist()
    metrics = {
        "loss": loss_sum / num_finite if num_finite else math.nan,
        "lr": lr_scheduler.get_last_lr()[0],
        "epoch": state.epoch,
        "grad_norm": float(grad_norm),
        "images_per_second": images_per_second,
    }
    if ema is not None:
        metrics["ema_decay"] = ema.cur_decay_value
    return metrics
