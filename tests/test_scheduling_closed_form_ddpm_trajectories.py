"""Tests whole reverse processes, for all combinations of options, against float64 and against diffusers' scheduler."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from schedulers.scheduling_closed_form_ddpm import ClosedFormDDPMScheduler

SHAPE = (2, 3, 4, 4)
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
# Zero terminal SNR with epsilon is refused, so it is no combination.
PREDICTIONS = [("epsilon", False), *itertools.product(["sample", "v_prediction"], [False, True])]
X0_LIMITS = {
    "unclipped": {"clip_sample": False},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.8},
    "thresholded": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
}
# With 1,000 of 1,000 timesteps every spacing lists 999..0.
SHORT_CHAINS = [
    *itertools.product(["linspace", "leading", "trailing"], [0], [10, 50]),
    *itertools.product(["leading"], [1], [10, 50]),
]
LONG_CHAINS = [("leading", 0, 1000)]
NUM_COMBINATIONS = len(SCHEDULES) * len(VARIANCES) * len(PREDICTIONS) * len(X0_LIMITS)


def reference_betas(schedule, rescale):
    """Returns the betas of the schedules' formulas, in float64."""
    steps = np.arange(1000)
    if schedule == "linear":
        betas = 1e-4 + (0.02 - 1e-4) * steps / 999
    elif schedule == "scaled_linear":
        betas = (1e-4**0.5 + (0.02**0.5 - 1e-4**0.5) * steps / 999) ** 2
    elif schedule == "sigmoid":
        betas = 1e-4 + (0.02 - 1e-4) / (1 + np.exp(6 - 12 * steps / 999))
    else:
        u = np.arange(1001) / 1000
        if schedule == "squaredcos_cap_v2":
            signal = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        else:
            snr = np.exp(-0.5 * np.where(u > 0.5, -1, 1) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6))
            signal = np.sqrt(snr / (1 + snr))
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    if rescale:
        root = np.sqrt(np.cumprod(1 - betas))
        root = root[0] * (root - root[-1]) / (root[0] - root[-1])
        betas = np.append(1 - root[0] ** 2, 1 - (root[1:] / root[:-1]) ** 2)
    return betas


def limit_x0(x0, config):
    if config.get("thresholding"):
        # Rank of the quantile with linear interpolation, by sorting.
        sorted_magnitudes = x0.abs().flatten(1).sort(1).values
        rank = config["dynamic_thresholding_ratio"] * (sorted_magnitudes.shape[1] - 1)
        low, fraction = int(rank), rank - int(rank)
        threshold = sorted_magnitudes[:, low] * (1 - fraction) + sorted_magnitudes[:, low + 1] * fraction
        threshold = threshold.clamp(1, config["sample_max_value"]).view(-1, 1, 1, 1)
        return torch.minimum(torch.maximum(x0, -threshold), threshold) / threshold
    if config["clip_sample"]:
        return x0.clamp(-config["clip_sample_range"], config["clip_sample_range"])
    return x0


