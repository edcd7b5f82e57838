"""The results of an evaluation as a table, written into the files of a run, and read from them."""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sprite_diffusion.common.errors import DAMAGED_JSON, warn
from sprite_diffusion.common.files import write_text, written_beside
from sprite_diffusion.common.run_files import HISTORY_FILE, METRICS_FILE, PAIRS_FILE

NEAR_COPIES = "near_copies"
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
    "clip_score": "CLIP score",
    "nearest_distance": "distance to the nearest training image",
    NEAR_COPIES: "near-copies of training images",
    "colours": "colours of an image (median)",
    "off_palette": "pixels off the data's palette",
    "partly_transparent": "partly transparent pixels",
    "background": "pixels of the background's colour",
    "lone_pixels": "lone pixels",
    "outline_brightness": "brightness beside transparency",
}
SEEN, UNSEEN = "seen", "unseen"  # whether the pairs of colour and part in a caption were in the training set
NUMBERS_NAMED = {"": (1, 99), "_up_to_4": (1, 4), "_5_to_8": (5, 8), "_9_or_more": (9, 99)}  # attributes in a caption
LEFT_OUT_PAIRS = "left_out_pairs"
OBEDIENCE_TITLES = {
    f"{figure}_{group}{number}": f"{title}, {group} pairs" + (f",{number.replace('_', ' ')} named" if number else "")
    for number in NUMBERS_NAMED
    for group in (SEEN, UNSEEN)
    for figure, title in (("attributes", "attributes that are there"), ("colours", "colours on the right part"))
} | {LEFT_OUT_PAIRS: "unseen pairs of colour and part"}
TITLES |= OBEDIENCE_TITLES
NOT_OF_FEATURES = (
    *OBEDIENCE_TITLES,
    *("class_accuracy", "clip_score", "nearest_distance", NEAR_COPIES),
    *("colours", "off_palette", "partly_transparent", "background", "lone_pixels", "outline_brightness"),
)
HEADINGS = ("", "images", "generated", "95% interval", "held-out real")


@dataclass(frozen=True)
class Measurement:
    """A metric of generated images, its 95% interval, and the same metric of held-out real images."""

    value: float
    interval: tuple[float, float]
    real: float
    num_images: int

    @property
    def exceeds_floor(self) -> bool:
        """Returns whether the whole interval lies above the figure of held-out real images."""
        return self.interval[0] > self.real

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measurement":
        """Returns the measurement that `asdict` has made `values` of."""
        low, high = values["interval"]
        return cls(
            value=float(values["value"]),
            interval=(float(low), float(high)),
            real=float(values["real"]),
            num_images=int(values["num_images"]),
        )

    def format_interval(self) -> str:
        """Returns the interval as text, '1.5 to 2.5'."""
        low, high = self.interval
        return f"{low:.4g} to {high:.4g}"


@dataclass
class Report:
    """The measurements of an evaluation, by metric, which `metrics.json` keeps."""

    num_images: int
    extractor: str
    figures: dict[str, Measurement] = field(default_factory=dict)
    of_class: dict[str, Measurement] = field(default_factory=dict)  # the first distance, by the class's name

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """Returns the report that `to_dict` has made `values` of, which may hold more.

        Raises one of `DAMAGED_JSON` if a value is missing or of another type.
        """
        report = cls(num_images=int(values["num_images"]), extractor=str(values["extractor"]))
        for measurements, group in ((report.figures, "figures"), (report.of_class, "of_class")):
            measurements.update({name: Measurement.from_dict(figure) for name, figure in values[group].items()})
        if not {NEAR_COPIES} <= report.figures.keys() <= TITLES.keys():
            raise LookupError(f"the metrics are {', '.join(report.figures) or 'missing'}")
        return report

    def scalars(self) -> dict[str, float]:
        """Returns the values for trackers, by name."""
        return {f"metrics/{name}": measurement.value for name, measurement in self.figures.items()}


