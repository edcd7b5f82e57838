"""Time DDPM sampling: diffusers' DDPMPipeline and ours, exact, in bf16, and compiled; one network, random weights.

Run from the root of the repository: python -m benchmarks.sampling_throughput
"""

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import DEVICE, arithmetic_rate, interleaved_times, median_ratio, report
from pipelines import UnconditionalDDPMPipeline
from schedulers import ClosedFormDDPMScheduler
from sprite_diffusion.runs.presets import parse_config
from sprite_diffusion.sampling.pipeline_loading import speed_up
from sprite_diffusion.training.build import build_model

PRESET = "sprites_long.yaml"
NAMES = ("peer", "ours", "ours, bf16", "ours, bf16, compiled")
TOTAL_STEPS = 1000


def make_pipeline(name: str) -> Any:
    config = parse_config([], PRESET)
    torch.manual_seed(0)
    unet = build_model(config, num_channels=3).to(DEVICE).eval()
    schedule = {"beta_schedule": config.ddpm_beta_schedule, "prediction_type": config.prediction_type}
    if name == "peer":
        pipeline: Any = DDPMPipeline(unet, DDPMScheduler(**schedule))
    else:
        unet = unet.bfloat16() if "bf16" in name else unet
        pipeline = UnconditionalDDPMPipeline(unet, ClosedFormDDPMScheduler(**schedule))
        speed_up(pipeline, compiles="compiled" in name, num_threads=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def serve(name: str, batch_size: int, num_inference_steps: int, pipe: Any) -> None:
    """Draws whenever it is asked to, in a process of its own: what speeds up one pipeline must not help another."""
    pipeline = make_pipeline(name)

    def draw(steps: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(batch_size, num_inference_steps=steps, generator=generator, output_type="np").images

    start = time.perf_counter()
    draw(2)
    pipe.send(time.perf_counter() - start)
    while pipe.recv():
        pipe.send(draw(num_inference_steps))


def network_flops(batch_size: int) -> int:
    unet = make_pipeline("ours").unet
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(batch_size, 3, *parse_config([], PRESET).image_size, device=DEVICE), 0)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Of 1,000; a step costs the same.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Also write JSON here.")
    args = parser.parse_args()
    rates = {dtype: arithmetic_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    rows = []
    for batch_size in args.batch_sizes:
        pipes, first_call = {}, {}
        for name in NAMES:
            pipes[name], theirs = multiprocessing.Pipe()
            process_args = (name, batch_size, args.num_inference_steps, theirs)
            multiprocessing.get_context("spawn").Process(target=serve, args=process_args, daemon=True).start()
            first_call[name] = pipes[name].recv()
        images = {}

        def draw(name: str) -> None:
            pipes[name].send(True)  # noqa: B023
            images[name] = pipes[name].recv()  # noqa: B023

        times = interleaved_times({name: lambda name=name: draw(name) for name in NAMES}, args.rounds)
        for name, seconds in times.items():
            rate = rates[torch.bfloat16 if "bf16" in name else torch.float32]
            rows.append(
                {
                    "pipeline": name,
                    "batch": batch_size,
                    "ms a step": 1e3 * statistics.median(seconds) / args.num_inference_steps,
                    "images/s": batch_size * args.num_inference_steps / TOTAL_STEPS / statistics.median(seconds),
                    "peer/this": median_ratio(times["peer"], seconds),
                    "floor, ms": 1e3 * network_flops(batch_size) / rate,
                    "first call, s": first_call[name],
                    "mean difference": float(abs(images[name] - images["peer"]).mean()),
                }
            )
            pipes[name].send(False)
    report(
        f"sampling: {TOTAL_STEPS}-step DDPM, measured over {args.num_inference_steps} steps, medians of {args.rounds} "
        "rounds; the floor is the network's FLOP at the machine's rate; differences from the peer's pixels, "
        "which lie in [0, 1]",
        rows,
        args.output,
    )


if __name__ == "__main__":
    main()