def reference_run(model, timesteps, alpha_bar, config, noises):
    """Runs Algorithm 2 of Ho et al. 2020 with eq. 7, in float64; without noise at the last step."""
    x = noises[0]
    trajectory = []
    for i, t in enumerate(timesteps):
        alpha_bar_t = alpha_bar[t]
        alpha_bar_prev = alpha_bar[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        beta = 1 - alpha_bar_t / alpha_bar_prev
        output = model(x, t)
        if config["variance_type"].startswith("learned"):
            output, extra = output.chunk(2, dim=1)
        if config["prediction_type"] == "epsilon":
            x0 = (x - (1 - alpha_bar_t) ** 0.5 * output) / alpha_bar_t**0.5
        elif config["prediction_type"] == "v_prediction":
            x0 = alpha_bar_t**0.5 * x - (1 - alpha_bar_t) ** 0.5 * output
        else:
            x0 = output
        x0 = limit_x0(x0, config)
        mean = (
            alpha_bar_prev**0.5 * beta / (1 - alpha_bar_t) * x0
            + (1 - beta) ** 0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * x
        )
        x = mean
        if i + 1 < len(timesteps):
            small = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta
            variance = {"fixed_small": small, "fixed_large": beta}.get(config["variance_type"].removesuffix("_log"))
            if config["variance_type"] == "learned":
                variance = extra
            elif config["variance_type"] == "learned_range":
                mix = (extra + 1) / 2
                variance = torch.exp(mix * np.log(beta) + (1 - mix) * np.log(small))
            x = mean + variance**0.5 * noises[i + 1]
        trajectory.append(x)
    return torch.stack(trajectory)


def make_model(alpha_bar, config):
    """Returns the optimal predictor of images from N(mean, 0.5^2), linear in x; in float64 for every run."""
    mean = torch.linspace(-0.9, 0.9, SHAPE[1] * SHAPE[2] * SHAPE[3], dtype=torch.float64).view(1, *SHAPE[1:])
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    # E[x_0 | x_t] = mean + gain (x_t - signal mean)
    gain = 0.25 * signal / (0.25 * alpha_bar + noise**2)
    slope, offset = gain, 1 - gain * signal
    if config["prediction_type"] != "sample":  # epsilon = (x_t - signal x_0) / noise
        slope, offset = (1 - signal * slope) / noise, -signal * offset / noise
    if config["prediction_type"] == "v_prediction":  # v = signal epsilon - noise x_0
        slope, offset = signal * slope - noise * gain, signal * offset - noise * (1 - gain * signal)
    offsets = torch.from_numpy(offset).view(-1, 1, 1, 1, 1) * mean
    texture = torch.sin(40 * mean).expand(SHAPE)
    variance = {"learned": 1e-3 * (1.5 + texture), "learned_range": texture}.get(config["variance_type"])

    def model(x, t):
        output = torch.add(offsets[t], x.double(), alpha=slope[t])
        if variance is not None:
            output = torch.cat([output, variance], dim=1)
        return output.to(x.dtype)

    return model


def scheduler_run(scheduler, model, noise_seed, x):
    generator = torch.Generator().manual_seed(noise_seed)
    trajectory = []
    for t, t_host in zip(scheduler.timesteps, scheduler.timesteps.tolist(), strict=True):
        x = scheduler.step(model(x, t_host), t, x, generator=generator, return_dict=False)[0]
        trajectory.append(x)
    return torch.stack(trajectory)


def tolerance(prediction_type, timesteps, alpha_bar):
    """Returns 1e-5, unless the float32 rounding of the model's output by itself costs more."""
    if prediction_type != "epsilon":
        return 1e-5
    now, previous = alpha_bar[timesteps], np.append(alpha_bar[timesteps[1:]], 1.0)
    # d x_{t-1} / d epsilon. It is 3,000 in the first of 10 steps of squaredcos_cap_v2, where sqrt(alpha_bar) is 5e-5;
    # elsewhere at most 3. Outputs below 4 round by 2^-23; the product with the noise rate rounds once more.
    slope = (previous - now) / previous**0.5 / (1 - now) ** 0.5 / now**0.5
    return max(1e-5, 2 * 2**-23 * slope.max())


def error(trajectory, reference):
    return (trajectory.double() - reference).abs().amax(dim=(1, 2, 3, 4))  # per step


def run_all(config, num_steps, alpha_bar):
    """Return the timesteps and, with the same noise, the trajectories of the reference, of ours and of stock."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # laplace ends with much signal
        ours = ClosedFormDDPMScheduler(**config)
    stock = DDPMScheduler(**config)
    if num_steps < 1000:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
    timesteps = ours.timesteps.tolist()
    assert timesteps == stock.timesteps.tolist()

    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()]
    noises += [torch.randn(SHAPE, generator=generator).double() for _ in timesteps]
    model = make_model(alpha_bar, config)
    reference = reference_run(model, timesteps, alpha_bar, config, noises)
    return timesteps, reference, *(scheduler_run(s, model, 1, noises[0].float()) for s in (ours, stock))


@pytest.mark.parametrize("x0_limit", X0_LIMITS)
@pytest.mark.parametrize(("prediction_type", "rescale"), PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "chains", [SHORT_CHAINS, pytest.param(LONG_CHAINS, marks=pytest.mark.slow)], ids=["10-50", "1000"]
)
def test_runs_stay_with_float64_and_with_stock(chains, schedule, prediction_type, rescale, x0_limit):
    alpha_bar = np.cumprod(1 - reference_betas(schedule, rescale))
    for variance_type, (spacing, steps_offset, num_steps) in itertools.product(VARIANCES, chains):
        config = {
            "beta_schedule": schedule,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": rescale,
            "variance_type": variance_type,
            "timestep_spacing": spacing,
            "steps_offset": steps_offset,
            **X0_LIMITS[x0_limit],
        }
        timesteps, reference, our_run, stock_run = run_all(config, num_steps, alpha_bar)
        # A step in float32 rounds some 6 times, each by 2^-24 of values up to 5, together 2e-6; each later step
        # shrinks what has gathered.
        allowed = tolerance(prediction_type, timesteps, alpha_bar)
        assert error(our_run, reference).max() <= allowed, config

        # Stock takes the square root of a negative log variance, and adds noise to the image if its last t is not 0.
        if variance_type == "fixed_large_log":
            assert stock_run.isnan().any()
            continue
        num_right = len(timesteps) - (timesteps[-1] > 0)
        reference, our_run, stock_run = reference[:num_right], our_run[:num_right], stock_run[:num_right]
        assert (error(our_run, stock_run) <= error(stock_run, reference) + allowed).all(), config


def test_what_float32_tables_cost_stock_in_1000_steps():
    alpha_bar = np.cumprod(1 - reference_betas("squaredcos_cap_v2", False))
    config = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "sample",
        "variance_type": "fixed_small",
        "clip_sample": False,
    }
    _, reference, our_run, stock_run = run_all(config, 1000, alpha_bar)
    assert error(our_run, reference).max() < 1e-5
    assert 4e-4 < error(stock_run, reference).max() < 5e-4


def test_number_of_combinations_is_the_documented_one():
    assert NUM_COMBINATIONS * len(SHORT_CHAINS + LONG_CHAINS) == 4050
