"""Trains the sprite course's network as the course does, with its faults or without, to be judged by their images.

python -m benchmarks.tutorial_faults OUT --faults noise shortcut --dataset_name sprites.npy --labels_file labels.npy
python calculate_metrics.py OUT --scheduler ddpm --num_inference_steps 500 --dataset_name sprites.npy ...

The faults: "noise" scales the noise of training by 1 - alpha_bar in place of its square root, "shortcut" draws the
first block's 1x1 convolution anew at each call. Everything else is the course's training with context: 32 epochs, 100
images a step, Adam whose learning rate falls from 1e-3 to 0 once an epoch, the label kept with probability 0.8.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from models import ContextUNet2DModel
from pipelines import ConditionalDDPMPipeline
from sprite_diffusion.common.machine import prepare_cpu
from sprite_diffusion.data.config import parse_data_flags
from sprite_diffusion.data.dataset import ImageData, load_image_data
from sprite_diffusion.data.decoding import to_model_range
from sprite_diffusion.sampling.conditions import Condition, one_hot
from sprite_diffusion.sampling.course_checkpoint import course_scheduler
from sprite_diffusion.sampling.generation import Request, sample_images
from sprite_diffusion.sampling.samplers import make_sampler
from sprite_diffusion.training.steps import make_dataloader

NUM_EPOCHS = 32
BATCH_SIZE = 100
NUM_STEPS = 500  # T
FAULTS = ("noise", "shortcut")


def train(data: ImageData, faults: list[str], seed: int, num_epochs: int) -> ConditionalDDPMPipeline:
    """Returns the pipeline of a network that is trained on labelled images of 16x16 pixels."""
    torch.manual_seed(seed)
    num_classes = len(data.class_names or ())
    model = ContextUNet2DModel(
        norm_type="batch",
        context_dim=num_classes,
        num_train_timesteps=NUM_STEPS,
        shortcut_seed=seed if "shortcut" in faults else None,
    )
    scheduler = course_scheduler()
    alpha_bar = scheduler.alphas_cumprod.float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    dataloader: DataLoader = make_dataloader(data, BATCH_SIZE)
    steps = 0
    for epoch in tqdm(range(num_epochs), unit="epoch"):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / num_epochs)
        for batch in dataloader:
            images = to_model_range(batch["images"])
            kept = torch.rand(len(images)) < 0.8
            context = F.one_hot(batch["class_labels"], num_classes) * kept[:, None]
            noise, t = torch.randn_like(images), torch.randint(0, NUM_STEPS, (len(images),))
            rate = alpha_bar[t][:, None, None, None]
            noise_rate = 1 - rate if "noise" in faults else (1 - rate).sqrt()
            if "shortcut" in faults:  # as many numbers apart as there are timesteps: another shortcut at each call
                steps += 1
                model.register_to_config(shortcut_seed=seed + steps * NUM_STEPS)
            prediction = model(rate.sqrt() * images + noise_rate * noise, t, context=context).sample
            loss = F.mse_loss(prediction, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {loss.item()}")
    names = dict(enumerate(data.class_names or ()))
    return ConditionalDDPMPipeline(unet=model.eval(), scheduler=scheduler, id2label=names)


def compare_shortcuts(pipeline: ConditionalDDPMPipeline, num_images: int = 25) -> None:
    """Prints how far images of the same noise differ by the random shortcut, and without a shortcut from those."""
    layer = pipeline.unet.conv_in.shortcut
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    sampler = make_sampler("--scheduler", pipeline, "ddim", 25)
    conditions = [Condition.of_classes(str(i % 5), one_hot(i % 5, pipeline.num_classes)) for i in range(num_images)]
    images = []
    for seed in (1, 10**6, None):
        pipeline.unet.register_to_config(shortcut_seed=seed)
        images.append(sample_images(pipeline, sampler, Request(list(range(num_images)), conditions)))
    random, other, none = images
    print(f"two random shortcuts: images differ by an rms of {(random - other).square().mean().sqrt():.3f} in [0, 1]")
    print(f"none and a random one: by {(none - random).square().mean().sqrt():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_epochs", type=int, default=NUM_EPOCHS)
    args, data_flags = parser.parse_known_args()
    prepare_cpu(num_threads=None)
    data = load_image_data(parse_data_flags([*data_flags, "--resolution=16"], None), with_labels=True)
    pipeline = train(data, args.faults, args.seed, args.num_epochs)
    pipeline.save_pretrained(str(args.output_dir))
    if "shortcut" in args.faults:
        compare_shortcuts(pipeline)


if __name__ == "__main__":
    main()
