"""Time training as a user starts it: diffusers' official script and ours, same network, images, batch and steps.

Run from the root of the repository: python -m benchmarks.training_throughput --peer PATH/TO/train_unconditional.py
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import DEVICE, arithmetic_rate, median_ratio, report
from sprite_diffusion.common.machine import choose_precision
from sprite_diffusion.data.sprites import draw_sprites
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.presets import parse_config
from sprite_diffusion.training.build import build_model

WARM_UP = 0.25  # of the steps, not counted


@dataclass(frozen=True)
class Run:
    """What one run of a script was seen to do."""

    images_per_second: float
    seconds_to_first_step: float  # from the launch, imports and reading of images included
    peak_memory: float  # bytes, of the largest process


def watch(command: list[str], num_steps: int, batch_size: int) -> Run:
    """Runs a script and reads its progress bar as it is drawn."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    launched = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    seen: dict[int, float] = {}  # steps done: when that was first shown
    text = b""
    assert process.stderr is not None
    while chunk := os.read(process.stderr.fileno(), 65536):
        text = (text + chunk)[-100_000:]
        for done in re.findall(rb"(\d+)/%d \[" % num_steps, chunk):
            seen.setdefault(int(done), time.perf_counter())
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0 or num_steps not in seen:
        sys.exit(f"{' '.join(command)} failed:\n{text.decode(errors='replace')[-3000:]}")
    warm = min(done for done in seen if done >= max(1, WARM_UP * num_steps))
    rate = (num_steps - warm) * batch_size / (seen[num_steps] - seen[warm])
    first = min(done for done in seen if done >= 1)
    return Run(rate, seen[first] - launched, 1024 * usage.ru_maxrss)


def training_flops(config: TrainingConfig) -> float:
    """Of one image, forward and backward."""
    model = build_model(config, num_channels=3).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *config.image_size, device=DEVICE), 0).sample.sum().backward()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="diffusers' train_unconditional.py")
    parser.add_argument("--preset", default="configs/sprites_long.yaml")
    parser.add_argument("--attention_head_dim", type=int, help="In place of the preset's, for both.")
    parser.add_argument("--num_steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer_flags", default="", help="More flags for the peer: '--mixed_precision bf16'.")
    parser.add_argument("--output", type=Path, help="Also write JSON here.")
    args = parser.parse_args()
    config = parse_config(["--config", args.preset], "")
    if args.attention_head_dim is not None:
        config = replace(config, attention_head_dim=args.attention_head_dim)
    batch_size = config.train_batch_size

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for i, pixels in enumerate(draw_sprites(batch_size * args.num_steps)[0]):
            image = Image.fromarray(pixels).resize(config.image_size[::-1], Image.Resampling.NEAREST)
            image.save(folder / "images" / f"{i:06d}.png")
        build_model(config, num_channels=3).save_config(folder / "model")
        cores = len(os.sched_getaffinity(0))
        launch = [*(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1")]
        shared = [
            *("--train_data_dir", str(folder / "images"), "--resolution", str(config.image_size[0]), "--use_ema"),
            *("--model_config_name_or_path", str(folder / "model"), "--train_batch_size", str(batch_size)),
            *("--num_epochs", "1", "--ddpm_num_inference_steps", "2", "--eval_batch_size", "1"),
            *("--checkpointing_steps", "1000000"),
        ]
        peer = [*launch, "--num_cpu_threads_per_process", str(cores), args.peer, *shared, *args.peer_flags.split()]
        ours = [*launch, "train_unconditional.py", "--config", args.preset, *shared, "--overwrite_output_dir"]
        runs: dict[str, list[Run]] = {"peer": [], "ours": []}
        for i in range(args.rounds):
            for who, command in (("peer", peer), ("ours", ours)):
                output_dir = str(folder / f"{who}{i}")
                runs[who].append(watch([*command, "--output_dir", output_dir], args.num_steps, batch_size))
        num_parameters = json.loads((folder / "ours0" / "training_summary.json").read_text())["num_parameters"]

    flops = training_flops(config)
    rates = {who: [run.images_per_second for run in of_one] for who, of_one in runs.items()}
    rows = []
    for who, of_one in runs.items():
        bf16 = choose_precision(config.mixed_precision) == "bf16" if who == "ours" else "bf16" in args.peer_flags
        rows.append(
            {
                "script": who,
                "images/s": statistics.median(rates[who]),
                "this/peer": median_ratio(rates[who], rates["peer"]),
                "floor, images/s": arithmetic_rate(torch.bfloat16 if bf16 else torch.float32) / flops,
                "first step, s": statistics.median(run.seconds_to_first_step for run in of_one),
                "memory, MB": statistics.median(run.peak_memory for run in of_one) / 1e6,
            }
        )
    report(
        f"training: {args.preset}, heads of {config.attention_head_dim} channels, {num_parameters / 1e6:.1f} M "
        f"parameters, {config.image_size[0]} pixels, batches of {batch_size}, {args.num_steps} steps, medians of "
        f"{args.rounds} rounds; {flops / 1e9:.2f} GFLOP an image; the floor is those at the machine's rate",
        rows,
        args.output,
    )


if __name__ == "__main__":
    main()
