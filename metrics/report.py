"""What is shown and kept of an evaluation."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from metrics.evaluation import Figure, Report

METRICS_FILE = "metrics.json"
HISTORY_FILE = "metrics.jsonl"  # a line for each evaluation of a run
PAIRS_FILE = "closest_pairs.png"
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text(json.dumps({**facts, **report.to_dict()}, indent=2) + "\n")
    picture.save(folder / PAIRS_FILE)
    return [folder / METRICS_FILE, folder / PAIRS_FILE]


def append_history(report: Report, folder: Path, facts: dict[str, Any]) -> None:
    """Adds a line to the history of a run; what a resumed run had written after its checkpoint is dropped."""
    path = folder / HISTORY_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    earlier = [line for line in lines if json.loads(line)["global_step"] < facts["global_step"]]
    path.write_text("\n".join([*earlier, json.dumps({**facts, **report.to_dict()})]) + "\n")


def _format_row(title: str, figure: Figure) -> tuple[str, ...]:
    interval = " to ".join(f"{end:.4g}" for end in figure.interval)
    return title, f"{figure.num_images:,}", f"{figure.value:.4g}", interval, f"{figure.real:.4g}"
