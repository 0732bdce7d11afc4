"""The driver's line to the Coordinator: start it, ask it, wait for it while Ray restarts it, let it say goodbye."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.errors import FlowfleetError
from common.metrics import check_port
from common.store.actor import CoordinatorActor
from deploy.compose import RunParts, coordinator_builder

COORDINATOR_OPTIONS: dict[str, Any] = {
    "num_cpus": 0,
    "max_concurrency": 32,  # its calls do file I/O
    "runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "2"}},  # glibc would give each of these threads a heap that never shrinks
}
CALL_TIMEOUT_S = 60.0
AWAY_LIMIT_S = 300.0


class CoordinatorLink:
    """A Coordinator beside the driver. Ray brings it back by itself under the same handle; it then lists the run directory.

    Raises:
        ConfigError: /metrics cannot listen where the config wants it.
    """

    def __init__(self, parts: RunParts) -> None:
        cluster = parts.config.cluster
        if cluster.metrics_port:
            check_port(cluster.metrics_port, cluster.metrics_host)
        shell: Any = CoordinatorActor  # Ray's decorator adds `options` and `remote`
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # What it is built from (the prompts are among it) lies in Ray's object store, and a restart needs it again: keep it there.
        self._arguments = ray.put(coordinator_builder(parts))
        self.handle: Any = shell.options(**COORDINATOR_OPTIONS, max_restarts=-1, scheduling_strategy=here).remote(
            self._arguments, cluster.metrics_port, cluster.metrics_host
        )
        self._away_since: float | None = None

    def ask(self, method: str, *arguments: Any, say: Callable[[str], None]) -> Any:
        """Its answer, None while it is away; `say` takes a sentence when it goes and when it is back.

        Raises:
            FlowfleetError: its own, with its exit code; or it was away for too long, or is gone for good.
        """
        try:
            answer = ray.get(self.handle.__getattr__(method).remote(*arguments), timeout=CALL_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, FlowfleetError):
                raise error.cause from None
            raise
        except (ActorUnavailableError, GetTimeoutError) as error:
            self._note_absence(method, error, say)
            return None
        except RayActorError as error:
            if isinstance(error.__cause__, FlowfleetError):
                raise error.__cause__ from None
            raise FlowfleetError(f"coordinator: its process ended ({error}); resume with the same command") from error
        if self._away_since is not None:
            say(f"the coordinator is back after {time.monotonic() - self._away_since:.1f} s")
            self._away_since = None
        return answer

    def _note_absence(self, method: str, error: RayError, say: Callable[[str], None]) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            say(f"the coordinator is away ({type(error).__name__}): it is started again and lists the run directory")
        if now - self._away_since > AWAY_LIMIT_S:
            raise FlowfleetError(
                f"coordinator: no answer to {method} for {AWAY_LIMIT_S:.0f} s; look at its log, then start the same command again"
            ) from error

    def close(self, reason: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Let status.json say that nobody runs this run; a Coordinator that cannot is passed over."""
        with contextlib.suppress(RayError):
            ray.get(self.handle.close.remote(reason), timeout=timeout_s)

    def kill(self) -> None:
        """End its process for good."""
        ray.kill(self.handle)
