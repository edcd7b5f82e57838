"""What is shown and kept of an evaluation."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from sprite_diffusion.common.files import write_text, written_beside
from sprite_diffusion.common.run_files import HISTORY_FILE, METRICS_FILE, PAIRS_FILE
from sprite_diffusion.metrics.evaluation import Measurement, Report

TITLES = {
    "fid": "FID",
    "kid": "KID",
    "cmmd": "CMMD",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "class_accuracy": "share in the class asked for",
    "nearest_distance": "distance to the nearest training image",
    "near_copies": "near-copies of training images",
}
NOT_OF_FEATURES = ("class_accuracy", "nearest_distance", "near_copies")
HEADINGS = ("", "images", "generated", "95% interval", "held-out real")


def format_table(report: Report) -> str:
    """For the terminal: a row for each figure."""
    first = TITLES[next(iter(report.figures))]
    figures = {TITLES[name]: figure for name, figure in report.figures.items()}
    figures |= {f"{first}, {name}": figure for name, figure in report.of_class.items()}
    rows = [HEADINGS, *(_format_row(title, figure) for title, figure in figures.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows]
    return f"features: {report.extractor}\n" + "\n".join(lines)


def write_report(report: Report, picture: Image.Image, folder: Path, facts: dict[str, Any]) -> list[Path]:
    """Writes the figures, with `facts` on what was measured, and the closest pairs; returns the files."""
    write_text(folder / METRICS_FILE, json.dumps({**facts, **report.to_dict()}, indent=2) + "\n")
    with written_beside(folder / PAIRS_FILE) as partial:
        picture.save(partial, format="PNG")
    return [folder / METRICS_FILE, folder / PAIRS_FILE]


def append_history(report: Report, folder: Path, facts: dict[str, Any]) -> None:
    """Adds a line to the history of a run; what a resumed run had written after its checkpoint is dropped."""
    earlier = [json.dumps(line) for line in _earlier_lines(folder, facts["global_step"])]
    write_text(folder / HISTORY_FILE, "\n".join([*earlier, json.dumps({**facts, **report.to_dict()})]) + "\n")


def is_lowest(report: Report, folder: Path, global_step: int) -> bool:
    """Whether the first distance is below that of every earlier evaluation of a run."""
    name, figure = next(iter(report.figures.items()))
    earlier = [line["figures"][name]["value"] for line in _earlier_lines(folder, global_step)]
    return figure.value < min(earlier, default=float("inf"))


def _earlier_lines(folder: Path, global_step: int) -> list[dict[str, Any]]:
    path = folder / HISTORY_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["global_step"] < global_step]


def _format_row(title: str, figure: Measurement) -> tuple[str, ...]:
    interval = " to ".join(f"{end:.4g}" for end in figure.interval)
    return title, f"{figure.num_images:,}", f"{figure.value:.4g}", interval, f"{figure.real:.4g}"
