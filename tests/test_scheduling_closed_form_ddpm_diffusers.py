"""Tests of our scheduler what diffusers asserts of its DDPMScheduler in tests/schedulers/test_scheduler_ddpm.py.

Two of its assertions contradict the mathematics and are reversed here: that `variance_type="other"` and that betas
up to 2 are accepted.
"""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from schedulers.scheduling_closed_form_ddpm import ClosedFormDDPMScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:The last of .* timesteps keeps:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' other schedulers with NumPy 2
]

COMPATIBLE = [e.name for e in KarrasDiffusionSchedulers]
CONFIGS = [
    *({"num_train_timesteps": n} for n in (1, 5, 100, 1000)),
    *({"beta_start": start, "beta_end": end} for start, end in [(0.0001, 0.002), (0.001, 0.02), (0.01, 0.2)]),
    *({"beta_schedule": name} for name in ("linear", "squaredcos_cap_v2", "sigmoid", "laplace", "scaled_linear")),
    *({"variance_type": name} for name in ("fixed_small", "fixed_small_log", "fixed_large")),
    *({"clip_sample": clip} for clip in (True, False)),
    *(
        {"thresholding": True, "prediction_type": prediction, "sample_max_value": value}
        for prediction in ("epsilon", "sample", "v_prediction")
        for value in (0.5, 1.0, 2.0)
    ),
    *({"prediction_type": prediction} for prediction in ("sample", "v_prediction")),
    *({"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")),
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"trained_betas": np.array([0.1, 0.3])},
    {"trained_betas": [0.1, 0.3]},
    {"steps_offset": 1, "clip_sample_range": 2.0, "dynamic_thresholding_ratio": 0.9},
]


def ramp():
    """Returns diffusers' deterministic sample: 0..767 / 768 as (4, 3, 8, 8), in a permuted layout."""
    return (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def dummy_model(sample, t):
    return sample * t / (t + 1)


def test_constructor_is_that_of_stock():
    ours = inspect.signature(ClosedFormDDPMScheduler.__init__).parameters
    stock = inspect.signature(DDPMScheduler.__init__).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in stock.values()]
    for name in ("step", "set_timesteps", "add_noise", "get_velocity", "scale_model_input", "previous_timestep"):
        ours, stock = (inspect.signature(getattr(c, name)) for c in (ClosedFormDDPMScheduler, DDPMScheduler))
        assert [(p.name, p.default) for p in ours.parameters.values()] == [
            (p.name, p.default) for p in stock.parameters.values()
        ]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("via", ["save_pretrained", "from_config", "stock", "stock_from_disk"])
def test_config_round_trip_gives_the_same_step(config, via, tmp_path):
    scheduler = ClosedFormDDPMScheduler(**config)
    if via == "save_pretrained":
        scheduler.save_pretrained(tmp_path)
        other = ClosedFormDDPMScheduler.from_pretrained(tmp_path)
        # As diffusers asserts of its own: only a new scheduler's config has the list of what was left at its default.
        expected = dict(scheduler.config)
        del expected["_use_default_values"]
        assert other.config == expected
    elif via == "from_config":
        other = ClosedFormDDPMScheduler.from_config(scheduler.config)
    elif via == "stock":
        other = DDPMScheduler.from_config(scheduler.config)
        assert {k: other.config[k] for k in config} == {k: scheduler.config[k] for k in config}
        other = ClosedFormDDPMScheduler.from_config(other.config)
    else:
        DDPMScheduler(**config).save_pretrained(tmp_path)
        other = ClosedFormDDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(scheduler.betas, other.betas)
    sample = ramp()
    for t in (0, len(scheduler.betas) - 1):
        steps = [
            s.step(0.1 * sample, t, sample, generator=torch.Generator().manual_seed(0)) for s in (scheduler, other)
        ]
        assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)


def test_from_config_with_unknown_and_missing_keys():
    config = {"num_train_timesteps": 500, "beta_end": 0.04, "unknown": 3}
    scheduler, unused = ClosedFormDDPMScheduler.from_config(config, return_unused_kwargs=True)
    assert unused == {"unknown": 3}
    assert len(scheduler) == 500
    assert scheduler.config["variance_type"] == "fixed_small"
    assert (
        ClosedFormDDPMScheduler.from_config(config, variance_type="fixed_large").config["variance_type"]
        == "fixed_large"
    )


def test_compatibles_are_those_of_stock():
    assert ClosedFormDDPMScheduler._compatibles == DDPMScheduler._compatibles
    assert set(DDPMScheduler().compatibles) == set(ClosedFormDDPMScheduler().compatibles)


