"""Tests the optimizer Muon: against its formulas and torch's, and that it skips and resumes exactly."""

import copy

import numpy as np
import pytest
import torch
from launching import TINY
from safetensors.torch import load_file
from torch import nn

from models import BasicUNet2DModel, ContextUNet2DModel
from sprite_diffusion.runs.config import TrainingConfig
from sprite_diffusion.training.build import build_model
from sprite_diffusion.training.muon import COEFFICIENTS, Muon, find_matrices, orthogonalize


class Network(nn.Module):
    """Two convolutions: the first has the channels of the images, the second is a matrix (rows, 9 * channels)."""

    def __init__(self, rows: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.inner = nn.Conv2d(channels, rows, 3)


def iterate(matrix: np.ndarray) -> np.ndarray:
    """Returns five of Newton and Schulz' iterations as Jordan et al. write them, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix / np.linalg.norm(matrix)
    x = x.T if len(x) > len(x[0]) else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > len(matrix[0]) else x


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (32, 288), (128, 1152), (200, 30)])
def test_orthogonalize_is_the_iteration(shape):
    """Each of some 10 products in float32 adds an error of 2^-24 of a vector of the small side."""
    matrix = np.random.default_rng(0).standard_normal(shape)
    (ours,) = orthogonalize([torch.tensor(matrix, dtype=torch.float32)])
    np.testing.assert_allclose(ours.double().numpy(), iterate(matrix), atol=10 * 2**-24 * min(shape) * 1.2)


def test_singular_values_become_about_one_and_directions_stay():
    matrix = torch.randn(16, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = u.T @ orthogonalize([matrix])[0] @ v.T
    assert torch.allclose(result, torch.diag(result.diag()), atol=1e-9)
    assert 0.6 < result.diag().min() < result.diag().max() < 1.25
    assert orthogonalize([torch.zeros(3, 4)])[0].eq(0).all()


@pytest.mark.parametrize(("rows", "channels"), [(24, 8), (80, 8)])
def test_steps_are_those_of_the_formulas(rows, channels):
    """Three steps of both kinds; AdamW is torch's."""
    torch.manual_seed(0)
    network = Network(rows, channels)
    reference = copy.deepcopy(network)
    ours = Muon(network, lr=1e-3, weight_decay=0.1)
    adamw = torch.optim.AdamW([*reference.first.parameters(), reference.inner.bias], lr=1e-3, weight_decay=0.1)
    weight, momentum = reference.inner.weight.detach().double().flatten(1).numpy(), np.zeros((rows, 9 * channels))
    for _ in range(3):
        for ours_p, reference_p in zip(network.parameters(), reference.parameters(), strict=True):
            ours_p.grad = torch.randn_like(ours_p)
            reference_p.grad = ours_p.grad.clone()
        ours.step()
        adamw.step()
        gradient = network.inner.weight.grad.double().flatten(1).numpy()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = iterate(0.05 * gradient + 0.95 * momentum)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * max(1, rows / (9 * channels)) ** 0.5 * update
        np.testing.assert_allclose(network.inner.weight.detach().flatten(1).numpy(), weight, atol=1e-6)
        for ours_p, reference_p in zip(network.first.parameters(), reference.first.parameters(), strict=True):
            assert torch.allclose(ours_p, reference_p, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
def test_a_matrix_takes_the_steps_of_torchs_muon():
    """torch computes in bfloat16, of 2^-8, and its iteration amplifies an error by up to 3.4445 each time."""
    torch.manual_seed(0)
    network = Network(24, 8)
    reference = nn.Parameter(network.inner.weight.detach().flatten(1).clone())
    ours, theirs = Muon(network, lr=1e-3, weight_decay=0.0), torch.optim.Muon([reference], lr=0.02, weight_decay=0.0)
    start = reference.detach().clone()
    for _ in range(3):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        reference.grad = network.inner.weight.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    moved = (reference - start).norm()
    assert (network.inner.weight.flatten(1) - reference).norm() < 5 * 2**-8 * 3.4445 * moved


def test_a_step_of_bad_gradients_changes_nothing():
    network = Network(24, 8)
    optimizer = Muon(network, lr=1e-3)

    def step(value: float, found_inf: float) -> None:
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter) * value
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf)
        optimizer.step()

    step(1.0, 0.0)
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
    step(torch.nan, 1.0)
    for old, new in zip(before[0].values(), network.state_dict().values(), strict=True):
        assert torch.equal(old, new)
    for old, new in zip(before[1].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    step(1.0, 0.0)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert not torch.equal(network.inner.weight, before[0]["inner.weight"])


def test_matrices_are_what_lies_between_images_tables_and_vectors_but_for_attention():
    config = TrainingConfig(resolution="16", block_out_channels=[16, 32], attention_levels=[2], attention_head_dim=8)
    unet = build_model(config, 3, dict(enumerate("abcd")))
    matrices = {id(matrix) for matrix in find_matrices(unet)}
    left = {name for name, parameter in unet.named_parameters() if id(parameter) not in matrices}
    of_attention = {name for name in left if "attentions" in name}
    assert len(of_attention) > 10
    assert {name for name in left - of_attention if unet.get_parameter(name).ndim > 1} == {
        "conv_in.weight",
        "conv_out.weight",
        "class_embedding.weight",
    }
    assert not any("attentions" in name for name, parameter in unet.named_parameters() if id(parameter) in matrices)
    for network in (BasicUNet2DModel(sample_size=8), ContextUNet2DModel(sample_size=8, num_features=8, context_dim=2)):
        assert all(3 not in matrix.shape[:2] for matrix in find_matrices(network))
        assert len(find_matrices(network)) > 3


def test_a_resumed_run_has_the_same_weights(run_script, tmp_path):
    flags = f"{TINY} --optimizer muon --logger none"
    run_script("train_unconditional", flags, tmp_path / "whole")
    run_script("train_unconditional", f"{flags} --max_train_steps 3", tmp_path / "halves")
    run_script("train_unconditional", f"{flags} --resume_from_checkpoint latest", tmp_path / "halves")
    whole, halves = (load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
