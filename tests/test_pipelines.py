"""Tests the pipelines against diffusers' own, and loads their folders in programs that do not know this project."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from launching import PYTHON, run_command
from PIL import Image
from tiny_network import make_tiny_text_to_image

from models import BasicUNet2DModel, ContextUNet2DModel
from pipelines import (
    ConditionalDDPMPipeline,
    TextToImageDDPMPipeline,
    UnconditionalDDPMPipeline,
    find_unknown_words,
    to_straight_alpha,
)
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.sampling.palettes import Palette

ID2LABEL = {0: "hero", 1: "food", 2: "spell"}


def tiny_unet(num_class_embeds: int | None = None, **kwargs) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=num_class_embeds,
        **kwargs,
    ).eval()


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.fixture
def unconditional() -> UnconditionalDDPMPipeline:
    return quiet(UnconditionalDDPMPipeline(tiny_unet(), ClosedFormDDPMScheduler()))


@pytest.fixture(params=["unet2d", "context"])
def conditional(request) -> ConditionalDDPMPipeline:
    if request.param == "unet2d":
        unet = tiny_unet(num_class_embeds=4)
    else:
        torch.manual_seed(0)
        unet = ContextUNet2DModel(sample_size=8, num_features=8, context_dim=3).eval()
    return quiet(ConditionalDDPMPipeline(unet, ClosedFormDDPMScheduler(), id2label=ID2LABEL))


@pytest.fixture
def by_prompt() -> TextToImageDDPMPipeline:
    return quiet(make_tiny_text_to_image())


def test_same_images_as_the_stock_pipeline(unconditional):
    stock = quiet(DDPMPipeline(unconditional.unet, DDPMScheduler()))
    for num_steps in (10, 100):
        ours = unconditional(2, num_steps, torch.Generator().manual_seed(1), output_type="np").images
        theirs = stock(2, torch.Generator().manual_seed(1), num_steps, output_type="np").images
        # stock's float32 tables cost it up to some 1e-4 of its coefficients, and the network passes that on
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_an_image_depends_on_its_own_seed_only(unconditional):
    together = unconditional(3, 20, seeds(5, 6, 7), output_type="pt").images
    alone = unconditional(1, 20, seeds(6), output_type="pt").images
    # The same arithmetic in another batch size: convolutions may sum in another order, about 1e-6 a step.
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_latents_are_the_noise_that_the_generator_draws(unconditional):
    drawn = unconditional(2, 5, torch.Generator().manual_seed(3), output_type="np").images
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 3, 8, 8, generator=generator)
    given = unconditional(2, 5, generator, latents=latents, output_type="np").images
    np.testing.assert_array_equal(drawn, given)


def test_output_types(unconditional):
    def run(**kwargs):
        return unconditional(2, 3, torch.Generator().manual_seed(0), **kwargs)

    array, tensor, pictures = run(output_type="np"), run(output_type="pt"), run()
    assert array.images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(tensor.images.permute(0, 2, 3, 1).numpy(), array.images)
    assert tensor.images.min() >= 0
    assert tensor.images.max() <= 1
    np.testing.assert_array_equal(np.asarray(pictures.images[1]), np.round(array.images[1] * 255).astype(np.uint8))
    np.testing.assert_array_equal(run(output_type="np", return_dict=False)[0], array.images)


def test_callback_sees_and_changes_the_latents(unconditional):
    timesteps = []

    def blank(pipeline, i, t, tensors):
        timesteps.append((i, int(t)))
        return {"latents": torch.ones_like(tensors["latents"])}

    images = unconditional(1, 4, output_type="np", callback_on_step_end=blank).images
    assert timesteps == [(0, 750), (1, 500), (2, 250), (3, 0)]
    np.testing.assert_array_equal(images, np.ones_like(images))


def test_callback_sees_the_predicted_images(unconditional, conditional):
    for pipeline in (unconditional, conditional):
        seen = []

        def record(pipeline, i, t, tensors, seen=seen):
            assert tensors.keys() == {"pred_original_sample"}
            seen.append(tensors["pred_original_sample"])
            return {}

        images = pipeline(
            batch_size=2,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            callback_on_step_end=record,
            callback_on_step_end_tensor_inputs=("pred_original_sample",),
        ).images
        assert len(seen) == 3
        assert torch.equal((seen[-1] / 2 + 0.5).clamp(0, 1), images)  # DDPM's last step is its prediction
        assert not torch.equal(seen[0], seen[-1])


def test_one_channel_and_non_square():
    pipeline = quiet(
        UnconditionalDDPMPipeline(BasicUNet2DModel(sample_size=(12, 8)).eval(), LinearCorruptionScheduler())
    )
    picture = pipeline(1, 3, torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (8, 12)
    assert picture.mode == "L"


def test_straight_alpha_is_the_quotient():
    # Colour times alpha, and alpha; a colour above its alpha is white, and below half a level there is none.
    pixels = torch.tensor([[0.1, 0.2], [0.3, 0.2], [0.2, 0.1], [0.0019, 0.0019], [0.002, 0.002], [0, 0], [1, 1]])
    images = pixels[:, [0, 0, 0, 1], None, None]
    expected = torch.tensor([0.5, 1, 1, 0, 1, 0, 1])
    straight = to_straight_alpha(images)
    torch.testing.assert_close(straight[:, 0, 0, 0], expected)
    assert torch.equal(straight[:, 3], images[:, 3])
    assert torch.equal(to_straight_alpha(images[:, :3]), images[:, :3])


def test_images_of_four_channels_have_straight_alpha():
    pipeline = quiet(UnconditionalDDPMPipeline(tiny_unet(in_channels=4, out_channels=4), ClosedFormDDPMScheduler()))
    levels = torch.tensor([51, 204, 0, 204])  # colours times alpha, and alpha

    def give(pipeline, i, t, tensors):
        return {"latents": (levels / 127.5 - 1).view(1, 4, 1, 1).expand(2, 4, 8, 8)}

    def run(**kwargs):
        return pipeline(2, 2, callback_on_step_end=give, **kwargs).images

    picture = run()[1]
    assert (picture.mode, picture.size) == ("RGBA", (8, 8))
    assert (np.asarray(picture) == [64, 255, 0, 204]).all()  # 51 / 204 of 255 is 63.75
    np.testing.assert_allclose(run(output_type="np")[0, 0, 0], [0.25, 1, 0, 0.8], atol=1e-6)
    np.testing.assert_allclose(run(output_type="pt")[0, :, 0, 0], [0.25, 1, 0, 0.8], atol=1e-6)


def test_classes_and_shape_are_the_networks(unconditional, conditional):
    assert (unconditional.num_classes, unconditional.sample_shape) == (0, (3, 8, 8))
    assert (conditional.num_classes, conditional.sample_shape) == (3, (3, 8, 8))
    oblong = UnconditionalDDPMPipeline(BasicUNet2DModel(sample_size=[12, 8]), LinearCorruptionScheduler())
    assert oblong.sample_shape == (1, 12, 8)


def test_uniform_noise_starts_uniform():
    pipeline = quiet(UnconditionalDDPMPipeline(BasicUNet2DModel(), LinearCorruptionScheduler(noise_type="uniform")))
    started = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: started.append(args[0]))
    pipeline(4, 2, torch.Generator().manual_seed(0))
    assert started[0].abs().max() <= 1
    assert abs(started[0].std().item() - 3**-0.5) < 0.03  # of U(-1, 1); 3,136 draws give it within 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(unconditional, dtype):
    expected = unconditional(1, 10, seeds(0), output_type="pt").images
    unconditional.unet.to(dtype)
    images = unconditional(1, 10, seeds(0), output_type="pt").images
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    # ten steps of a prediction that is off by the dtype's 2^-8 or 2^-11
    assert (images - expected).abs().mean() < (0.04 if dtype == torch.bfloat16 else 0.005)


@pytest.mark.parametrize(
    "scheduler_class",
    [
        DDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_any_compatible_scheduler_recovers_the_image(scheduler_class):
    """Every sampler has to end at the clean image that the network knows."""
    clean = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    unet = tiny_unet()
    alphas_cumprod = DDPMScheduler().alphas_cumprod

    def predict_noise(sample, timestep, **kwargs):
        t = torch.as_tensor(timestep, dtype=torch.float32).clamp(0, 999)
        alpha_bar = torch.lerp(alphas_cumprod[t.floor().long()], alphas_cumprod[t.ceil().long()], t.frac())
        noise = (sample - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        return type("Output", (), {"sample": noise})

    unet.forward = predict_noise
    scheduler = scheduler_class.from_config(ClosedFormDDPMScheduler(clip_sample=False).config)
    pipeline = quiet(UnconditionalDDPMPipeline(unet, scheduler))
    images = pipeline(1, 25, torch.Generator().manual_seed(0), output_type="pt").images
    # alpha_bar at the last listed t leaves up to sqrt(1 - 0.9999) = 0.01 of noise, half that in [0, 1]
    torch.testing.assert_close(images, clean / 2 + 0.5, atol=0.02, rtol=0)


def test_class_names_ids_and_contexts_agree(conditional):
    def run(**kwargs):
        return conditional(num_inference_steps=5, generator=seeds(0, 1), output_type="np", **kwargs).images

    by_name = run(class_labels=["food", "spell"])
    np.testing.assert_array_equal(run(class_labels=[1, 2]), by_name)
    np.testing.assert_array_equal(run(context=torch.tensor([[0.0, 1, 0], [0, 0, 1]])), by_name)
    np.testing.assert_array_equal(run(context=[{"food": 1}, {"spell": 1}]), by_name)
    assert np.abs(run(class_labels="hero", batch_size=2) - by_name).max() > 1e-3


def test_unet2d_is_given_the_embedding_of_the_label():
    """For a plain class, the hook that mixes classes does what UNet2DModel does by itself."""
    unet = tiny_unet(num_class_embeds=4)
    pipeline = quiet(ConditionalDDPMPipeline(unet, ClosedFormDDPMScheduler()))
    context = torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 0, 0.6]])
    sample, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    with torch.no_grad(), pipeline.conditioned_on(context, guidance_scale=1.0):
        conditioned = pipeline.predict(sample, t)
    with torch.no_grad():
        expected = unet(sample, t, class_labels=torch.tensor([1, 3, 0])).sample
        table = unet.class_embedding.weight
        unet.class_embedding.weight[0] = table[0] + 0.6 * (table[2] - table[3])
        mixed = unet(sample[2:], t, class_labels=torch.tensor([0])).sample
    torch.testing.assert_close(conditioned[:2], expected[:2], atol=0, rtol=0)
    torch.testing.assert_close(conditioned[2:], mixed, atol=1e-5, rtol=1e-4)
    assert not unet.class_embedding._forward_hooks


def test_mixed_classes_lie_between(conditional):
    def run(**context):
        return conditional(context=context, num_inference_steps=3, generator=seeds(0), output_type="np").images

    hero, mix = run(hero=1), run(hero=1, food=0.6)
    assert np.abs(hero - mix).max() > 1e-4
    np.testing.assert_array_equal(run(hero=1, food=0), hero)


def test_guidance_is_the_formula_in_one_batch(conditional):
    batches = []

    def run(**kwargs):
        outputs = []

        def record(module, args, output):
            batches.append(len(args[0]))
            outputs.append(output.sample)

        hook = conditional.unet.register_forward_hook(record)
        conditional(num_inference_steps=1, latents=latents, generator=seeds(0, 1), **kwargs)
        hook.remove()
        return outputs[0]

    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, uncond = run(class_labels=["hero", "food"]), run(batch_size=2)
    both = run(class_labels=["hero", "food"], guidance_scale=3.0)
    assert batches == [2, 2, 4]
    torch.testing.assert_close(both, torch.cat([cond, uncond]), atol=1e-5, rtol=1e-4)

    seen = []
    step = conditional.scheduler.step
    conditional.scheduler.step = lambda output, *args, **kw: (seen.append(output), step(output, *args, **kw))[1]
    run(class_labels=["hero", "food"], guidance_scale=3.0)
    torch.testing.assert_close(seen[0], 3 * cond - 2 * uncond, atol=1e-4, rtol=1e-4)


def test_a_guide_is_led_away_from(unconditional):
    """Karras et al. 2024: w times the network's prediction, and 1 - w times the guide's."""
    guide = tiny_unet()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def run(**kwargs):
        return unconditional(2, 3, seeds(0, 1), output_type="np", **kwargs).images

    sample, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    with torch.no_grad(), unconditional.conditioned_on(guide, 3.0):
        own, weaker = unconditional.unet(sample, t).sample, guide(sample, t).sample
        torch.testing.assert_close(unconditional.predict(sample, t), 3 * own - 2 * weaker, atol=1e-5, rtol=1e-5)
    guided, plain = run(guide=guide, guidance_scale=3.0), run()
    assert np.abs(guided - plain).max() > 1e-2
    for same in ({"guide": guide}, {"guide": unconditional.unet, "guidance_scale": 3.0}):
        np.testing.assert_array_equal(run(**same), plain)
    with pytest.raises(ValueError, match="an unconditional model needs a `guide`"):
        run(guidance_scale=2.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("negative_prompt", [None, "blue cat"])
def test_prompts_and_guidance_are_those_of_stable_diffusion(by_prompt, guidance_scale, negative_prompt):
    """Its pipeline, without the autoencoder, ends at the latents that ours makes images of."""
    by_prompt.text_encoder.config.use_attention_mask = True  # or it would read behind the end of a prompt
    stock = StableDiffusionPipeline(
        vae=None,
        text_encoder=by_prompt.text_encoder,
        tokenizer=by_prompt.tokenizer,
        unet=by_prompt.unet,
        scheduler=DDIMScheduler.from_config(by_prompt.scheduler.config, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    kwargs = {
        "prompt": ["a red cat", "two dogs"],
        "negative_prompt": None if negative_prompt is None else [negative_prompt] * 2,
        "guidance_scale": guidance_scale,
        "num_images_per_prompt": 2,
        "num_inference_steps": 5,
        "latents": latents,
    }
    expected = quiet(stock)(**kwargs, output_type="latent").images
    by_prompt.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    images = by_prompt(**kwargs, output_type="pt").images
    torch.testing.assert_close(images, to_straight_alpha((expected / 2 + 0.5).clamp(0, 1)), atol=1e-4, rtol=0)
    assert (images[0] - images[2]).abs().max() > 1e-3


def test_prompts_and_their_embeddings_agree(by_prompt):
    def run(*args, **kwargs):
        return by_prompt(*args, num_inference_steps=3, generator=seeds(0, 1), output_type="np", **kwargs).images

    prompts = ["a red cat", "two dogs"]
    expected = run(prompts)
    np.testing.assert_array_equal(run(prompt_embeds=by_prompt.encode_prompt(prompts)), expected)
    np.testing.assert_array_equal(run("a red cat", batch_size=2)[0], expected[0])
    np.testing.assert_array_equal(run("A Red  CAT", num_images_per_prompt=2)[0], expected[0])
    np.testing.assert_array_equal(run(batch_size=2), run("", batch_size=2))
    assert np.abs(run(batch_size=2) - expected).max() > 1e-4
    negative = by_prompt.encode_prompt("blue")
    guided = run(prompts, guidance_scale=2.0, negative_prompt="blue")
    np.testing.assert_array_equal(run(prompts, guidance_scale=2.0, negative_prompt_embeds=negative), guided)


def test_what_a_model_can_not_read_is_said_once(by_prompt, caplog):
    prompt = "A reed cat and a Zebra, a reed"
    assert find_unknown_words(by_prompt.tokenizer, prompt) == ["reed", "and", "zebra"]
    for _ in range(2):
        by_prompt.encode_prompt([prompt, "a red cat, asleep"])
    assert caplog.messages == [
        "the prompt has 11 tokens, this model takes 7: 'Zebra, a reed' is left out",
        "this model has never seen the word 'reed'; words like it that it has seen: red",
        "this model has never seen the word 'and'; words like it that it has seen: none",
        "this model has never seen the word 'zebra'; words like it that it has seen: none",
    ]
    caplog.clear()
    by_prompt("a red cat", negative_prompt="blue", num_inference_steps=1)
    assert caplog.messages == ["`negative_prompt` has no effect at a `guidance_scale` of 1"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": ["a", "a"], "batch_size": 3}, "2 prompts for a `batch_size` of 3"),
        ({"prompt": ["a", "a"], "negative_prompt": ["red"] * 3}, "3 negative prompts for 2 images"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "`num_images_per_prompt` is 0: it must be at least 1"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 7, 128)}, "pass `prompt` or `prompt_embeds`, not both"),
        ({"prompt_embeds": torch.zeros(1, 7, 64)}, r"shape \(1, 7, 64\): it must be \(B, L, 128\)"),
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": "a", "batch_size": 0}, "must be at least 1"),
    ],
)
def test_what_the_caller_of_a_prompt_got_wrong(by_prompt, kwargs, message):
    with pytest.raises(ValueError, match=message):
        by_prompt(num_inference_steps=1, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": "dragon"}, "unknown class 'dragon': this model's classes are hero, food, spell"),
        ({"class_labels": 3}, "unknown class 3"),
        ({"class_labels": -1}, "unknown class -1"),
        ({"context": {"hero": 1, "cake": 1}}, "unknown class 'cake'"),
        ({"context": torch.zeros(2, 4)}, r"shape \(2, 4\): it must be \(B, 3\)"),
        ({"class_labels": [0, 1], "context": torch.zeros(2, 3)}, "not both"),
        ({"class_labels": [0, 1], "batch_size": 3}, "2 classes for a `batch_size` of 3"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()] * 3}, "list of 3, but `batch_size` is 2"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"latents": torch.zeros(1, 3, 8, 4)}, r"shape \(1, 3, 8, 4\): this model takes \(1, 3, 8, 8\)"),
        ({"output_type": "latent"}, "must be 'pil', 'np' or 'pt'"),
        ({"callback_on_step_end_tensor_inputs": ("noise",)}, r"\['noise'\]: it can pass \['latents', 'pred"),
    ],
)
def test_what_the_caller_got_wrong(conditional, kwargs, message):
    with pytest.raises(ValueError, match=message):
        conditional(num_inference_steps=1, **kwargs)


LOAD = """
import sys
for name in ("models", "pipelines", "schedulers", "sprite_diffusion"):
    sys.modules[name] = None  # an editable install would be found from anywhere
