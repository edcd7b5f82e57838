"""Losses: what the network is to predict at a timestep, and how much an error there counts."""

from typing import Any

import torch
import torch.nn.functional as F


def ddpm_loss(
    model: Any,
    noise_scheduler: Any,
    clean_images: torch.Tensor,  # (B, C, H, W) in [-1, 1]
    noise: torch.Tensor,  # (B, C, H, W), standard normal, float32
    timesteps: torch.Tensor,  # (B,) in 0..T-1
    model_kwargs: dict[str, torch.Tensor],
    snr_gamma: float | None = None,
    snr_floor: float = 0.0,
) -> torch.Tensor:
    """Returns the simple loss of Ho et al. 2020 (equation 14), for any prediction type, weighted by `loss_weights`."""
    noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
    model_output = model(noisy_images, timesteps, **model_kwargs).sample.float()
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "sample":
        target = clean_images
    else:  # v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, Salimans and Ho 2022, appendix D
        target = noise_scheduler.get_velocity(clean_images, noise, timesteps)
    loss = F.mse_loss(model_output, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return (loss_weights(noise_scheduler, timesteps, snr_gamma, snr_floor) * loss).mean()


def loss_weights(
    noise_scheduler: Any, timesteps: torch.Tensor, snr_gamma: float | None, snr_floor: float = 0.0
) -> torch.Tensor:
    """Returns weights (B,) of the squared error at each timestep.

    An error of the predicted image of weight SNR is an error of the predicted noise of weight 1, so `sample` is
    weighted by the SNR as in the official script. Min-SNR (Hang et al. 2023, section 3.4) caps that weight at gamma. A
    floor of 1 is the truncated SNR of Salimans and Ho 2022, section 4: what a caption says of the whole image is
    learned where little else is to be seen, and there the SNR is next to 0.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if snr_gamma is None and snr_floor == 0 and prediction_type != "sample":
        return torch.ones_like(timesteps, dtype=torch.float32)
    alphas_cumprod = noise_scheduler.alphas_cumprod  # float64: in float32, 1 - alpha_bar is coarse at small t
    snr = (alphas_cumprod / (1 - alphas_cumprod)).float().to(timesteps.device)[timesteps]
    sample_weights = snr.clamp(min=snr_floor, max=snr_gamma)
    if prediction_type == "sample":
        return sample_weights
    return sample_weights / (snr if prediction_type == "epsilon" else snr + 1)


def corruption_loss(
    model: Any,
    noise_scheduler: Any,
    clean_images: torch.Tensor,  # (B, C, H, W) in [-1, 1]
    noise: torch.Tensor,  # (B, C, H, W), standard normal, float32
    timesteps: torch.Tensor,  # (B,) in 0..T-1
) -> torch.Tensor:
    """Returns the squared error of the clean image that is predicted from a linear mix of it with noise."""
    noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
    return F.mse_loss(model(noisy_images, timesteps).sample.float(), clean_images)
