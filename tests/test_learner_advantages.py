"""Advantages against hand-computed values and the invariants A1-A6, A9 (algorithms, section 27)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from common.errors import ConfigError, CorruptFile
from common.types import Manifest, ManifestGroup
from learner.advantages import AdvantageEstimator, GlobalStd, GroupStd, make_estimator
from learner.config import AdvantageConfig
from learner.objectives.nft import optimality

EPS = 1e-4
ESTIMATORS = pytest.mark.parametrize("estimator", [GroupStd(eps=EPS), GlobalStd(eps=EPS)], ids=["group_std", "global_std"])


def group(number: int, kept: Sequence[bool] | None = None, **scores: Sequence[float | None]) -> ManifestGroup:
    size = len(next(iter(scores.values())))
    return ManifestGroup(
        number=number, path=f"g{number}", media_path="", version=0, num_bytes=1, prompt_id="same text",
        scores={name: tuple(values) for name, values in scores.items()}, kept=tuple(kept or [True] * size),
    )  # fmt: skip


def manifest(*groups: ManifestGroup) -> Manifest:
    return Manifest(update=1, incarnation=1, config_digest="", max_staleness=0, groups=groups, drops=())


def random_manifest(seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Manifest:
    rewards = np.random.default_rng(seed).normal(size=(5, 6)) * scale + shift
    return manifest(*(group(number, r=list(row)) for number, row in enumerate(rewards)))


def test_group_std_gives_the_numbers_computed_by_hand() -> None:
    # mean 2, population std sqrt(2/3) = 0.8164966
    found = GroupStd(eps=EPS).estimate(manifest(group(0, r=[1.0, 2.0, 3.0])), {"r": 1.0})
    expected = [-1 / (0.8164966 + EPS), 0.0, 1 / (0.8164966 + EPS)]
    np.testing.assert_allclose(found.advantages, [expected], rtol=1e-6)
    assert found.advantages.dtype == np.float32
    np.testing.assert_array_equal(found.rewards, [[1.0, 2.0, 3.0]])


def test_global_std_centers_by_group_and_scales_by_all_samples_flat_groups_included() -> None:
    # groups {0, 2}, {10, 10}: the 4 rewards have mean 5.5 and variance (5.5^2 + 3.5^2 + 2 * 4.5^2) / 4 = 20.75
    found = GlobalStd(eps=EPS).estimate(manifest(group(0, r=[0.0, 2.0]), group(1, r=[10.0, 10.0])), {"r": 1.0})
    scale = 20.75**0.5 + EPS
    np.testing.assert_allclose(found.advantages, [[-1 / scale, 1 / scale], [0.0, 0.0]], rtol=1e-6)


@ESTIMATORS
def test_advantages_of_a_group_sum_to_zero(estimator: AdvantageEstimator) -> None:
    found = estimator.estimate(random_manifest(shift=3.0), {"r": 1.0})
    assert np.abs(found.advantages.sum(axis=1)).max() <= 1e-5  # A1, float32


@ESTIMATORS
def test_shifting_or_scaling_all_rewards_does_not_change_advantages(estimator: AdvantageEstimator) -> None:
    plain = estimator.estimate(random_manifest(), {"r": 1.0}).advantages
    np.testing.assert_allclose(estimator.estimate(random_manifest(shift=7.0), {"r": 1.0}).advantages, plain, atol=1e-6)  # A2
    # scaled by 10: eps / std is the whole error; |A| < 3 and std > .2 bound it by 3 * 1e-4 / .2
    np.testing.assert_allclose(estimator.estimate(random_manifest(scale=10.0), {"r": 1.0}).advantages, plain, atol=1.5e-3)


@ESTIMATORS
def test_a_flat_group_gets_zero_and_is_masked(estimator: AdvantageEstimator) -> None:
    found = estimator.estimate(manifest(group(0, r=[0.3, 0.3, 0.3]), group(1, r=[0.0, 1.0, 0.0])), {"r": 1.0})
    assert found.flat.tolist() == [True, False]
    assert found.mask.tolist() == [[False] * 3, [True] * 3]
    np.testing.assert_array_equal(found.advantages[0], 0.0)
    assert np.isfinite(found.advantages).all()


def test_a_group_is_flat_only_when_every_train_reward_is() -> None:
    both = manifest(group(0, a=[1.0, 1.0], b=[0.0, 1.0]))
    assert not GroupStd(eps=EPS).estimate(both, {"a": 1.0, "b": 1.0}).flat[0]
    assert GroupStd(eps=EPS).estimate(both, {"a": 1.0}).flat[0]  # b is only watched


@ESTIMATORS
def test_reordering_samples_or_groups_reorders_advantages(estimator: AdvantageEstimator) -> None:
    original = random_manifest()
    plain = estimator.estimate(original, {"r": 1.0}).advantages
    order = [3, 0, 5, 1, 4, 2]
    shuffled = manifest(*(group(g.number, r=[g.scores["r"][k] for k in order]) for g in reversed(original.groups)))
    np.testing.assert_allclose(estimator.estimate(shuffled, {"r": 1.0}).advantages, plain[::-1][:, order], atol=1e-6)  # A4


def test_groups_of_equal_text_stay_groups_of_their_own() -> None:
    found = GroupStd(eps=EPS).estimate(manifest(group(0, r=[0.0, 1.0]), group(1, r=[100.0, 101.0])), {"r": 1.0})
    np.testing.assert_allclose(found.advantages[0], found.advantages[1], atol=1e-6)  # A5: merged, the means would differ by 100


MERGING = [AdvantageConfig(kind=kind, merge_prompts=True) for kind in ("group_std", "global_std", "none", "super_linear")]


@pytest.mark.parametrize(
    "config", [*MERGING, AdvantageConfig(normalize="per_reward", merge_prompts=True)], ids=lambda c: f"{c.kind}-{c.normalize}"
)
def test_merged_groups_of_a_prompt_get_what_one_group_of_all_their_samples_gets(config: AdvantageConfig) -> None:
    """A5's other side: groups 0 and 2 share a prompt and a null score; group 1 has one of its own; the last is flat alone, not merged."""
    own, other = ("shared", "alone")
    parts = [
        replace(group(0, kept=[True, True, False], r=[0.0, 1.0, None]), prompt_id=own),
        replace(group(1, r=[5.0, 7.0, 6.0]), prompt_id=other),
        replace(group(2, r=[4.0, 4.0, 4.0]), prompt_id=own),
    ]
    found = make_estimator(config).estimate(manifest(*parts), {"r": 1.0})
    alone = config.model_copy(update={"merge_prompts": False})
    joined = group(0, kept=[True, True, False, True, True, True], r=[0.0, 1.0, None, 4.0, 4.0, 4.0])
    filled = group(1, kept=[True] * 3 + [False] * 3, r=[5.0, 7.0, 6.0, None, None, None])
    expected = make_estimator(alone).estimate(manifest(joined, filled), {"r": 1.0})
    np.testing.assert_array_equal(found.advantages, [expected.advantages[0, :3], expected.advantages[1, :3], expected.advantages[0, 3:]])
    np.testing.assert_array_equal(found.mask, [[True, True, False], [True] * 3, [True] * 3])
    assert found.flat.tolist() == [False] * 3
    np.testing.assert_array_equal(found.rewards, [[0.0, 1.0, np.nan], [5.0, 7.0, 6.0], [4.0, 4.0, 4.0]])
    if config.kind == "group_std":  # by hand: 0, 1, 4, 4, 4 have mean 2.6 and std 1.7436
        np.testing.assert_allclose(found.advantages[2], (4 - 2.6) / (3.04**0.5 + config.eps), rtol=1e-6)


