"""Window plans: one choice a round, the same for all (R6)."""

import pytest

from common.errors import ConfigError
from common.flow.kernels import make_kernel
from rollout_workers.config import WindowConfig
from rollout_workers.windows import WindowPlan, check_window, make_window_plan

CONFIGS = {
    "none": WindowConfig(kind="none"),
    "all": WindowConfig(kind="all"),
    "drop_last": WindowConfig(kind="drop_last"),
    "first": WindowConfig(kind="first", size=3),
    "random": WindowConfig(kind="random", size=2, start=1, stop=8),
}


def plan_of(kind: str, num_steps: int = 10, run_seed: int = 7) -> WindowPlan:
    return make_window_plan(CONFIGS[kind], num_steps, run_seed)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_plan_gives_increasing_steps_inside_its_reach_and_repeats_itself(kind: str) -> None:
    """The contract of a WindowPlan, on every implementation."""
    plan, same = plan_of(kind), plan_of(kind)
    for window_round in range(50):
        steps = plan.steps(window_round)
        assert list(steps) == sorted(set(steps))
        assert set(steps) <= plan.reach <= set(range(10))
        assert same.steps(window_round) == steps
    assert plan.steps(3) == plan.steps(3)


@pytest.mark.parametrize(
    ("kind", "expected"), [("none", ()), ("all", tuple(range(10))), ("drop_last", tuple(range(9))), ("first", (0, 1, 2))]
)
def test_the_fixed_windows_are_the_named_steps(kind: str, expected: tuple[int, ...]) -> None:
    assert plan_of(kind).steps(0) == plan_of(kind).steps(17) == expected


def test_a_random_window_is_consecutive_and_takes_every_place_evenly() -> None:
    counts = dict.fromkeys(range(1, 7), 0)  # starts 1 to 6: a window of 2 inside [1, 8)
    for window_round in range(6000):
        first, second = plan_of("random").steps(window_round)
        assert second == first + 1
        counts[first] += 1
    assert all(abs(count - 1000) < 4 * (6000 * 1 / 6 * 5 / 6) ** 0.5 for count in counts.values())  # 4 binomial standard errors


def test_a_random_window_depends_on_the_run_seed() -> None:
    assert [plan_of("random", run_seed=7).steps(r) for r in range(20)] != [plan_of("random", run_seed=8).steps(r) for r in range(20)]


@pytest.mark.parametrize(
    ("config", "num_steps"),
    [
        (WindowConfig(kind="first", size=3), 2),
        (WindowConfig(kind="random", size=3, start=2, stop=4), 10),
        (WindowConfig(kind="random", size=1, stop=11), 10),
        (WindowConfig(kind="drop_last"), 1),
    ],
)
def test_a_window_that_does_not_fit_is_a_config_error(config: WindowConfig, num_steps: int) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.window"):
        make_window_plan(config, num_steps, 0)


def test_a_window_without_a_log_prob_under_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"window\.kind = none"):
        check_window(plan_of("first"), make_kernel("ode", 0.0), 10)
    with pytest.raises(ConfigError, match=r"window\.kind = none"):
        check_window(plan_of("first"), make_kernel("flow_sde", 0.0), 10)
    with pytest.raises(ConfigError, match="drop_last"):
        check_window(plan_of("all"), make_kernel("cps", 0.8), 10)
    check_window(plan_of("none"), make_kernel("ode", 0.0), 10)
    check_window(plan_of("drop_last"), make_kernel("cps", 0.8), 10)
    check_window(plan_of("all"), make_kernel("flow_sde", 0.7), 10)
