"""A run on one page: its losses, its sample grids, how it draws, and its figures, in one file without links.

python -m sprite_diffusion.sharing.report runs/sprites-unconditional
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from sprite_diffusion.common.errors import (
    DAMAGED_JSON,
    UserInputError,
    exits_on_user_error,
    first_line,
    mask_secrets,
    printable,
)
from sprite_diffusion.common.files import check_writable, write_text, written_beside
from sprite_diffusion.common.flags import ArgumentParser
from sprite_diffusion.common.run_files import (
    LOSS_FILE,
    METRICS_FILE,
    PAIRS_FILE,
    REPORT_FILE,
    SAMPLES_DIR,
    SUMMARY_FILE,
    TRAINING_LOG_FILE,
    read_saved_config,
)
from sprite_diffusion.metrics.report import TITLES, Report
from sprite_diffusion.sampling.conditions import example_conditions
from sprite_diffusion.sampling.generation import Request, StepStills, sample_images
from sprite_diffusion.sampling.pictures import make_picture
from sprite_diffusion.sampling.pipeline_loading import Pipeline, load_pipeline
from sprite_diffusion.sampling.samplers import make_sampler

TRAJECTORY_STEPS = 25
TRAJECTORY_IMAGES = 8
MAX_GRIDS = 100  # sample grids on the page, evenly chosen
MAX_POINTS = 2000  # of a curve: more can't be told apart on a screen
SUMMARY_ROWS = {
    "data_source": "data",
    "num_images": "images",
    "global_step": "optimizer steps",
    "epoch": "epochs",
    "images_seen": "images seen",
    "loss": "last loss",
    "skipped_steps": "skipped steps",
    "num_parameters": "parameters",
    "seconds": "seconds",
    "device": "device",
    "precision": "precision",
}
FLAG_ROWS = ("model_class", "noise_scheduler_class", "prediction_type", "ddpm_beta_schedule", "ddpm_num_steps")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
/* As wide as the widest picture, so that none is scaled by a fraction where there is room for it. */
body {{ font: 16px/1.5 system-ui, sans-serif; width: fit-content; max-width: calc(100% - 2rem); margin: 2rem auto; }}
h1, td:only-of-type {{ overflow-wrap: anywhere; }}
/* Whole pixels: a picture that begins between two rows of the screen is blurred. */
h1, h2, p {{ margin: 1rem 0; }}
figure {{ margin: 0 0 2rem; }}
figure.wide {{ overflow-x: auto; }}
img {{ image-rendering: pixelated; max-width: 100%; }}
img.curve {{ image-rendering: auto; width: 72rem; min-width: 54rem; background: white; }}
img.pairs {{ max-width: none; }}
input[type=range] {{ width: 100%; max-width: 40rem; }}
td, th {{ text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; vertical-align: top; }}
td:last-child {{ padding-right: 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
{sections}
<script>
for (const slider of document.querySelectorAll("input[type=range]")) {{
  const images = slider.closest("figure").querySelectorAll("img");
  const show = () => images.forEach((image, i) => {{
    image.hidden = i !== Number(slider.value);
    if (!image.hidden) slider.closest("figure").querySelector("output").textContent = image.alt;
  }});
  slider.addEventListener("input", show);
  show();
}}
</script>
</body>
</html>
"""


@dataclass(frozen=True)
class EpochSummary:
    """What the log says of an epoch."""

    number: int  # counted from 1
    loss: float  # the mean over the epoch's images; NaN if no loss was finite
    images_per_second: float
    seconds: float  # with the samples and checkpoints in it

    def __str__(self) -> str:
        rate = f"{self.images_per_second:.0f} images/s"
        return f"epoch {self.number}: mean loss {self.loss:.4f}, {rate}, {self.seconds:.0f} s"


def read_training_log(run_dir: Path) -> list[dict[str, Any]]:
    """Returns what a run has logged, a dictionary for each time; none where there is no log.

    Lines that can't be read are left out: a kill or a full disk may have torn one.
    """
    path = run_dir / TRAINING_LOG_FILE
    entries = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(*DAMAGED_JSON):
            entry = json.loads(text)
            numbers = [entry[name] for name in ("global_step", "epoch", "images_seen", "seconds", "lr")]
            if all(math.isfinite(number) for number in [*numbers, entry["loss"] or 0.0]):
                entries.append(entry)
    return entries


