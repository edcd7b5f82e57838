"""Tests ContextUNet2DModel and BasicUNet2DModel against the networks of the two courses that they repeat."""

import pytest
import torch
import torch.nn.functional as F
from course_network import make_course_network
from torch import nn

from models import BasicUNet2DModel, ContextUNet2DModel
from sprite_diffusion.sampling.course_checkpoint import convert_weights


def noisy(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def context_unet(seed: int = 0, **config) -> ContextUNet2DModel:
    torch.manual_seed(seed)
    return ContextUNet2DModel(**{"num_features": 16, **config}).eval()


@pytest.mark.parametrize("norm_type", ["batch", "group"])
@pytest.mark.parametrize("sides", [(16, 16), (24, 16)])
def test_context_unet_with_a_zero_shortcut_is_the_course_network(norm_type, sides):
    norm = nn.BatchNorm2d if norm_type == "batch" else lambda channels: nn.GroupNorm(8, channels)
    course = make_course_network(*sides, norm)
    model = context_unet(sample_size=sides, norm_type=norm_type, num_train_timesteps=500)
    model.load_state_dict(convert_weights(course.state_dict()))

    sample, context = noisy(1, 4, 3, *sides), noisy(2, 4, 5)
    timesteps = torch.tensor([0, 1, 250, 499])
    # The course's t is 1 .. 500, and its network takes t / 500. About 20 layers of sums of up to 600 products, summed
    # in blocks, differ by at most 8 roundings (2^-24) each: 1e-5 of values of order one.
    with torch.no_grad():
        expected = course(sample, (timesteps + 1)[:, None] / 500, context)
        torch.testing.assert_close(model(sample, timesteps, context=context).sample, expected, rtol=1e-5, atol=1e-5)


def test_the_shortcut_is_a_layer_that_is_trained_and_saved():
    model = context_unet()
    sample = noisy(1, 2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(sample, 10).sample, model(sample, 10).sample)
    assert "conv_in.shortcut.weight" in model.state_dict()
    model(sample, 10).sample.square().sum().backward()
    assert model.conv_in.shortcut.weight.grad.abs().min() > 0
    same_width = context_unet(in_channels=16)
    assert not list(same_width.conv_in.shortcut.parameters())  # the identity, as in the course


@torch.no_grad()
def test_classes_are_one_hot_contexts_and_the_null_class_is_the_zero_context():
    model = context_unet()
    sample = noisy(1, 6, 3, 16, 16)
    by_label = model(sample, 10, class_labels=torch.arange(6)).sample
    context = torch.cat([torch.eye(5), torch.zeros(1, 5)])
    assert torch.equal(by_label, model(sample, 10, context=context).sample)
    zero = model(sample, 10, context=torch.zeros(6, 5)).sample
    assert torch.equal(zero, model(sample, 10).sample)
    assert torch.equal(zero, model(sample, 10, class_labels=torch.full((6,), 5)).sample)
    assert not torch.isclose(by_label[:5], zero[:5]).flatten(1).all(dim=1).any()
    mixed = model(sample, 10, context=torch.full((6, 5), 0.2)).sample
    assert not torch.isclose(mixed, zero).flatten(1).all(dim=1).any()


@torch.no_grad()
def test_timesteps_may_be_a_number_or_a_tensor():
    model = context_unet()
    sample = noisy(1, 2, 3, 16, 16)
    expected = model(sample, 10).sample
    for timestep in (torch.tensor(10), torch.tensor([10, 10]), torch.tensor([10.0, 10.0])):
        assert torch.equal(model(sample, timestep).sample, expected)
    assert torch.equal(model(sample, torch.tensor([10, 900])).sample[0], expected[0])
    assert not torch.isclose(model(sample, torch.tensor([10, 900])).sample[1], expected[1]).all()
    assert torch.equal(model(sample, 10, return_dict=False)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("sides", [16, 32, 20, 4, (24, 16), (16, 24)])
def test_context_unet_takes_sides_divisible_by_4(sides):
    height, width = (sides, sides) if isinstance(sides, int) else sides
    output = context_unet(sample_size=sides, out_channels=6)(noisy(1, 2, 3, height, width), 10).sample
    assert output.shape == (2, 6, height, width)
    assert output.isfinite().all()


def test_context_unet_errors():
    for sides in (18, (16, 18), (18, 16)):
        with pytest.raises(ValueError, match="divisible by 4"):
            ContextUNet2DModel(sample_size=sides)
    with pytest.raises(ValueError, match="num_features must be divisible by 8, got 20"):
        ContextUNet2DModel(num_features=20)
    with pytest.raises(ValueError, match=r"'layer'.*group, batch"):
        ContextUNet2DModel(norm_type="layer")
    model = context_unet(sample_size=(24, 16))
    with pytest.raises(ValueError, match=r"24 x 16.*got 16 x 24"):
        model(torch.zeros(1, 3, 16, 24), 0)
    with pytest.raises(ValueError, match="not both"):
        model(torch.zeros(1, 3, 24, 16), 0, class_labels=torch.tensor([0]), context=torch.zeros(1, 5))


@torch.no_grad()
def test_images_of_a_batch_are_independent_in_evaluation():
    model = context_unet(norm_type="batch")
    sample, labels, timesteps = noisy(1, 3, 3, 16, 16), torch.tensor([0, 3, 5]), torch.tensor([0, 500, 999])

    def differences() -> float:
        together = model(sample, timesteps, labels).sample
        alone = [model(sample[i : i + 1], timesteps[i : i + 1], labels[i : i + 1]).sample for i in range(3)]
        return (together - torch.cat(alone)).abs().max().item()

    assert differences() <= 1e-5  # another batch size may sum in another order: roundings as in the course's test
    model.train()
    assert differences() > 1e-2  # batch statistics: the measure does see a dependence


def test_gradients_reach_every_parameter():
    model = context_unet().train()
    model(noisy(1, 5, 3, 16, 16), torch.arange(5), torch.arange(5)).sample.square().sum().backward()
    basic = BasicUNet2DModel()
    basic(noisy(1, 2, 1, 28, 28), 0).sample.square().sum().backward()
    for network in (model, basic):
        assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    for model, channels in ((context_unet(), 3), (BasicUNet2DModel().eval(), 1)):
        sample = noisy(1, 2, channels, 16, 16)
        expected = model(sample, 300).sample
        with torch.autocast("cpu", dtype=dtype):
            outputs = [model(sample, 300).sample]
        outputs.append(model.to(dtype)(sample.to(dtype), 300).sample)
        for output in outputs:
            assert output.dtype == dtype
            # About 24 layers with two roundings each of half an ulp, 2^-9 in bfloat16: 10 % if they all add up.
            assert (output - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_time_is_rounded_once_in_half_precision():
    model = context_unet(sample_size=4, num_features=8).bfloat16()
    times = []
    model.time_embeddings[0].register_forward_hook(lambda _, args, output: times.append(args[0]))
    model(torch.zeros(1000, 3, 4, 4, dtype=torch.bfloat16), torch.arange(1000))
    assert torch.equal(times[0], (torch.arange(1, 1001)[:, None] / 1000).bfloat16())


@pytest.mark.parametrize("norm_type", ["group", "batch"])
def test_context_unet_save_and_load(tmp_path, norm_type):
    model = context_unet(sample_size=(24, 16), norm_type=norm_type).train()
    sample = noisy(1, 2, 3, 24, 16)
    model(sample, 10)  # moves the statistics of batch norm off their initial values
    model.eval().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded = ContextUNet2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    labels = torch.tensor([1, 5])
    with torch.no_grad():
        assert torch.equal(loaded(sample, 10, labels).sample, model(sample, 10, labels).sample)


def test_basic_unet_has_the_parameters_of_the_course_network():
    # Weights and biases of 5x5 convolutions.
    layers = [(1, 32), (32, 64), (64, 64), (64, 64), (64, 32), (32, 1)]
    count = sum(25 * channels_in * channels_out + channels_out for channels_in, channels_out in layers)
    assert sum(p.numel() for p in BasicUNet2DModel().parameters()) == count == 309_057


@torch.no_grad()
@pytest.mark.parametrize("sides", [(28, 28), (16, 24)])
def test_basic_unet_is_the_course_network_before_its_last_activation(sides):
    torch.manual_seed(0)
    model = BasicUNet2DModel(sides, in_channels=3, out_channels=2)
    sample = noisy(1, 2, 3, *sides)

    def course(x):
        skips = []
        for i, layer in enumerate(model.down_layers):
            x = F.silu(layer(x))
            if i < 2:
                skips.append(x)
                x = nn.MaxPool2d(2)(x)
        for i, layer in enumerate(model.up_layers):
            if i > 0:
                x = nn.Upsample(scale_factor=2)(x)
                x = x + skips.pop()
            x = F.silu(layer(x))
        return x

    output = model(sample, torch.tensor([3, 7])).sample
    # The same operations in the same order.
    assert torch.equal(F.silu(output), course(sample))
    assert torch.equal(model(sample, return_dict=False)[0], output)


def test_basic_unet_save_and_load_and_errors(tmp_path):
    model = BasicUNet2DModel()
    model.save_pretrained(tmp_path)
    loaded = BasicUNet2DModel.from_pretrained(tmp_path)
    sample = noisy(1, 2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(sample).sample, model(sample).sample)
    with pytest.raises(ValueError, match="divisible by 4, got 28 x 30"):
        model(torch.zeros(1, 1, 28, 30))
