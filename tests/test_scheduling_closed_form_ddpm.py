"""Coefficients, dtypes, errors and the defects of diffusers' scheduler that ours does not share."""

import copy
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.utils._python_dispatch import TorchDispatchMode

from schedulers import scheduling_closed_form_ddpm
from schedulers.scheduling_closed_form_ddpm import ClosedFormDDPMScheduler

T = 1000
ALL_TIMESTEPS = torch.arange(T)
FLOAT32_ROUNDING = 2.0**-24
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]


def make(**config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the laplace schedule ends with much signal
        return ClosedFormDDPMScheduler(**config)


def reference_betas(schedule, rescale):
    """Returns the formulas' betas in extended precision, which bounds the reference's own cancellation."""
    real = np.longdouble
    steps = np.arange(T, dtype=real) / (T - 1)
    start, end = real(0.0001), real(0.02)
    if schedule == "linear":
        betas = start + (end - start) * steps
    elif schedule == "scaled_linear":
        betas = (np.sqrt(start) + (np.sqrt(end) - np.sqrt(start)) * steps) ** 2
    elif schedule == "sigmoid":
        betas = start + (end - start) / (1 + np.exp(6 - 12 * steps))
    else:
        u = np.arange(T + 1, dtype=real) / T
        if schedule == "squaredcos_cap_v2":
            signal = np.cos((u + real(0.008)) / real(1.008) * real(np.pi) / 2) ** 2
        else:
            snr = np.exp(-0.5 * np.where(u > 0.5, -1, 1) * np.log(1 - 2 * np.abs(real(0.5) - u) + real(1e-6)))
            signal = np.sqrt(snr / (1 + snr))
        betas = np.minimum(1 - signal[1:] / signal[:-1], real(0.999))
    if rescale:
        root = np.sqrt(np.cumprod(1 - betas))
        root = root[0] * (root - root[-1]) / (root[0] - root[-1])
        betas = np.append(1 - root[0] ** 2, 1 - (root[1:] / root[:-1]) ** 2)
    return betas


def relative_error(actual, expected):
    actual = np.asarray(actual, dtype=np.longdouble).reshape(-1)
    with np.errstate(invalid="ignore"):
        return np.where(actual == expected, 0, np.abs(actual / expected - 1)).max()


def images(*values):
    """Returns for each value one constant image per timestep, (T, 1, 1, 1)."""
    return [torch.full((T, 1, 1, 1), float(value)) for value in values]


@pytest.fixture
def unit_noise(monkeypatch):
    """Makes all noise ones, so that the standard deviation can be read from the result."""
    monkeypatch.setattr(
        scheduling_closed_form_ddpm, "randn_tensor", lambda shape, dtype, **_: torch.ones(shape, dtype=dtype)
    )


# --- exact ---


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_forward_coefficients(schedule, rescale):
    betas = reference_betas(schedule, rescale)
    alpha_bar = np.cumprod(1 - betas)
    scheduler = make(beta_schedule=schedule, rescale_betas_zero_snr=rescale, prediction_type="v_prediction")
    # In float64 the worst are differences of two numbers near 1 that are 4e-5 apart, which keep 1e-16 / 4e-5 = 3e-12;
    # a sum of 1,000 logarithms adds 1e-13.
    assert relative_error(scheduler.betas, betas) < 1e-11
    assert relative_error(scheduler.alphas, 1 - betas) < 1e-11
    assert relative_error(scheduler.alphas_cumprod, alpha_bar) < 1e-11
    assert relative_error(1 - scheduler.alphas_cumprod, 1 - alpha_bar) < 1e-11
    zeros, ones = images(0, 1)
    # One rounding to float32: 6e-8.
    assert relative_error(scheduler.add_noise(ones, zeros, ALL_TIMESTEPS), np.sqrt(alpha_bar)) <= 1e-7
    assert relative_error(scheduler.add_noise(zeros, ones, ALL_TIMESTEPS), np.sqrt(1 - alpha_bar)) <= 1e-7
    assert relative_error(scheduler.get_velocity(zeros, ones, ALL_TIMESTEPS), np.sqrt(alpha_bar)) <= 1e-7
    assert relative_error(-scheduler.get_velocity(ones, zeros, ALL_TIMESTEPS), np.sqrt(1 - alpha_bar)) <= 1e-7


def test_trained_betas_keep_their_precision():
    betas = reference_betas("linear", False)[::10]
    scheduler = make(trained_betas=betas.astype(np.float64))
    assert relative_error(scheduler.betas, betas) < 1e-15
    assert len(scheduler.timesteps) == len(betas)


def test_stock_one_minus_alpha_bar_is_off_at_the_first_timestep():
    stock = DDPMScheduler()
    assert relative_error(1 - stock.alphas_cumprod[:1], np.longdouble(1e-4)) > 1.6e-4
    assert relative_error(1 - ClosedFormDDPMScheduler().alphas_cumprod[:1], np.longdouble(1e-4)) < 1e-11


def test_compute_snr_of_diffusers():
    alpha_bar = np.cumprod(1 - reference_betas("linear", False))
    snr = compute_snr(ClosedFormDDPMScheduler(), ALL_TIMESTEPS)
    assert snr.dtype == torch.float32
    # diffusers rounds both square roots to float32, divides and squares: 2 (3 roundings) + 1.
    assert relative_error(snr, alpha_bar / (1 - alpha_bar)) < 7 * FLOAT32_ROUNDING


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reverse_coefficients(schedule, prediction_type):
    alpha_bar = np.cumprod(1 - reference_betas(schedule, False))
    previous = np.append(np.longdouble(1), alpha_bar[:-1])
    beta = 1 - alpha_bar / previous
    scheduler = make(
        beta_schedule=schedule, prediction_type=prediction_type, variance_type="learned", clip_sample=False
    )
    zeros, ones = images(0, 1)

    def step(sample, output):
        # A learned variance of 0 leaves the mean.
        model_output = torch.cat([output, zeros], dim=1)
        return scheduler.step(model_output, ALL_TIMESTEPS, sample, return_dict=False)

    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    of_sample, of_output = {
        "epsilon": (1 / signal, -noise / signal),
        "sample": (0 * signal, 1 + 0 * signal),
        "v_prediction": (signal, -noise),
    }[prediction_type]
    # The epsilon coefficient of the output is a product of two entries, each rounded once.
    assert relative_error(step(ones, zeros)[1], of_sample) <= 1e-7
    assert relative_error(step(zeros, ones)[1], of_output) <= 3.5 * FLOAT32_ROUNDING
    if prediction_type == "sample":
        assert relative_error(step(zeros, ones)[0], np.sqrt(previous) * beta / (1 - alpha_bar)) <= 1e-7
        assert relative_error(step(ones, zeros)[0], np.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar)) <= 1e-7


