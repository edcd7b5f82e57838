"""Draw the figures of schedulers.md, and measure what it says of DDIM and of tutorials, and networks.md of a network.

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
from diffusers import DDIMScheduler
from torch import nn

from models import ContextUNet2DModel
from schedulers.scheduling_closed_form_ddpm import ClosedFormDDPMScheduler
from sprite_diffusion.data.sprites import draw_sprite, draw_sprites
from sprite_diffusion.runs.presets import load_preset
from sprite_diffusion.training.build import build_model

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
    image = torch.from_numpy(draw_sprite(0).image[..., :3]).permute(2, 0, 1).float() / 127.5 - 1  # uint8 -> [-1, 1]
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


def measure_simple_loss() -> None:
    """Equation 12 of Ho et al. 2020 with sigma^2 = beta weighs the timesteps, equation 14 does not."""
    scheduler = ClosedFormDDPMScheduler()
    weights = scheduler.betas / (2 * scheduler.alphas * (1 - scheduler.alphas_cumprod))
    print("eq. 12: weight of the squared error of the noise, 1 in eq. 14")
    print("   " + ", ".join(f"t = {t}: {weights[t]:.4f}" for t in (0, 1, 10, 100, 999)))


def sample_gaussian(scheduler: Any, num_steps: int, alpha_bar: torch.Tensor, **step_options: Any) -> torch.Tensor:
    """Samples images distributed as N(0, 0.5^2) by the best prediction of the noise, which is linear in x_t."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=generator)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        noise = sample * (1 - alpha_bar[t]).sqrt() / (0.25 * alpha_bar[t] + 1 - alpha_bar[t])
        sample = scheduler.step(noise, t, sample, generator=generator, **step_options).prev_sample
    return sample


def measure_ddim() -> None:
    """DDIM with eta = 1 is DDPM with the posterior variance, where nothing is clipped."""
    print("DDIM with eta = 1 against DDPM: largest difference of a pixel")
    for num_steps, clip_sample, options in (
        (1000, False, {}),
        (50, False, {}),
        (1000, True, {}),
        (1000, True, {"use_clipped_model_output": True}),
    ):
        ddpm = ClosedFormDDPMScheduler(clip_sample=clip_sample)
        alpha_bar = ddpm.alphas_cumprod
        ddim = DDIMScheduler.from_config(ddpm.config)
        expected = sample_gaussian(ddpm, num_steps, alpha_bar)
        differences = []
        for table in (ddim.alphas_cumprod, alpha_bar):
            ddim.alphas_cumprod = table
            sample = sample_gaussian(ddim, num_steps, alpha_bar, eta=1.0, **options)
            differences.append((sample - expected).abs().max().item())
        words = [f"{num_steps:4} steps", f"clip_sample={clip_sample}", *(f"{k}={v}" for k, v in options.items())]
        print(f"   {', '.join(words)}: {differences[0]:.1e}, with our float64 alpha_bar {differences[1]:.1e}")


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


def measure_missing_noise() -> None:
    """A sampler that adds noise where `timestep > 1`, with timesteps that count from 0, adds none at t = 1."""
    scheduler = ClosedFormDDPMScheduler()
    beta, alpha, alpha_bar = (x.numpy() for x in (scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod))
    alpha_bar_prev = np.append(1, alpha_bar[:-1])
    posterior_variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    print("4. no noise at t = 1")
    print(f"   std of the noise that is missing: {np.sqrt(posterior_variance[1]):.4f}, ", end="")
    print(f"{np.sqrt(posterior_variance[1]) * 127.5:.2f} of 255 levels")
    # The best prediction of an image distributed as N(0, 0.5^2) is linear in x_t, and so is each step.
    data_variance = 0.25
    image_per_x = np.sqrt(alpha_bar) * data_variance / (alpha_bar * data_variance + 1 - alpha_bar)
    slope = np.sqrt(alpha_bar_prev) * beta * image_per_x + np.sqrt(alpha) * (1 - alpha_bar_prev)
    slope /= 1 - alpha_bar
    for first_noisy in (1, 2):
        variance = 1.0
        for t in range(999, -1, -1):
            variance = slope[t] ** 2 * variance + (posterior_variance[t] if t >= first_noisy else 0)
        print(f"   noise where timestep > {first_noisy - 1}: samples of std {np.sqrt(variance):.6f}")


def measure_mix_factor() -> None:
    """The last step of a chain of mixtures has to go all the way to the prediction."""
    print("5. share of the starting noise that is left after n steps")
    for name, offset in (("1/(n - i)", 0), ("1/(n - i + 1)", 1)):
        for n in (5, 40, 50):
            left = 1.0
            for i in range(n):
                left *= 1 - 1 / (n - i + offset)
            print(f"   mix_factor = {name}, n = {n:2}: {left:.4f}, {left * 255:.1f} of 255 levels")


