"""Sums over the members of a group, for losses that couple them: a micro-batch then holds whole groups."""

import torch


def group_sums(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return each sample's sum of `values` over its own group; differentiable, and in one order on every device.

    Args:
        values: [B]. group: [B] equal within a group, on any device.

    Returns:
        [B], the dtype of `values`.
    """
    group = group.to(values.device)
    same = group[:, None] == group[None, :]
    return torch.where(same, values[None, :], torch.zeros_like(values)[None, :]).sum(dim=1)
