"""Window plans: one choice a round, the same for all (R6)."""

import math
from collections.abc import Iterator
from itertools import islice

import pytest

from common.config import parse
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
    "progressive": WindowConfig(kind="sliding", size=3, start=1, stop=9, interval=4),
    "rolling": WindowConfig(kind="sliding", size=2, start=1, stop=8, interval=3, stride=2, roll_back=True),
    "decay": WindowConfig(kind="sliding", size=2, start=1, interval=8, strategy="decay"),
    "growing": WindowConfig(kind="sliding", size=2, stop=7, interval=2, strategy="decay", last_interval=5, roll_back=True),
    "exp_decay": WindowConfig(kind="sliding", size=2, interval=8, strategy="exp_decay", decay_from=3, decay_rate=0.3),
    "sliding at random": WindowConfig(kind="sliding", size=2, start=1, stop=8, interval=5, strategy="random"),
    "frozen": WindowConfig(kind="sliding", size=4, interval=20, stride=0),
}
SLIDING = [name for name, config in CONFIGS.items() if config.kind == "sliding" and config.strategy != "random"]


def plan_of(kind: str, num_steps: int = 10, run_seed: int = 7) -> WindowPlan:
    return make_window_plan(CONFIGS[kind], num_steps, run_seed)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_plan_gives_increasing_steps_inside_its_reach_and_repeats_itself(kind: str) -> None:
    """The contract of a WindowPlan, on every implementation."""
    plan, same = plan_of(kind), plan_of(kind)
    for window_round in range(50):
        steps = plan.steps(window_round)
        assert list(steps) == sorted(set(steps))
        assert len(steps) == plan.size
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


