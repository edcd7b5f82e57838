"""Time a reverse step and `add_noise`: diffusers' DDPMScheduler, ours, and the least PyTorch work that does the same.

Run from the root of the repository: python -m benchmarks.scheduler_step
"""

import statistics
import time
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

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


def interleaved_times(functions: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Return the microseconds per call of each function in each round; a round times all of them in turn."""

    def block(function: Callable[[], object], num_calls: int) -> float:
        start = time.perf_counter()
        for _ in range(num_calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / num_calls

    num_calls = {}
    for name, function in functions.items():
        block(function, 3)
        num_calls[name] = max(1, int(SECONDS_PER_BLOCK / block(function, 3)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            times[name].append(1e6 * block(function, num_calls[name]))
    return times


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    # Ratios within a round: what else the machine does then slows both.
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock, ours = DDPMScheduler(), ClosedFormDDPMScheduler()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(50, device=device)
    timestep = ours.timesteps[10]  # a 0-d tensor, as pipelines pass it
    print(f"{device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, medians of {ROUNDS} rounds")
    print("                       step, microseconds                        add_noise, microseconds")
    print("shape             stock    ours   floor  ours/floor stock/ours    stock    ours stock/ours")
    for shape in SHAPES:
        generator = torch.Generator(device).manual_seed(0)
        sample, model_output = torch.randn(2, *shape, generator=generator, device=device).unbind()
        timesteps = torch.randint(0, 1000, shape[:1], generator=generator, device=device)
        times = interleaved_times(
            {
                "stock": lambda: stock.step(model_output, timestep, sample, generator=generator),  # noqa: B023
                "ours": lambda: ours.step(model_output, timestep, sample, generator=generator),  # noqa: B023
                "floor": lambda: floor_step(sample, model_output, generator),  # noqa: B023
                "stock add_noise": lambda: stock.add_noise(sample, model_output, timesteps),  # noqa: B023
                "our add_noise": lambda: ours.add_noise(sample, model_output, timesteps),  # noqa: B023
            },
            device,
        )
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(
            f"{'x'.join(map(str, shape)):<14}"
            f"{medians['stock']:>9.1f}{medians['ours']:>8.1f}{medians['floor']:>8.1f}"
            f"{median_ratio(times['ours'], times['floor']):>12.2f}{median_ratio(times['stock'], times['ours']):>11.2f}"
            f"{medians['stock add_noise']:>9.1f}{medians['our add_noise']:>8.1f}"
            f"{median_ratio(times['stock add_noise'], times['our add_noise']):>11.2f}"
        )


if __name__ == "__main__":
    main()
