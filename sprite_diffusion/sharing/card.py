"""The model card of a run: made of the files in the run's folder, around what people wrote into earlier cards."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from sprite_diffusion.common.errors import UserInputError, first_line, mask_secrets, printable
from sprite_diffusion.common.run_files import (
    CARD_FILE,
    CONFIG_FILE,
)
from sprite_diffusion.data.config import BUILT_IN_DATASET
from sprite_diffusion.metrics.report import NEAR_COPIES, NOT_OF_FEATURES, TITLES
from sprite_diffusion.sampling.flags import SCHEDULES_OF_DIFFUSERS
from sprite_diffusion.sharing.markdown import escape, quote, table_row
from sprite_diffusion.sharing.run_record import RunRecord, read_run

# The text between these two lines is the run's, the rest of a card is people's.
BEGIN, END = "<!-- from the run: begin -->", "<!-- from the run: end -->"
SNIPPET_STEPS = 50
UNKNOWN_LICENSE = "unknown"
RUN_METADATA = ("datasets", "model-index", "widget")  # is replaced, whatever earlier cards say


def make_card(run_dir: Path, repo_id: str | None, hub_card: str | None) -> str:
    """Returns the text of the card of the run in `run_dir`.

    What people wrote stays: text outside of the two marks, of `hub_card` or, if that has none, of the card in
    `run_dir`; their choice of a licence; tags; metadata that the run does not determine. Without a `repo_id` the
    card names the repository of `--hub_model_id`, or one called like the folder. Raises `UserInputError` if the
    folder holds no run, a card can't be parsed, or has one of the two marks alone.
    """
    run = read_run(run_dir)
    repo_id = repo_id or run.hub_model_id or f"me/{run_dir.resolve().name}"
    earlier_cards = _read_cards(run_dir / CARD_FILE, hub_card)
    before, after = next((parts for parts in map(_hand_written, earlier_cards) if any(parts)), ("", ""))
    text = "\n\n".join(part for part in (before, f"{BEGIN}\n{_describe(run, repo_id)}\n{END}", after) if part)
    card = _parse("")
    card.data = CardData(**_merge_metadata(earlier_cards, _metadata(run, repo_id)))  # keeps the order of its keys
    card.text = f"\n{text}\n"
    return mask_secrets(str(card))


def _read_cards(path: Path, hub_card: str | None) -> list[ModelCard]:
    """Returns the earlier cards: the one on the Hub, then the one in the run's folder, where they exist.

    Raises `UserInputError` if one can't be parsed.
    """
    try:
        return [_parse(text) for text in (hub_card, path.read_text() if path.is_file() else None) if text]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserInputError(f"{path} can't be read ({first_line(error)}): mend or remove it") from None


def _parse(text: str) -> ModelCard:
    """Returns the card of a text. One without metadata gets an empty block, as `ModelCard` would warn otherwise."""
    return ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}", ignore_metadata_errors=True)


def _hand_written(card: ModelCard) -> tuple[str, str]:
    """Returns the text before and after the marks.

    Raises `UserInputError` if the first mark has no second after it: the text of people can't be told then.
    """
    before, begin, rest = _split_at_line(card.text, BEGIN)
    _, end, after = _split_at_line(rest, END)
    if begin and not end:
        raise UserInputError(f"{CARD_FILE} has the line '{BEGIN}', but no '{END}' after it: put that back")
    return before.strip(), after.strip()


def _split_at_line(text: str, mark: str) -> tuple[str, str, str]:
    """Returns the text before the first line that is nothing but `mark`, this line, and the text after it."""
    match = re.search(rf"^[ \t]*{re.escape(mark)}[ \t\r]*$", text, re.MULTILINE)
    return (text, "", "") if match is None else (text[: match.start()], match[0], text[match.end() :])


def _merge_metadata(earlier_cards: list[ModelCard], metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a run, with what people chose in earlier cards; the first card counts most."""
    kept = {key: value for card in reversed(earlier_cards) for key, value in card.data.to_dict().items()}
    tags = list(dict.fromkeys([*metadata["tags"], *kept.get("tags", [])]))
    merged = {key: value for key, value in kept.items() if key not in RUN_METADATA} | metadata | {"tags": tags}
    if kept.get("license", UNKNOWN_LICENSE) != UNKNOWN_LICENSE:
        merged["license"] = kept["license"]
    return merged