def measure_last_activation() -> None:
    """`BasicUNet` of the Hugging Face diffusion course, unit 1, has SiLU after its last layer."""
    lowest = F.silu(torch.linspace(-5, 5, 1_000_001, dtype=torch.float64)).min().item()
    print("6. SiLU after the last layer")
    cut_off = (1 + lowest) / 2
    print(f"   min of SiLU: {lowest:.4f}")
    print(
        f"   of [-1, 1] the lowest {cut_off:.0%} is out of reach, black comes out as level {cut_off * 255:.0f} of 255"
    )


def measure_wrapped_pixels() -> None:
    """A cast to uint8 takes an integer modulo 256."""
    print("7. pixels outside of [0, 1] as uint8, by way of int64")
    for value in (-0.01, -0.1, -1.0, 1.01):
        truncated, rounded = (np.int64(x).astype(np.uint8) for x in (value * 255, np.round(value * 255)))
        print(f"   {value:5} * 255 = {value * 255:7.2f}: {truncated:3}, rounded first {rounded:3}")


@torch.no_grad()
def measure_random_shortcut() -> None:
    """The course's network makes a convolution in `forward`, with new random weights at each call."""
    print("8. the random shortcut, freshly initialised networks: rms change of the output, as a share of its std")
    torch.manual_seed(0)
    sample = torch.randn(16, 3, 16, 16)
    timesteps = (0, 124, 249, 374, 498)  # of 500

    def predict(model: ContextUNet2DModel, t: int, shortcut_of: int) -> torch.Tensor:
        model.register_to_config(shortcut_seed=shortcut_of - t)  # to which the network adds t
        return model(sample, t).sample

    for norm_type in ("batch", "group"):
        # Not in eval(): there, new batch norms would not normalise.
        model = ContextUNet2DModel(norm_type=norm_type, num_train_timesteps=500)
        own = torch.stack([predict(model, t, shortcut_of=t) for t in timesteps])
        neighbour = torch.stack([predict(model, t, shortcut_of=t + 1) for t in timesteps])
        later = torch.stack([predict(model, t + 1, shortcut_of=t) for t in timesteps])
        for name, other in (("shortcut of t + 1, same time", neighbour), ("same shortcut, time t + 1", later)):
            change = (own - other).square().mean().sqrt() / own.std()
            print(f"   {norm_type} norm, {name}: {change:.1e}")


def measure_pool() -> None:
    """`AvgPool2d(4)` at the bottom of the course's network, whose sides there are a quarter of the image's."""
    print("9. positions that AvgPool2d(4) sees")
    for side in (16, 20, 24, 28):
        features = torch.zeros(1, 1, side // 4, side // 4, requires_grad=True)
        nn.AvgPool2d(4)(features).sum().backward()
        seen = features.grad.count_nonzero()
        print(f"   {side} pixels: {seen} of {features.numel()}, {seen / features.numel():.0%}")


def print_networks() -> None:
    """The network of configs/sprites_unconditional.yaml, block by block, and the course's."""

    def count(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()):,} parameters"

    def print_block(name: str, block: nn.Module) -> None:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            print(f"   {name:14} -> {tuple(output.shape)}, {count(block)}", end="")
            channels = [resnet.in_channels for resnet in getattr(block, "resnets", [])]
            print(f", residual blocks that take {channels}" if channels else "")

        block.register_forward_hook(hook, with_kwargs=True)

    model = build_model(load_preset("sprites_unconditional.yaml"), num_channels=3)
    print(f"the default network: {count(model)}, {model.config.norm_num_groups} groups")
    frequencies = model.time_proj(torch.ones(1))[0, 32:].arcsin()  # of their sines, at t = 1
    print(f"   frequencies {frequencies[0]:.3g} to {frequencies[-1]:.3g}: ", end="")
    print(f"periods of {2 * np.pi / frequencies[0]:.1f} to {2 * np.pi / frequencies[-1]:,.0f} timesteps")
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            for i, block in enumerate(child):
                print_block(f"{name}.{i}", block)
        else:
            print_block(name, child)
    model(torch.zeros(1, 3, 16, 16), torch.tensor([0]))
    print(f"the course's network: {count(ContextUNet2DModel())}")


def measure_groups() -> None:
    """What is left, after a group norm, of a number that was added to each channel."""
    print("group norm of 64 channels: rms change of its output where a random number is added to each channel")
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(16, 64, 16, 16, generator=generator)
    embedding = torch.randn(16, 64, 1, 1, generator=generator)
    for groups in (64, 32):
        norm = nn.GroupNorm(groups, 64)
        change = (norm(hidden_states + embedding) - norm(hidden_states)).square().mean().sqrt()
        print(f"   {groups} groups of {64 // groups}: {change:.1e}")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    warnings.filterwarnings("ignore", "The last of", UserWarning)  # laplace, drawn because it does so
    draw_schedules()
    draw_variances()
    draw_forward_process()
    measure_simple_loss()
    measure_ddim()
    measure_unsquared_noise()
    measure_exclusive_randint()
    measure_backward_of_loss()
    measure_missing_noise()
    measure_mix_factor()
    measure_last_activation()
    measure_wrapped_pixels()
    measure_random_shortcut()
    measure_pool()
    print_networks()
    measure_groups()


if __name__ == "__main__":
    main()
