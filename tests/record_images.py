"""Runs train_conditional.py and records which images each process trains on, for test_processes.py.

The index of an image is the red of its first pixel. Each process appends a line of JSON for each micro-batch.
"""

import json
import os
import sys
from pathlib import Path

import train_conditional
from sprite_diffusion.training import conditional
from sprite_diffusion.training.loss import ddpm_loss


def main() -> None:
    output_dir = Path(sys.argv[-1])
    record = output_dir.with_name(f"{output_dir.name}-{os.environ.get('RANK', '0')}.jsonl")

    def recording_loss(model, noise_scheduler, clean_images, *args, **kwargs):
        indices = ((clean_images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        with record.open("a") as file:
            file.write(json.dumps(indices) + "\n")
        return ddpm_loss(model, noise_scheduler, clean_images, *args, **kwargs)

    conditional.ddpm_loss = recording_loss
    try:
        train_conditional.main()
    finally:
        conditional.ddpm_loss = ddpm_loss


if __name__ == "__main__":
    main()
