"""Muon with its orthogonalization divided among the processes, and the split of a model's parameters."""

from collections.abc import Iterable

import torch
from torch import nn

from deploy.pretrain.processes import Ranks

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with its singular values drawn near 1 (Newton-Schulz, Jordan et al. 2024, Muon).

    Args:
        matrix: [r, c].

    Returns:
        [r, c] bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: torch.Tensor = x.T if is_tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices; each process orthogonalizes its share of them.

    Momentum is kept by every process, so a checkpoint of any one is complete. Updates are scaled by
    0.2 sqrt(max(rows, columns)), which gives them AdamW's size (Liu et al. 2025), so one learning rate suits both.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, ranks: Ranks, momentum: float = 0.95, decay: float = 0.01) -> None:
        """Optimize matrices.

        Args:
            matrices: two-dimensional parameters.
            lr: learning rate.
            ranks: this process's place.
            momentum: Nesterov momentum.
            decay: decoupled weight decay.
        """
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum, "decay": decay})
        self._ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient, which must be equal on all processes."""
        for group in self.param_groups:
            updates = [self._update(parameter, group["momentum"], number) for number, parameter in enumerate(group["params"])]
            for source in range(self._ranks.size):
                self._ranks.share(updates[source :: self._ranks.size], source)
            for parameter, update in zip(group["params"], updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)

    def _update(self, parameter: torch.Tensor, momentum: float, number: int) -> torch.Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None, "every hidden matrix takes part in the loss"
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        if number % self._ranks.size != self._ranks.rank:
            return torch.empty_like(parameter)
        return orthogonalized(gradient.lerp(state["momentum"], momentum)).to(parameter.dtype)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (hidden matrices of attention and feed-forward layers, everything else) of a model that learns."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_hidden = ".transformer_blocks." in f".{name}" or ".layers." in name
        if parameter.ndim == 2 and is_hidden and ".norm1" not in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return matrices, others
