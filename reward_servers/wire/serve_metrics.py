"""What a served reward shows at /metrics: base units, few and bounded labels, a registry of its own."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class ServeMetrics:
    """Requests by status, images by outcome, seconds a request, pending requests; the label reward is the scorer's name."""

    def __init__(self, reward: str) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "flowfleet_reward_http_requests", "Score requests by HTTP status.", ["reward", "status"], registry=self.registry
        )
        self._images = Counter("flowfleet_reward_http_images", "Images by outcome.", ["reward", "outcome"], registry=self.registry)
        self._pending = Gauge(
            "flowfleet_reward_http_pending", "Requests read, waiting or being scored.", ["reward"], registry=self.registry
        ).labels(reward=reward)
        self._seconds = Histogram(
            "flowfleet_reward_http_seconds", "From a request's admission to its answer.", ["reward"], registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        ).labels(reward=reward)  # fmt: skip
        self._reward = reward

    def count_request(self, status: int) -> None:
        """One score request was answered with this status."""
        self._requests.labels(reward=self._reward, status=str(status)).inc()

    def count_scores(self, is_scored: Iterable[bool]) -> None:
        """Images that got a number, and images that got null."""
        for one in is_scored:
            self._images.labels(reward=self._reward, outcome="scored" if one else "null").inc()

    def show_pending(self, number: int) -> None:
        """How many requests are held now."""
        self._pending.set(number)

    def timed(self) -> AbstractContextManager[object]:
        """Time a request."""
        return self._seconds.time()