import numpy as np, torch
from diffusers import DiffusionPipeline
folder, out, trust, kwargs = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=trust == "trust")
pipeline.set_progress_bar_config(disable=True)
images = pipeline(generator=torch.Generator().manual_seed(4), num_inference_steps=20, output_type="np",
                  **eval(kwargs)).images
np.save(out, images)
print(type(pipeline).__name__, type(pipeline.unet).__name__, type(pipeline.scheduler).__name__)
pipeline.save_pretrained(folder + "-again")
"""


def load_elsewhere(tmp_path, folder, trust: str, **kwargs) -> tuple[str, np.ndarray]:
    """Loads a pipeline folder with diffusers alone, in a process that can't import this project."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    command = [*PYTHON, "-I", "-c", LOAD, str(folder), str(tmp_path / "images.npy"), trust, repr(kwargs)]
    # As many threads as here: sums in another order would differ in their last bits.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = run_command(command, cwd=elsewhere, environment=threads)
    return result.stdout.strip(), np.load(tmp_path / "images.npy")


def test_unconditional_folder_is_stock(unconditional, tmp_path):
    folder = tmp_path / "model"
    unconditional.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    classes, images = load_elsewhere(tmp_path, folder, "no-trust", batch_size=2)
    assert classes == "DDPMPipeline UNet2DModel DDPMScheduler"
    expected = unconditional(2, 20, torch.Generator().manual_seed(4), output_type="np").images
    np.testing.assert_allclose(images, expected, atol=2e-3)  # as for the stock pipeline above


