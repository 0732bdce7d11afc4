"""A batch's scores -> advantages: pure NumPy on the manifest, so that any update can be weighed again offline."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, CorruptFile
from common.types import FloatArray, Manifest, ManifestGroup
from learner.advantage_selection import Best, Ends, Pair, Selection
from learner.config import AdvantageConfig

BoolArray = NDArray[np.bool_]
DoubleArray = NDArray[np.float64]

FLAT_SPREAD = 1e-8  # a reward whose scored samples differ by no more says nothing about its group


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageBatch:
    """What the scores of one manifest say about each sample."""

    advantages: FloatArray  # [P, K]; 0 where masked; not clipped
    mask: BoolArray  # [P, K]: kept, of a group that is not flat, and chosen where the estimator chooses: only these see a forward
    flat: BoolArray  # [P]: nothing to learn from the group's spread
    rewards: FloatArray  # [P, K] weighted sum of the raw train rewards; NaN where a sample is not kept


class AdvantageEstimator(Protocol):
    """A batch's scores -> advantages (architecture, section 9)."""

    def estimate(self, manifest: Manifest, weights: Mapping[str, float]) -> AdvantageBatch:
        """Return the advantages of a manifest's samples.

        Args:
            manifest: P groups of K samples with raw scores.
            weights: train reward -> weight; other rewards are only watched.

        Raises:
            CorruptFile: a sample is marked kept though an applicable train reward did not score it.
        """
        ...

    def read_state(self) -> dict[str, float]:
        """The estimator's history across updates, for the LearnerState; empty when there is none."""
        ...

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take up a history that `read_state` gave."""
        ...


class Stateless:
    """An estimator without a history across updates."""

    __slots__ = ()

    def read_state(self) -> dict[str, float]:
        """No history."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """No history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStd(Stateless):
    """A = (r - mean of the group) / (population std of the group + eps), over kept samples (Flow-GRPO, arXiv 2505.05470)."""

    eps: float

    def estimate(self, manifest: Manifest, weights: Mapping[str, float]) -> AdvantageBatch:
        """See AdvantageEstimator."""
        rewards, kept, flat = weigh_scores(manifest, weights)
        spread = np.array([_std(row[keep]) for row, keep in zip(rewards, kept, strict=True)])
        return _batch(_center(rewards, kept) / (spread + self.eps)[:, None], rewards, kept, flat)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalStd(Stateless):
    """A = (r - mean of the group) / (population std of all kept samples of the manifest + eps), flat groups included
    (flow_grpo's `global_std`)."""  # fmt: skip

    eps: float

    def estimate(self, manifest: Manifest, weights: Mapping[str, float]) -> AdvantageBatch:
        """See AdvantageEstimator."""
        rewards, kept, flat = weigh_scores(manifest, weights)
        return _batch(_center(rewards, kept) / (_std(rewards[kept]) + self.eps), rewards, kept, flat)


