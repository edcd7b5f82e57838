"""The model card of a run."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from sprite_diffusion.common.errors import UserInputError, first_line
from sprite_diffusion.common.run_files import CARD_FILE, CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from sprite_diffusion.metrics.report import NOT_OF_FEATURES, TITLES

BEGIN, END = "<!-- from the run: begin -->", "<!-- from the run: end -->"
PIPELINE_TAG = "unconditional-image-generation"  # the nearest that the Hub has for images by class too


def make_card(run_dir: Path, repo_id: str | None, hub_card: str | None) -> str:
    """The text of the card of the run in `run_dir`.

    What people wrote stays: text outside of the two marks, of `hub_card` or, if that has none, of the card in
    `run_dir`; their choice of a licence; tags; metadata that the run does not determine.
    """
    try:
        config = yaml.safe_load((run_dir / CONFIG_FILE).read_text())
        summary = json.loads((run_dir / SUMMARY_FILE).read_text())
        index = json.loads((run_dir / "model_index.json").read_text())
        metrics = _read_metrics(run_dir, summary["global_step"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserInputError(f"{run_dir} is not the output folder of a run: {first_line(error)}") from None
    grids = sorted((run_dir / "samples").glob("step-*.png"))
    grid = f"samples/{grids[-1].name}" if grids else None
    try:
        repo_id = repo_id or config["hub_model_id"] or f"me/{run_dir.resolve().name}"
        classes = list(index.get("id2label", {}).values())
        body = _describe(repo_id, config, summary, metrics, index, classes, grid)
        metadata = _metadata(repo_id, config, summary, metrics, classes, grid)
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # a value is missing or of another type
        raise UserInputError(f"{run_dir} is not the output folder of a run: {first_line(error)}") from None

    own_file = run_dir / CARD_FILE
    try:
        cards = [_parse(text) for text in (hub_card, own_file.read_text() if own_file.is_file() else None) if text]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserInputError(f"{own_file} can't be read ({first_line(error)}): mend or remove it") from None
    kept = {key: value for card in reversed(cards) for key, value in card.data.to_dict().items()}
    before, after = next((parts for parts in map(_hand_written, cards) if any(parts)), ("", ""))
    text = "\n\n".join(part for part in (before, f"{BEGIN}\n{body}\n{END}", after) if part)
    tags = list(dict.fromkeys([*metadata["tags"], *kept.get("tags", [])]))
    chosen_license = kept.get("license", "unknown")
    if chosen_license != "unknown":
        metadata["license"] = chosen_license
    others = {key: value for key, value in kept.items() if key not in ("datasets", "model-index", "widget")}
    metadata = {**others, **metadata, "tags": tags}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{text}\n"


def _parse(text: str) -> ModelCard:
    return ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}", ignore_metadata_errors=True)


def _hand_written(card: ModelCard) -> tuple[str, str]:
    """What stands before and after the marks."""
    before, _, rest = card.text.partition(BEGIN)
    return before.strip(), rest.partition(END)[2].strip()


def _metadata(
    repo_id: str,
    config: dict[str, Any],
    summary: dict[str, Any],
    metrics: dict[str, Any] | None,
    classes: list[str],
    grid: str | None,
) -> dict[str, Any]:
    name = repo_id.split("/")[-1]
    data_name = _data_name(config, summary)
    measured = {} if summary["loss"] is None else {"loss": ("training loss", summary["loss"])}
    if metrics is not None:
        for metric, figure in metrics["figures"].items():
            how = f"{figure['num_images']:,} images by {metrics['sampler']}"
            if metric not in NOT_OF_FEATURES:
                how += f", features of the {metrics['extractor']}"
            measured[metric] = (f"{TITLES[metric]} ({how})", figure["value"])
    results = [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=data_name,
            dataset_name=data_name,
            metric_type=metric,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for metric, (title, value) in measured.items()
    ]
    widget = [{"text": ", ".join(classes) or "samples", "output": {"url": grid}}]
    options: dict[str, Any] = {
        "license": summary["data_license"] or "unknown",
        "library_name": "diffusers",
        "pipeline_tag": PIPELINE_TAG,
        "tags": ["diffusion", "ddpm", "class-conditional" if classes else "unconditional", "sprite-diffusion"],
        "datasets": [data_name] if _is_on_the_hub(config) else None,
        "model_name": name,
        "eval_results": results or None,
        "widget": widget if grid else None,
    }
    return ModelCardData(**options).to_dict()


def _describe(
    repo_id: str,
    config: dict[str, Any],
    summary: dict[str, Any],
    metrics: dict[str, Any] | None,
    index: dict[str, Any],
    classes: list[str],
    grid: str | None,
) -> str:
    width, _, height = config["resolution"].partition("x")
    kind = "A class-conditional" if classes else "An unconditional"
    weights = "moving average (EMA) of the weights" if config["use_ema"] else "weights of the last step"
    picture = f"![Samples]({grid})\n\n" if grid else ""
    sections = [
        f"# {repo_id.split('/')[-1]}\n\n{kind} diffusion model of {width}x{height or width} images: "
        f"a {config['model_class']} of {summary['num_parameters'] / 1e6:.2f} M parameters, trained with "
        f"{config['noise_scheduler_class']} by sprite-diffusion. It holds the {weights}.\n\n" + picture.rstrip(),
        "## Use it\n\n" + _snippet(repo_id, index, classes),
        "## Data\n\n" + _data_section(config, summary, classes),
        "## Training\n\n" + _training_table(config, summary),
        "## Metrics\n\n" + _metrics_section(config, summary, metrics),
        f"## Repeat the run\n\n```bash\naccelerate launch {summary['script']} --config {CONFIG_FILE}\n```\n\n"
        "with the file of that name from this repository and the same data.",
        "## Limits\n\nIt draws what its data holds and at its resolution only. A small model may reproduce training "
        f"images; {_copies(metrics)}.",
    ]
    return "\n\n".join(sections)


def _read_metrics(run_dir: Path, global_step: int) -> dict[str, Any] | None:
    """What was measured of these weights, not of earlier ones."""
    path = run_dir / METRICS_FILE
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    return metrics if metrics.get("global_step") == global_step else None


def _metrics_section(config: dict[str, Any], summary: dict[str, Any], metrics: dict[str, Any] | None) -> str:
    parts = []
    if metrics is not None:
        guidance = f", guidance {metrics['guidance_scale']:g}" if "guidance_scale" in metrics else ""
        rows = [
            f"| {TITLES[name]} | {figure['value']:.4g} | {_interval(figure)} | {figure['real']:.4g} |"
            for name, figure in metrics["figures"].items()
        ]
        parts.append(
            f"{metrics['num_images']:,} images by {metrics['sampler']}{guidance}, against as many real ones; features "
            f"of the {metrics['extractor']}. Beside it the same for real images that were held out from the "
            "comparison: what a perfect model would get.\n\n"
            "| metric | generated | 95% interval | held-out real |\n|---|---|---|---|\n" + "\n".join(rows)
        )
    if summary["loss"] is not None:
        parts.append(
            f"The training loss was {summary['loss']:.4f}, the mean over the last {config['logging_steps']} steps. It "
            "says little about how good images look: see the samples."
        )
    return "\n\n".join(parts) or "None were computed."


def _interval(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{low:.4g} to {high:.4g}"


def _copies(metrics: dict[str, Any] | None) -> str:
    if metrics is None:
        return "whether this one does was not measured"
    copies = metrics["figures"]["near_copies"]
    return (
        f"of {copies['num_images']:,} samples, {copies['value']:.1%} were near-copies of one (of real images, "
        f"{copies['real']:.1%} have such a double in the data)"
    )


def _snippet(repo_id: str, index: dict[str, Any], classes: list[str]) -> str:
    trust = "" if isinstance(index["_class_name"], str) else ", trust_remote_code=True"
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{repo_id}"{trust})',
    ]
    if classes:
        first, last = json.dumps(classes[0]), json.dumps(classes[-1])
        lines += [
            f'pipeline(class_labels=[{first}, {last}], guidance_scale=2.0).images[0].save("image.png")',
            f'pipeline(context={{{first}: 1, {last}: 0.6}}).images[0].save("mix.png")  # a mix of classes',
        ]
        after = (
            "\n\nThe pipeline, the scheduler and, where it is not diffusers', the network come with this repository "
            "as code, hence `trust_remote_code`. `guidance_scale` above 1 makes images more typical of their class."
        )
    else:
        lines.append('pipeline(batch_size=4, num_inference_steps=250).images[0].save("image.png")')
        after = ""
        if not trust:
            after = (
                '\n\nWith `custom_pipeline="pipeline", trust_remote_code=True` the same repository gives the pipeline '
                "and the scheduler that it was trained with, which takes other samplers, one seed per image and "
                "starting noise."
            )
    return "```python\n" + "\n".join(lines) + "\n```" + after


def _data_section(config: dict[str, Any], summary: dict[str, Any], classes: list[str]) -> str:
    number = f"{summary['num_images']:,} images" if summary["num_images"] else "A stream of images"
    said = f"licence: {summary['data_license']}" if summary["data_license"] else "its licence is not recorded"
    named = f"\n\nClasses: {', '.join(classes)}." if classes else ""
    return f"{number} from {_data_name(config, summary)}; {said}.{named}"


def _training_table(config: dict[str, Any], summary: dict[str, Any]) -> str:
    batch = config["train_batch_size"] * config["gradient_accumulation_steps"] * summary["num_processes"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    rows = {
        "steps": f"{summary['global_step']:,}",
        "images seen": f"{summary['images_seen']:,}",
        "batch size": f"{batch}",
        "learning rate": f"{config['learning_rate']:g}, {config['lr_scheduler']}",
        "prediction, schedule": f"{config['prediction_type']}, {config['ddpm_beta_schedule']}, "
        f"T = {config['ddpm_num_steps']}",
        "mixed precision": {"no": "none, float32"}.get(summary["precision"], summary["precision"]),
        "hardware": f"{summary['num_processes']} process(es) on {summary['device']}",
        "time": f"{summary['seconds'] / 60:.1f} min",
        "seed": f"{config['seed']}",
        "versions": versions,
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _data_name(config: dict[str, Any], summary: dict[str, Any]) -> str:
    """What the data is called in public: of a path, the last part."""
    source = summary["data_source"]
    return source if _is_on_the_hub(config) else Path(source).name


def _is_on_the_hub(config: dict[str, Any]) -> bool:
    name = config["dataset_name"]
    if not name or name == "sprites" or Path(name).exists() or name.endswith((".npy", ".parquet")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
