"""The Ray shell of the Coordinator, and the client that makes its handle look like the desks: one line a method."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from common.errors import ConfigError, FlowfleetError
from common.logs import configure_logging, get_logger
from common.metrics import LOOPBACK, serve_metrics
from common.store.coordinator import Coordinator
from common.store.directive import Directive
from common.store.ending import Outcome
from common.types import LoadReceipt, Manifest, Publication, RolloutLease, ScoringLease, Stop, Wait

CALL_TIMEOUT_S = 120.0
AWAY_LIMIT_S = 300.0  # of a Coordinator that restarts
RETRY_S = 0.5
DESK_AWAY: tuple[type[Exception], ...] = (ActorUnavailableError, GetTimeoutError)


class CoordinatorGone(FlowfleetError):
    """The Coordinator did not come back in time; the message names the call that waited."""


@ray.remote
class CoordinatorActor:
    """A Coordinator in a process of its own; several threads (max_concurrency), since its calls do file I/O.

    Args:
        build: makes the Coordinator in that process.
        metrics_port: of /metrics; 0 = none.
        metrics_host: the address it listens on.
    """

    def __init__(self, build: Callable[[], Coordinator], metrics_port: int = 0, metrics_host: str = LOOPBACK) -> None:
        configure_logging()
        self._desk = build()
        if metrics_port:
            _serve(self._desk, metrics_port, metrics_host)

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

    def return_scoring(self, lease_id: str, reason: str) -> None:
        """ScoringDesk."""
        self._desk.return_scoring(lease_id, reason)

    def stop_scoring(self, lease_id: str, error: str) -> None:
        """ScoringDesk."""
        self._desk.stop_scoring(lease_id, error)

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        """LearnerDesk."""
        return self._desk.next_manifest(update)

    def publish(self, publication: Publication) -> None:
        """LearnerDesk."""
        self._desk.publish(publication)

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> bool:
        """LearnerDesk."""
        return self._desk.finish_update(update, metrics)

    def tick(self, directive: Directive | None = None) -> Outcome:
        """Called about every second by the driver."""
        return self._desk.tick(directive)

    def summary(self) -> dict[str, Any]:
        """For the live line."""
        return self._desk.summary()

    def close(self, reason: str) -> None:
        """The run ends."""
        self._desk.close(reason)


def _serve(desk: Coordinator, port: int, host: str) -> None:
    """Serve /metrics. Raises ConfigError at the run's start; a Coordinator that Ray started again goes on without, since a run is worth more."""
    try:
        serve_metrics(desk.metrics.registry, port, host)
    except ConfigError as error:
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            raise
        get_logger("coordinator").warning("alert: restarted without /metrics: %s", error)


class CoordinatorClient:
    """The three desks over an actor handle; flowfleet's own errors come through as such.

    A Coordinator that is away (it was killed, and Ray restarts it) is waited for, up to `away_limit_s`: every call is
    idempotent, so it is simply made again.
    """

    def __init__(self, handle: Any, *, away_limit_s: float = AWAY_LIMIT_S) -> None:
        self._handle, self._away_limit_s = handle, away_limit_s

    def _call(self, method: str, *arguments: Any) -> Any:
        deadline = time.monotonic() + self._away_limit_s
        num_tries = 0
        while True:
            try:
                return ray.get(self._handle.__getattr__(method).remote(*arguments), timeout=CALL_TIMEOUT_S)
            except RayTaskError as error:
                if isinstance(error.cause, FlowfleetError):
                    raise error.cause from None
                raise
            except RayActorError as error:
                self._wait_for_return(method, error, deadline, num_tries)
            except GetTimeoutError as error:
                self._wait_for_return(method, error, deadline, num_tries)
            num_tries += 1

    def _wait_for_return(self, method: str, error: Exception, deadline: float, num_tries: int) -> None:
        """Sleep before the next try. Raises CoordinatorGone when it will not come back, or did not in time."""
        is_final = isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)
        if is_final or time.monotonic() >= deadline:
            raise CoordinatorGone(
                f"coordinator: {method} got no answer for {self._away_limit_s:.0f} s or its process is gone for good ({error}); look at "
                "its log, then start the same command again"
            ) from error
        if num_tries == 0:
            get_logger("desk").warning("the coordinator is away; %s waits for it up to %.0f s", method, self._away_limit_s)
        time.sleep(RETRY_S)

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

    def return_scoring(self, lease_id: str, reason: str) -> None:
        """ScoringDesk."""
        self._call("return_scoring", lease_id, reason)

    def stop_scoring(self, lease_id: str, error: str) -> None:
        """ScoringDesk."""
        self._call("stop_scoring", lease_id, error)

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        """LearnerDesk."""
        answer: Manifest | Wait | Stop = self._call("next_manifest", update)
        return answer

    def publish(self, publication: Publication) -> None:
        """LearnerDesk."""
        self._call("publish", publication)

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> bool:
        """LearnerDesk."""
        is_state_wanted: bool = self._call("finish_update", update, dict(metrics))
        return is_state_wanted
