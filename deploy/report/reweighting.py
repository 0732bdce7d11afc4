"""What other reward weights would have said: every update's advantages drawn again from its manifest, no image made again."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from common.errors import CorruptFile, UserError
from common.store import paths
from common.store.manifests import read_claim, read_manifest
from common.store.run_store import RunStore
from common.types import Manifest, ManifestGroup
from deploy.report.drawing import Panel, as_array, color, make_axes, marker, smooth, to_uri
from learner.advantages import AdvantageBatch, AdvantageEstimator, make_estimator
from learner.config import AdvantageConfig

Numbers = Sequence[float | None]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How one start turned scores into advantages."""

    weights: Mapping[str, float]  # train reward -> weight
    advantage: AdvantageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ReweighedUpdate:
    """One update under other weights, beside what trained; None where there is nothing to compute it from."""

    update: int
    correlation: float | None  # Pearson, of both advantages over the compared samples
    flipped: float | None  # share of the compared samples whose advantages have opposite signs
    reward: float | None  # mean weighted raw reward under the other weights
    num_samples: int  # compared: scored by every reward on both sides, and not flat on both


@dataclass(frozen=True, slots=True, kw_only=True)
class Reweighting:
    """A run under other weights."""

    weights: Mapping[str, float]
    updates: tuple[ReweighedUpdate, ...]

    @property
    def sentence(self) -> str:
        """The run in one line, updates weighed by their samples."""
        weighed = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        pairs = [(each, each.num_samples) for each in self.updates if each.num_samples]
        if not pairs:
            return f"Under {weighed} no sample can be compared: no update holds scores that differ."
        total = sum(count for _, count in pairs)
        flipped = sum((each.flipped or 0.0) * count for each, count in pairs) / total
        known = [(each.correlation, count) for each, count in pairs if each.correlation is not None]
        mean = sum(value * count for value, count in known) / sum(count for _, count in known) if known else math.nan
        correlation = f"correlate {mean:.2f} with those that trained" if known else "have no correlation with those that trained"
        return f"Under {weighed} the advantages {correlation} (mean over updates); {flipped:.0%} of {total:,} samples change sign."


def parse_weights(text: str) -> dict[str, float]:
    """Return the weights of NAME=NUMBER,NAME=NUMBER. Raises UserError naming what is wrong."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, mark, number = (piece.strip() for piece in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not mark or not name or name in weights or not math.isfinite(weight):
            raise UserError(f"--reward-weights: {part!r} is no NAME=NUMBER of its own; write e.g. geneval_strict=1,ocr_flowgrpo=0.5")
        weights[name] = weight
    return weights


def reweigh(manifests: Iterable[Manifest], trainings: Mapping[int, Training], weights: Mapping[str, float]) -> Reweighting:
    """Draw every update's advantages again; pure.

    Args:
        manifests: in order of updates.
        trainings: incarnation -> how it trained; the other weights go through the same estimator.
        weights: reward -> weight; train and watch rewards alike. A weight of 0 leaves a reward out.

    Raises:
        UserError: a name that no manifest holds (the nearest is named), or no weight that is not 0.
    """
    found = list(manifests)
    _check_names(found, weights)
    chosen = {name: weight for name, weight in weights.items() if weight != 0}
    estimators = {number: (_estimator(training), _estimator(training)) for number, training in trainings.items()}
    updates = []
    for manifest in found:
        trained, drawn_again = estimators[manifest.incarnation]
        ours = trained.estimate(manifest, trainings[manifest.incarnation].weights)
        theirs = drawn_again.estimate(_scored(manifest, chosen), chosen)
        updates.append(_compare(manifest, ours, theirs, chosen))
    return Reweighting(weights=dict(weights), updates=tuple(updates))


def _estimator(training: Training) -> AdvantageEstimator:
    return make_estimator(training.advantage)


def _check_names(manifests: Sequence[Manifest], weights: Mapping[str, float]) -> None:
    known = sorted({name for manifest in manifests for group in manifest.groups for name in group.scores})
    if not known:
        raise UserError("--reward-weights: the run has no manifest with scores yet; wait for its first update")
    for name in weights:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"--reward-weights: no reward {name!r} judged this run; the nearest is {near!r}, all are {', '.join(known)}")
    if not any(weights.values()):
        raise UserError("--reward-weights: every weight is 0; give one reward another")


def _scored(manifest: Manifest, weights: Mapping[str, float]) -> Manifest:
    """The manifest with only those samples kept that every applicable reward of `weights` scored: a watch reward may have skipped some."""

    def keeps(group: ManifestGroup, sample: int) -> bool:
        return group.kept[sample] and all(group.scores[name][sample] is not None for name in weights if name in group.scores)

    groups = tuple(replace(group, kept=tuple(keeps(group, sample) for sample in range(len(group.kept)))) for group in manifest.groups)
    return replace(manifest, groups=groups)


def _compare(manifest: Manifest, ours: AdvantageBatch, theirs: AdvantageBatch, weights: Mapping[str, float]) -> ReweighedUpdate:
    is_scored = ~np.isnan(theirs.rewards)
    compared = is_scored & (ours.mask | theirs.mask)
    before, after = (np.asarray(batch.advantages, dtype=np.float64)[compared] for batch in (ours, theirs))
    applies = np.array([any(name in group.scores for name in weights) for group in manifest.groups])
    rewards = theirs.rewards[is_scored & applies[:, None]]
    return ReweighedUpdate(
        update=manifest.update,
        correlation=_pearson(before, after),
        flipped=float((before * after < 0).mean()) if before.size else None,
        reward=float(np.mean(rewards, dtype=np.float64)) if rewards.size else None,
        num_samples=int(before.size),
    )


def _pearson(first: Array, second: Array) -> float | None:
    """Pearson's r; None where one side does not vary."""
    if first.size < 2 or first.std() == 0 or second.std() == 0:
        return None
    return float(np.clip(((first - first.mean()) * (second - second.mean())).mean() / (first.std() * second.std()), -1, 1))


