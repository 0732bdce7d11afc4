"""Several rewards in one advantage: weighted raw scores, or each reward standardized first; against slow loops and by hand."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import ConfigError, CorruptFile
from common.types import Manifest, ManifestGroup
from learner.advantages import AdvantageEstimator, GlobalStd, GroupStd, PerReward, make_estimator
from learner.config import AdvantageConfig

EPS = 1e-4
GROUP, GLOBAL = PerReward(single=GroupStd(eps=EPS)), PerReward(single=GlobalStd(eps=EPS))
ESTIMATORS = pytest.mark.parametrize("estimator", [GROUP, GLOBAL], ids=["group_std", "global_std"])


def group(number: int, scores: Mapping[str, list[float | None]], train: tuple[str, ...]) -> ManifestGroup:
    """A group whose samples are kept when every applicable train reward scored them."""
    judged = [values for name, values in scores.items() if name in train]
    kept = tuple(all(value is not None for value in column) for column in zip(*judged, strict=True))
    tables = {name: tuple(values) for name, values in scores.items()}
    return ManifestGroup(number=number, path="", media_path="", version=0, num_bytes=1, prompt_id="", scores=tables, kept=kept)


def manifest(*groups: ManifestGroup) -> Manifest:
    return Manifest(update=1, incarnation=1, config_digest="", max_staleness=0, groups=groups, drops=())


def random_manifest(seed: int = 3, scale_b: float = 1.0) -> Manifest:
    """Six groups of five: a everywhere, b on half of them, c watched only; some scores are null, some rewards flat."""
    generator = np.random.default_rng(seed)
    groups = []
    for number in range(6):
        scores: dict[str, list[float | None]] = {"a": list(generator.normal(size=5)), "c": list(generator.normal(size=5))}
        if number % 2:
            scores["b"] = [scale_b * value for value in generator.normal(size=5)]
        if number == 3:
            scores["a"] = [0.5] * 5  # flat: only b speaks
        if number in (1, 4):
            scores["a"][2] = None
        groups.append(group(number, scores, ("a", "b")))
    return manifest(*groups)


def slow_per_reward(found: Manifest, weights: Mapping[str, float], *, by_group: bool) -> NDArray[np.float64]:
    """One loop, one symbol: A[p][k] = sum_r w_r (s_r[p][k] - mean_p) / (std + eps), std of the group or of all groups that r judges."""
    size = len(found.groups[0].kept)
    advantages = np.zeros((len(found.groups), size))
    for name, weight in weights.items():
        everything = [
            each.scores[name][k] for each in found.groups if name in each.scores for k in range(size) if each.kept[k]
        ]  # fmt: skip
        for p, each in enumerate(found.groups):
            if name not in each.scores:
                continue
            own = [each.scores[name][k] for k in range(size) if each.kept[k]]
            mean = sum(own) / len(own)
            spread = own if by_group else everything
            center = sum(spread) / len(spread)
            std = math.sqrt(sum((value - center) ** 2 for value in spread) / len(spread))
            for k in range(size):
                if each.kept[k]:
                    advantages[p][k] += weight * (each.scores[name][k] - mean) / (std + EPS)
    return advantages


@pytest.mark.parametrize(("estimator", "by_group"), [(GROUP, True), (GLOBAL, False)], ids=["group_std", "global_std"])
def test_per_reward_equals_the_slow_loop(estimator: AdvantageEstimator, by_group: bool) -> None:
    found = estimator.estimate(random_manifest(), {"a": 1.0, "b": 0.5})
    expected = slow_per_reward(random_manifest(), {"a": 1.0, "b": 0.5}, by_group=by_group)
    np.testing.assert_allclose(found.advantages, expected, atol=2e-6)  # float32 of values below 3
    assert found.advantages.dtype == np.float32


def test_rewards_a_hundred_times_apart_weigh_the_same_per_reward_and_not_when_summed() -> None:
    """Opposite orders of two samples: (0, 1) and (100, 0). Standardized they cancel; summed raw, the large one wins."""
    both = manifest(group(0, {"a": [0.0, 1.0], "b": [100.0, 0.0]}, ("a", "b")))
    weights = {"a": 1.0, "b": 1.0}
    # a: mean .5, std .5, so -/+ .5 / (.5 + eps); b: mean 50, std 50, so +/- 50 / (50 + eps)
    left = -0.5 / (0.5 + EPS) + 50 / (50 + EPS)
    np.testing.assert_allclose(GROUP.estimate(both, weights).advantages, [[left, -left]], atol=1e-7)
    assert abs(left) < 2.1e-4
    # the sums are 100 and 1: mean 50.5, std 49.5
    np.testing.assert_allclose(
        GroupStd(eps=EPS).estimate(both, weights).advantages, [[49.5 / (49.5 + EPS), -49.5 / (49.5 + EPS)]], rtol=1e-6
    )


@ESTIMATORS
def test_scaling_one_reward_changes_per_reward_advantages_by_eps_only(estimator: AdvantageEstimator) -> None:
    weights = {"a": 1.0, "b": 1.0}
    plain = estimator.estimate(random_manifest(), weights).advantages
    scaled = estimator.estimate(random_manifest(scale_b=100.0), weights).advantages
    np.testing.assert_allclose(scaled, plain, atol=1e-3)  # A7: eps / std, std > .3, |A| < 3
    summed = GroupStd(eps=EPS)
    apart = np.abs(
        summed.estimate(random_manifest(scale_b=100.0), weights).advantages - summed.estimate(random_manifest(), weights).advantages
    )
    assert apart.max() > 0.3


@ESTIMATORS
def test_a_reward_that_does_not_apply_adds_nothing_and_its_weight_goes_nowhere(estimator: AdvantageEstimator) -> None:
    text = group(0, {"b": [0.0, 1.0, 0.0]}, ("a", "b"))
    shapes = group(1, {"a": [0.0, 1.0, 1.0]}, ("a", "b"))
    found = estimator.estimate(manifest(text, shapes), {"a": 0.5, "b": 0.25}).advantages
    alone = estimator.estimate(manifest(text), {"b": 1.0}).advantages
    np.testing.assert_allclose(found[0], 0.25 * alone[0], rtol=1e-6)  # not 0.75: a's half is not handed to b
    other = estimator.estimate(manifest(shapes), {"a": 1.0}).advantages
    np.testing.assert_allclose(found[1], 0.5 * other[0], rtol=1e-6)


def test_a_flat_reward_is_silent_and_a_group_is_flat_only_when_all_its_rewards_are() -> None:
    found = GROUP.estimate(
        manifest(
            group(0, {"a": [0.7, 0.7], "b": [0.0, 1.0]}, ("a", "b")),
            group(1, {"a": [0.1, 0.1], "b": [3.0, 3.0]}, ("a", "b")),
        ),
        {"a": 1.0, "b": 1.0},
    )  # fmt: skip
    np.testing.assert_allclose(found.advantages, [[-0.5 / (0.5 + EPS), 0.5 / (0.5 + EPS)], [0.0, 0.0]], rtol=1e-6)
    assert found.flat.tolist() == [False, True]
    assert found.mask.tolist() == [[True, True], [False, False]]


@ESTIMATORS
def test_a_sample_that_one_train_reward_did_not_score_is_left_out_of_the_others_too(estimator: AdvantageEstimator) -> None:
    nulls: list[float | None] = [0.0, None, 2.0, 5.0]
    with_null = manifest(group(0, {"a": [1.0, 50.0, 2.0, 4.0], "b": nulls}, ("a", "b")))
    without = manifest(group(0, {"a": [1.0, 2.0, 4.0], "b": [0.0, 2.0, 5.0]}, ("a", "b")))
    weights = {"a": 1.0, "b": 1.0}
    found = estimator.estimate(with_null, weights)
    np.testing.assert_allclose(found.advantages[0][[0, 2, 3]], estimator.estimate(without, weights).advantages[0], rtol=1e-6)
    assert found.advantages[0, 1] == 0.0
    assert not found.mask[0, 1]
    assert np.isnan(found.rewards[0, 1])


@ESTIMATORS
def test_one_reward_of_weight_one_is_the_plain_estimator(estimator: PerReward) -> None:
    one = manifest(*(group(n, {"a": list(np.random.default_rng(n).normal(size=4))}, ("a",)) for n in range(3)))
    found, plain = estimator.estimate(one, {"a": 1.0}), estimator.single.estimate(one, {"a": 1.0})
    np.testing.assert_array_equal(found.advantages, plain.advantages)
    np.testing.assert_array_equal(found.rewards, plain.rewards)


def test_rewards_stay_the_weighted_sum_of_raw_scores() -> None:
    found = GROUP.estimate(manifest(group(0, {"a": [1.0, 2.0], "b": [10.0, 30.0]}, ("a", "b"))), {"a": 2.0, "b": 0.5})
    np.testing.assert_allclose(found.rewards, [[7.0, 19.0]])


def test_a_kept_sample_without_a_score_and_no_train_reward_are_refused() -> None:
    torn = manifest(group(0, {"a": [1.0, None]}, ()))
    with pytest.raises(CorruptFile, match="keeps a sample"):
        GROUP.estimate(manifest(ManifestGroup(
            number=0, path="", media_path="", version=0, num_bytes=1, prompt_id="", scores=torn.groups[0].scores, kept=(True, True)
        )), {"a": 1.0})  # fmt: skip
    with pytest.raises(ConfigError, match="no reward trains"):
        GROUP.estimate(random_manifest(), {})


def test_the_config_chooses_how_rewards_meet() -> None:
    assert make_estimator(AdvantageConfig(normalize="per_reward")) == PerReward(single=GroupStd(eps=1e-4))
    assert make_estimator(AdvantageConfig(kind="global_std", normalize="per_reward", eps=0.5)) == PerReward(single=GlobalStd(eps=0.5))
    assert make_estimator(AdvantageConfig()) == GroupStd(eps=1e-4)
    assert make_estimator(AdvantageConfig(normalize="per_reward")).read_state() == {}