@pytest.mark.parametrize("num_steps", [7, 50, T])
@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
)
def test_standard_deviations(variance_type, num_steps, unit_noise):
    alpha_bar = np.cumprod(1 - reference_betas("linear", False))
    scheduler = ClosedFormDDPMScheduler(variance_type=variance_type, prediction_type="sample")
    scheduler.set_timesteps(num_steps)
    now = alpha_bar[scheduler.timesteps]
    previous = np.append(now[1:], np.longdouble(1))
    large = 1 - now / previous
    small = (1 - previous) / (1 - now) * large
    fraction = np.longdouble(0.3)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = {
            "fixed_small": np.sqrt(small),
            "fixed_large": np.sqrt(large),
            "learned": np.full(num_steps, np.sqrt(np.longdouble(0.3))),
            "learned_range": np.exp(0.5 * (fraction * np.log(large) + (1 - fraction) * np.log(small))),
        }[variance_type.removesuffix("_log")]
    expected[-1] = 0
    zeros = torch.zeros(num_steps, 1, 1, 1)
    model_output = zeros
    if variance_type.startswith("learned"):
        raw = 0.3 if variance_type == "learned" else 2 * 0.3 - 1
        model_output = torch.cat([zeros, torch.full_like(zeros, raw)], dim=1)
    std = scheduler.step(model_output, scheduler.timesteps, zeros).prev_sample
    # Fixed: one rounding. Learned: 0.3 in float32 is given, its square root and two products round. Range: the
    # logarithm lies in -12..-2, and its roundings in float32 become relative errors of its exponential.
    roundings = {"learned": 2, "learned_range": 40}.get(variance_type, 1.5)
    assert relative_error(std, expected) <= roundings * FLOAT32_ROUNDING


