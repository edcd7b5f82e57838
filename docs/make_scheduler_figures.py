"""Draw the figures of schedulers.md and measure what it says of three tutorials.

Run from the root of the repository, with matplotlib installed: python -m docs.make_scheduler_figures
"""

import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from schedulers.scheduling_closed_form_ddpm import ClosedFormDDPMScheduler
from sprite_diffusion.data.sprites import draw_sprite, draw_sprites

IMAGES = Path(__file__).parent / "images"
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear (Stable Diffusion)": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "linear, zero terminal SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


def save(figure: plt.Figure, name: str) -> None:
    # No date or version in the file, so that it changes only when the picture does.
    figure.savefig(IMAGES / name, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw_schedules() -> None:
    levels, level_axes = plt.subplots(figsize=(6.4, 3.6))
    ratios, ratio_axes = plt.subplots(figsize=(6.4, 3.6))
    for name, config in SCHEDULES.items():
        alpha_bar = ClosedFormDDPMScheduler(**config).alphas_cumprod.numpy()
        style = "--" if "zero" in name else "-"
        level_axes.plot(np.sqrt(alpha_bar), style, label=name)
        with np.errstate(divide="ignore"):
            ratio_axes.plot(np.log10(alpha_bar) - np.log10(1 - alpha_bar), style, label=name)
    level_axes.set(xlabel="t", ylabel="sqrt(alpha_bar)", title="What is left of the image")
    ratio_axes.set(xlabel="t", ylabel="log10 SNR", title="Signal-to-noise ratio, alpha_bar / (1 - alpha_bar)")
    ratio_axes.set_ylim(-9, 5)
    for axes in (level_axes, ratio_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(levels, "noise_schedules.png")
    save(ratios, "signal_to_noise.png")


def draw_variances() -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for num_steps, style in ((1000, "-"), (50, "--")):
        for colour, variance_type in enumerate(("fixed_large", "fixed_small")):
            scheduler = ClosedFormDDPMScheduler(variance_type=variance_type, prediction_type="sample")
            scheduler.set_timesteps(num_steps)
            # One pixel per timestep; x_t and the predicted x_0 are 0, so what `step` returns is its noise.
            zeros = torch.zeros(num_steps, 1, 1, 1, dtype=torch.float64)
            generators = [torch.Generator().manual_seed(0) for _ in range(num_steps)]
            noise = torch.randn(1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            std = scheduler.step(zeros, scheduler.timesteps, zeros, generator=generators).prev_sample / noise
            label = f"{variance_type}, {num_steps} steps"
            # The last step has no noise, hence no place on a logarithmic axis.
            axes.plot(scheduler.timesteps[:-1], std.flatten()[:-1], style, color=f"C{colour}", label=label)
    axes.set(xlabel="t", ylabel="std of the noise added", title="Reverse step, linear schedule")
    axes.loglog()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, "posterior_variance.png")


def draw_forward_process() -> None:
    timesteps = [0, 50, 100, 200, 300, 500, 700, 999]
    image = torch.from_numpy(draw_sprite(0).image).permute(2, 0, 1).float() / 127.5 - 1  # uint8 -> [-1, 1]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    figure, grid = plt.subplots(2, len(timesteps), figsize=(8, 2.4))
    for row, (label, schedule) in zip(grid, {"linear": "linear", "cosine": "squaredcos_cap_v2"}.items(), strict=True):
        scheduler = ClosedFormDDPMScheduler(beta_schedule=schedule)
        for axes, t in zip(row, timesteps, strict=True):
            noisy = scheduler.add_noise(image[None], noise[None], torch.tensor([t]))[0]
            axes.imshow((noisy.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0), interpolation="nearest")  # [-1, 1] -> [0, 1]
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"t = {t}", fontsize=8)
        row[0].set_ylabel(label, fontsize=8)
    save(figure, "forward_process.png")


def measure_unsquared_noise() -> None:
    """`perturb_input` of "How Diffusion Models Work" scales the noise by 1 - alpha_bar."""
    betas = np.linspace(1e-4, 0.02, 501)  # the course's 500 timesteps, counted from 1
    alpha_bar = np.exp(np.cumsum(np.log(1 - betas)))
    alpha_bar[0] = 1
    print("1. noise scaled by 1 - alpha_bar")
    for t in (1, 10, 100, 500):
        wrong, right = 1 - alpha_bar[t], np.sqrt(1 - alpha_bar[t])
        print(f"   t = {t:3}: std {wrong:.5f} in place of {right:.5f}, {right / wrong:.1f} times too little")
    # For images distributed as N(0, 0.5^2) the best prediction of the noise is linear in x_t, and so is each step of
    # the course's sampler: the variance of its samples follows exactly.
    data_variance = 0.25
    for name, noise_std in (("1 - alpha_bar", 1 - alpha_bar), ("its square root", np.sqrt(1 - alpha_bar))):
        variance = 1.0
        for t in range(500, 0, -1):
            epsilon_per_x = noise_std[t] / (alpha_bar[t] * data_variance + noise_std[t] ** 2)
            slope = (1 - epsilon_per_x * betas[t] / np.sqrt(1 - alpha_bar[t])) / np.sqrt(1 - betas[t])
            variance = slope**2 * variance + (betas[t] if t > 1 else 0)
        print(f"   trained with {name}: samples of std {np.sqrt(variance):.3f}, images of std 0.500")


def measure_exclusive_randint() -> None:
    """`torch.randint(0, 999)` of the Hugging Face diffusion course, unit 2, excludes its upper end."""
    drawn = torch.randint(0, 999, (10_000_000,), generator=torch.Generator().manual_seed(0))
    print("2. randint(0, 999)")
    print(f"   10,000,000 draws: largest {drawn.max()}, t = 999 drawn {(drawn == 999).sum()} times, due 10,000 times")
    scheduler = ClosedFormDDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    ones = torch.ones(1, 1, 1, 1)
    results = [scheduler.step(epsilon * ones, 999, ones).pred_original_sample for epsilon in (1.0, 1.01)]
    moved = (results[0] - results[1]).abs().item()
    print(f"   an error of 0.01 in the noise predicted at t = 999, where sampling starts, moves x_0 by {moved:.0f}")


def measure_backward_of_loss() -> None:
    """`loss.backward(loss)` of the Hugging Face diffusion course, unit 1, multiplies the gradient by the loss."""
    print("3. loss.backward(loss)")
    torch.manual_seed(0)
    images = torch.from_numpy(draw_sprites(64)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1  # uint8 -> [-1, 1]
    scheduler = ClosedFormDDPMScheduler()
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def gradient(loss: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        optimizer.zero_grad()
        loss.backward(factor, retain_graph=True)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for step in range(301):
        noise = torch.randn_like(images)
        noisy = scheduler.add_noise(images, noise, torch.randint(0, 1000, (len(images),)))
        loss = F.mse_loss(model(noisy), noise)
        scaled, plain = gradient(loss, loss), gradient(loss, None)
        if step in (0, 30, 300):
            print(
                f"   step {step:3}: loss {loss.item():.4f}, gradient multiplied by {scaled.norm() / plain.norm():.4f}"
            )
        optimizer.step()


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    warnings.filterwarnings("ignore", "The last of", UserWarning)  # laplace, drawn because it does so
    draw_schedules()
    draw_variances()
    draw_forward_process()
    measure_unsquared_noise()
    measure_exclusive_randint()
    measure_backward_of_loss()


if __name__ == "__main__":
    main()