def test_folder_with_own_network_carries_its_code(tmp_path):
    torch.manual_seed(0)
    pipeline = quiet(UnconditionalDDPMPipeline(BasicUNet2DModel().eval(), LinearCorruptionScheduler()))
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)
    classes, images = load_elsewhere(tmp_path, folder, "trust", batch_size=2)
    assert classes == "UnconditionalDDPMPipeline BasicUNet2DModel LinearCorruptionScheduler"
    expected = pipeline(2, 20, torch.Generator().manual_seed(4), output_type="np").images
    np.testing.assert_array_equal(images, expected)


def test_conditional_folder_carries_its_code(conditional, tmp_path):
    folder = tmp_path / "model"
    conditional.save_pretrained(folder)
    generator = torch.Generator().manual_seed(4)
    expected = conditional(
        ["hero", "food"], None, 2.0, num_inference_steps=20, generator=generator, output_type="np"
    ).images
    # once as saved by us, once as saved by the program that loaded it
    for source in (folder, tmp_path / "model-again"):
        classes, images = load_elsewhere(tmp_path, source, "trust", class_labels=["hero", "food"], guidance_scale=2.0)
        assert classes.split()[0] == "ConditionalDDPMPipeline"
        assert classes.split()[2] == "ClosedFormDDPMScheduler"
        np.testing.assert_array_equal(images, expected)


