"""Where the time of a training step goes, how it grows with resolution and batch, and the data with its images.

Run from the root of the repository: python -m benchmarks.scaling
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring import DEVICE, interleaved_times, report
from sprite_diffusion.data.dataset import load_image_data
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.presets import parse_config
from sprite_diffusion.training.build import build_model, build_noise_scheduler
from sprite_diffusion.training.loss import ddpm_loss
from sprite_diffusion.training.performance import make_accelerator, prepare_attention
from sprite_diffusion.training.steps import make_dataloader

PRESET = "sprites_long.yaml"
BATCHES = 100  # read from each set of images


def make_step(resolution: int) -> Callable[[int], None]:
    """Forward, backward and optimizer for a batch of so many images, without the data."""
    config = replace(parse_config([], PRESET), resolution=str(resolution))
    accelerator = make_accelerator(config)
    model = build_model(config, num_channels=3)
    prepare_attention(model, accelerator)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    noise_scheduler = build_noise_scheduler(config)

    def step(batch_size: int) -> None:
        images, noise = torch.randn(2, batch_size, 3, resolution, resolution, device=DEVICE).unbind()
        timesteps = torch.randint(config.ddpm_num_steps, (batch_size,), device=DEVICE)
        accelerator.backward(ddpm_loss(model, noise_scheduler, images, noise, timesteps))
        optimizer.step()
        optimizer.zero_grad()

    return step


def profile_step(batch_size: int, num_rows: int = 12) -> list[dict[str, object]]:
    """The operations that take longest, of five steps."""
    step = make_step(resolution=16)
    step(batch_size)
    with torch.profiler.profile() as profile:
        for _ in range(5):
            step(batch_size)
    times = {event.key: event.self_cpu_time_total + event.self_device_time_total for event in profile.key_averages()}
    total = sum(times.values())
    rows = [(name, times[name]) for name in sorted(times, key=times.__getitem__, reverse=True)[:num_rows]]
    rows.append(("all others", total - sum(time for _, time in rows)))
    return [{"operation": name, "ms a step": time / 5e3, "share, %": 100 * time / total} for name, time in rows]


def measure_steps(resolutions: list[int], batch_sizes: list[int], rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for resolution in resolutions:
        step = make_step(resolution)
        times = interleaved_times({str(size): partial(step, size) for size in batch_sizes}, rounds)
        for batch_size in batch_sizes:
            seconds = statistics.median(times[str(batch_size)])
            rows.append(
                {
                    "pixels": f"{resolution}x{resolution}",
                    "batch": batch_size,
                    "ms a step": 1e3 * seconds,
                    "images/s": batch_size / seconds,
                    "us a pixel": 1e6 * seconds / (batch_size * resolution**2),
                }
            )
    return rows


def private_memory() -> int:
    """Bytes that are the process's own: what is mapped from a file the system can take back."""
    found = re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure_data(counts: list[int], folder: Path) -> list[dict[str, object]]:
    """Decoding, opening what is decoded, and reading batches in random order."""
    rows: list[dict[str, object]] = []
    for count in counts:
        path = folder / f"{count}.npy"
        array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 16, 16, 3))
        for start in range(0, count, 10_000):
            array[start : start + 10_000] = np.random.default_rng(start).integers(0, 256, array[:1].shape)
        del array
        config = TrainingConfig(dataset_name=str(path), resolution="16", train_batch_size=64)
        start_time = time.perf_counter()
        load_image_data(config, with_labels=False)
        decoding = time.perf_counter() - start_time
        before, start_time = private_memory(), time.perf_counter()
        data = load_image_data(config, with_labels=False)
        opening = time.perf_counter() - start_time
        batches = iter(make_dataloader(data, config.train_batch_size))
        next(batches)  # draws the order
        start_time = time.perf_counter()
        num_read = sum(1 for _, _ in zip(range(BATCHES), batches, strict=False))
        reading = (time.perf_counter() - start_time) / max(1, num_read)
        rows.append(
            {
                "images": count,
                "decoding, s": decoding,
                "opening, s": opening,
                "ms a batch of 64": 1e3 * reading,
                "memory, MB": (private_memory() - before) / 1e6,
                "on the disk, MB": count * 768 / 1e6,
            }
        )
        path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--num_images", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Also write JSON here: the table of steps; the others beside.")
    args = parser.parse_args()

    def beside(suffix: str) -> Path | None:
        return None if args.output is None else args.output.with_stem(args.output.stem + suffix)

    title = f"a training step of {PRESET}, 64 images of 16x16, by operation"
    report(title, profile_step(batch_size=64), beside("_profile"))
    steps = measure_steps(args.resolutions, args.batch_sizes, args.rounds)
    report(f"a training step of {PRESET}, medians of {args.rounds} rounds", steps, args.output)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        data = measure_data(args.num_images, Path(folder))
    title = "data: images of 16x16 from an array; memory is what the process holds besides mapped files"
    report(title, data, beside("_data"))


if __name__ == "__main__":
    main()
