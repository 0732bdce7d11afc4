"""The asynchronous rule on a simulated clock: what S buys, and what no group ever passes. Coordinator, loops and files are the real ones."""

from functools import cache

import pytest

from common.store.audit import audit
from tests.simulated_run import SimulatedRun, simulate, small_fake_config

BALANCED = "rollout=4s,learner=5s,reward=1s"  # sampling and scoring take as long as learning; polls (0.2 s) are small beside them
WARMUP = 4  # updates until the pipeline is full
SHORT = ("schedule.num_updates=8", "reward.0.num_servers=1")


@cache
def balanced(staleness: int) -> SimulatedRun:
    """P = 4 groups by 4 workers and 4 reward servers."""
    config = small_fake_config("rollout.num_workers=4", f"schedule.max_staleness={staleness}", "schedule.num_updates=16")
    return simulate(f"memory://balanced-{staleness}", config, BALANCED)


def test_balanced_phases_at_staleness_1_give_1_8_times_the_updates_of_staleness_0_and_2_is_no_worse() -> None:
    rates = [balanced(staleness).updates_per_minute(WARMUP) for staleness in (0, 1, 2)]
    assert rates[1] >= 1.8 * rates[0]
    assert rates[2] >= rates[1]


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_an_update_takes_the_slowest_phase_or_the_round_trip_over_s_plus_1(staleness: int) -> None:
    """Closed form: max(learner, sampling, (sampling + scoring + learning) / (S + 1)), and up to three polls of 0.2 s a round trip."""
    expected_s = max(5.0, 4.0, (4.0 + 1.0 + 5.0) / (staleness + 1))
    measured_s = 60.0 / balanced(staleness).updates_per_minute(WARMUP)
    assert expected_s - 1e-6 <= measured_s <= expected_s + 3 * 0.2 + 1e-6


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_no_group_passes_s_behind_a_learner_ten_times_slower_and_the_bound_is_reached(staleness: int) -> None:
    config = small_fake_config("rollout.num_workers=4", f"schedule.max_staleness={staleness}", *SHORT)
    run = simulate(f"memory://slow-learner-{staleness}", config, "rollout=1s,learner=10s,reward=0.3s")
    assert len(run.manifests) == 8
    assert max(run.staleness()) == staleness  # quick workers fill the bound
    assert audit(run.store).violations == ()


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_no_group_passes_s_with_worker_speeds_13_times_apart(staleness: int) -> None:
    config = small_fake_config("rollout.num_workers=7", f"schedule.max_staleness={staleness}", "schedule.num_updates=16")
    run = simulate(f"memory://spread-{staleness}", config, "rollout=0.2s..2.6s,learner=0.5s,reward=0.3s")
    assert len(run.manifests) == 16
    assert min(run.staleness()) >= 0 and max(run.staleness()) <= staleness
    assert [group.number for _, manifest in sorted(run.manifests.items()) for group in manifest.groups] == list(range(64))
    assert audit(run.store).violations == ()
