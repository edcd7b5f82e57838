"""The page of the studio, by gradio."""

import html
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipelines import DEFAULT_STRENGTH
from sprite_diffusion.common.errors import UserInputError, first_line, mask_secrets, printable
from sprite_diffusion.common.flags import MAX_SEED
from sprite_diffusion.sampling.editing import read_picture
from sprite_diffusion.sampling.pictures import make_single_picture
from sprite_diffusion.studio.drawing import (
    EVERY_CLASS,
    LIMITS,
    MAX_PROMPT,
    MIX,
    NO_CLASS,
    Drawing,
    Model,
    Settings,
    draw,
    write_files,
)
from sprite_diffusion.studio.snippet import write_snippet

MAX_SLIDERS = 12  # of a mix: those of more classes would fill the page
MAX_WAITING = 16  # clicks, of all who have the page open
MAX_FILE_SIZE = "20mb"  # of a picture that is loaded
MAX_PICTURE_PIXELS = 2**22
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")  # not those whose decoders start programs
MAX_PARTS = 6  # of the canvas: what lies below, layers, and both together
CANVAS_SIDE = 384  # pixels, of the picture that a mask is painted on
WAITING, DRAWING = "Waiting ...", "Drawing ..."
BRUSH = ("#ff00ff", 0.6)  # what lies below is seen through it
ALL_OF_IT, PAINTED = "all of it", "what is painted"
LOOPBACK = ["127.0.0.1", "localhost"]
HALVES = ("upper half", "lower half", "left half", "right half")
CSS = """
#sprites img { image-rendering: pixelated;
  background: repeating-conic-gradient(#ccc 0 25%, #fff 0 50%) 0 0 / 16px 16px; }
#sprites .grid-container { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); padding-top: 2em; }
#sprites .thumbnail-item { display: block; height: auto; aspect-ratio: auto; }
#sprites .caption-label { position: static; max-width: none; background: none; }
input[type=range]:focus-visible { outline: 2px solid currentColor; }
.dark { color-scheme: dark; }
"""
# Screen readers say what changes in an element of this role.
SCRIPT = "() => { document.getElementById('status').setAttribute('role', 'status'); }"
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def bound_canvas(canvas: gr.ImageEditor) -> None:
    """Has a canvas take no more than a person can have painted, whatever a visitor sends."""
    # Not by a subclass, beside whose module gradio would write a file.
    read = canvas.preprocess

    def preprocess(payload: Any) -> Any:
        parts = [] if payload is None else [payload.background, *payload.layers, payload.composite]
        width, height = canvas.canvas_size
        if len(parts) > MAX_PARTS or any(_count_pixels(part) > 4 * width * height for part in parts if part):
            raise gr.Error("this is more than fits on the canvas")
        return read(payload)

    canvas.preprocess = preprocess  # type: ignore[method-assign]
    # By these, parts that no click ever uses would stay in memory; without them they come with the click.
    canvas.accept_blobs, canvas.server_fns = None, []


def _count_pixels(part: Any) -> int:
    """Returns the pixels of a picture's file, without decoding it."""
    with Image.open(part.path, formats=PICTURE_FORMATS) as picture:
        return picture.width * picture.height