def read_reweighting(store: RunStore, weights: Mapping[str, float]) -> Reweighting:
    """Reweigh a run directory: manifests and the configuration of each start, nothing else. Raises UserError, StoreError, CorruptFile."""
    updates = sorted(update for path in store.list(paths.MANIFESTS) if (update := paths.parse_manifest(path)) is not None)
    manifests = [read_manifest(store, update) for update in updates]
    trainings = {number: _read_training(store, number) for number in sorted({manifest.incarnation for manifest in manifests})}
    return reweigh(manifests, trainings, weights)


def _read_training(store: RunStore, incarnation: int) -> Training:
    config = read_claim(store, incarnation).config
    try:
        rewards = [(each["name"], each.get("use", "train"), float(each.get("weight", 1.0))) for each in config["reward"]]
        advantage = AdvantageConfig.model_validate(config["learner"]["advantage"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"report: {paths.config_path(incarnation)}: lacks what reweighting needs ({error!r}); restore it") from None
    return Training(weights={name: weight for name, use, weight in rewards if use == "train"}, advantage=advantage)


def draw_reweighting(reweighting: Reweighting) -> list[Panel]:
    """Return the panels: correlation, flipped signs, weighted reward."""
    updates = reweighting.updates
    panels = [
        _panel(reweighting, [each.correlation for each in updates], "Correlation of advantages", "Of the other weights' advantages with those that trained."),
        _panel(reweighting, [each.flipped for each in updates], "Flipped signs", "Share of samples that the other weights push the other way."),
        _panel(reweighting, [each.reward for each in updates], "Weighted reward", "Mean of each update's samples under the other weights."),
    ]  # fmt: skip
    return panels


def _panel(reweighting: Reweighting, values: Numbers, title: str, caption: str) -> Panel:
    figure, axes = make_axes()
    numbers, tone = [each.update for each in reweighting.updates], color(6)
    axes.plot(numbers, as_array(values), color=tone, alpha=0.35, linewidth=1.0)
    axes.plot(numbers, smooth(values), color=tone, marker=marker(len(numbers)), markersize=3)
    if title == "Flipped signs":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("update", loc="right")
    return Panel(title=title, caption=caption, uri=to_uri(figure))