class TestPalette:
    COLOURS = ("#000000", "ffffff", "#D02c30", "2050a0", "60c040")

    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_is_that_of_sample_py(self, channels):
        """As what scipy's search finds nearest, for `sample.py --palette FILE`; grey images have greys."""
        colours = ("#000000", "#ffffff", "808080") if channels == 1 else self.COLOURS
        unet = tiny_unet(in_channels=channels, out_channels=channels)
        pipeline = quiet(UnconditionalDDPMPipeline(unet, ClosedFormDDPMScheduler()))
        kwargs = {"batch_size": 3, "num_inference_steps": 3, "output_type": "pt"}
        raw = pipeline(**kwargs, generator=seeds(0, 1, 2)).images
        snapped = pipeline(**kwargs, generator=seeds(0, 1, 2), palette=colours).images
        levels = np.array([list(bytes.fromhex(colour.removeprefix("#"))) for colour in colours], np.uint8)
        assert torch.equal(snapped, Palette(levels, "").snap(raw))
        assert not torch.equal(snapped, raw)

    @pytest.mark.parametrize("palette", [[], ["red"], ["#12345"], ["#1234567"], ["#12 456"]])
    def test_what_is_no_colour_is_an_error(self, unconditional, palette):
        with pytest.raises(ValueError, match="`palette` has"):
            unconditional(num_inference_steps=1, palette=palette)


