"""The Ray shell of the Coordinator, and the client that makes its handle look like the desks: one line a method."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError

from common.errors import FlowfleetError
from common.logs import configure_logging
from common.metrics import serve_metrics
from common.store.coordinator import Coordinator
from common.store.ending import Outcome
from common.types import LoadReceipt, Manifest, Publication, RolloutLease, ScoringLease, Stop, Wait

CALL_TIMEOUT_S = 120.0
DESK_AWAY: tuple[type[Exception], ...] = (ActorUnavailableError, GetTimeoutError)


@ray.remote
class CoordinatorActor:
    """A Coordinator in a process of its own; several threads (max_concurrency), since its calls do file I/O.

    Args:
        build: makes the Coordinator in that process.
        metrics_port: of /metrics on loopback; 0 = none.
    """

    def __init__(self, build: Callable[[], Coordinator], metrics_port: int = 0) -> None:
        configure_logging()
        self._desk = build()
        if metrics_port:
            serve_metrics(self._desk.metrics.registry, metrics_port)

    def ask_rollout(self, slot: str) -> RolloutLease | Wait | Stop:
        """RolloutDesk."""
        return self._desk.ask_rollout(slot)

    def confirm_weights(self, slot: str, receipt: LoadReceipt) -> None:
        """RolloutDesk."""
        self._desk.confirm_weights(slot, receipt)

    def commit_rollout(self, lease_id: str, path: str, seconds: float) -> None:
        """RolloutDesk."""
        self._desk.commit_rollout(lease_id, path, seconds)

    def fail_rollout(self, lease_id: str, error: str) -> None:
        """RolloutDesk."""
        self._desk.fail_rollout(lease_id, error)

    def return_rollout(self, lease_id: str, reason: str) -> None:
        """RolloutDesk."""
        self._desk.return_rollout(lease_id, reason)

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Every desk."""
        self._desk.beat(slot, lease_ids, metrics)

    def ask_scoring(self, slot: str, reward: str, limit: int) -> tuple[ScoringLease, ...] | Wait | Stop:
        """ScoringDesk."""
        return self._desk.ask_scoring(slot, reward, limit)

    def commit_scores(self, lease_id: str, path: str) -> None:
        """ScoringDesk."""
        self._desk.commit_scores(lease_id, path)

    def fail_scoring(self, lease_id: str, error: str) -> None:
        """ScoringDesk."""
        self._desk.fail_scoring(lease_id, error)

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        """LearnerDesk."""
        return self._desk.next_manifest(update)

    def publish(self, publication: Publication) -> None:
        """LearnerDesk."""
        self._desk.publish(publication)

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> None:
        """LearnerDesk."""
        self._desk.finish_update(update, metrics)

    def tick(self) -> Outcome:
        """Called about every second by the driver."""
        return self._desk.tick()

    def summary(self) -> dict[str, Any]:
        """For the live line."""
        return self._desk.summary()

    def close(self, reason: str) -> None:
        """The run ends."""
        self._desk.close(reason)


class CoordinatorClient:
    """The three desks over an actor handle. Every call has a deadline; flowfleet's own errors come through as such."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(self._handle.__getattr__(method).remote(*arguments), timeout=CALL_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, FlowfleetError):
                raise error.cause from None
            raise

    def ask_rollout(self, slot: str) -> RolloutLease | Wait | Stop:
        """RolloutDesk."""
        answer: RolloutLease | Wait | Stop = self._call("ask_rollout", slot)
        return answer

    def confirm_weights(self, slot: str, receipt: LoadReceipt) -> None:
        """RolloutDesk."""
        self._call("confirm_weights", slot, receipt)

    def commit_rollout(self, lease_id: str, path: str, seconds: float) -> None:
        """RolloutDesk."""
        self._call("commit_rollout", lease_id, path, seconds)

    def fail_rollout(self, lease_id: str, error: str) -> None:
        """RolloutDesk."""
        self._call("fail_rollout", lease_id, error)

    def return_rollout(self, lease_id: str, reason: str) -> None:
        """RolloutDesk."""
        self._call("return_rollout", lease_id, reason)

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Every desk."""
        self._call("beat", slot, tuple(lease_ids), dict(metrics))

    def ask_scoring(self, slot: str, reward: str, limit: int) -> tuple[ScoringLease, ...] | Wait | Stop:
        """ScoringDesk."""
        answer: tuple[ScoringLease, ...] | Wait | Stop = self._call("ask_scoring", slot, reward, limit)
        return answer

    def commit_scores(self, lease_id: str, path: str) -> None:
        """ScoringDesk."""
        self._call("commit_scores", lease_id, path)

    def fail_scoring(self, lease_id: str, error: str) -> None:
        """ScoringDesk."""
        self._call("fail_scoring", lease_id, error)

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        """LearnerDesk."""
        answer: Manifest | Wait | Stop = self._call("next_manifest", update)
        return answer

    def publish(self, publication: Publication) -> None:
        """LearnerDesk."""
        self._call("publish", publication)

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> None:
        """LearnerDesk."""
        self._call("finish_update", update, dict(metrics))