def test_float64_inputs_are_computed_in_float64():
    alpha_bar = np.cumprod(1 - reference_betas("linear", False))
    zeros, ones = (image.double() for image in images(0, 1))
    scheduler = ClosedFormDDPMScheduler(clip_sample=False)
    noisy = scheduler.add_noise(zeros, ones, ALL_TIMESTEPS)
    assert noisy.dtype == torch.float64
    assert relative_error(noisy, np.sqrt(1 - alpha_bar)) < 1e-11
    x0 = scheduler.step(ones, ALL_TIMESTEPS, zeros).pred_original_sample
    assert relative_error(x0, -np.sqrt((1 - alpha_bar) / alpha_bar)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_timestep_has_its_own_noise_level_in_half_precision(dtype):
    scheduler, stock = ClosedFormDDPMScheduler(), DDPMScheduler()
    zeros, ones = images(0, 1)
    # Noise and loss target are drawn in float32 whatever the images' dtype.
    levels = scheduler.add_noise(zeros.to(dtype), ones, ALL_TIMESTEPS)
    assert levels.dtype == torch.float32
    assert len(levels.unique()) == T
    assert relative_error(levels, np.sqrt(1 - np.cumprod(1 - reference_betas("linear", False)))) <= 1e-7
    assert scheduler.get_velocity(zeros.to(dtype), ones, ALL_TIMESTEPS).dtype == torch.float32

    stock_levels = stock.add_noise(zeros.to(dtype), ones, ALL_TIMESTEPS)
    num_silent, num_levels = {torch.bfloat16: (10, 190), torch.float16: (2, 573)}[dtype]
    assert (stock_levels == 0).sum() == num_silent
    assert len(stock_levels.unique()) == num_levels

    # With the noise in half precision too, no two timesteps give the same noised image.
    image, noise = torch.randn(2, 1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).to(dtype)

    def count_noised_images(scheduler):
        noised = (scheduler.add_noise(image, noise, torch.tensor([t])) for t in range(T))
        return len({image.view(torch.int16).numpy().tobytes() for image in noised})

    assert count_noised_images(scheduler) == T
    assert count_noised_images(stock) < T


@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sample_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_dtypes_promote_as_in_stock(prediction_type, sample_dtype, output_dtype):
    config = {"prediction_type": prediction_type}
    scheduler, stock = ClosedFormDDPMScheduler(**config), DDPMScheduler(**config)
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(2, 3, 4, 4, generator=generator).to(d) for d in (sample_dtype, output_dtype))
    ours = scheduler.step(output, 500, sample, generator=torch.Generator().manual_seed(1))
    theirs = stock.step(output, 500, sample, generator=torch.Generator().manual_seed(1))
    assert ours.prev_sample.dtype == theirs.prev_sample.dtype
    assert ours.pred_original_sample.dtype == ours.prev_sample.dtype
    assert scheduler.add_noise(sample, output, ALL_TIMESTEPS[:2]).dtype == ours.prev_sample.dtype


