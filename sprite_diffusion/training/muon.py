"""Muon, an optimizer for matrices, in one with AdamW for everything else."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

ADAMW_MULTIPLE = 20.0  # Muon's learning rate as a multiple of AdamW's: 0.02, as in the source, where AdamW has 0.001
MOMENTUM = 0.95
ITERATIONS = 5
FEWEST_FEATURES = 8  # a shorter side is one of colours, classes or times
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that takes singular values to about 1 in five iterations


class Muon(torch.optim.AdamW):
    r"""
    AdamW in which the matrices of a network take Muon's steps: orthogonalised momentum.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, as `torch.optim.Muon`, which takes no convolutions
    and can't be told on the device to leave out a step. The weights of a convolution are a matrix of its output
    channels by everything else.

    Args:
        model: The network, whose matrices are those of `find_matrices`.
        lr (`float`): AdamW's learning rate; Muon's is `ADAMW_MULTIPLE` times as large.
        **kwargs: The other arguments of [`torch.optim.AdamW`]; its weight decay is for both.
    """

    def __init__(self, model: nn.Module, lr: float, **kwargs: Any) -> None:
        matrices = find_matrices(model)
        ids = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
        groups = [{"params": others, "lr": lr}, {"params": matrices, "lr": ADAMW_MULTIPLE * lr}]
        super().__init__(groups, lr=lr, fused=True, **kwargs)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here computes a loss again
        """Takes a step, or none if `found_inf`, which GradScaler or BadSteps sets, is 1."""
        groups = self.param_groups
        self.param_groups = groups[:1]
        try:
            super().step()
        finally:
            self.param_groups = groups
        self._step_matrices(groups[1]["params"], groups[1]["lr"], groups[1]["weight_decay"])

    def _step_matrices(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                # AdamW looks for a step when it loads a state.
                self.state[matrix] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(matrix)}
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]  # each has one
        new_momenta = torch._foreach_lerp(momenta, gradients, 1 - MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, new_momenta, MOMENTUM)
        updates = orthogonalize([update.flatten(1) for update in nesterov])
        found_inf = getattr(self, "found_inf", None)
        for matrix, momentum, new_momentum, update in zip(matrices, momenta, new_momenta, updates, strict=True):
            rows, columns = update.shape
            change = update.reshape(matrix.shape).mul_(-lr * max(1, rows / columns) ** 0.5)
            change.add_(matrix, alpha=-lr * weight_decay)
            if found_inf is not None:
                change = torch.where(found_inf > 0, 0, change)
                new_momentum = torch.where(found_inf > 0, momentum, new_momentum)
            matrix.add_(change)
            momentum.copy_(new_momentum)


def orthogonalize(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns matrices (M, N) with all singular values near 1, 0.7 to 1.2, by Newton and Schulz' iteration.

    Each iteration is X <- (a I + b X X' + c (X X')^2) X. All of them are polynomials of the first X X' times the first
    X: so only the small side is iterated, which is a third of the operations, and all matrices of one small side at
    once.
    """
    wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    wide = [matrix / matrix.norm().clamp(min=1e-7) for matrix in wide]  # no singular value is above 1
    for side in {len(matrix) for matrix in wide}:
        rows = [row for row, matrix in enumerate(wide) if len(matrix) == side]
        products = _multiply_iterations(torch.stack([wide[row] @ wide[row].T for row in rows]))
        for row, product in zip(rows, products, strict=True):
            wide[row] = product @ wide[row]
    return [
        result.T if matrix.shape[0] > matrix.shape[1] else result
        for matrix, result in zip(matrices, wide, strict=True)
    ]


def _multiply_iterations(gram: torch.Tensor) -> torch.Tensor:
    """Returns the product (B, M, M) of the factors of all iterations, of the first X X' (B, M, M)."""
    identity = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    factor = product = _factor(gram, identity)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram, identity)
        product = factor @ product
    return product


def _factor(gram: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    return a * identity + b * gram + c * gram @ gram


def find_matrices(model: nn.Module) -> list[torch.Tensor]:
    """Returns the weights that mix features: of convolutions, and of what the time and the class go through.

    Those of attention are left out: they are as many as the others, so that to orthogonalise them takes as much time
    again, and at 4x4 pixels it brought nothing (docs/quality.md).
    """
    attention = {id(part) for module in model.modules() if isinstance(module, Attention) for part in module.modules()}
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    weights = [layer.weight for layer in layers if id(layer) not in attention]
    return [weight for weight in weights if min(weight.shape[:2]) >= FEWEST_FEATURES]
