"""Every kind of advantage against a slow loop, by hand, and the invariants A1-A9 (algorithms, section 27)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from common.types import Manifest
from learner.advantages import AdvantageBatch, make_estimator
from learner.config import AdvantageConfig
from tests.test_learner_advantages import group, manifest, random_manifest

EPS = 1e-4
Rewards = Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A configuration and which invariants it has."""

    config: AdvantageConfig
    sums_to_zero: bool = False
    scale: float = 0.0  # A(a r) = a^scale A(r)


CASES = {
    "group_std": Case(config=AdvantageConfig(kind="group_std"), sums_to_zero=True),
    "global_std": Case(config=AdvantageConfig(kind="global_std"), sums_to_zero=True),
    "none": Case(config=AdvantageConfig(kind="none"), sums_to_zero=True, scale=1.0),
    "super_linear": Case(config=AdvantageConfig(kind="super_linear")),
    "pair": Case(config=AdvantageConfig(kind="pair"), sums_to_zero=True),
    "best": Case(config=AdvantageConfig(kind="best")),
    "group_std_subset": Case(config=AdvantageConfig(kind="group_std", subset=4)),
    "global_std_subset": Case(config=AdvantageConfig(kind="global_std", subset=2)),
    "none_subset": Case(config=AdvantageConfig(kind="none", subset=4), scale=1.0),
    "super_linear_subset": Case(config=AdvantageConfig(kind="super_linear", gamma=1.0, subset=4)),
}
KINDS = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def estimate(
    found: Manifest, config: AdvantageConfig | None = None, weights: dict[str, float] | None = None, **changes: Any
) -> AdvantageBatch:
    chosen = config or AdvantageConfig(**changes)
    return make_estimator(chosen).estimate(found, weights or {"r": 1.0})


def of_rows(rows: Rewards) -> Manifest:
    return manifest(*(group(n, [value is not None for value in row], r=row) for n, row in enumerate(rows)))


