"""Muon, an optimizer for weight matrices, in one with AdamW for everything else."""

from typing import Any

import torch
from torch import nn

ADAMW_MULTIPLE = 20.0  # Muon's learning rate as a multiple of AdamW's: steps of about as many thousandths of a weight
MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that takes singular values to about 1 in five iterations


class Muon(torch.optim.AdamW):
    r"""
    AdamW in which the matrices of a network take Muon's steps: orthogonalised momentum.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, as `torch.optim.Muon`, which takes no convolutions
    and can't be told on the device to leave out a step. The weights of a convolution are a matrix of its output
    channels by everything else.

    Args:
        model: A network with `in_channels` in its config.
        lr (`float`): AdamW's learning rate; Muon's is `ADAMW_MULTIPLE` times as large.
        **kwargs: The other arguments of [`torch.optim.AdamW`]; its weight decay is for both.
    """

    def __init__(self, model: Any, lr: float, **kwargs: Any) -> None:
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
        found_inf = getattr(self, "found_inf", None)
        for matrix in groups[1]["params"]:
            if matrix.grad is not None:
                self._step_matrix(matrix, matrix.grad, groups[1]["lr"], groups[1]["weight_decay"], found_inf)

    def _step_matrix(
        self,
        parameter: nn.Parameter,
        gradient: torch.Tensor,
        lr: float,
        weight_decay: float,
        found_inf: torch.Tensor | None,
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # which AdamW looks for when it loads a state
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp(gradient, 1 - MOMENTUM)
        update = orthogonalize(gradient.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's momentum
        rows, columns = update.shape
        stepped = parameter * (1 - lr * weight_decay) - lr * max(1, rows / columns) ** 0.5 * update.view_as(parameter)
        if found_inf is not None:
            stepped = torch.where(found_inf > 0, parameter, stepped)
            momentum = torch.where(found_inf > 0, state["momentum_buffer"], momentum)
        parameter.copy_(stepped)
        state["momentum_buffer"].copy_(momentum)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the matrix (M, N) with all singular values near 1, 0.7 to 1.2, by Newton and Schulz' iteration.

    Each iteration is X <- (a I + b X X' + c (X X')^2) X. All of them are polynomials of the first X X' times the first
    X, so the small side is iterated alone: a third of the operations.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    wide = wide / wide.norm().clamp(min=1e-7)  # no singular value is above 1
    gram = wide @ wide.T
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    product = identity
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    wide = product @ wide
    return wide.T if is_tall else wide


def find_matrices(model: Any) -> list[torch.Tensor]:
    """Returns the weights inside of a network that are matrices.

    The first and the last layer, which have the images' channels, and tables of embeddings are none: one of their
    sides is no mix of features.
    """
    layers = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d))
    return [layer.weight for layer in layers if model.config["in_channels"] not in layer.weight.shape[:2]]