SCHEDULERS = {
    "ddpm": ClosedFormDDPMScheduler,
    "stock ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "corruption": LinearCorruptionScheduler,
}


class TestEditing:
    """Images that are changed: noised in part, or drawn anew in part."""

    KWARGS: ClassVar = {"batch_size": 2, "num_inference_steps": 5, "output_type": "pt"}

    def pipeline(self, scheduler: str, channels: int = 4) -> UnconditionalDDPMPipeline:
        unet = tiny_unet(in_channels=channels, out_channels=channels)
        cls = SCHEDULERS[scheduler]
        config = (
            {} if cls is LinearCorruptionScheduler else ClosedFormDDPMScheduler(timestep_spacing="trailing").config
        )
        return quiet(UnconditionalDDPMPipeline(unet, cls.from_config(config)))

    def images(self, channels: int = 4) -> torch.Tensor:
        """Images of whole levels, with some pixels transparent that have a colour below."""
        images = torch.randint(256, (2, channels, 8, 8), generator=torch.Generator().manual_seed(3)) / 255
        if channels == 4:
            images[:, 3, :4] = 0
        return images

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_what_is_kept_is_kept_bit_for_bit(self, scheduler):
        pipeline, images = self.pipeline(scheduler), self.images()
        same = pipeline(**self.KWARGS, image=images, strength=0, generator=seeds(0, 1)).images
        assert torch.equal(same, images)
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., 3:6, 2:] = 1
        for strength in (None, 0.4):
            drawn = pipeline(
                **self.KWARGS, image=images, mask_image=mask, strength=strength, generator=seeds(0, 1)
            ).images
            kept = (mask == 0).expand_as(images)
            assert torch.equal(drawn[kept], images[kept])
            assert (drawn != images)[~kept].float().mean() > 0.5
        pictures = VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
        kwargs = {**self.KWARGS, "output_type": "pil"}
        for picture, before in zip(pipeline(**kwargs, image=pictures, strength=0).images, pictures, strict=True):
            assert picture.mode == "RGBA"
            assert picture.tobytes() == before.tobytes()

    @pytest.mark.parametrize("channels", [3, 4])
    @pytest.mark.parametrize(("strength", "left"), [(0.2, 1), (0.6, 3), (0.5, 2), (0.7, 4), (0.01, 1), (1, 5)])
    def test_a_share_of_the_steps_is_done(self, channels, strength, left):
        """As by hand, in the way of diffusers' image-to-image pipelines, with its DDIM."""
        pipeline, images = self.pipeline("ddim", channels), self.images(channels)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
        changed = pipeline(**self.KWARGS, image=images, strength=strength, latents=noise).images
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(5)
        timesteps = scheduler.timesteps[5 - left :]
        clean_images = images.clone()
        if channels == 4:
            clean_images[:, :3] *= images[:, 3:]
        x = noise if strength == 1 else scheduler.add_noise(2 * clean_images - 1, noise, timesteps[:1])
        with torch.no_grad():
            for t in timesteps:
                x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
        assert torch.equal(changed, to_straight_alpha((x / 2 + 0.5).clamp(0, 1)))

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_the_kept_part_is_at_the_level_of_noise_of_each_step(self, scheduler):
        """As the network sees it: with the right share of the image and of the same noise at each step."""
        pipeline, images = self.pipeline(scheduler, 3), self.images(3)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., :4] = 1
        seen = []
        hook = pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append((args[1], args[0])))
        pipeline(**self.KWARGS, image=images, mask_image=mask, strength=0.6, latents=noise, generator=seeds(0, 1))
        hook.remove()
        assert len(seen) == (5 if scheduler == "heun" else 3)
        if scheduler == "corruption":
            expected = [pipeline.scheduler.add_noise(2 * images - 1, noise, t.expand(2)) for t, _ in seen]
        else:
            process = ClosedFormDDPMScheduler()
            expected = [process.add_noise(2 * images - 1, noise, t.long().expand(2)) for t, _ in seen]
        for (_, sample), x in zip(seen, expected, strict=True):
            torch.testing.assert_close(sample[..., 4:], x[..., 4:], atol=1e-5, rtol=1e-5)

    def test_pictures_are_laid_on_white_where_a_model_has_no_alpha(self):
        picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        changed = self.pipeline("ddim", 3)(image=picture, strength=0).images[0]
        assert changed.mode == "RGB"
        assert changed.getcolors() == [(64, (255, 255, 255))]

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"strength": 0.5}, "need an `image`"),
            ({"mask_image": torch.ones(1, 1, 8, 8)}, "need an `image`"),
            ({"image": torch.zeros(1, 3, 8, 8), "strength": 1.5}, "between 0 and 1"),
            (
                {"image": torch.zeros(1, 4, 8, 8)},
                r"`image` has the shape \(1, 4, 8, 8\): this model takes \(2, 3, 8, 8\)",
            ),
            ({"image": torch.zeros(3, 3, 8, 8)}, "`image` has the shape"),
            ({"image": torch.zeros(1, 3, 8, 8), "mask_image": torch.ones(1, 3, 8, 8)}, "`mask_image` has the shape"),
            ({"image": Image.new("RGB", (9, 8))}, "`image` has the shape"),
        ],
    )
    def test_what_does_not_fit_is_an_error(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            self.pipeline("ddim", 3)(**self.KWARGS, **kwargs)

    def test_a_scheduler_that_counts_its_calls_can_not_begin_midway(self):
        pipeline = self.pipeline("ddim", 3)
        pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
        with pytest.raises(ValueError, match="PNDMScheduler can't begin midway"):
            pipeline(image=torch.zeros(1, 3, 8, 8), strength=0.5, num_inference_steps=5)

    def test_classes_are_edited_too(self, conditional):
        image = torch.rand(1, *conditional.sample_shape)
        kwargs = {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 2}
        drawn = conditional(["hero", "food"], image=image, strength=0.5, generator=seeds(0, 0), **kwargs).images
        assert len(drawn) == 2
        assert not torch.equal(drawn[0], drawn[1])
        assert torch.equal(conditional("hero", image=image, strength=0, **kwargs).images, image)


def test_folder_with_captions_carries_its_code(by_prompt, tmp_path):
    folder = tmp_path / "model"
    by_prompt.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    kwargs = {"prompt": "two dogs", "guidance_scale": 2.0, "num_images_per_prompt": 2}
    generator = torch.Generator().manual_seed(4)
    expected = by_prompt(num_inference_steps=20, generator=generator, output_type="np", **kwargs).images
    for source in (folder, tmp_path / "model-again"):
        classes, images = load_elsewhere(tmp_path, source, "trust", **kwargs)
        assert classes == "TextToImageDDPMPipeline UNet2DConditionModel ClosedFormDDPMScheduler"
        np.testing.assert_array_equal(images, expected)
