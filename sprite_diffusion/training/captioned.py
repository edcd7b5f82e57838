"""Training on captions, compared with conditional.py: a text encoder reads them, and the network attends to the words.

The text encoder turns the words of a caption into vectors, which the network's cross-attention looks up. It is trained
together with the network, or it is that of `--text_encoder`, which stays as it is.
"""

from dataclasses import replace
from typing import Any

import torch

from pipelines import TextToImageDDPMPipeline
from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.captions import NO_CAPTION
from sprite_diffusion.data.dataset import ImageData, load_image_data
from sprite_diffusion.data.sources import Table
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.outputs import SampleGrid
from sprite_diffusion.sampling.conditions import Condition
from sprite_diffusion.training.augmentation import augment_as_asked
from sprite_diffusion.training.build import build_model, build_noise_scheduler
from sprite_diffusion.training.loss import ddpm_loss
from sprite_diffusion.training.randomness import Draws
from sprite_diffusion.training.steps import Batch
from sprite_diffusion.training.text_encoder import choose_text_encoder, embed_once, tokenize
from sprite_diffusion.training.training_loop import begin_run, training_loop

MAX_GRID_ROWS = 8  # captions in a sample grid, one per row


class CaptionedNetwork(torch.nn.Module):
    """A `UNet2DConditionModel` with the text encoder that is trained together with it."""

    def __init__(self, unet: Any, text_encoder: Any) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """Returns the prediction for noisy images (B, C, H, W) whose captions are `input_ids` (B, L)."""
        embeddings = self.text_encoder(input_ids, attention_mask=attention_mask)[0]  # (B, L, D)
        return self.unet(sample, timestep, encoder_hidden_states=embeddings, **kwargs)


def train(
    config: TrainingConfig, data: ImageData | None = None, table: Table | None = None
) -> TextToImageDDPMPipeline:
    """Trains a model on images with captions, writes it into `config.output_dir`, and returns its pipeline.

    Args:
        config: The flags.
        data: Images with captions, such as those of `load_tensor`; None for those that `config` names.
        table: That of the latter, if it is open already.

    Raises:
        UserInputError: For a flag, file or column that has to be changed.
    """
    if config.noise_scheduler_class == "LinearCorruptionScheduler":
        raise UserInputError("--noise_scheduler_class LinearCorruptionScheduler: use train_unconditional.py")
    if config.model_class not in ("UNet2DModel", "UNet2DConditionModel"):
        raise UserInputError(f"--model_class {config.model_class} takes no captions: use UNet2DConditionModel")
    config = replace(config, model_class="UNet2DConditionModel")  # UNet2DModel with attention to captions
    base = begin_run(config)
    if base is not None and not isinstance(base, TextToImageDDPMPipeline):
        raise UserInputError(f"--init_from {config.init_from} reads no captions: name a model that does")
    data = data or load_image_data(config, with_labels=None, streaming=config.streaming, table=table)
    captions = data.captions
    if captions is None or captions == [""]:
        raise UserInputError(f"{data.source}: there are no captions to train on: give some, or train by class")
    tokenizer, text_encoder = choose_text_encoder(config, captions, base)
    unet = build_model(config, data.num_channels, base=base, cross_attention_dim=text_encoder.config.hidden_size)
    read = tokenize(tokenizer, captions)  # what the network is given of each caption
    if config.text_encoder is None:
        model: torch.nn.Module = CaptionedNetwork(unet, text_encoder)
    else:
        model, read = unet, {"encoder_hidden_states": embed_once(text_encoder, read)}
    noise_scheduler = build_noise_scheduler(config, base)

    def loss_fn(model: Any, batch: Batch, draws: Draws) -> torch.Tensor:
        assert batch.caption_ids is not None  # `data` has them
        caption_ids = torch.where(draws.uniform < config.label_dropout, NO_CAPTION, batch.caption_ids)
        images, kwargs = augment_as_asked(batch.images, draws.augmentation, config)
        kwargs |= {name: values[caption_ids.to(values.device)].to(images.device) for name, values in read.items()}
        return ddpm_loss(
            model, noise_scheduler, images, draws.noise, draws.timesteps, kwargs, config.snr_gamma, config.snr_floor
        )

    prompts = choose_examples(captions)

    def make_pipeline(unet: Any, text_encoder: Any = text_encoder) -> TextToImageDDPMPipeline:
        scheduler = type(noise_scheduler).from_config(noise_scheduler.config)
        return TextToImageDDPMPipeline(
            unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, example_prompts=prompts
        )

    grid = SampleGrid(
        conditions=[Condition.of_prompt(prompt) for prompt in prompts for _ in range(config.eval_batch_size)],
        columns=config.eval_batch_size,
        caption=f"{config.ddpm_num_inference_steps} inference steps, guidance {config.guidance_scale:g}, "
        f"rows: {'; '.join(prompts)}",
        guidance_scale=config.guidance_scale,
    )
    return training_loop(config, data, model, loss_fn, make_pipeline, grid)


def choose_examples(captions: list[str]) -> list[str]:
    """Returns some of the captions, spread over all of them, without the empty one."""
    named = captions[1:]
    count = min(len(named), MAX_GRID_ROWS)
    return [named[i * len(named) // count] for i in range(count)]
