"""Tests LinearCorruptionScheduler against its formulas and against diffusers' scheduler of flow matching."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from schedulers import LinearCorruptionScheduler

ROUNDOFF = 2.0**-24  # of one float32 operation, relative


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1  # [-1, 1]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_train_timesteps", [1, 7, 1000])
def test_coefficients_are_the_float64_ones_rounded_once(num_train_timesteps):
    scheduler = LinearCorruptionScheduler(num_train_timesteps)
    timesteps = torch.arange(num_train_timesteps)
    amounts = np.arange(1, num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    zeros, ones = torch.zeros(num_train_timesteps, 1, 1, 1), torch.ones(num_train_timesteps, 1, 1, 1)
    assert np.array_equal(scheduler.add_noise(zeros, ones, timesteps).flatten(), amounts.astype(np.float32))
    # 1 - amount is rounded in float64 (2^-53) before it is in float32, which may move a tie by one last place.
    np.testing.assert_allclose(
        scheduler.add_noise(ones, zeros, timesteps).flatten(), 1 - amounts, rtol=2 * ROUNDOFF, atol=2.0**-53
    )


@pytest.mark.parametrize("noise_type", ["gaussian", "uniform"])
def test_add_noise_is_the_formula(noise_type):
    scheduler = LinearCorruptionScheduler(50, noise_type)
    clean, noise, timesteps = images(0, 50, 3, 4, 4), normal(1, 50, 3, 4, 4), torch.arange(50)
    z = noise.double().numpy()
    corruption = z if noise_type == "gaussian" else 2 * scipy.stats.norm.cdf(z) - 1
    amount = (np.arange(50) + 1.0).reshape(-1, 1, 1, 1) / 50
    expected = (1 - amount) * clean.double().numpy() + amount * corruption
    # Three roundings (coefficient, product, sum); for uniform noise two more in erf's argument and 4 ulp in erf.
    bound = 16 * ROUNDOFF * ((1 - amount) * clean.abs().numpy() + amount * np.abs(corruption))
    assert (np.abs(scheduler.add_noise(clean, noise, timesteps).numpy() - expected) <= bound).all()


def test_add_noise_at_the_last_timestep_is_the_noise():
    clean, noise = images(0, 2, 3, 4, 4), normal(1, 2, 3, 4, 4)
    for noise_type in ("gaussian", "uniform"):
        scheduler = LinearCorruptionScheduler(1000, noise_type)
        noisy = scheduler.add_noise(clean, noise, torch.tensor([999, 999]))
        assert torch.equal(noisy, scheduler.transform_noise(noise))


def test_uniform_noise_is_uniform():
    noise = normal(0, 100_000)
    uniform = LinearCorruptionScheduler(noise_type="uniform").transform_noise(noise)
    assert uniform.abs().max() <= 1
    # One draw with a fixed seed: it would fall below this level once in a thousand seeds.
    assert scipy.stats.kstest(uniform.numpy(), scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert LinearCorruptionScheduler().transform_noise(noise) is noise


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 50, 1000])
def test_timesteps_divide_the_amount_evenly(num_train_timesteps):
    scheduler = LinearCorruptionScheduler(num_train_timesteps)
    for n in range(1, min(num_train_timesteps, 60) + 1):
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.numpy()
        assert len(timesteps) == scheduler.num_inference_steps == n
        assert timesteps[0] == num_train_timesteps - 1
        assert (np.diff(timesteps) < 0).all()
        # In units of 1 / num_train_timesteps; 1e-9 is for the float64 rounding of the exact values.
        exact = num_train_timesteps * (n - np.arange(n)) / n
        assert np.abs(timesteps + 1 - exact).max() <= 0.5 + 1e-9


def test_a_new_scheduler_has_all_timesteps():
    scheduler = LinearCorruptionScheduler(20)
    assert scheduler.timesteps.tolist() == list(range(19, -1, -1))
    assert len(scheduler) == 20


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_sampling_is_the_formula(n):
    scheduler = LinearCorruptionScheduler(1000)
    scheduler.set_timesteps(n)
    sample, predictions = normal(0, 2, 3, 4, 4), images(1, n, 2, 3, 4, 4)
    expected = sample.double()
    largest = sample.abs().max().item()  # every step is an average, so that no value grows beyond it
    for i, t in enumerate(scheduler.timesteps):
        output = scheduler.step(predictions[i], t, sample)
        assert torch.equal(output.pred_original_sample, predictions[i])
        sample = output.prev_sample
        expected = expected + (predictions[i].double() - expected) / (n - i)
    # Four roundings a step (weight, two products, sum), none of which later steps enlarge.
    torch.testing.assert_close(sample.double(), expected, rtol=0, atol=4 * n * ROUNDOFF * largest)


@pytest.mark.parametrize("n", [1, 3, 10, 50])
def test_gaussian_sampling_is_euler_flow_matching(n):
    scheduler = LinearCorruptionScheduler(1000)
    scheduler.set_timesteps(n)
    reference = FlowMatchEulerDiscreteScheduler(1000)
    reference.set_timesteps(sigmas=np.linspace(1, 1 / n, n).tolist())

    def predict_clean(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(x)

    sample = expected = normal(0, 2, 3, 4, 4)
    largest = sample.abs().max().item()
    for i, t in enumerate(scheduler.timesteps):
        assert abs(reference.timesteps[i].item() - 1 - t.item()) <= 0.5 + 1e-3  # ours are rounded to integers
        sample = scheduler.step(predict_clean(sample), t, sample).prev_sample
        velocity = (expected - predict_clean(expected)) / reference.sigmas[i]
        expected = reference.step(velocity, reference.timesteps[i], expected).prev_sample
    # The reference's float32 differences of sigmas, 1 / n, and its division by sigma = k / n with k steps left, have
    # an error of n / k roundings each; the sum over k is n (1 + ln n). The prediction is a contraction.
    bound = 8 * n * (1 + math.log(n)) * ROUNDOFF * largest
    torch.testing.assert_close(sample, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_a_perfect_predictor_gives_exactly_the_clean_image(n):
    scheduler = LinearCorruptionScheduler(1000)
    scheduler.set_timesteps(n)
    clean, sample = images(0, 2, 3, 8, 8), normal(1, 2, 3, 8, 8)
    for t in scheduler.timesteps:
        sample = scheduler.step(clean, t, sample).prev_sample
    assert torch.equal(sample, clean)


def test_half_precision_is_computed_in_float32():
    scheduler = LinearCorruptionScheduler(1000, "uniform")
    clean, noise = images(0, 8, 3, 8, 8).bfloat16(), normal(1, 8, 3, 8, 8).bfloat16()
    timesteps = torch.arange(8) * 100
    noisy = scheduler.add_noise(clean, noise, timesteps)
    assert torch.equal(noisy, scheduler.add_noise(clean.float(), noise.float(), timesteps).bfloat16())
    output = scheduler.step(clean, 600, noise)
    assert torch.equal(output.prev_sample, scheduler.step(clean.float(), 600, noise.float()).prev_sample.bfloat16())


def test_step_takes_numbers_and_tensors_and_returns_a_tuple_on_request():
    scheduler = LinearCorruptionScheduler(1000)
    prediction, sample = images(0, 1, 3, 4, 4), normal(1, 1, 3, 4, 4)
    output = scheduler.step(prediction, 500, sample)
    as_tuple = scheduler.step(prediction, torch.tensor(500), sample, return_dict=False)
    assert torch.equal(output.prev_sample, as_tuple[0])
    assert torch.equal(output.pred_original_sample, as_tuple[1])
    assert scheduler.scale_model_input(sample, 500) is sample


def test_config_round_trip(tmp_path):
    LinearCorruptionScheduler(100, "uniform").save_pretrained(tmp_path)
    loaded = LinearCorruptionScheduler.from_pretrained(tmp_path)
    assert (len(loaded), loaded.config.noise_type) == (100, "uniform")
    copy = LinearCorruptionScheduler.from_config(LinearCorruptionScheduler(100, "uniform").config)
    assert (len(copy), copy.config.noise_type) == (100, "uniform")
    new = LinearCorruptionScheduler(noise_type="uniform")
    new.save_pretrained(tmp_path)
    expected = dict(new.config)
    del expected["_use_default_values"]  # as diffusers asserts of its own schedulers
    assert LinearCorruptionScheduler.from_pretrained(tmp_path).config == expected
    noise = normal(0, 8)
    assert torch.equal(loaded.transform_noise(noise), torch.erf(noise / math.sqrt(2)))


def test_errors():
    with pytest.raises(ValueError, match=r"'poisson'.*gaussian, uniform"):
        LinearCorruptionScheduler(noise_type="poisson")
    scheduler = LinearCorruptionScheduler(10)
    for n in (0, 11):
        with pytest.raises(ValueError, match=f"between 1 and .*10.*{n}"):
            scheduler.set_timesteps(n)
    scheduler.set_timesteps(2)
    sample = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="Timestep 7"):
        scheduler.step(sample, 7, sample)
