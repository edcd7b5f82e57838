"""What the benchmarks share: times in turn, ratios within a round, the machine's limits, a table and its JSON."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

from sprite_diffusion.common.machine import describe_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_per_call(function: Callable[[], object], num_calls: int = 1) -> float:
    """The mean of `num_calls` in a row, the device's work included."""
    start = time.perf_counter()
    for _ in range(num_calls):
        function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / num_calls


def interleaved_times(
    functions: dict[str, Callable[[], object]], rounds: int, seconds_per_block: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per call of each function in each round; a round times all of them in turn."""
    num_calls = {}
    for name, function in functions.items():
        seconds_per_call(function, 2)  # what happens once
        num_calls[name] = max(1, int(seconds_per_block / seconds_per_call(function)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds_per_call(function, num_calls[name]))
    return times


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Of the ratios within a round: what else the machine does then slows both."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def arithmetic_rate(dtype: torch.dtype) -> float:
    """FLOP per second that this machine reaches: the best of a matrix product and a convolution, ten rounds each."""
    a, b = torch.randn(2, 2048, 2048, device=DEVICE, dtype=dtype).unbind()
    images = torch.randn(64, 256, 16, 16, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        times = interleaved_times(
            {"product": lambda: a @ b, "convolution": lambda: F.conv2d(images, weight, padding=1)},
            rounds=10,
            seconds_per_block=0.05,
        )
    return max(2 * 2048**3 / min(times["product"]), 2 * images.numel() * 9 * 256 / min(times["convolution"]))


def report(title: str, rows: list[dict[str, Any]], output: Path | None) -> None:
    """Prints one table, numbers rounded to three digits, and writes the rows and the machine as JSON."""
    machine = {
        "device": describe_device(DEVICE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    cells = [list(rows[0]), *([_format(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"{title}\n{', '.join(f'{name} {value}' for name, value in machine.items())}")
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if output is not None:
        output.write_text(json.dumps({"title": title, "machine": machine, "rows": rows}, indent=2) + "\n")
        print(f"wrote {output}")


def _format(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