@dataclass(frozen=True, slots=True, kw_only=True)
class Centered(Stateless):
    """A = r - mean of the group, over kept samples: in the reward's own units."""

    def estimate(self, manifest: Manifest, weights: Mapping[str, float]) -> AdvantageBatch:
        """See AdvantageEstimator."""
        rewards, kept, flat = weigh_scores(manifest, weights)
        return _batch(_center(rewards, kept), rewards, kept, flat)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperLinear(Stateless):
    """A = S / (population std of all kept samples' S + eps) with S = sign(d) |d|^(1 + gamma), d = r - mean of the group.

    Large differences weigh more than in proportion, and no group's spread is divided away (SLAS, arXiv 2605.10937). Experimental:
    reconstructed from the abstract; that the batch's std is taken of S, which makes A free of the reward's scale, is our reading of its
    "batch-level normalization". With gamma 0 it is d / (std of all d + eps). Advantages of a group do not sum to 0.
    """

    gamma: float
    eps: float

    def estimate(self, manifest: Manifest, weights: Mapping[str, float]) -> AdvantageBatch:
        """See AdvantageEstimator."""
        rewards, kept, flat = weigh_scores(manifest, weights)
        differences = _center(rewards, kept)
        shaped = np.sign(differences) * np.abs(differences) ** (1.0 + self.gamma)
        return _batch(shaped / (_std(shaped[kept]) + self.eps), rewards, kept, flat)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerReward:
    """A = sum over rewards of weight x the advantage that the reward alone gives: its scale does not count, its weight does.

    Source: GDPO's decoupled normalization (normalize each reward inside its group, then the weighted sum), without its last step,
    the batch norm, so that a weight of 1 for one reward is that reward's estimator. A reward that does not apply to a group adds
    nothing there, and its weight goes to no other; one that is flat in a group adds 0.
    """

    single: AdvantageEstimator  # of one reward

    def estimate(self, manifest: Manifest, weights: Mapping[str, float]) -> AdvantageBatch:
        """See AdvantageEstimator."""
        rewards, kept, flat = weigh_scores(manifest, weights)
        total = np.zeros(kept.shape)
        for name, weight in weights.items():
            rows = [row for row, group in enumerate(manifest.groups) if name in group.scores]
            if rows:
                judged = replace(manifest, groups=tuple(manifest.groups[row] for row in rows))
                total[rows] += weight * self.single.estimate(judged, {name: 1.0}).advantages
        return _batch(total, rewards, kept, flat)

    def read_state(self) -> dict[str, float]:
        """That of the single reward's estimator."""
        return self.single.read_state()

    def load_state(self, state: Mapping[str, float]) -> None:
        """That of the single reward's estimator."""
        self.single.load_state(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """Another estimator's advantages with all groups of a prompt as one group (flow_grpo, whose key of a group is the prompt's text)."""

    single: AdvantageEstimator

    def estimate(self, manifest: Manifest, weights: Mapping[str, float]) -> AdvantageBatch:
        """See AdvantageEstimator."""
        rows: dict[str, list[int]] = {}
        for row, group in enumerate(manifest.groups):
            rows.setdefault(group.prompt_id, []).append(row)
        size, widest = len(manifest.groups[0].kept), max(map(len, rows.values()))
        whole = [_as_one([manifest.groups[row] for row in members], weights, widest * size) for members in rows.values()]
        found = self.single.estimate(replace(manifest, groups=tuple(whole)), weights)
        order = np.argsort([row for members in rows.values() for row in members])
        cells = [(at, slice(k * size, (k + 1) * size)) for at, members in enumerate(rows.values()) for k in range(len(members))]
        parts = [cells[row] for row in order]
        return AdvantageBatch(
            advantages=np.stack([found.advantages[part] for part in parts]), mask=np.stack([found.mask[part] for part in parts]),
            flat=found.flat[[at for at, _ in parts]], rewards=np.stack([found.rewards[part] for part in parts]),
        )  # fmt: skip

    def read_state(self) -> dict[str, float]:
        """That of the other estimator."""
        return self.single.read_state()

    def load_state(self, state: Mapping[str, float]) -> None:
        """That of the other estimator."""
        self.single.load_state(state)


def _as_one(groups: list[ManifestGroup], weights: Mapping[str, float], size: int) -> ManifestGroup:
    """The samples of several groups of a prompt in one, filled up to `size` with samples that nobody kept."""
    kept = [keep for group in groups for keep in group.kept]
    missing = size - len(kept)
    scores = {
        name: (*(score for group in groups for score in group.scores[name]), *[None] * missing)
        for name in weights
        if name in groups[0].scores
    }
    return replace(groups[0], scores=scores, kept=(*kept, *[False] * missing))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """Some of each group's samples by the advantages of another estimator; the others are masked.

    A group whose samples all rank alike, though one of its rewards differs (rewards that cancel), is flat: nothing says whom to choose.
    """

    ranked_by: AdvantageEstimator
    selection: Selection

    def estimate(self, manifest: Manifest, weights: Mapping[str, float]) -> AdvantageBatch:
        """See AdvantageEstimator."""
        ranked = self.ranked_by.estimate(manifest, weights)
        advantages, mask, flat = np.zeros_like(ranked.advantages), np.zeros_like(ranked.mask), ranked.flat.copy()
        for group in np.flatnonzero(~flat):
            row, eligible = ranked.advantages[group], ranked.mask[group]
            flat[group] = np.ptp(row[eligible]) <= FLAT_SPREAD
            if not flat[group]:
                advantages[group], mask[group] = self.selection.choose(row, eligible)
        return AdvantageBatch(advantages=np.where(mask, advantages, np.float32(0)), mask=mask, flat=flat, rewards=ranked.rewards)

    def read_state(self) -> dict[str, float]:
        """That of the ranking estimator."""
        return self.ranked_by.read_state()

    def load_state(self, state: Mapping[str, float]) -> None:
        """That of the ranking estimator."""
        self.ranked_by.load_state(state)


def make_estimator(config: AdvantageConfig) -> AdvantageEstimator:
    """Return the estimator that the config names.

    pair and best rank by the weighted sum of raw rewards or, with normalize = "per_reward", of rewards standardized in their group.
    """
    per_reward = config.normalize == "per_reward"
    singles: dict[str, AdvantageEstimator] = {
        "group_std": GroupStd(eps=config.eps),
        "global_std": GlobalStd(eps=config.eps),
        "none": Centered(),
        "super_linear": SuperLinear(gamma=config.gamma, eps=config.eps),
    }
    selections: dict[str, Selection] = {"pair": Pair(), "best": Best()}
    single = singles[config.kind if config.kind in singles else ("group_std" if per_reward else "none")]
    whole = PerReward(single=single) if per_reward else single
    if config.kind in selections:
        return Selected(ranked_by=whole, selection=selections[config.kind])
    if config.merge_prompts:
        return Merged(single=whole)
    return Selected(ranked_by=whole, selection=Ends(count=config.subset)) if config.subset else whole


def weigh_scores(manifest: Manifest, weights: Mapping[str, float]) -> tuple[DoubleArray, BoolArray, BoolArray]:
    """Return the weighted train rewards [P, K] (NaN where not kept), the kept mask [P, K] and the flat flags [P].

    Raises:
        ConfigError: there is no train reward. CorruptFile: see AdvantageEstimator.
    """
    if not weights:
        raise ConfigError('AdvantageEstimator: no reward trains; give at least one [[reward]] use = "train"')
    kept = np.array([group.kept for group in manifest.groups], dtype=np.bool_)
    rewards = np.stack([_weigh(group, weights) for group in manifest.groups])
    if np.isnan(rewards[kept]).any():
        raise CorruptFile(
            f"AdvantageEstimator: manifest {manifest.update} keeps a sample that an applicable train reward did not score; "
            "kept means scored by all of them; run `flowfleet audit` on the run"
        )
    flat = np.array([is_flat(group, weights) or sum(group.kept) < 2 for group in manifest.groups], dtype=np.bool_)
    return np.where(kept, rewards, np.nan), kept, flat


def is_flat(group: ManifestGroup, weights: Mapping[str, float]) -> bool:
    """Say whether every train reward's spread (max - min) over its scored samples is at most 1e-8."""
    return all(_spread(group.scores[name]) <= FLAT_SPREAD for name in weights if name in group.scores)


def _spread(scores: tuple[float | None, ...]) -> float:
    scored = [score for score in scores if score is not None]
    return max(scored) - min(scored) if scored else 0.0


def _weigh(group: ManifestGroup, weights: Mapping[str, float]) -> DoubleArray:
    """[K] sum of weight x raw score over the applicable train rewards; NaN where one of them is null."""
    total = np.zeros(len(group.kept))
    for name, weight in weights.items():
        if name in group.scores:
            total += weight * np.array([np.nan if score is None else score for score in group.scores[name]])
    return total


def _std(rewards: DoubleArray) -> float:
    return float(np.std(rewards)) if rewards.size else 0.0


def _center(rewards: DoubleArray, kept: BoolArray) -> DoubleArray:
    """[P, K] rewards minus their group's mean over kept samples; NaN where not kept."""
    means = np.array([row[keep].mean() if keep.any() else 0.0 for row, keep in zip(rewards, kept, strict=True)])
    centered: DoubleArray = rewards - means[:, None]
    return centered


def _batch(values: DoubleArray, rewards: DoubleArray, kept: BoolArray, flat: BoolArray) -> AdvantageBatch:
    mask = kept & ~flat[:, None]
    advantages = np.where(mask, values, 0.0)
    return AdvantageBatch(advantages=advantages.astype(np.float32), mask=mask, flat=flat, rewards=rewards.astype(np.float32))
