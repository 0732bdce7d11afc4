"""ScoreCounts: what each score file adds to the counters of /metrics, once a file."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from common.metrics import RunMetrics
from common.types import NOT_APPLICABLE, ScoreFile

MAX_REASONS: Final = 16  # a reward; further ones are "other"
NUM_WORDS, NUM_LETTERS = 6, 60  # of an error that make its reason
REMEMBERED: Final = 1024  # newest paths that are not counted again: an announcement may be repeated


class ScoreCounts:
    """Images, null scores by reason and latency of each reward. The caller holds the lock."""

    def __init__(self, metrics: RunMetrics, rewards: Iterable[str]) -> None:
        self._metrics = metrics
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._reasons: dict[str, set[str]] = {}
        for name in rewards:
            metrics.count("reward_images_total", 0, name)
            metrics.open("reward_latency_seconds", name)

    def take(self, path: str, file: ScoreFile) -> None:
        """A score file of a training group or of an evaluation sheet exists."""
        if path in self._seen:
            return
        self._seen[path] = None
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        for score in file.scores:
            if score.value is None and score.error == NOT_APPLICABLE:
                continue
            self._metrics.count("reward_images_total", 1, file.reward)
            if score.value is None:
                self._metrics.count("reward_null_scores_total", 1, file.reward, self._reason(file.reward, score.error))
            if score.value is not None or score.latency_s > 0:  # a null that nobody scored took no time
                self._metrics.observe("reward_latency_seconds", score.latency_s, file.reward)

    def _reason(self, reward: str, error: str) -> str:
        known = self._reasons.setdefault(reward, set())
        reason = " ".join(error.partition(":")[0].split()[:NUM_WORDS])[:NUM_LETTERS] or "no reason"
        if reason not in known and len(known) >= MAX_REASONS:
            return "other"
        known.add(reason)
        return reason
