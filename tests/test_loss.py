"""Tests the losses against the papers' formulas in float64, and the average of the weights against a plain loop."""

import math

import numpy as np
import pytest
import torch

from models import ContextUNet2DModel
from schedulers import ClosedFormDDPMScheduler, LinearCorruptionScheduler
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.runs.weights import ema_tensors, ema_weights, make_ema
from sprite_diffusion.training.loss import corruption_loss, ddpm_loss, loss_weights


class Guess(torch.nn.Module):
    """A network that returns the same tensor for every input, and keeps the input."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer, self.shown = answer, None

    def forward(self, sample, timesteps, **kwargs):
        self.shown = sample
        return type("Output", (), {"sample": self.answer})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    shape = (6, 3, 4, 4)
    clean, noise, answer = (torch.randn(shape, generator=generator) for _ in range(3))
    return clean.clamp(-1, 1), noise, answer, torch.tensor([0, 1, 99, 500, 900, 999])


def alpha_bar_float64() -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddpm_loss_is_the_formula(batch, prediction_type, snr_gamma):
    clean, noise, answer, timesteps = batch
    scheduler = ClosedFormDDPMScheduler(prediction_type=prediction_type)
    model = Guess(answer)
    loss = ddpm_loss(model, scheduler, clean, noise, timesteps, {}, snr_gamma=snr_gamma)

    alpha_bar = alpha_bar_float64()[timesteps.numpy()][:, None, None, None]
    x0, eps, guess = (t.double().numpy() for t in (clean, noise, answer))
    xt = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * eps
    np.testing.assert_allclose(model.shown.numpy(), xt, atol=1e-6)  # numbers below 5 after a few roundings of float32
    target = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x0,
    }[prediction_type]
    snr = alpha_bar / (1 - alpha_bar)
    capped = snr if snr_gamma is None else np.minimum(snr, snr_gamma)
    weight = {"epsilon": capped / snr, "sample": capped, "v_prediction": capped / (snr + 1)}[prediction_type]
    if snr_gamma is None and prediction_type == "v_prediction":
        weight = np.ones_like(snr)
    # Squares and sums are float32, and so is the SNR that weights them, which is good to some 1e-5.
    assert loss.item() == pytest.approx((weight * (guess - target) ** 2).mean(), rel=1e-4)


@pytest.mark.parametrize(("prediction_type", "divisor"), [("sample", 0.0), ("v_prediction", 1.0)])
def test_a_floor_holds_the_weight_of_an_image_where_there_is_little_but_noise(prediction_type, divisor):
    """Salimans and Ho 2022, section 4: max(SNR, 1) times the squared error of the image; of v, that over SNR + 1."""
    scheduler = ClosedFormDDPMScheduler(prediction_type=prediction_type)
    alpha_bar = alpha_bar_float64()
    snr = alpha_bar / (1 - alpha_bar)
    of_v = snr + 1 if divisor else np.ones_like(snr)
    for gamma, weights in ((None, np.maximum(snr, 1)), (5.0, np.clip(snr, 1, 5))):
        found = loss_weights(scheduler, torch.arange(1000), gamma, snr_floor=1.0)
        np.testing.assert_allclose(found.numpy(), weights / of_v, rtol=1e-5)  # float32, good to some 1e-7


def test_min_snr_caps_the_weight_of_nearly_clean_images(batch):
    scheduler = ClosedFormDDPMScheduler()
    timesteps = torch.arange(1000)
    weights = loss_weights(scheduler, timesteps, 5.0)
    # The SNR falls with t: where it is below gamma the weight of the noise is 1, elsewhere gamma / SNR.
    assert (weights[-500:] == 1).all()
    assert weights[0] == pytest.approx(5 * 1e-4 / (1 - 1e-4), rel=1e-3)  # SNR(0) = (1 - beta) / beta
    assert (weights.diff() >= 0).all()


def test_corruption_loss_is_the_formula(batch):
    clean, noise, answer, timesteps = batch
    model = Guess(answer)
    loss = corruption_loss(model, LinearCorruptionScheduler(), clean, noise, timesteps)
    amount = ((timesteps + 1) / 1000).double()[:, None, None, None]
    torch.testing.assert_close(model.shown.double(), (1 - amount) * clean + amount * noise, atol=1e-6, rtol=0)
    assert loss.item() == pytest.approx(((answer - clean).double() ** 2).mean().item(), rel=1e-5)


def test_loss_is_float32_for_a_half_precision_model(batch):
    clean, noise, answer, timesteps = batch
    scheduler = ClosedFormDDPMScheduler()
    loss = ddpm_loss(Guess(answer.bfloat16()), scheduler, clean, noise, timesteps, {})
    assert loss.dtype == torch.float32


def test_ema_averages_weights_and_statistics_and_gives_the_trained_ones_back():
    config = TrainingConfig(use_ema=True, ema_inv_gamma=1.0, ema_power=0.75)
    model = ContextUNet2DModel(sample_size=8, num_features=8, norm_type="batch")
    ema = make_ema(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages: dict[str, torch.Tensor] = {}
    for step in range(1, 6):
        model(torch.randn(4, 3, 8, 8), 5).sample.square().mean().backward()
        optimizer.step()
        ema.step(ema_tensors(model))
        decay = 0.0 if step == 1 else 1 - (1 + (step - 1)) ** -0.75
        for name, tensor in model.state_dict().items():
            old = averages.get(name, torch.zeros(()))
            averages[name] = decay * old + (1 - decay) * tensor.double() if tensor.is_floating_point() else tensor

    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def sample():
        with ema_weights(ema, model):
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(tensor.double(), averages[name].double(), atol=1e-6, rtol=1e-5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # an interrupted sampling must not leave the averages to be trained on
        sample()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert "running_mean" in " ".join(trained)
    assert math.isfinite(ema.cur_decay_value)