def test_half_precision_step_rounds_once():
    scheduler = ClosedFormDDPMScheduler()
    sample, output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    result = scheduler.step(output, 500, sample, generator=torch.Generator().manual_seed(1))
    alpha_bar = np.cumprod(1 - reference_betas("linear", False)).astype(np.float64)
    now, previous = alpha_bar[500], alpha_bar[499]
    x0 = ((sample.double() - (1 - now) ** 0.5 * output.double()) / now**0.5).clamp(-1, 1)
    beta = 1 - now / previous
    expected = previous**0.5 * beta / (1 - now) * x0 + (1 - beta) ** 0.5 * (1 - previous) / (1 - now) * sample.double()
    expected += ((1 - previous) / (1 - now) * beta) ** 0.5 * noise.double()
    # Half a unit in the last of 8 bits, plus the float32 arithmetic.
    assert ((result.prev_sample.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()
    assert ((result.pred_original_sample.double() - x0).abs() <= x0.abs() * 2**-8 + 1e-5).all()


def test_nothing_a_caller_does_changes_the_tables():
    scheduler = ClosedFormDDPMScheduler()
    before = [scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod]
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = scheduler.add_noise(x, x, torch.tensor([3, 900]))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        scheduler.add_noise(x.to(dtype), x.to(dtype), torch.tensor([3, 900]))
        scheduler.step(x.to(dtype), 999, x.to(dtype))
    scheduler.set_timesteps(10)
    for table in (scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod):
        table.zero_()
    with pytest.raises(AttributeError):
        scheduler.alphas_cumprod = torch.zeros(T)
    after = [scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(scheduler.add_noise(x, x, torch.tensor([3, 900])), expected)

    stock = DDPMScheduler()
    stock.alphas_cumprod.zero_()
    assert stock.add_noise(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([3])) == 0


# --- right where stock is wrong ---


def test_trailing_lists_n_timesteps_from_the_last():
    scheduler, stock = (make_(timestep_spacing="trailing") for make_ in (ClosedFormDDPMScheduler, DDPMScheduler))
    stock_is_wrong = []
    for n in range(1, T + 1):
        scheduler.set_timesteps(n)
        stock.set_timesteps(n)
        assert len(scheduler.timesteps) == n == scheduler.num_inference_steps
        assert scheduler.timesteps[0] == T - 1
        assert scheduler.timesteps[-1] >= 0
        if len(stock.timesteps) == n:
            assert torch.equal(scheduler.timesteps, stock.timesteps)
        else:
            stock_is_wrong.append(n)
            assert stock.timesteps[-1] == -1
            assert torch.equal(scheduler.timesteps, stock.timesteps[:-1])
    assert len(stock_is_wrong) == 62
    assert stock_is_wrong[:3] == [61, 103, 121]


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_other_spacings_are_those_of_stock(spacing):
    config = {"timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
    scheduler, stock = ClosedFormDDPMScheduler(**config), DDPMScheduler(**config)
    for n in range(1, T if spacing == "leading" else T + 1):
        scheduler.set_timesteps(n)
        stock.set_timesteps(n)
        assert torch.equal(scheduler.timesteps, stock.timesteps)


def test_the_last_step_adds_no_noise():
    config = {"timestep_spacing": "trailing", "variance_type": "fixed_large", "prediction_type": "sample"}
    scheduler, stock = ClosedFormDDPMScheduler(**config), DDPMScheduler(**config)
    x0 = torch.zeros(4, 3, 32, 32)
    for candidate in (scheduler, stock):
        candidate.set_timesteps(20)
    last = scheduler.timesteps[-1]
    assert last == 49
    assert torch.equal(scheduler.step(x0, last, x0).prev_sample, x0)
    left = stock.step(x0, last, x0, generator=torch.Generator().manual_seed(0)).prev_sample.std()
    # std of 12,288 draws: 0.17 within 4 of its standard errors 0.17 / sqrt(2 * 12288) = 0.0011
    assert abs(left - 0.1744) < 4 * 0.0011
    scheduler.set_timesteps(timesteps=[900, 500, 300])
    assert torch.equal(scheduler.step(x0, 300, x0).prev_sample, x0)
    assert not torch.equal(scheduler.step(x0, 500, x0).prev_sample, x0)


def test_fixed_large_log_is_fixed_large_where_stock_is_nan():
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def step(scheduler_class, variance_type):
        generator = torch.Generator().manual_seed(1)
        return scheduler_class(variance_type=variance_type).step(x, 500, x, generator=generator).prev_sample

    assert torch.equal(step(ClosedFormDDPMScheduler, "fixed_large_log"), step(ClosedFormDDPMScheduler, "fixed_large"))
    assert torch.equal(step(ClosedFormDDPMScheduler, "fixed_small_log"), step(ClosedFormDDPMScheduler, "fixed_small"))
    assert step(DDPMScheduler, "fixed_large_log").isnan().all()
    # Stock's beta_500 = 1 - a quotient = 0.01 is off by 2^-24 / 0.01 = 6e-6 of itself, in terms below 0.5.
    torch.testing.assert_close(
        step(ClosedFormDDPMScheduler, "fixed_small_log"), step(DDPMScheduler, "fixed_small_log"), atol=5e-6, rtol=0
    )


def test_zero_terminal_snr_refuses_epsilon():
    with pytest.raises(ValueError, match="use prediction_type='v_prediction'"):
        ClosedFormDDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="v_prediction"):
        ClosedFormDDPMScheduler(trained_betas=[0.5, 1.0])
    x = torch.ones(1, 3, 4, 4)
    stock = DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    assert not stock.step(0.5 * x, 999, x).prev_sample.isfinite().any()

    scheduler = ClosedFormDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] == 0
    assert torch.equal(scheduler.add_noise(x, -x, torch.tensor([999])), -x)
    assert torch.equal(scheduler.step(0.5 * x, 999, x).pred_original_sample, -0.5 * x)


@pytest.mark.parametrize("option", ["beta_schedule", "variance_type", "prediction_type", "timestep_spacing"])
def test_unknown_options_are_refused_at_construction(option):
    with pytest.raises(ValueError, match=f"`{option}` must be one of .* but is 'other'"):
        ClosedFormDDPMScheduler(**{option: "other"})
    if option != "beta_schedule":
        DDPMScheduler(**{option: "other"})


@pytest.mark.parametrize(
    "config", [{"beta_end": 2.0}, {"beta_start": 0.0}, {"trained_betas": [0.1, 1.0, 0.1]}, {"beta_end": float("nan")}]
)
def test_betas_that_are_no_variances_are_refused(config):
    with pytest.raises(ValueError, match="beta"):
        ClosedFormDDPMScheduler(**config)
    DDPMScheduler(**config)


def test_warns_once_of_terminal_signal():
    with pytest.warns(UserWarning, match=r"0\.60.*rescale_betas_zero_snr=True") as record:
        scheduler = ClosedFormDDPMScheduler(num_train_timesteps=100)
    assert len(record) == 1
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            scheduler.step(torch.zeros(1, 1, 1, 1), t, torch.zeros(1, 1, 1, 1))
        for schedule in ("linear", "squaredcos_cap_v2", "sigmoid"):
            ClosedFormDDPMScheduler(beta_schedule=schedule)
        ClosedFormDDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        ClosedFormDDPMScheduler(
            num_train_timesteps=100, rescale_betas_zero_snr=True, prediction_type="v_prediction"
        ).set_timesteps(10)


# --- timesteps of any kind, no synchronisation ---


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_every_kind_of_timestep_gives_the_same_step(prediction_type, variance_type):
    scheduler = ClosedFormDDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    scheduler.set_timesteps(50)
    channels = 6 if variance_type == "learned_range" else 3
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(4, 3, 8, 8, generator=generator), torch.randn(4, channels, 8, 8, generator=generator)

    def step(t, rows=slice(None)):
        noise_generator = torch.Generator().manual_seed(1)
        return scheduler.step(output, t, x, generator=noise_generator).prev_sample[rows]

    timesteps = scheduler.timesteps[[0, 7, 30, 49]]
    for i, t in enumerate(timesteps.tolist()):
        expected = step(t)
        for same in (np.int64(t), torch.tensor(t), torch.tensor(t, dtype=torch.int32), torch.tensor([t] * 4)):
            assert torch.equal(step(same), expected)
        assert torch.equal(step(timesteps, i), expected[i])


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.moves = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        tensors = [a for a in (*args, result) if isinstance(a, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            self.moves.add(name)
        return result


@pytest.mark.parametrize("limit", [{}, {"thresholding": True}, {"variance_type": "learned_range"}])
def test_nothing_is_read_from_or_moved_to_the_device(limit):
    """Runs on meta tensors, which hold no data: whatever reads one raises."""
    scheduler = ClosedFormDDPMScheduler(**limit)
    scheduler.set_timesteps(10, device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta")
    output = torch.cat([x, x], dim=1) if "variance_type" in limit else x
    with _Operations() as operations:
        for t in (scheduler.timesteps[3], scheduler.timesteps[:2], 900):
            scheduler.step(output, t, x)
            scheduler.add_noise(x, x, t)
            scheduler.get_velocity(x, x, t)
    assert "index_select" in operations.names
    assert not operations.moves
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero"} & operations.names

    stock = DDPMScheduler()
    stock.set_timesteps(10, device="meta")
    with pytest.raises(Exception, match="meta"):
        stock.step(x, stock.timesteps[3], x)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"thresholding": True, "prediction_type": "v_prediction"},
        {"variance_type": "learned_range"},
        {"variance_type": "learned", "prediction_type": "sample", "clip_sample": False},
    ],
)
def test_step_and_add_noise_compile_to_one_graph(config):
    torch._dynamo.reset()
    scheduler = ClosedFormDDPMScheduler(**config)
    scheduler.set_timesteps(10)
    channels = 6 if config.get("variance_type") else 3
    x, output = torch.rand(4, 3, 8, 8), torch.rand(4, channels, 8, 8)
    # `aot_eager` runs PyTorch's own kernels, so the random numbers are those of the uncompiled step.
    step = torch.compile(scheduler.step, fullgraph=True, backend="aot_eager")
    for t in [*scheduler.timesteps, scheduler.timesteps[:4], 900, 800, 700]:
        torch.manual_seed(0)
        expected = scheduler.step(output, t, x)
        torch.manual_seed(0)
        actual = step(output, t, x)
        torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=0, atol=1e-6)
        torch.testing.assert_close(actual.pred_original_sample, expected.pred_original_sample, rtol=0, atol=1e-6)
    timesteps = torch.tensor([0, 10, 500, 999])
    for name in ("add_noise", "get_velocity"):
        compiled = torch.compile(getattr(scheduler, name), fullgraph=True, backend="aot_eager")
        expected = getattr(scheduler, name)(x, -x, timesteps)
        torch.testing.assert_close(compiled(x, -x, timesteps), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_step_never_synchronises_and_can_be_captured():
    scheduler = ClosedFormDDPMScheduler()
    scheduler.set_timesteps(10, device="cuda")
    x = torch.randn(2, 3, 8, 8, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in [*scheduler.timesteps, 900, torch.tensor(900)]:
            scheduler.step(x, t, x, generator=generator)
            scheduler.add_noise(x, x, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    timestep = scheduler.timesteps[-1].clone()  # the last step has no noise, so its result is known
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scheduler.step(x, timestep, x).prev_sample
    graph.replay()
    torch.testing.assert_close(captured, scheduler.step(x, timestep, x).prev_sample)


# --- interface ---


def test_timesteps_outside_of_the_chain():
    scheduler = ClosedFormDDPMScheduler()
    scheduler.set_timesteps(10)
    x = torch.ones(1, 3, 4, 4)
    for t in (899, 1000, -100, np.int64(5)):
        with pytest.raises(IndexError, match="not one of the 10 listed"):
            scheduler.step(x, t, x)
    assert scheduler.step(x, torch.tensor(899), x).prev_sample.isnan().all()
    for t in (torch.tensor(1000), torch.tensor([-1])):
        with pytest.raises(IndexError):
            scheduler.step(x, t, x)
        with pytest.raises(IndexError):
            scheduler.add_noise(x, x, t)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one"),
        ({"num_inference_steps": 2, "timesteps": [1, 0]}, "Exactly one"),
        ({"num_inference_steps": 0}, "1..1000"),
        ({"num_inference_steps": 1001}, "1..1000"),
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [5, 6]}, "strictly descending"),
        ({"timesteps": [5, 5]}, "strictly descending"),
        ({"timesteps": [1000, 0]}, "0..999"),
        ({"timesteps": [3, -1]}, "0..999"),
    ],
)
def test_bad_chains_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClosedFormDDPMScheduler().set_timesteps(**arguments)