def slide(config: WindowConfig, num_steps: int) -> Iterator[tuple[int, ...]]:
    """The windows of round 0, 1, 2 ... by MixGRPO's rules, as a loop that keeps a position and a counter."""
    stop = config.stop or num_steps
    last = stop - config.size
    position, spent = config.start, 0
    while True:
        yield tuple(position + offset for offset in range(config.size))
        stay = float(config.interval)
        if config.strategy == "decay":
            share = (position - config.start) / (last - config.start)
            final = config.last_interval or max(1, config.interval // 4)
            stay = math.floor(config.interval * (1 - share) + final * share + 1e-9)  # 1e-9: 3 from 2.9999999999 of the division is 3
        if config.strategy == "exp_decay":
            stay = math.ceil(config.interval * math.exp(-config.decay_rate * max(0, position - config.decay_from)))
        spent += 1
        if spent >= stay:
            spent, moved = 0, position + config.stride
            position = moved if moved <= last else config.start if config.roll_back else last


@pytest.mark.parametrize("kind", SLIDING)
def test_a_sliding_window_is_where_a_plain_loop_has_moved_it(kind: str) -> None:
    plan = plan_of(kind)
    expected = list(islice(slide(CONFIGS[kind], 10), 120))
    assert [plan.steps(window_round) for window_round in range(120)] == expected
    assert plan.reach == {step for steps in expected for step in steps}


def test_a_progressive_window_moves_by_its_stride_and_stays_at_the_last_place() -> None:
    plan = make_window_plan(WindowConfig(kind="sliding", size=4, interval=25), 25, 0)
    assert plan.steps(0) == plan.steps(24) == (0, 1, 2, 3)
    assert plan.steps(25) == (1, 2, 3, 4)
    assert plan.steps(21 * 25) == plan.steps(10**6) == (21, 22, 23, 24)
    assert (plan.size, plan.reach) == (4, frozenset(range(25)))


def test_a_stride_over_the_end_stops_at_the_last_place_that_fits_or_rolls_back_before_it() -> None:
    config = WindowConfig(kind="sliding", size=2, start=1, stop=8, interval=1, stride=4)
    stays, rolls = make_window_plan(config, 10, 0), make_window_plan(config.model_copy(update={"roll_back": True}), 10, 0)
    assert [stays.steps(r)[0] for r in range(5)] == [1, 5, 6, 6, 6]
    assert [rolls.steps(r)[0] for r in range(5)] == [1, 5, 1, 5, 1]
    assert (stays.reach, rolls.reach) == ({1, 2, 5, 6, 7}, {1, 2, 5, 6})


def test_exponential_decay_shortens_the_stay_from_its_threshold_on() -> None:
    """interval 25, from 13, rate .1: ceil(25 e^-.1) = ceil(22.62) = 23 rounds at 14, ceil(25 e^-.8) = ceil(11.23) = 12 at 21."""
    plan = make_window_plan(WindowConfig(kind="sliding", size=4, interval=25, strategy="exp_decay", roll_back=True), 25, 0)
    starts = [plan.steps(window_round)[0] for window_round in range(5000)]
    first = starts[: starts.index(21) + 30]
    stays = [first.count(position) for position in range(1, 22)]
    assert stays[:13] == [25] * 13
    assert (stays[13], stays[20]) == (23, 12)
    assert stays[13:] == sorted(stays[13:], reverse=True)


def test_a_window_slid_at_random_keeps_a_place_for_its_interval_and_takes_all() -> None:
    plan = plan_of("sliding at random")
    starts = [plan.steps(window_round)[0] for window_round in range(1000)]
    assert all(len(set(starts[span : span + 5])) == 1 for span in range(0, 1000, 5))
    assert set(starts) == set(range(1, 7))
    alone = make_window_plan(CONFIGS["sliding at random"].model_copy(update={"interval": 1}), 10, 7)
    assert [alone.steps(r) for r in range(50)] == [plan_of("random").steps(r) for r in range(50)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_start_in_the_middle_goes_on_where_the_run_was(kind: str) -> None:
    """Nothing is carried over: a plan made for round 37 alone, whatever it was asked before, gives what a plan of the whole run gives."""
    whole = [plan_of(kind).steps(window_round) for window_round in range(80)]
    restarted = plan_of(kind)
    assert [restarted.steps(window_round) for window_round in range(37, 80)] == whole[37:]
    backwards = plan_of(kind)
    assert [backwards.steps(window_round) for window_round in reversed(range(80))] == whole[::-1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_groups_of_a_round_agree_whoever_samples_them(kind: str) -> None:
    """R6: workers of their own, groups in any order; the round is the group's number // P."""
    workers, groups_per_update = [plan_of(kind) for _ in range(3)], 4
    windows: dict[int, set[tuple[int, ...]]] = {}
    for number in reversed(range(120)):
        window_round = number // groups_per_update
        windows.setdefault(window_round, set()).add(workers[number % 3].steps(window_round))
    assert all(len(found) == 1 for found in windows.values())


def test_a_window_for_each_group_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"inflates the groups' spread and collapses training; leave shared out"):
        parse(WindowConfig, {"kind": "random", "shared": False}, "mine.toml")


@pytest.mark.parametrize(
    ("config", "num_steps"),
    [
        (WindowConfig(kind="first", size=3), 2),
        (WindowConfig(kind="random", size=3, start=2, stop=4), 10),
        (WindowConfig(kind="random", size=1, stop=11), 10),
        (WindowConfig(kind="drop_last"), 1),
        (WindowConfig(kind="sliding", size=4, start=7), 10),
        (WindowConfig(kind="sliding", size=1, stop=11, strategy="random"), 10),
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
    with pytest.raises(ConfigError, match="drop_last"):
        check_window(plan_of("all"), make_kernel("dpm_sde", 0.7), 10)
    with pytest.raises(ConfigError, match=r"window\.stop"):
        check_window(plan_of("decay"), make_kernel("cps", 0.8), 10)
    check_window(plan_of("progressive"), make_kernel("cps", 0.8), 10)
    check_window(plan_of("none"), make_kernel("ode", 0.0), 10)
    check_window(plan_of("drop_last"), make_kernel("cps", 0.8), 10)
    check_window(plan_of("all"), make_kernel("flow_sde", 0.7), 10)
