"""Time a reverse step and `add_noise`: diffusers' DDPMScheduler, ours, and the least PyTorch work that does the same.

Run from the root of the repository: python -m benchmarks.scheduler_step
"""

import argparse
import statistics
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from benchmarks.measuring import DEVICE, interleaved_times, median_ratio, report
from schedulers.scheduling_closed_form_ddpm import ClosedFormDDPMScheduler

SHAPES = [(1, 3, 16, 16), (16, 3, 32, 32), (64, 3, 64, 64)]  # (B, C, H, W)
ROUNDS = 100
SECONDS_PER_BLOCK = 0.003


def floor_step(
    sample: torch.Tensor, model_output: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The random draw and six passes: two scaled terms and a clip for x_0, three scaled terms for x_{t-1}."""
    x0 = torch.sub(sample, model_output, alpha=0.7).mul_(1.4).clamp_(-1, 1)
    noise = torch.randn(sample.shape, generator=generator, device=sample.device)
    return noise.mul_(0.1).add_(sample, alpha=0.9).add_(x0, alpha=0.05), x0


def floor_add_noise(sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Two passes."""
    return (sample * 0.7).add_(noise, alpha=0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="Also write JSON here.")
    args = parser.parse_args()
    stock, ours = DDPMScheduler(), ClosedFormDDPMScheduler()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(50, device=DEVICE)
    t = ours.timesteps[10]  # a 0-d tensor, as pipelines pass it
    rows = []
    for shape in SHAPES:
        generator = torch.Generator(DEVICE).manual_seed(0)
        x, out = torch.randn(2, *shape, generator=generator, device=DEVICE).unbind()
        timesteps = torch.randint(0, 1000, shape[:1], generator=generator, device=DEVICE)
        times = interleaved_times(
            {
                "stock step": lambda: stock.step(out, t, x, generator=generator),  # noqa: B023
                "our step": lambda: ours.step(out, t, x, generator=generator),  # noqa: B023
                "floor step": lambda: floor_step(x, out, generator),  # noqa: B023
                "stock add_noise": lambda: stock.add_noise(x, out, timesteps),  # noqa: B023
                "our add_noise": lambda: ours.add_noise(x, out, timesteps),  # noqa: B023
                "floor add_noise": lambda: floor_add_noise(x, out),  # noqa: B023
            },
            ROUNDS,
            SECONDS_PER_BLOCK,
        )
        for what in ("step", "add_noise"):
            peer, own, floor = (times[f"{who} {what}"] for who in ("stock", "our", "floor"))
            rows.append(
                {
                    "what": what,
                    "shape": "x".join(map(str, shape)),
                    "peer, us": 1e6 * statistics.median(peer),
                    "ours, us": 1e6 * statistics.median(own),
                    "floor, us": 1e6 * statistics.median(floor),
                    "peer/ours": median_ratio(peer, own),
                    "ours/floor": median_ratio(own, floor),
                }
            )
    report(f"scheduler: medians of {ROUNDS} rounds, the peer is diffusers' DDPMScheduler", rows, args.output)


if __name__ == "__main__":
    main()