@pytest.mark.parametrize("through_disk", [False, True])
@pytest.mark.parametrize("name", COMPATIBLE)
def test_swapping_with_compatible_schedulers(name, through_disk, tmp_path):
    other_class = getattr(diffusers, name)
    scheduler = ClosedFormDDPMScheduler(beta_schedule="scaled_linear", beta_end=0.012, prediction_type="v_prediction")
    try:
        other = other_class.from_config(scheduler.config)
    except ImportError as error:  # DPMSolverSDE needs torchsde
        pytest.skip(str(error))
    # The same as stock's config would give.
    expected = other_class.from_config(DDPMScheduler.from_config(scheduler.config).config)
    init_keys = set(inspect.signature(other_class.__init__).parameters) - {"self"}
    assert {k: other.config[k] for k in init_keys} == {k: expected.config[k] for k in init_keys}
    if through_disk:
        other.save_pretrained(tmp_path)
        back, expected = (c.from_pretrained(tmp_path) for c in (ClosedFormDDPMScheduler, DDPMScheduler))
    else:
        back, expected = (c.from_config(other.config) for c in (ClosedFormDDPMScheduler, DDPMScheduler))
        assert torch.equal(back.betas, scheduler.betas)
    ours = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    # A file written by a DPM-Solver has no variance type, which stock takes as fixed_small without saying so.
    assert {k: back.config[k] for k in ours} == {k: expected.config[k] or back.config[k] for k in ours}
    assert back.config["variance_type"] == "fixed_small"
    assert back.config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("name", COMPATIBLE)
def test_config_comes_back_whole_from_a_compatible_scheduler(name):
    """Diffusers' test_compatibles."""
    scheduler = ClosedFormDDPMScheduler(
        1000, 0.0001, 0.02, beta_schedule="linear", variance_type="fixed_small", clip_sample=True
    )
    try:
        other = getattr(diffusers, name).from_config(scheduler.config)
    except ImportError as error:  # DPMSolverSDE needs torchsde
        pytest.skip(str(error))
    back = ClosedFormDDPMScheduler.from_config(other.config)
    assert {key: value for key, value in back.config.items() if key in scheduler.config} == dict(scheduler.config)
    additional = back.config.keys() - scheduler.config.keys()
    assert not additional & inspect.signature(ClosedFormDDPMScheduler.__init__).parameters.keys()


def test_values_given_by_position_are_kept():
    """Diffusers counts them as defaults, and loses them."""
    assert len(DDPMScheduler.from_config(DDPMScheduler(500).config)) == 1000
    assert len(ClosedFormDDPMScheduler.from_config(ClosedFormDDPMScheduler(500).config)) == 500


