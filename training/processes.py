"""How the processes of a run find each other, and which images of an optimizer step each of them has."""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from training.config import TrainingConfig
from training.errors import UserInputError


def use_cpu() -> bool:
    """Whether accelerate has to be told to work on the CPU: without a GPU, it takes each process for the only one.

    Raises where `accelerate launch` was asked for several processes and started one.
    """
    num_processes = os.environ.keys() & {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    # `accelerate launch` sets MASTER_PORT if it was asked for several, and then starts one unless it sees GPUs or MPI.
    if not num_processes and os.environ.keys() >= {"ACCELERATE_DYNAMO_BACKEND", "MASTER_PORT"}:
        raise UserInputError(
            "--num_processes of accelerate launch: it started one process, as it does with --cpu or without GPUs; "
            "give --multi_gpu in place of --cpu, which starts several on CPUs too"
        )
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (bool(num_processes) and not torch.accelerator.is_available())


@dataclass(frozen=True)
class Share:
    """The images of an optimizer step that a process has in one micro-batch."""

    first_row: int  # among all images of the step
    num_images: int  # of this process; fewer than it was given where accelerate filled up an epoch's last batch
    num_images_of_all: int  # of all processes
    loss_weight: float  # of the mean over `num_images`, so that each image of the step counts the same


def take_share(
    batch: dict[str, torch.Tensor],
    accelerator: Accelerator,
    config: TrainingConfig,
    micro_batch: int,
    images_left: int | None,
) -> tuple[dict[str, torch.Tensor], Share]:
    """This process's own of the rows that it was given, and their place in the step; see `find_share`.

    At least one row, if of weight 0: the processes average their gradients together.
    """
    batch_size = len(batch["images"])
    images_given = batch_size * accelerator.num_processes
    if accelerator.gradient_state.end_of_dataloader and accelerator.gradient_state.remainder > 0:
        images_given = accelerator.gradient_state.remainder
    share = find_share(
        batch_size,
        config.train_batch_size,
        config.gradient_accumulation_steps,
        micro_batch,
        accelerator.process_index,
        accelerator.num_processes,
        images_given,
        images_left,
    )
    return {name: rows[: max(1, share.num_images)] for name, rows in batch.items()}, share


def find_share(
    batch_size: int,
    train_batch_size: int,
    gradient_accumulation_steps: int,
    micro_batch: int,
    rank: int,
    num_processes: int,
    images_given: int,
    images_left: int | None,
) -> Share:
    """What is this process's own of a batch.

    Args:
        batch_size: Images that it was given, on every process the same.
        train_batch_size, gradient_accumulation_steps: Of the configuration.
        micro_batch: Number of the batch within the step.
        rank, num_processes: Of this process and of all.
        images_given: Different images that all processes were given together, for a stream.
        images_left: Images of the epoch that no earlier step had; None for a stream, whose length is not known.
    """
    start = micro_batch * train_batch_size * num_processes
    if images_left is None:  # nor is then known how many batches the step will have
        step_images = images_given * gradient_accumulation_steps
    else:
        step_images = min(images_left, train_batch_size * num_processes * gradient_accumulation_steps)
        images_given = min(step_images - start, batch_size * num_processes)
    num_images = min(max(images_given - rank * batch_size, 0), batch_size)
    return Share(
        start + rank * batch_size,
        num_images,
        images_given,
        # backward divides by the micro-batches, the mean over processes by these
        num_images * num_processes * gradient_accumulation_steps / step_images,
    )