def build_page(model: Model) -> gr.Blocks:
    """Returns the page of a model."""
    with gr.Blocks(
        title=f"{mask_secrets(Path(model.name).name)}: studio", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gr.HTML(f"<h1>{html.escape(mask_secrets(Path(model.name).name))}</h1>")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                controls = {**_add_conditions(model), **_add_sampling(model)}
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
                    stop = gr.Button("Stop", min_width=100, elem_id="stop")
            with gr.Column(scale=2, min_width=300):
                status = gr.HTML(_say("Nothing is drawn yet."), elem_id="status")
                sprites = gr.Gallery(
                    label="Sprites: choose one to change it",
                    format="png",
                    interactive=False,
                    allow_preview=False,
                    object_fit="contain",
                    height="auto",
                    buttons=[],
                    elem_id="sprites",
                )
                picture, canvas, part, controls["strength"] = _add_editing(model, status)
                files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
                code = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="code")
        drawn = gr.State()  # the images

        def on_draw(chosen: torch.Tensor | None, painted: Any, where: str, *values: Any) -> Iterator[tuple]:
            yield from _draw(model, dict(zip(controls, values, strict=True)), chosen, painted, where)

        clicks = [start.click, *([controls["prompt"].submit] if "prompt" in controls else [])]
        inputs = [picture, canvas, part, *controls.values()]
        options: dict[str, Any] = {"concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
        waiting = gr.on(clicks, lambda: _say(WAITING), None, status, **QUICK)
        started = waiting.then(on_draw, inputs, [status, sprites, files, code, drawn], **options)
        stopped = stop.click(None, cancels=[started], **QUICK)
        stopped.then(lambda: _say("Stopped."), None, status, **QUICK)  # after what was on its way to the page
        sprites.select(_choose, drawn, [picture, canvas, status], **QUICK)
    return page


def build_notice(name: str, message: str) -> gr.Blocks:
    """Returns a page that says why there is no studio."""
    with gr.Blocks(title=f"{mask_secrets(name)}: studio", analytics_enabled=False) as page:
        gr.HTML(f"<h1>{html.escape(mask_secrets(name))}</h1>" + _say(message), elem_id="status")
    return page


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serves a page in the background, and returns its address; at any free port if none is given.

    Raises `UserInputError` if the address can't be listened at.
    """
    # Fonts of the system: those of gradio's own theme are asked for on the web.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    is_own = host in LOOPBACK
    try:  # before gradio does, which would say that no port is left
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        raise UserInputError(f"--host {host} --port {port}: {first_line(error)}; name others") from None
    _, url, _ = page.queue(max_size=MAX_WAITING).launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        theme=theme,
        css=CSS,
        js=SCRIPT,
        run_history=False,
        # Or a page elsewhere could have its own name point to this machine, and ask this one.
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)]} if is_own else None,
        prevent_thread_lock=True,
    )
    return url


def _add_conditions(model: Model) -> dict[str, Any]:
    """Adds the controls of what images are to show, by the names that `Settings` has for them."""
    pipeline = model.pipeline
    if not pipeline.is_conditional:
        return {}
    guidance = gr.Slider(*_limits("guidance_scale"), value=2, step=0.5, label="Guidance: how typical", render=False)
    if model.takes_prompts:
        examples = pipeline.example_prompts
        prompt = gr.Textbox(examples[0] if examples else "", label="Prompt", max_length=MAX_PROMPT, elem_id="prompt")
        if examples:
            with gr.Accordion("Prompts like those it was trained on", open=False):
                gr.Examples([[text] for text in examples], prompt)
        negative = gr.Textbox(label="Away from", max_length=MAX_PROMPT, elem_id="negative")
        return {"prompt": prompt, "negative_prompt": negative, "guidance_scale": guidance.render()}
    names = [(pipeline.id2label.get(id, str(id)), str(id)) for id in range(pipeline.num_classes)]
    mixes = len(names) <= MAX_SLIDERS
    choices: list[Any] = [EVERY_CLASS, *names, NO_CLASS, *([MIX] if mixes else [])]
    asked = gr.Dropdown(choices, value=EVERY_CLASS, label="Class", elem_id="class")
    controls = {"class_id": asked, "guidance_scale": guidance}
    if mixes:
        with gr.Accordion("A mix of classes", open=False):
            for name, id in names:
                slider = gr.Slider(0, 1, value=0, step=0.1, label=name, elem_id=f"weight-{id}")
                slider.input(lambda: MIX, None, asked, **QUICK)
                controls[f"weight_{id}"] = slider
    guidance.render()
    return controls


def _add_sampling(model: Model) -> dict[str, Any]:
    """Adds the controls of how images are drawn, by the names that `Settings` has for them."""
    count = gr.Slider(*_limits("num_images"), value=8, step=1, label="Sprites", elem_id="count")
    with gr.Row():
        seed = gr.Number(0, label="Seed of the first", precision=0, minimum=0, min_width=100, elem_id="seed")
        reseed = gr.Button("Other seeds", min_width=100, elem_id="reseed")
    reseed.click(lambda now, n: ((now or 0) + n) % (MAX_SEED + 1), [seed, count], seed, **QUICK)
    controls = {"num_images": count, "seed": seed}
    with gr.Accordion("How", open=False):
        most = min(_limits("num_inference_steps")[1], len(model.pipeline.scheduler))
        controls["sampler"] = gr.Dropdown(model.samplers, value=model.samplers[0], label="Sampler", elem_id="sampler")
        controls["num_inference_steps"] = gr.Slider(
            1, max(2, most), model.num_inference_steps, step=1, label="Steps", elem_id="steps"
        )
        if model.palette is not None:
            label = "Only colours of the images that it was trained on"
            controls["uses_palette"] = gr.Checkbox(True, label=label, elem_id="palette")
            controls["colours_per_image"] = gr.Slider(0, 32, 8, step=1, label="Colours of a sprite at most (0: any)")
        if model.pipeline.sample_shape[0] == 4:
            controls["binary_alpha"] = gr.Checkbox(True, label="Each pixel opaque or transparent", elem_id="alpha")
    return controls


def _add_editing(model: Model, status: gr.HTML) -> tuple[gr.State, gr.ImageEditor, gr.Radio, Any]:
    """Adds the controls of a picture to change; returns its state, its canvas, its part and the strength."""
    picture = gr.State()
    height, width = model.pipeline.sample_shape[1:]
    scale = _canvas_scale(height, width)
    with gr.Accordion("Change a picture", open=True):
        with gr.Row():
            load = gr.UploadButton("Load a picture", file_types=["image"], elem_id="load")
            leave = gr.Button("Draw from noise again", elem_id="leave")
        part = gr.Radio([ALL_OF_IT, PAINTED, *HALVES], value=ALL_OF_IT, label="Draw anew", elem_id="part")
        strength = gr.Slider(
            *_limits("strength"), value=DEFAULT_STRENGTH, step=0.05, label="By how much", elem_id="strength"
        )
        canvas = gr.ImageEditor(
            type="pil",
            label="Paint what is to be drawn anew",
            sources=[],
            transforms=[],
            layers=False,
            brush=gr.Brush(2 * scale, [BRUSH], BRUSH, "fixed"),
            eraser=gr.Eraser(2 * scale),
            canvas_size=(scale * width, scale * height),
            fixed_canvas=True,
            format="png",
            buttons=[],
            visible=False,
            elem_id="canvas",
        )
    bound_canvas(canvas)
    chosen = [picture, canvas, status]
    one_at_a_time: dict[str, Any] = {**QUICK, "queue": True, "concurrency_limit": 1}
    load.upload(lambda path: _load(model, path), load, chosen, **one_at_a_time)
    leave.click(_leave, None, chosen, **QUICK)
    part.input(lambda where: DEFAULT_STRENGTH if where == ALL_OF_IT else 1.0, part, strength, **QUICK)
    return picture, canvas, part, strength


def _limits(name: str) -> tuple[Any, Any]:
    """Returns the ends of a slider."""
    return LIMITS[name].at_least, LIMITS[name].at_most


def _draw(
    model: Model, values: dict[str, Any], picture: torch.Tensor | None, painted: Any, where: str
) -> Iterator[tuple]:
    """Yields what the page shows on the way to a drawing, and at its end; of an error of the user's the line."""
    try:
        settings = _read_settings(values)
        mask = None if picture is None else _read_mask(where, painted, *picture.shape[2:])
        yield _say(DRAWING), gr.skip(), None, None, gr.skip()
        for shown in draw(model, settings, picture, mask):
            if not isinstance(shown, Drawing):
                yield _say(DRAWING), [make_single_picture(image, 1) for image in shown], None, None, gr.skip()
                continue
            asked = zip(shown.request.conditions, shown.request.seeds, strict=True)
            captions = [f"{condition.name or ''} {seed}".strip() for condition, seed in asked]
            pictures = [make_single_picture(image, 1) for image in shown.images]
            with TemporaryDirectory() as folder:
                files = [str(path) for path in write_files(model, shown, Path(folder))]
                said = _say(
                    "\n".join([f"{len(pictures)} drawn by {shown.sampler.label}.", *model.check_prompts(settings)])
                )
                code = write_snippet(model, settings, shown)
                yield said, list(zip(pictures, captions, strict=True)), files, code, shown.images
    except UserInputError as error:
        yield _say(str(error)), gr.skip(), gr.skip(), gr.skip(), gr.skip()
    except Exception:
        yield _say("That did not work; what happened stands in the terminal."), *[gr.skip()] * 4
        raise


def _read_settings(values: dict[str, Any]) -> Settings:
    """Returns the values of controls. Raises `UserInputError` for what is not a whole number and should be one."""
    for name in {"num_images", "seed", "num_inference_steps", "colours_per_image"} & values.keys():
        if not isinstance(values[name], int):
            raise UserInputError(f"--{name} is {values[name]}: it must be a whole number")
    weights = tuple(float(values.pop(name)) for name in [*values] if name.startswith("weight_"))
    return Settings(weights=weights, **values)


def _read_mask(where: str, painted: Any, height: int, width: int) -> torch.Tensor | None:
    """Returns the mask (1, 1, H, W) of what is to be drawn anew, 1 there; None for all of the picture.

    Of what is painted, a pixel is drawn anew if half of it was painted. Raises `UserInputError` if nothing was.
    """
    if where == ALL_OF_IT:
        return None
    mask = torch.zeros(1, 1, height, width)
    if where in HALVES:
        rows, columns = torch.arange(height)[:, None] * 2, torch.arange(width)[None] * 2
        parts = (rows < height, rows >= height, columns < width, columns >= width)
        return mask + parts[HALVES.index(where)]
    for layer in (painted or {}).get("layers") or []:
        scale = _canvas_scale(height, width)
        alpha = np.asarray(layer.convert("RGBA").resize((width * scale, height * scale), Image.Resampling.NEAREST))[
            ..., 3
        ]
        share = (alpha > 0).reshape(height, scale, width, scale).mean(axis=(1, 3))
        mask[0, 0][torch.from_numpy(share >= 0.5)] = 1
    if not mask.any():
        raise UserInputError(
            "nothing is painted: paint what is to be drawn anew, or choose another part of the picture"
        )
    return mask


def _canvas_scale(height: int, width: int) -> int:
    """Returns the side of a pixel of the picture on the canvas."""
    return max(1, CANVAS_SIDE // max(height, width))


def _choose(images: torch.Tensor | None, event: gr.SelectData) -> tuple:
    """Returns the sprite that was clicked as the picture to change, on the canvas, and what to say."""
    if images is None or not 0 <= event.index < len(images):
        return gr.skip(), gr.skip(), _say("Wait until it is drawn.")
    return _show(images[event.index : event.index + 1], f"Sprite {event.index + 1} is to be changed.")


def _load(model: Model, path: str) -> tuple:
    """Returns the picture of a file as the picture to change, on the canvas, and what to say."""
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:  # reads its head alone
            if picture.width * picture.height > MAX_PICTURE_PIXELS:
                raise UserInputError(f"{path} has more than {MAX_PICTURE_PIXELS:,} pixels: load a smaller picture")
        return _show(read_picture(model.pipeline, Path(path)), "The picture is to be changed.")
    except UserInputError as error:
        text = str(error)
    except Exception:  # decoders raise whatever a broken file leads them to
        text = f"{path} can't be read: load one of {', '.join(PICTURE_FORMATS)}"
    return gr.skip(), gr.skip(), _say(text.replace(path, Path(path).name))


def _show(picture: torch.Tensor, text: str) -> tuple:
    """Returns a picture (1, C, H, W) to change, its canvas, and what to say."""
    background = make_single_picture(picture[0], _canvas_scale(*picture.shape[2:]))
    value: Any = {"background": background, "layers": [], "composite": None}
    return picture, gr.ImageEditor(value=value, visible=True), _say(text)


def _leave() -> tuple:
    """Returns no picture, no canvas, and what to say."""
    return None, gr.ImageEditor(value=None, visible=False), _say("Sprites are drawn from noise.")


def _say(text: str) -> str:
    """Returns lines of text for the page."""
    return f"<p>{'<br>'.join(html.escape(printable(line)) for line in mask_secrets(text).splitlines())}</p>"