def test_saved_config_is_plain_json(tmp_path):
    ClosedFormDDPMScheduler(trained_betas=np.linspace(0.001, 0.3, 50, dtype=np.float32)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["_class_name"] == "ClosedFormDDPMScheduler"
    assert config["trained_betas"] == np.linspace(0.001, 0.3, 50, dtype=np.float32).tolist()


@pytest.mark.parametrize(("prediction_type", "total"), [("epsilon", 258.9606), ("v_prediction", 202.0296)])
def test_full_loop(prediction_type, total):
    """Compares with the sum of magnitudes that diffusers expects of its own scheduler, within its tolerance."""
    scheduler = ClosedFormDDPMScheduler(prediction_type=prediction_type)
    sample = ramp()
    generator = torch.manual_seed(0)
    for t in reversed(range(len(scheduler))):
        sample = scheduler.step(dummy_model(sample, t), t, sample, generator=generator).prev_sample
    assert abs(sample.abs().sum() - total) < 1e-2
    assert abs(sample.abs().mean() - total / 768) < 1e-3


def test_full_loop_with_noise():
    """diffusers expects 387.9466 here, which is due to its own rounding: the two steps in float64 give 387.9673."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    noise = (torch.arange(768).flip(-1) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    drawn = torch.randn(ramp().shape, generator=torch.Generator().manual_seed(0)).double()
    x = alpha_bar[1] ** 0.5 * ramp().double() + (1 - alpha_bar[1]) ** 0.5 * noise.double()
    x0 = ((x - (1 - alpha_bar[1]) ** 0.5 * dummy_model(x, 1)) / alpha_bar[1] ** 0.5).clamp(-1, 1)
    beta = 1 - alpha_bar[1] / alpha_bar[0]
    mean = alpha_bar[0] ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - alpha_bar[0]) * x
    x = mean / (1 - alpha_bar[1]) + ((1 - alpha_bar[0]) / (1 - alpha_bar[1]) * beta) ** 0.5 * drawn
    exact = (x / alpha_bar[0] ** 0.5).clamp(-1, 1).abs().sum()

    totals = []
    for scheduler in (ClosedFormDDPMScheduler(), DDPMScheduler()):
        timesteps = scheduler.timesteps[998:]
        sample = scheduler.add_noise(ramp(), noise, timesteps[:1])
        generator = torch.manual_seed(0)
        for t in timesteps:
            sample = scheduler.step(dummy_model(sample, t), t, sample, generator=generator).prev_sample
        totals.append(sample.abs().sum())
    # 768 values below 1, each rounded some 10 times by 2^-24, if all in one direction: 5e-4.
    assert abs(totals[0] - exact) < 5e-4
    assert abs(totals[0] - 387.9466) < 1e-2 + abs(totals[1] - exact)  # diffusers' tolerance, and its own error
    assert abs(totals[1] - exact) > 1e-2


@pytest.mark.parametrize("time", [0, 487, 999])
def test_variance(time):
    """Compares the spread that `step` adds with the variances that diffusers expects."""
    scheduler = ClosedFormDDPMScheduler(prediction_type="sample")
    zeros = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    noise = torch.randn(1, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    deviation = scheduler.step(zeros, time, zeros, generator=torch.Generator().manual_seed(0)).prev_sample / noise
    assert abs(deviation.item() ** 2 - {0: 0.0, 487: 0.00979, 999: 0.02}[time]) < 1e-5


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_shapes_with_learned_variance(variance_type):
    scheduler = ClosedFormDDPMScheduler(variance_type=variance_type)
    sample = ramp()
    model_output = torch.cat([sample, 0.1 * sample], dim=1)
    output = scheduler.step(model_output, 1, sample)
    assert output.prev_sample.shape == output.pred_original_sample.shape == sample.shape


def test_tuple_and_output_class_agree():
    scheduler = ClosedFormDDPMScheduler()
    assert list(inspect.signature(type(scheduler.step(ramp(), 0, ramp()))).parameters) == [
        "prev_sample",
        "pred_original_sample",
    ]
    as_class, as_tuple = (
        scheduler.step(ramp(), 500, ramp(), generator=torch.Generator().manual_seed(0), return_dict=return_dict)
        for return_dict in (True, False)
    )
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_class.prev_sample, as_tuple[0])
    assert torch.equal(as_class.pred_original_sample, as_tuple[1])
    assert torch.equal(as_class[0], as_tuple[0])


def test_public_attributes():
    scheduler = ClosedFormDDPMScheduler()
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    assert torch.equal(scheduler.timesteps, DDPMScheduler().timesteps)
    sample = ramp()
    assert scheduler.scale_model_input(sample, 5) is sample
    with pytest.raises(AttributeError, match="has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist


def test_add_noise_with_a_timestep_of_the_chain():
    scheduler, stock = ClosedFormDDPMScheduler(), DDPMScheduler()
    scheduler.set_timesteps(100)
    timestep = scheduler.timesteps[5][None]
    noised = scheduler.add_noise(ramp(), -ramp(), timestep)
    assert noised.shape == ramp().shape
    torch.testing.assert_close(noised, stock.add_noise(ramp(), -ramp(), timestep), atol=1e-6, rtol=0)


def test_custom_timesteps():
    scheduler = ClosedFormDDPMScheduler()
    timesteps = [100, 87, 50, 1, 0]
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    assert [scheduler.previous_timestep(t).item() for t in scheduler.timesteps] == [87, 50, 1, 0, -1]


def test_in_a_pipeline_of_diffusers():
    from diffusers import DDPMPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    results = []
    for scheduler_class in (ClosedFormDDPMScheduler, DDPMScheduler):
        pipeline = DDPMPipeline(unet, scheduler_class())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        results.append(pipeline(batch_size=2, generator=generator, num_inference_steps=20, output_type="np").images)
    # Images in [0, 1]; stock's tables cost it up to some 1e-4.
    np.testing.assert_allclose(*results, atol=5e-4)


def test_betas_go_along_to_a_scheduler_with_other_defaults():
    """Values left at a class's default are lost by diffusers' `from_config`, and Heun has other default betas."""
    stock = diffusers.HeunDiscreteScheduler.from_config(DDPMScheduler().config)
    assert stock.config["beta_start"] == 0.00085
    ours = diffusers.HeunDiscreteScheduler.from_config(ClosedFormDDPMScheduler().config)
    assert (ours.config["beta_start"], ours.config["beta_end"]) == (0.0001, 0.02)
