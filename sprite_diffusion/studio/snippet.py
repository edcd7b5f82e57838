"""The Python that makes a drawing again, with the files of the drawing beside it."""

import torch

from sprite_diffusion.studio.drawing import EVERY_CLASS, MIX, NO_CLASS, Drawing, Model, Settings


def write_snippet(model: Model, settings: Settings, drawing: Drawing) -> str:
    """Returns a program whose `images` are those of the drawing, as `PIL.Image`s."""
    pipeline = model.pipeline
    dtype = pipeline.unet.dtype
    options = "" if dtype == torch.float32 else f", {dtype}"
    device = "" if pipeline.device.type == "cpu" else f".to({pipeline.device.type!r})"
    arguments = {**_name_conditions(model, settings), **_name_edit(drawing)}
    finishes = bool(drawing.finish.record)
    seeds = drawing.request.seeds
    lines = [
        "import torch",
        *(["from PIL import Image"] if drawing.request.edit is not None else []),
        *(["from torchvision.transforms.functional import pil_to_tensor"] if finishes and _has_mask(drawing) else []),
        "",
        *(["from sprite_diffusion.sampling.palettes import Finish, choose_palette"] if finishes else []),
        *(["from sprite_diffusion.sampling.pictures import make_single_picture"] if finishes else []),
        "from sprite_diffusion.sampling.pipeline_loading import load_pipeline",
        "from sprite_diffusion.sampling.samplers import make_sampler",
        "",
        f"pipeline = load_pipeline({model.name!r}{options}){device}",
        f'sampler = make_sampler("sampler", pipeline, {settings.sampler_name!r}, {settings.num_inference_steps})',
        "pipeline.scheduler = sampler.scheduler",
        "images = pipeline(",
        *(f"    {name}={value}," for name, value in arguments.items()),
        f"    batch_size={len(seeds)},",
        f"    num_inference_steps={settings.num_inference_steps},",
        f"    generator=[torch.Generator().manual_seed(seed) for seed in range({seeds[0]}, {seeds[-1] + 1})],",
        *(['    output_type="pt",'] if finishes else []),
        ").images",
        *(_finish(model, drawing) if finishes else []),
    ]
    return "\n".join(lines) + "\n"


def _name_conditions(model: Model, settings: Settings) -> dict[str, str]:
    """Returns the arguments that say what images are to show, as Python."""
    if not model.pipeline.is_conditional:
        return {}
    if model.takes_prompts:
        negative = {"negative_prompt": repr(settings.negative_prompt)} if settings.negative_prompt else {}
        return {"prompt": repr(settings.prompt), **negative, "guidance_scale": str(settings.guidance_scale)}
    names = model.pipeline.id2label
    guidance = {"guidance_scale": str(settings.guidance_scale)}
    if settings.class_id == NO_CLASS:
        return guidance
    if settings.class_id == MIX:
        return {"context": str({names.get(i, i): w for i, w in enumerate(settings.weights) if w}), **guidance}
    if settings.class_id == EVERY_CLASS:
        ids = [i % model.pipeline.num_classes for i in range(settings.num_images)]
    else:
        ids = [int(settings.class_id)]
    return {"class_labels": str([names.get(id, id) for id in ids]), **guidance}


def _name_edit(drawing: Drawing) -> dict[str, str]:
    """Returns the arguments of a picture that was changed, as Python."""
    edit = drawing.request.edit
    if edit is None:
        return {}
    mask = {"mask_image": 'Image.open("mask.png")'} if edit.mask is not None else {}
    return {"image": 'Image.open("image.png")', "strength": str(edit.strength), **mask}


def _has_mask(drawing: Drawing) -> bool:
    return drawing.request.edit is not None and drawing.request.edit.mask is not None


def _finish(model: Model, drawing: Drawing) -> list[str]:
    """Returns the lines that do to the images what was done after they were drawn."""
    palette, lines = "None", []
    if drawing.finish.palette is not None:
        channels, limit = model.pipeline.sample_shape[0], drawing.finish.palette.colours_per_image
        palette = f'choose_palette("auto", {model.name!r}, {channels}, colours_per_image={limit})'
    if _has_mask(drawing):
        lines = [
            'kept, mask = (pil_to_tensor(Image.open(name))[None] for name in ("image.png", "mask.png"))',
            "images = torch.where(mask > 0, images, kept / 255)",
        ]
    return [
        f"images = Finish({palette}, binary_alpha={drawing.finish.binary_alpha})(images.float().cpu())",
        *lines,
        "images = [make_single_picture(image, scale=1) for image in images]",
    ]