def _metadata(run: RunRecord, repo_id: str) -> dict[str, Any]:
    """Returns the metadata that a run determines, by which the Hub finds and shows it."""
    data_name = _data_name(run)
    results = [
        EvalResult(
            task_type=_task(run),
            dataset_type=data_name,
            dataset_name=data_name,
            metric_type=metric,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for metric, title, value in _results(run)
    ]
    shown = {printable(prompt): picture for prompt, picture in run.prompts.items() if picture}
    if not shown and run.newest_grid:
        shown = {printable(", ".join(run.class_names)) or "samples": run.newest_grid}
    data = ModelCardData(
        license=run.data_license or UNKNOWN_LICENSE,
        base_model=run.base if run.base_is_on_hub else None,
        base_model_relation="finetune" if run.base_is_on_hub else None,
        library_name="diffusers",
        pipeline_tag=_task(run),
        tags=["diffusion", "ddpm", _kind(run), "sprite-diffusion"],
        datasets=[data_name] if _is_on_the_hub(run.dataset_name) else None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
        widget=[{"text": text, "output": {"url": picture}} for text, picture in shown.items()] or None,
    )
    return data.to_dict()


def _results(run: RunRecord) -> list[tuple[str, str, float]]:
    """Returns the name of each metric, its title with how it was measured, and its value."""
    results = [] if run.loss is None else [("loss", "training loss", run.loss)]
    if run.report is None:
        return results
    for metric, measurement in run.report.figures.items():
        features = "" if metric in NOT_OF_FEATURES else f", features of the {run.report.extractor}"
        title = printable(f"{TITLES[metric]} ({measurement.num_images:,} images by {run.sampler}{features})")
        results.append((metric, title, measurement.value))
    return results


def _describe(run: RunRecord, repo_id: str) -> str:
    """Returns the text between the marks."""
    width, _, height = run.resolution.partition("x")
    kind = f"{'An' if _kind(run) == 'unconditional' else 'A'} {_kind(run)}"
    weights = "moving average (EMA) of the weights" if run.use_ema else "weights of the last step"
    sections = [
        f"# {escape(repo_id.split('/')[-1])}",
        f"{kind} diffusion model of {escape(f'{width}x{height or width}')} {'RGBA ' if run.is_transparent else ''}"
        f"images: a {escape(run.model_class)} of "
        f"{run.num_parameters / 1e6:.2f} M parameters, trained with {escape(run.noise_scheduler_class)} by "
        "sprite-diffusion. "
        f"It holds the {weights}.{_origin(run)}",
        *(["<Gallery />"] if any(run.prompts.values()) else []),
        *([f"![Samples]({run.newest_grid})"] if run.newest_grid else []),
        "## Use it",
        _snippet(run, repo_id),
        "## Data",
        _data_section(run),
        "## Training",
        _training_table(run),
        "## Metrics",
        _metrics_section(run),
        "## Repeat the run",
        f"```bash\naccelerate launch {shlex.quote(printable(run.script))} --config {CONFIG_FILE}\n```",
        "with the file of that name from this repository, the same data"
        f"{' and the model that it began from' if run.base else ''}.",
        "## Limits",
        "It makes only images like those of its data, at their resolution. A small model may reproduce training "
        f"images; {_copies(run)}.",
    ]
    return "\n\n".join(sections)


def _kind(run: RunRecord) -> str:
    """Returns what kind of model it is, as a tag of the Hub."""
    return "text-to-image" if run.prompts else "class-conditional" if run.class_names else "unconditional"


def _task(run: RunRecord) -> str:
    """Returns the Hub's name of what a model does, of which it has none for images by class."""
    return "text-to-image" if run.prompts else "unconditional-image-generation"


def _origin(run: RunRecord) -> str:
    """Returns a sentence on the model that the run began from, if there is one."""
    if run.base is None:
        return ""
    licence = f"licence: {escape(run.base_license)}" if run.base_license else "its licence is not recorded"
    return f" The training began with the weights of {escape(run.base)}; {licence}."


def _snippet(run: RunRecord, repo_id: str) -> str:
    """Returns a program that samples from the model, with a note on how it is loaded."""
    trust = ", trust_remote_code=True" if run.needs_remote_code else ""
    # DDIM needs few steps; diffusers has it for its own schedules alone.
    has_ddim = (
        run.noise_scheduler_class == "ClosedFormDDPMScheduler" and run.ddpm_beta_schedule in SCHEDULES_OF_DIFFUSERS
    )
    steps = f"num_inference_steps={min(SNIPPET_STEPS, run.ddpm_num_steps)}"
    lines = [
        f"from diffusers import {'DDIMScheduler, ' if has_ddim else ''}DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({quote(repo_id)}{trust})",
    ]
    if has_ddim:
        lines.append("pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)")
    note = ""
    of_all = (
        "\n\nThe pipeline, the scheduler and, where it is not diffusers', the network come with this repository "
        "as code, hence `trust_remote_code`. `guidance_scale` above 1 makes images more typical of "
    )
    if run.prompts:
        lines.append(
            f'pipeline({quote(next(iter(run.prompts)))}, guidance_scale=2.0, {steps}).images[0].save("image.png")'
        )
        note = f"{of_all}their prompt."
    elif run.class_names:
        first, last = quote(run.class_names[0]), quote(run.class_names[-1])
        lines += [
            f'pipeline(class_labels=[{first}, {last}], guidance_scale=2.0, {steps}).images[0].save("image.png")',
            f'pipeline(context={{{first}: 1, {last}: 0.6}}, {steps}).images[0].save("mix.png")  # a mix of classes',
        ]
        note = f"{of_all}their class."
    else:
        lines.append(f'pipeline(batch_size=4, {steps}).images[0].save("image.png")')
        if not run.needs_remote_code:
            note = (
                '\n\nWith `custom_pipeline="pipeline", trust_remote_code=True` the same repository gives the pipeline '
                "and the scheduler that it was trained with, which takes other samplers, one seed per image and "
                "starting noise."
            )
            if run.is_transparent:
                note += (
                    " Its images have straight alpha; those of the snippet have colours that are multiplied by alpha, "
                    "which makes a difference where a pixel is half transparent."
                )
    return "```python\n" + "\n".join(lines) + "\n```" + note


def _data_section(run: RunRecord) -> str:
    number = f"{run.num_images:,} images" if run.num_images else "A stream of images"
    licence = f"licence: {escape(run.data_license)}" if run.data_license else "its licence is not recorded"
    classes = f"\n\nClasses: {', '.join(map(escape, run.class_names))}." if run.class_names else ""
    return f"{number} from {escape(_data_name(run))}; {licence}.{classes}"


def _training_table(run: RunRecord) -> str:
    rows = {
        "steps": f"{run.global_step:,}",
        "images seen": f"{run.images_seen:,}",
        "batch size": f"{run.train_batch_size * run.gradient_accumulation_steps * run.num_processes}",
        "learning rate": f"{run.learning_rate:g}, {escape(run.lr_scheduler)}",
        "prediction, schedule": f"{escape(run.prediction_type)}, {escape(run.ddpm_beta_schedule)}, "
        f"T = {run.ddpm_num_steps}",
        "mixed precision": "none, float32" if run.precision == "no" else escape(run.precision),
        "hardware": f"{run.num_processes} process(es) on {escape(run.device)}",
        "time": f"{run.seconds / 60:.1f} min",
        "seed": f"{run.seed}",
        "versions": ", ".join(escape(f"{name} {version}") for name, version in run.versions.items()),
    }
    return "| | |\n|---|---|\n" + "\n".join(table_row(name, value) for name, value in rows.items())


def _metrics_section(run: RunRecord) -> str:
    parts = []
    if run.report is not None:
        guidance = "" if run.guidance_scale is None else f", guidance {run.guidance_scale:g}"
        guidance += "" if run.guide is None else f" by {escape(run.guide)}"
        rows = [
            table_row(TITLES[name], f"{figure.value:.4g}", figure.format_interval(), f"{figure.real:.4g}")
            for name, figure in run.report.figures.items()
        ]
        parts.append(
            f"{run.report.num_images:,} images by {escape(str(run.sampler))}{guidance}, against as many real ones; "
            f"features of the {escape(run.report.extractor)}. Beside each metric stands that of real images that were "
            "held out from the comparison, which is what a perfect model would get.\n\n"
            "| metric | generated | 95% interval | held-out real |\n|---|---|---|---|\n" + "\n".join(rows)
        )
    if run.loss is not None:
        parts.append(
            f"The training loss was {run.loss:.4f}, the mean over the last {run.logging_steps} steps. It "
            "says little about how good images look: see the samples."
        )
    return "\n\n".join(parts) or "None were computed."


def _copies(run: RunRecord) -> str:
    """Returns the end of a sentence: how many samples were near-copies of training images."""
    if run.report is None:
        return "whether this one does was not measured"
    copies = run.report.figures[NEAR_COPIES]
    return (
        f"of {copies.num_images:,} samples, {copies.value:.1%} were near-copies of one (of real images, "
        f"{copies.real:.1%} have such a double in the data)"
    )


def _data_name(run: RunRecord) -> str:
    """Returns the public name of the data: of a path, the last part only."""
    return run.data_source if _is_on_the_hub(run.dataset_name) else Path(run.data_source).name


def _is_on_the_hub(dataset_name: str | None) -> bool:
    """Returns whether `--dataset_name` names a dataset of the Hub."""
    if not dataset_name or dataset_name == BUILT_IN_DATASET or Path(dataset_name).exists():
        return False
    if dataset_name.endswith((".npy", ".parquet")):
        return False
    try:
        validate_repo_id(dataset_name)
    except HFValidationError:
        return False
    return True