def format_table(report: Report) -> str:
    """Returns a table for the terminal, with a row for each metric and for each class."""
    first_title = TITLES[next(iter(report.figures))]
    measurements = {TITLES[name]: measurement for name, measurement in report.figures.items()}
    measurements |= {f"{first_title}, {name}": measurement for name, measurement in report.of_class.items()}
    rows = [HEADINGS, *(_format_row(title, measurement) for title, measurement in measurements.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows]
    return f"features: {report.extractor}\n" + "\n".join(lines)


def write_report(report: Report, closest_pairs: Image.Image, folder: Path, facts: dict[str, Any]) -> list[Path]:
    """Writes the picture, and `facts` about what was measured followed by the measurements. Returns the files."""
    write_text(folder / METRICS_FILE, json.dumps({**facts, **report.to_dict()}, indent=2) + "\n")
    with written_beside(folder / PAIRS_FILE) as partial:
        closest_pairs.save(partial, format="PNG")
    return [folder / METRICS_FILE, folder / PAIRS_FILE]


def append_history(report: Report, folder: Path, facts: dict[str, Any]) -> None:
    """Adds a line to the history of a run, and drops the lines of later steps, which a resumed run measures again.

    Lines that can't be read are left out with a warning: a kill may have torn the last one.
    """
    lines, num_damaged = _read_history(folder / HISTORY_FILE)
    if num_damaged:
        warn(f"{folder / HISTORY_FILE}: {num_damaged} line(s) can't be read and are left out")
    earlier = [json.dumps(line) for line in lines if line["global_step"] < facts["global_step"]]
    write_text(folder / HISTORY_FILE, "\n".join([*earlier, json.dumps({**facts, **report.to_dict()})]) + "\n")


class Losses(NamedTuple):
    """The mean losses of images that are trained on and of others, of the same noise and timesteps."""

    training: float
    held_out: float
    gap_error: float  # the standard error of their difference

    @property
    def gap(self) -> float:
        """The loss of images that are held out, less that of those that are trained on."""
        return self.held_out - self.training

    def to_dict(self) -> dict[str, float]:
        """Returns the losses for trackers and the history of a run, by name."""
        return {
            "loss_of_training_images": self.training,
            "loss_of_held_out_images": self.held_out,
            "loss_gap": self.gap,
        }

    def gap_grows(self, folder: Path, global_step: int) -> bool:
        """Returns whether the gap is above 0 and above the smallest of a run so far, by more than chance makes it."""
        lines, _ = _read_history(folder / HISTORY_FILE)
        earlier = [line["loss_gap"] for line in lines if line["global_step"] < global_step and "loss_gap" in line]
        return bool(earlier) and self.gap - max(0.0, min(earlier)) > 3 * self.gap_error


def is_lowest(report: Report, folder: Path, global_step: int) -> bool:
    """Returns whether the report's first distance is below that of every earlier evaluation of the run."""
    name, measurement = next(iter(report.figures.items()))
    lines, _ = _read_history(folder / HISTORY_FILE)
    earlier = [Report.from_dict(line).figures for line in lines if line["global_step"] < global_step]
    return measurement.value < min((figures[name].value for figures in earlier if name in figures), default=math.inf)


def _read_history(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines of a run's history, and the number of those that can't be read."""
    texts = path.read_text(errors="replace").splitlines() if path.is_file() else []
    lines = []
    for text in texts:
        with suppress(*DAMAGED_JSON):
            line = json.loads(text)
            Report.from_dict(line)  # raises for a line that is not an evaluation's
            if isinstance(line["global_step"], int):
                lines.append(line)
    return lines, len(texts) - len(lines)


def _format_row(title: str, measurement: Measurement) -> tuple[str, ...]:
    value, floor = f"{measurement.value:.4g}", f"{measurement.real:.4g}"
    return title, f"{measurement.num_images:,}", value, measurement.format_interval(), floor
