"""The training loop: reads from top to bottom, knows nothing of classes."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from sprite_diffusion.common.flags import check_tracker
from sprite_diffusion.common.machine import join_processes
from sprite_diffusion.data.dataset import ImageData
from sprite_diffusion.runs.base_model import check_same_prediction, load_base
from sprite_diffusion.runs.checkpoint import Checkpoints
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.folder import check_output_dir
from sprite_diffusion.runs.outputs import RunOutputs, SampleGrid
from sprite_diffusion.runs.signals import EXIT_STATUS, Signals
from sprite_diffusion.runs.state import find_due
from sprite_diffusion.runs.weights import Weights
from sprite_diffusion.sampling.pipeline_loading import Pipeline
from sprite_diffusion.training.bad_steps import BadSteps
from sprite_diffusion.training.build import check_network
from sprite_diffusion.training.held_out import hold_out, measure_losses
from sprite_diffusion.training.meter import Meter
from sprite_diffusion.training.muon import Muon
from sprite_diffusion.training.performance import (
    check_speed_flags,
    compile_model,
    make_accelerator,
    prepare_attention,
)
from sprite_diffusion.training.randomness import Draws, draw_randomness
from sprite_diffusion.training.steps import Batch, Steps


def training_loop(
    config: TrainingConfig,
    data: ImageData,
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Batch, Draws], torch.Tensor],
    make_pipeline: Callable[..., DiffusionPipeline],
    grid: SampleGrid,
) -> DiffusionPipeline:
    """Trains `model`, and returns its pipeline, which is also written into `config.output_dir` with sample grids.

    What makes a run conditional is in the last three arguments: the mean loss of a micro-batch, the pipeline of a
    model, and what the pipeline is called with for a sample grid.
    """
    accelerator = make_accelerator(config)
    prepare_attention(model, accelerator)
    data = hold_out(data, config.validation_fraction)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    steps = Steps(data, config, accelerator)
    lr_scheduler = make_lr_scheduler(optimizer, config, steps)
    train_model = compile_model(model, config, accelerator, steps.total)
    weights = Weights(accelerator, model, config, make_pipeline)
    bad_steps = BadSteps(accelerator, optimizer, weights.model, config.max_skipped_steps)
    checkpoints = Checkpoints(accelerator, config, data, weights, lr_scheduler)
    state = checkpoints.load()
    signals = Signals(accelerator, config.shutdown_grace, checkpoints.describe_newest)
    losses = partial(measure_losses, accelerator.unwrap_model(model), data, config, loss_fn)
    outputs = RunOutputs(accelerator, config, data, weights, grid, steps.total, checkpoints, signals, losses)
    outputs.begin(state)
    meter = Meter(accelerator, steps.total, state)
    next_steps = steps.after(state)
    grad_norm: Any = None
    lr = 0.0

    def stops_here(checkpoint_is_due: bool) -> bool:
        """Saves a checkpoint if one is due or a signal asks for it. Returns whether a signal asks the run to stop."""
        if signals.poll() or checkpoint_is_due:
            bad_steps.read(state, checkpoints.describe_newest())
            checkpoints.save(state)
        return signals.stop != 0

    model.train()
    with signals, meter:
        while True:
            # 1. What is due after `state.global_step` steps. A resumed run begins here too: the run that was killed
            #    may not have come to what follows the checkpoint.
            due = find_due(state, config, steps.total)
            if due.log and grad_norm is not None:
                metrics = meter.read(state, grad_norm, lr) | weights.metrics()
                outputs.log(metrics | bad_steps.read(state, checkpoints.describe_newest()), state)
            if stops_here(due.checkpoint):
                break
            if due.outputs:
                judgement = outputs.write(due, state)
                if judgement.is_best and config.keep_best_checkpoint:
                    checkpoints.save(state, is_best=True)
                if judgement.is_copying and config.stop_when_copying and not due.end:
                    state, grad_norm = checkpoints.return_to_best(), None
                    steps.total = outputs.total_steps = state.global_step
                    continue
                if stops_here(checkpoint_is_due=False):
                    break
            if due.end:
                break

            # 2. An optimizer step.
            step = next(next_steps)
            for batch in step.batches:
                with nullcontext() if batch is step.batches[-1] else accelerator.no_sync(model):
                    draws = draw_randomness((config.seed, state.global_step), batch, config, steps.size)
                    loss = loss_fn(train_model, batch, draws)
                    accelerator.backward(bad_steps.watch(step.loss_weight(batch, accelerator.num_processes) * loss))
                meter.add_loss(loss, batch.num_images)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            bad_steps.mark(grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            lr = lr_scheduler.get_last_lr()[0]  # of this step, not of the next
            lr_scheduler.step()
            weights.average()
            meter.add_step()
            state.advance(step.epoch, step.index, step.ends_epoch, step.num_images)
        if signals.stop:
            outputs.close()  # within the time that is left
    if not signals.stop:
        outputs.finish()
    accelerator.end_training()
    if signals.stop:
        sys.exit(EXIT_STATUS[signals.stop])
    return weights.finish()


def begin_run(config: TrainingConfig) -> Pipeline | None:
    """Joins the processes, checks what can be checked before the images are read, and seeds the random numbers.

    Returns the model of `--init_from`, if there is one. Raises `UserInputError` if processes, precision, output
    folder, tracker, model or network can't be used.
    """
    join_processes()
    check_speed_flags(config)
    check_output_dir(config)
    check_tracker(config.logger)
    base = None if config.init_from is None else load_base(config.init_from, asdict(config))
    if base is not None:
        check_same_prediction(config, base)
    check_network(config, base)
    set_seed(config.seed)
    return base


def make_optimizer(model: Any, config: TrainingConfig) -> torch.optim.AdamW:
    """Returns the optimizer of the flags: AdamW (Loshchilov and Hutter 2019), or Muon with it."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "muon":
        return Muon(model, **options)
    # The fused kernel can be told on the device to leave out a step, see BadSteps.
    return torch.optim.AdamW(model.parameters(), fused=True, **options)


def make_lr_scheduler(optimizer: Any, config: TrainingConfig, steps: Steps) -> Any:
    """Returns the learning-rate schedule, counted in optimizer steps.

    It is not prepared by accelerate, which would step it once for every process.
    """
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer.optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps.total,
    )
    if config.lr_scheduler_interval == "epoch":  # each step of an epoch has the rate of the first one
        rates = scheduler.lr_lambdas
        scheduler.lr_lambdas = [lambda step, rate=rate: rate(step - step % steps.per_epoch) for rate in rates]
    return scheduler