def summarize_epochs(entries: list[dict[str, Any]]) -> list[EpochSummary]:
    """Returns a summary of each epoch in a log, in order."""
    epochs: list[EpochSummary] = []
    seen, seconds, first = 0, 0.0, 0
    for i, entry in enumerate(entries):
        if i + 1 < len(entries) and entries[i + 1]["epoch"] == entry["epoch"]:
            continue
        part = entries[first : i + 1]
        starts = [seen, *(one["images_seen"] for one in part[:-1])]
        counts = [one["images_seen"] - start for one, start in zip(part, starts, strict=True)]
        finite = [(one["loss"], count) for one, count in zip(part, counts, strict=True) if one["loss"] is not None]
        total = sum(count for _, count in finite)
        loss = sum(loss * count for loss, count in finite) / total if total else math.nan
        duration = entry["seconds"] - seconds
        rate = sum(counts) / duration if duration > 0 else math.nan
        epochs.append(EpochSummary(int(entry["epoch"]) + 1, loss, rate, duration))
        seen, seconds, first = entry["images_seen"], entry["seconds"], i + 1
    return epochs


def draw_losses(entries: list[dict[str, Any]], file: Path | BinaryIO) -> None:
    """Draws the loss, its logarithm and the learning rate against the optimizer step, with the mean of each epoch.

    Args:
        entries: A run's log.
        file: The PNG file to write.
    """
    from matplotlib.figure import Figure  # not at the top: a training's start need not wait for it

    points = entries[:: max(1, math.ceil(len(entries) / MAX_POINTS))]
    steps = [entry["global_step"] for entry in points]
    losses = [math.nan if entry["loss"] is None else entry["loss"] for entry in points]
    ends = [
        entry["global_step"]
        for entry, after in zip(entries, [*entries[1:], None], strict=True)
        if after is None or after["epoch"] != entry["epoch"]
    ]
    means = [epoch.loss for epoch in summarize_epochs(entries)]
    figure = Figure(figsize=(12, 3.5))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.15, top=0.9, wspace=0.2)  # to measure labels takes longer
    plain, logarithmic, rate = figure.subplots(1, 3)
    for axes, title in ((plain, "loss"), (logarithmic, "loss, logarithmic")):
        axes.plot(steps, losses, color="tab:blue", alpha=0.5, linewidth=1, label="each log")
        axes.plot(ends, means, color="tab:orange", marker=".", linewidth=1, label="mean of each epoch")
        axes.set_title(title)
        axes.legend()
    if any(loss > 0 for loss in losses):
        logarithmic.set_yscale("log")
    rate.plot(steps, [entry["lr"] for entry in points], color="tab:green", linewidth=1)
    rate.set_title("learning rate")
    for axes in (plain, logarithmic, rate):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    # No version in the file: the same losses are the same picture.
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def make_report(run_dir: Path, pipeline: Pipeline, summary: dict[str, Any]) -> str:
    """Returns the page of a run as HTML that needs no other file.

    Args:
        run_dir: The run's folder, with the picture of its losses, sample grids and metrics, as far as there are any.
        pipeline: The run's model, which draws some images for the page.
        summary: The content of the run's summary.
    """
    sections = [_table_section("What was trained", _summary_rows(run_dir, summary))]
    if (run_dir / LOSS_FILE).is_file():
        uri = _data_uri((run_dir / LOSS_FILE).read_bytes(), "png")
        image = f'<img class="curve" alt="loss and learning rate" src="{uri}">'
        sections.append(f'<h2>Loss</h2>\n<figure class="wide">{image}</figure>')
    if grids := _find_grids(run_dir / SAMPLES_DIR):
        chosen = sorted(grids)[:: math.ceil(len(grids) / MAX_GRIDS)]
        images = [(f"step {step:,}", grids[step].read_bytes()) for step in chosen]
        sections.append(_slider_section("Samples while it learned", "grids", images))
    sections.append(_slider_section("How it draws", "trajectory", _draw_trajectory(pipeline)))
    if rows := _metric_rows(run_dir):
        sections.append(_table_section("How good the images are", rows))
        if (run_dir / PAIRS_FILE).is_file():
            pairs = _data_uri((run_dir / PAIRS_FILE).read_bytes(), "png")
            image = f'<img class="pairs" alt="samples beside their nearest training images" src="{pairs}">'
            sections.append(f'<figure class="wide">{image}</figure>')
    title = escape(printable(mask_secrets(run_dir.resolve().name)))
    return PAGE.format(title=title, sections="\n".join(sections))


def _find_grids(folder: Path) -> dict[int, Path]:
    """Returns a run's sample grids by their steps, without what others have put beside them."""
    files = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.png")}
    return {int(step): path for path, step in files.items() if step.isdecimal()}