def slow(config: AdvantageConfig, rows: Rewards) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Written as the definitions read: one loop, one symbol."""
    kept = [[k for k, r in enumerate(row) if r is not None] for row in rows]
    means = [sum(row[k] for k in own) / len(own) for row, own in zip(rows, kept, strict=True)]
    differences = {(p, k): rows[p][k] - means[p] for p, own in enumerate(kept) for k in own}
    power = 1 + config.gamma if config.kind == "super_linear" else 1.0
    shaped = {key: math.copysign(abs(d) ** power, d) for key, d in differences.items()}
    everything = list(shaped.values()) if config.kind == "super_linear" else [rows[p][k] for p, own in enumerate(kept) for k in own]
    advantages, mask = np.zeros((len(rows), len(rows[0]))), np.zeros((len(rows), len(rows[0])), dtype=np.bool_)
    for p, own in enumerate(kept):
        if max(rows[p][k] for k in own) == min(rows[p][k] for k in own):
            continue
        best = min(own, key=lambda k: (-rows[p][k], k))
        worst = max(own, key=lambda k: (-rows[p][k], k))
        by_rank = sorted(own, key=lambda k: (-rows[p][k], k))
        half = config.subset // 2
        picked = by_rank[:half] + by_rank[-half:] if config.subset and len(own) > config.subset else own
        if config.kind in ("pair", "best"):
            picked = [best, worst] if config.kind == "pair" else [best]
        scale = {"none": 1.0, "group_std": std([rows[p][k] for k in own]) + EPS}.get(config.kind, std(everything) + EPS)
        for k in picked:
            mask[p, k] = True
            advantages[p, k] = shaped[p, k] / scale
            if config.kind in ("pair", "best"):
                advantages[p, k] = 1.0 if k == best else -1.0
    return advantages, mask


def std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def random_rows(seed: int = 1) -> list[list[float | None]]:
    """Seven groups of eight: quarters, so that many tie; a few nulls, one flat group, one with two samples left."""
    generator = np.random.default_rng(seed)
    rows: list[list[float | None]] = [[round(4 * value) / 4 for value in generator.normal(size=8)] for _ in range(7)]
    rows[2] = [0.5] * 8
    rows[4][0] = rows[4][5] = None
    rows[5] = [None, 0.25, None, None, None, None, 1.0, None]
    return rows


@KINDS
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_kind_equals_the_slow_loop(case: Case, seed: int) -> None:
    found = estimate(of_rows(random_rows(seed)), case.config)
    advantages, mask = slow(case.config, random_rows(seed))
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_allclose(found.advantages, advantages, rtol=1e-6, atol=1e-6)  # float32 of values below 8
    assert found.advantages.dtype == np.float32
    assert found.flat.tolist() == [False, False, True, False, False, False, False]


def test_every_kind_gives_the_numbers_computed_by_hand() -> None:
    one = of_rows([[1.0, 4.0, 1.0, 2.0]])  # mean 2, differences -1, 2, -1, 0; std sqrt(6/4)
    root = 1.5**0.5
    expected: dict[str, list[float]] = {
        "none": [-1.0, 2.0, -1.0, 0.0],
        "group_std": [-1 / (root + EPS), 2 / (root + EPS), -1 / (root + EPS), 0.0],
        "pair": [0.0, 1.0, -1.0, 0.0],  # of the two lowest, the highest index
        "best": [0.0, 1.0, 0.0, 0.0],
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(estimate(one, kind=kind).advantages, [values], rtol=1e-6, err_msg=kind)
    # gamma 1: S = -1, 4, -1, 0 with mean .5 and std sqrt(18/4 - 1/4) = sqrt(4.25)
    scale = 4.25**0.5 + EPS
    np.testing.assert_allclose(
        estimate(one, kind="super_linear", gamma=1.0).advantages, [[-1 / scale, 4 / scale, -1 / scale, 0.0]], rtol=1e-6
    )


def test_ties_give_the_best_its_lowest_and_the_worst_its_highest_index() -> None:
    tied = of_rows([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(estimate(tied, kind="pair").advantages, [[1, 0, 0, -1], [0, 0, -1, 1], [1, 0, 0, -1]])
    np.testing.assert_array_equal(
        estimate(tied, kind="best").mask, [[True, False, False, False], [False] * 3 + [True], [True] + [False] * 3]
    )
    np.testing.assert_array_equal(estimate(tied, subset=2).mask, [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1]])


def test_a_subset_trains_both_ends_with_the_advantages_of_the_whole_group() -> None:
    one = of_rows([[5.0, 1.0, 4.0, 2.0, 3.0, 0.0]])
    found, whole = estimate(one, subset=4), estimate(one)
    assert found.mask.tolist() == [[True, True, True, False, False, True]]  # 5, 4 and 1, 0
    np.testing.assert_array_equal(found.advantages, np.where(found.mask, whole.advantages, 0.0))
    np.testing.assert_array_equal(found.rewards, whole.rewards)  # masked samples keep their rewards
    small = of_rows([[1.0, None, 0.0, 2.0]])
    assert estimate(small, subset=4).mask.tolist() == [[True, False, True, True]]  # no more than n: all of them


@KINDS
def test_advantages_of_a_group_sum_to_zero_where_they_are_centered(case: Case) -> None:
    sums = np.abs(estimate(random_manifest(shift=3.0), case.config).advantages.astype(np.float64).sum(axis=1)).max()
    assert (sums <= 1e-5) if case.sums_to_zero else (sums > 1e-2)  # A1, float32; the others do not claim it


@KINDS
def test_shifting_rewards_changes_nothing_and_scaling_them_what_the_kind_says(case: Case) -> None:
    plain, scaled = (estimate(random_manifest(scale=scale), case.config) for scale in (1.0, 10.0))
    shifted = estimate(random_manifest(shift=7.0), case.config)
    np.testing.assert_allclose(
        shifted.advantages, plain.advantages, atol=2e-6
    )  # A2; super_linear has |A| up to 6, where float32 keeps 5e-7
    # eps / std is the whole error: |A| < 6 (shaped), std > .2
    np.testing.assert_allclose(scaled.advantages, 10.0**case.scale * plain.advantages, rtol=1e-6 if case.scale else 3e-3, atol=2e-6)
    for other in (shifted, scaled):
        np.testing.assert_array_equal(other.mask, plain.mask)


@KINDS
def test_a_flat_group_is_masked_by_every_kind(case: Case) -> None:
    found = estimate(of_rows([[0.3] * 6, [0.0, 1.0, 0.0, 0.5, 0.2, 0.1], [None, 1.0, None, None, None, None]]), case.config)
    assert found.flat.tolist() == [True, False, True]  # A3; one sample left has nothing to compare
    assert not found.mask[0].any() and found.mask[1].any() and not found.mask[2].any()
    np.testing.assert_array_equal(found.advantages[[0, 2]], 0.0)
    assert np.isfinite(found.advantages).all()


@KINDS
def test_reordering_samples_and_groups_reorders_advantages_and_masks(case: Case) -> None:
    original, order = random_manifest(seed=4), [3, 0, 5, 1, 4, 2]
    plain = estimate(original, case.config)
    moved = manifest(*(group(g.number, r=[g.scores["r"][k] for k in order]) for g in reversed(original.groups)))
    found = estimate(moved, case.config)
    np.testing.assert_array_equal(found.mask, plain.mask[::-1][:, order])  # A4; without ties
    np.testing.assert_allclose(found.advantages, plain.advantages[::-1][:, order], atol=1e-6)


@KINDS
def test_null_scores_are_left_out_as_if_the_samples_did_not_exist(case: Case) -> None:
    full, where = np.random.default_rng(8).normal(size=(3, 6)), [0, 2, 3, 5, 6, 7]
    holed: list[list[float | None]] = [[None] * 8 for _ in full]
    for row, values in zip(holed, full, strict=True):
        for place, value in zip(where, values, strict=True):
            row[place] = float(value)
    found, subset = estimate(of_rows(holed), case.config), estimate(of_rows(full.tolist()), case.config)
    np.testing.assert_array_equal(found.advantages[:, where], subset.advantages)  # A9
    np.testing.assert_array_equal(found.mask[:, where], subset.mask)
    assert not found.mask[:, [1, 4]].any()


def two_rewards(scale: float) -> Manifest:
    """Five groups of six with rewards a and b that disagree; b in units of `scale`."""
    a, b = np.random.default_rng(2).normal(size=(2, 5, 6))
    return manifest(*(group(n, a=a[n].tolist(), b=(scale * b[n]).tolist()) for n in range(5)))


@pytest.mark.parametrize("kind", ["group_std", "global_std", "super_linear", "pair", "best"])
def test_per_reward_frees_every_kind_from_one_rewards_scale(kind: str) -> None:
    weights = {"a": 1.0, "b": 1.0}
    plain, scaled = (estimate(two_rewards(s), weights=weights, kind=kind, normalize="per_reward") for s in (1.0, 100.0))
    np.testing.assert_array_equal(scaled.mask, plain.mask)
    np.testing.assert_allclose(scaled.advantages, plain.advantages, atol=3e-3)  # A7: eps / std, as above
    first, second = (estimate(two_rewards(s), weights=weights, kind=kind) for s in (1.0, 100.0))
    assert np.abs(first.advantages - second.advantages).max() > 0.3  # summed raw, b decides


def test_a_pair_of_several_rewards_is_chosen_by_their_weighted_sum_or_by_the_standardized_ones() -> None:
    # b has a hundred times a's spread; standardized, a's weight of 2 decides
    both = manifest(group(0, a=[0.0, 1.0, 0.5], b=[100.0, 0.0, 50.0]))
    assert estimate(both, weights={"a": 2.0, "b": 1.0}, kind="pair").advantages.tolist() == [[1.0, -1.0, 0.0]]
    assert estimate(both, weights={"a": 2.0, "b": 1.0}, kind="pair", normalize="per_reward").advantages.tolist() == [[-1.0, 1.0, 0.0]]


@pytest.mark.parametrize("kind", ["pair", "best"])
def test_rewards_that_cancel_choose_nobody(kind: str) -> None:
    cancels = manifest(group(0, a=[0.1, 0.2, 0.3], b=[0.3, 0.2, 0.1]), group(1, a=[0.0, 1.0, 0.0], b=[0.0, 0.0, 0.0]))
    found = estimate(cancels, weights={"a": 1.0, "b": 1.0}, kind=kind)
    assert found.flat.tolist() == [True, False]  # .1 + .3 and .2 + .2 differ in float64, by 6e-17
    assert not found.mask[0].any() and found.mask[1].any()


def test_super_linear_with_gamma_zero_is_centered_over_the_batchs_std() -> None:
    original = random_manifest(seed=5)
    rewards = np.array([g.scores["r"] for g in original.groups])
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    found = estimate(original, kind="super_linear", gamma=0.0).advantages
    np.testing.assert_allclose(found, centered / (centered.std() + EPS), atol=1e-6)  # A8


@pytest.mark.parametrize("gamma", [0.25, 0.5, 2.0])
def test_super_linear_keeps_sign_and_order_and_lets_large_differences_stand_out(gamma: float) -> None:
    original = random_manifest(seed=6)
    shaped, linear = (estimate(original, kind="super_linear", gamma=g).advantages for g in (gamma, 0.0))
    np.testing.assert_array_equal(np.sign(shaped), np.sign(linear))  # A8
    np.testing.assert_array_equal(shaped.argsort(axis=1), linear.argsort(axis=1))
    large, small = np.abs(linear).argmax(), np.abs(linear).argmin()
    ratio = np.abs(linear.flat[large] / linear.flat[small])
    assert np.abs(shaped.flat[large] / shaped.flat[small]) == pytest.approx(ratio ** (1 + gamma), rel=1e-3)  # float32 of a small number


@pytest.mark.parametrize(
    ("kind", "normalize"),
    [(kind, normalize) for normalize in ("sum", "per_reward") for kind in ("group_std", "global_std", "super_linear")] + [("none", "sum")],
)
def test_without_a_subset_everything_kept_trains_and_no_estimator_has_a_history(kind: str, normalize: str) -> None:
    config = AdvantageConfig(kind=kind, normalize=normalize)  # type: ignore[arg-type]
    found = estimate(of_rows(random_rows()), config)
    expected = np.array([[r is not None for r in row] for row in random_rows()]) & ~found.flat[:, None]
    np.testing.assert_array_equal(found.mask, expected)
    estimator = make_estimator(config)
    estimator.load_state(estimator.read_state())
    assert estimator.read_state() == make_estimator(AdvantageConfig(kind="pair")).read_state() == {}


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"subset": 3}, "make it even"), ({"subset": -2}, "greater than or equal to 0"), ({"subset": 2, "kind": "pair"}, "leave subset out"),
        ({"kind": "none", "normalize": "per_reward"}, "set kind='group_std'"), ({"subset": 2, "kind": "best"}, "leave subset out"), ({"gamma": -0.5}, "greater than or equal to 0"), ({"kind": "worst"}, "super_linear"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValidationError, match=remedy):
        AdvantageConfig(**changes)