def test_stock_accepts_a_negative_timestep():
    stock = DDPMScheduler()
    stock.set_timesteps(timesteps=[3, -1])
    assert stock.timesteps[-1] == -1


def test_steps_offset_beyond_the_last_timestep_is_refused():
    with pytest.raises(ValueError, match="from 1000 to 1"):
        ClosedFormDDPMScheduler(steps_offset=1).set_timesteps(1000)
    stock = DDPMScheduler(steps_offset=1)
    stock.set_timesteps(1000)
    assert stock.timesteps[0] == 1000


def test_learned_variance_needs_twice_the_channels():
    x = torch.ones(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"6 channels.* has 3"):
        ClosedFormDDPMScheduler(variance_type="learned").step(x, 5, x)


def test_previous_timestep():
    scheduler = ClosedFormDDPMScheduler()
    assert scheduler.previous_timestep(5) == 4
    assert scheduler.previous_timestep(0) == -1
    scheduler.set_timesteps(timesteps=[900, 30, 2])
    assert [scheduler.previous_timestep(t).item() for t in scheduler.timesteps] == [30, 2, -1]
    assert scheduler.previous_timestep(scheduler.timesteps).tolist() == [30, 2, -1]


@pytest.mark.parametrize("config", [{}, {"prediction_type": "sample", "clip_sample": False}, {"thresholding": True}])
def test_results_share_no_memory_with_the_inputs(config):
    scheduler = ClosedFormDDPMScheduler(**config)
    x, output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    x_before, output_before = x.clone(), output.clone()
    for result in scheduler.step(output, 5, x, return_dict=False):
        result.fill_(7)
    scheduler.add_noise(x, output, torch.tensor([1, 2])).fill_(7)
    assert torch.equal(x, x_before)
    assert torch.equal(output, output_before)


