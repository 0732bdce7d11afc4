"""O15: a run that is cut, saved, loaded elsewhere and gone on with equals the whole one, bit for bit."""

from collections.abc import Callable
from typing import Any

import torch

from common.types import Manifest, RolloutGroup
from learner.state import StateArchive
from learner.update import Learner
from tests.learner_fakes import MemoryFiles


def flat(state: Any) -> torch.Tensor:
    """All tensors of an adapter in one."""
    return torch.cat([state[key].flatten() for key in sorted(state)])


def check_resume(
    make: Callable[[], Learner], batch_for: Callable[[Learner, int], tuple[Manifest, list[RolloutGroup]]], *, updates: int, cut: int
) -> Learner:
    """Compare live adapter, snapshots, their counters and the optimizer's moments; return the learner that nobody cut.

    Args:
        batch_for: an update's manifest and groups, sampled with the learner that nobody cuts.
        cut: the update after which the other one is saved, and loaded into a fresh learner.
    """
    whole, first, second = (make() for _ in range(3))
    archive = StateArchive(MemoryFiles(), states_kept=2, writer_id="w")
    for update in range(1, updates + 1):
        batch = batch_for(whole, update)
        whole.update(*batch)
        if update <= cut:
            first.update(*batch)
        if update == cut:
            archive.save(first)
            archive.load(second, cut)
        if update > cut:
            second.update(*batch)
    assert second.version == whole.version == updates
    assert torch.equal(flat(second.live), flat(whole.live))
    assert second.snapshots.counts == whole.snapshots.counts
    for name, state in whole.snapshots.states.items():
        assert torch.equal(flat(state), flat(second.snapshots.states[name])), name
    for key, moments in whole.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, second.optimizer.state_dict()["state"][key][name]) for name, tensor in moments.items())
    return whole
