"""Trains variants of a run over several seeds, measures their images, and prints what each gives for its time.

python -m benchmarks.quality OUT "adamw: --optimizer adamw" "muon: --optimizer muon" --seeds 0 1 2 -- FLAGS OF ALL

A variant is a name and the flags that make it. Each run is a folder of OUT, and is not made again once it is measured:
give the same command to go on. Processor time is of the training script alone, its imports and sample grids included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import report
from sprite_diffusion.common.run_files import METRICS_FILE, SUMMARY_FILE

ROOT = Path(__file__).parent.parent
TIME_FILE = "processor_seconds.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("variants", nargs="+", metavar="NAME: FLAGS", help="Flags of the training script.")
    parser.add_argument("--script", default="train_unconditional.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", default="1000", help="Images that are measured of each run.")
    parser.add_argument("--metrics_flags", default="", help="More flags of calculate_metrics.py, such as a sampler's.")
    parser.add_argument("--output", type=Path, help="JSON file of the table.")
    own, common = split_at_dashes(sys.argv[1:])
    args = parser.parse_args(own)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for variant in args.variants:
            name, _, flags = variant.partition(":")
            run_dir = args.output_dir / f"{name}-{seed}"
            train(run_dir, [str(ROOT / args.script), *common, *flags.split(), f"--seed={seed}"])
            measure(run_dir, [f"--num_images={args.num_images}", *args.metrics_flags.split()])
            runs.setdefault(name, []).append(read_run(run_dir))
    report(f"{args.script} {' '.join(common)}", [summarize(name, rows) for name, rows in runs.items()], args.output)


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """Returns what stands before the first "--", and what stands after it."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def train(run_dir: Path, command: list[str]) -> None:
    """Trains a run, and notes the processor time that it took; does nothing if that is noted already."""
    note = run_dir.with_name(f"{run_dir.name}.{TIME_FILE}")
    if note.exists():
        return
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command, f"--output_dir={run_dir}", "--overwrite_output_dir"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    note.write_text(json.dumps(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime))


def measure(run_dir: Path, flags: list[str]) -> None:
    """Measures the images of a run, unless that has been done."""
    if not (run_dir / METRICS_FILE).exists():
        subprocess.run([sys.executable, str(ROOT / "calculate_metrics.py"), str(run_dir), *flags], check=True)


def read_run(run_dir: Path) -> dict[str, Any]:
    """Returns a run's processor minutes, images and metrics."""
    seconds = json.loads(run_dir.with_name(f"{run_dir.name}.{TIME_FILE}").read_text())
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    figures = json.loads((run_dir / METRICS_FILE).read_text())["figures"]
    values = {name: figure["value"] for name, figure in figures.items()}
    return {"minutes": seconds / 60, "images": summary["images_seen"], **values}


def summarize(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row of the table: medians over the seeds, and each seed's distance."""
    names = ("minutes", "images", "frechet_distance", "coverage")
    medians = {name: statistics.median(run[name] for run in runs) for name in names}
    distances = ", ".join(f"{run['frechet_distance']:.3g}" for run in runs)
    return {"variant": name, **medians, "distances of the seeds": distances}


if __name__ == "__main__":
    main()