def test_merging_is_refused_where_samples_are_chosen_in_a_group() -> None:
    for clash in ({"kind": "pair"}, {"kind": "best"}, {"subset": 4}):
        with pytest.raises(ValidationError, match="leave merge_prompts out"):
            AdvantageConfig(merge_prompts=True, **clash)  # type: ignore[arg-type]


def test_null_scores_are_left_out_as_if_the_sample_did_not_exist() -> None:
    with_null = manifest(group(0, kept=[True, False, True, True], r=[1.0, None, 2.0, 4.0]), group(1, r=[0.0, 1.0, 0.0, 3.0]))
    without = manifest(group(0, r=[1.0, 2.0, 4.0]), group(1, r=[0.0, 1.0, 0.0, 3.0][:3]))
    found = GroupStd(eps=EPS).estimate(with_null, {"r": 1.0})
    subset = GroupStd(eps=EPS).estimate(without, {"r": 1.0})
    np.testing.assert_array_equal(found.advantages[0][[0, 2, 3]], subset.advantages[0])  # A9
    assert found.mask[0].tolist() == [True, False, True, True]
    assert found.advantages[0, 1] == 0.0
    assert np.isnan(found.rewards[0, 1])


def test_weights_add_raw_rewards_and_skip_those_that_do_not_apply() -> None:
    found = GroupStd(eps=EPS).estimate(manifest(group(0, a=[1.0, 2.0], b=[10.0, 30.0]), group(1, a=[5.0, 6.0])), {"a": 2.0, "b": 0.5})
    np.testing.assert_allclose(found.rewards, [[7.0, 19.0], [10.0, 12.0]])


def test_a_group_with_one_kept_sample_has_nothing_to_compare() -> None:
    found = GroupStd(eps=EPS).estimate(manifest(group(0, kept=[True, False], r=[1.0, None])), {"r": 1.0})
    assert found.flat[0]
    assert not found.mask.any()


def test_a_manifest_that_keeps_an_unscored_sample_is_refused() -> None:
    with pytest.raises(CorruptFile, match="keeps a sample"):
        GroupStd(eps=EPS).estimate(manifest(group(0, kept=[True, True], r=[1.0, None])), {"r": 1.0})
    with pytest.raises(ConfigError, match="no reward trains"):
        GroupStd(eps=EPS).estimate(random_manifest(), {})


def test_the_config_chooses_the_estimator() -> None:
    assert make_estimator(AdvantageConfig(kind="global_std", eps=0.5)) == GlobalStd(eps=0.5)
    assert make_estimator(AdvantageConfig()) == GroupStd(eps=1e-4)


def test_optimality_is_a_probability_around_one_half() -> None:
    rho = optimality(torch.tensor([-9.0, -5.0, -2.5, 0.0, 2.5, 5.0, 9.0]), 5.0)
    assert rho.tolist() == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]  # A6; symmetric advantages have mean rho .5
    assert rho.mean() == 0.5