def _summary_rows(run_dir: Path, summary: dict[str, Any]) -> list[Sequence[Any]]:
    config = read_saved_config(run_dir) or {}
    rows = [(title, summary[name]) for name, title in SUMMARY_ROWS.items() if summary.get(name) is not None]
    return [*rows, *((name, config[name]) for name in FLAG_ROWS if name in config)]


def _metric_rows(run_dir: Path) -> list[Sequence[Any]]:
    """Returns the rows of the metrics' table, with a heading; none where there are no metrics, or damaged ones."""
    try:
        report = Report.from_dict(json.loads((run_dir / METRICS_FILE).read_text()))
    except DAMAGED_JSON:
        return []
    rows: list[Sequence[Any]] = [("", "generated", "95% interval", "held-out real")]
    for name, figure in report.figures.items():
        rows.append((TITLES[name], f"{figure.value:.4g}", figure.format_interval(), f"{figure.real:.4g}"))
    return rows


def _draw_trajectory(pipeline: Pipeline) -> list[tuple[str, bytes]]:
    """Samples some images, and returns each step's noisy images over its predictions, as PNG with a caption."""
    request = Request(list(range(TRAJECTORY_IMAGES)), example_conditions(pipeline, TRAJECTORY_IMAGES))
    steps = min(TRAJECTORY_STEPS, len(pipeline.scheduler))
    name = "ddim" if pipeline.scheduler.compatibles else None
    sampler = make_sampler("--scheduler", pipeline, name, steps)
    stills = StepStills(interval=1)
    sample_images(pipeline, sampler, request, trajectory=stills, show_progress=False)
    return [
        (f"step {number} of {steps}: noisy, and below the prediction", _encode(make_picture(row, TRAJECTORY_IMAGES)))
        for (number, _), row in zip(stills.steps, stills.rows, strict=True)
    ]


def _encode(picture: Image.Image) -> bytes:
    """Returns a picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _table_section(title: str, rows: Iterable[Sequence[Any]]) -> str:
    """Returns a heading and a table whose rows begin with a name each; one without a name has the columns' titles."""
    lines = []
    for name, *values in rows:
        begin, end = ("<td>", "</td>") if name else ('<th scope="col">', "</th>")
        cells = "".join(f"{begin}{escape(_format(value))}{end}" for value in values)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    table = "<table>\n" + "\n".join(lines) + "\n</table>"
    return f'<h2>{escape(title)}</h2>\n<figure class="wide">\n{table}\n</figure>'


def _format(value: Any) -> str:
    """Returns a cell's text, without the tokens that may stand in it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else printable(mask_secrets(str(value)))


def _slider_section(title: str, name: str, images: Sequence[tuple[str, bytes]]) -> str:
    """Returns a heading and a figure that shows one of some PNG images, each with a caption, by a slider."""
    shown = "\n".join(
        f'<img alt="{escape(caption)}" src="{_data_uri(png, "png")}"{"" if i == len(images) - 1 else " hidden"}>'
        for i, (caption, png) in enumerate(images)
    )
    last = len(images) - 1
    slider = f'<input type="range" id="{name}" aria-label="{escape(title)}" min="0" max="{last}" value="{last}">'
    return f"<h2>{escape(title)}</h2>\n<figure>\n{slider}\n<p><output></output></p>\n{shown}\n</figure>"


def _data_uri(content: bytes, subtype: str) -> str:
    return f"data:image/{subtype};base64,{base64.b64encode(content).decode()}"


@exits_on_user_error
def main() -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="Output folder of a run.")
    run_dir = parser.parse_args().run
    try:
        summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    except DAMAGED_JSON as error:
        raise UserInputError(f"{run_dir} is not the folder of a run with a pipeline: {first_line(error)}") from None
    if not isinstance(summary, dict):
        raise UserInputError(f"{run_dir / SUMMARY_FILE} is not the summary of a run")
    check_writable("the report", run_dir / REPORT_FILE)
    pipeline = load_pipeline(str(run_dir))
    if entries := read_training_log(run_dir):
        with written_beside(run_dir / LOSS_FILE) as partial:
            draw_losses(entries, partial)
        print(f"wrote {printable(str(run_dir / LOSS_FILE))}")
    page = make_report(run_dir, pipeline, summary)
    write_text(run_dir / REPORT_FILE, page)
    print(f"wrote {printable(str(run_dir / REPORT_FILE))}")


if __name__ == "__main__":
    main()