def test_noise_is_drawn_once_per_step_as_randn_draws_it():
    scheduler = ClosedFormDDPMScheduler(prediction_type="sample")
    scheduler.set_timesteps(5)
    x = torch.zeros(3, 3, 4, 4)
    generator, expected = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for t in scheduler.timesteps:
        noisy = scheduler.step(x, t, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=expected)
        if t > 0:
            torch.testing.assert_close(noisy / noisy.std(), noise / noise.std(), rtol=1e-5, atol=0)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_one_generator_per_image():
    scheduler = ClosedFormDDPMScheduler()
    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    together = scheduler.step(x, 500, x, generator=[torch.Generator().manual_seed(s) for s in range(3)]).prev_sample
    for s in range(3):
        alone = scheduler.step(x[s : s + 1], 500, x[s : s + 1], generator=torch.Generator().manual_seed(s))
        assert torch.equal(together[s : s + 1], alone.prev_sample)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"thresholding": True, "sample_max_value": 2.0},
        {"prediction_type": "v_prediction", "variance_type": "learned_range"},
    ],
)
def test_gradients_are_those_of_stock(config):
    """Compares in float64, so that the rounding of stock's float32 tables is all that remains."""
    gradients = []
    channels = 6 if "variance_type" in config else 3
    for scheduler_class in (ClosedFormDDPMScheduler, DDPMScheduler):
        source = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 4, 4, generator=source, dtype=torch.float64).requires_grad_()
        output = torch.randn(2, channels, 4, 4, generator=source, dtype=torch.float64).requires_grad_()
        generator = torch.Generator().manual_seed(1)
        result = scheduler_class(**config).step(output, 300, x, generator=generator)
        (result.prev_sample.square().sum() + result.pred_original_sample.sin().sum()).backward()
        gradients.append((x.grad, output.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_training_after_sampling_in_inference_mode():
    scheduler = ClosedFormDDPMScheduler()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.inference_mode():  # creates the float64 copies of the tables
        scheduler.step(x, 5, x)
        scheduler.add_noise(x, x, torch.tensor([1, 2]))
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    loss = (
        scheduler.step(x * weight, 5, x).prev_sample.sum()
        + scheduler.add_noise(x * weight, x, torch.tensor([1, 2])).sum()
    )
    loss.backward()
    assert weight.grad.isfinite()


def test_copies_are_independent():
    scheduler = ClosedFormDDPMScheduler()
    other = copy.deepcopy(scheduler)
    other.set_timesteps(10)
    assert len(scheduler.timesteps) == T
    scheduler.step(torch.zeros(1, 1, 1, 1), 998, torch.zeros(1, 1, 1, 1))
