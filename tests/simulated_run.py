"""Whole runs in simulated seconds: the real Coordinator, loops and files; fake engines whose pauses move a clock of the test's own."""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from common.config import config_digest
from common.policy.fake import FakePolicy
from common.store.claim import claim_run
from common.store.coordinator import Coordinator
from common.store.prompts_order import PromptOrder
from common.store.run_store import RunStore
from common.types import Manifest, Prompt, Stop, Wait
from deploy.compose import compose
from deploy.config import RunConfig, load_config
from deploy.fakes import parse_fakes
from deploy.gates import PromptSets
from learner.build import LearnerProcess
from reward_servers.build import build_server
from reward_servers.server import scoring_loop
from rollout_workers.build import build_local_worker

PROMPTS = tuple(Prompt(id=f"p{index}", text=f"picture {index}") for index in range(7))
PATIENCE_S = 120.0  # real seconds for one turn of one role: a deadlock must not hang the suite


class _Ended(BaseException):
    """Unwinds a role's thread when the simulation is over."""


class SimulatedTime:
    """Roles in threads of which exactly one runs at a time; `pause` gives the turn away and comes back when the clock is there."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._waiting: list[tuple[float, int, threading.Semaphore]] = []  # who goes on when; ties in the order of asking
        self._turn_over = threading.Semaphore(0)
        self._own = threading.local()
        self._failures: list[BaseException] = []
        self._is_over = False

    def clock(self) -> float:
        """Simulated seconds."""
        return self.now

    def pause(self, seconds: float) -> None:
        """Let the others go on for this long."""
        turn: threading.Semaphore = self._own.turn
        heappush(self._waiting, (self.now + seconds, next(self._order), turn))
        self._turn_over.release()
        turn.acquire()
        if self._is_over:
            raise _Ended

    def drive(self, loop: Iterable[Wait]) -> Callable[[], None]:
        """A role's body: its loop, paused between turns."""

        def body() -> None:
            for wait in loop:
                self.pause(wait.seconds)

        return body

    def run(self, bodies: Mapping[str, Callable[[], None]], limit_s: float) -> None:
        """Run every body to its end. Raises what a body raised; AssertionError past `limit_s` simulated seconds."""
        threads = [threading.Thread(target=self._live, args=(body, turn), daemon=True) for body, turn in self._enter(bodies)]
        for thread in threads:
            thread.start()
        while self._waiting and not self._failures and self.now <= limit_s:
            self.now, _, turn = heappop(self._waiting)
            turn.release()
            assert self._turn_over.acquire(timeout=PATIENCE_S), f"a role did not give its turn back at {self.now:.1f} s"
        left, self._is_over = len(self._waiting), True
        for _, _, turn in self._waiting:
            turn.release()
        for thread in threads:
            thread.join(PATIENCE_S)
        if self._failures:
            raise self._failures[0]
        assert left == 0, f"{left} roles still work after {limit_s} s"

    def _enter(self, bodies: Mapping[str, Callable[[], None]]) -> Iterable[tuple[Callable[[], None], threading.Semaphore]]:
        for body in bodies.values():
            turn = threading.Semaphore(0)
            heappush(self._waiting, (0.0, next(self._order), turn))
            yield body, turn

    def _live(self, body: Callable[[], None], turn: threading.Semaphore) -> None:
        self._own.turn = turn
        turn.acquire()
        try:
            if not self._is_over:
                body()
        except _Ended:
            return
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._turn_over.release()


class WatchedCoordinator(Coordinator):
    """Notes when each update was finished, and what each manifest was made of."""

    def watch(self, clock: Callable[[], float]) -> None:
        self.finished_at: dict[int, float] = {}
        self.manifests: dict[int, Manifest] = {}
        self._watch_clock = clock

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> bool:
        self.finished_at.setdefault(update, self._watch_clock())
        return super().finish_update(update, metrics)

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        answer = super().next_manifest(update)
        if isinstance(answer, Manifest):
            self.manifests[update] = answer
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What a run did."""

    store: RunStore
    finished_at: Mapping[int, float]
    manifests: Mapping[int, Manifest]

    def updates_per_minute(self, warmup: int) -> float:
        """Between the end of update `warmup` and the last."""
        last = max(self.finished_at)
        return 60.0 * (last - warmup) / (self.finished_at[last] - self.finished_at[warmup])

    def staleness(self) -> list[int]:
        """Of every consumed group, in order."""
        return [update - 1 - group.version for update, manifest in sorted(self.manifests.items()) for group in manifest.groups]


def small_fake_config(*sets: str) -> RunConfig:
    """The shipped recipe, cut to groups of two samples, P = 4 and one reward; nothing is evaluated."""
    config = load_config(
        "tiny-geneval-grpo",
        ["rollout.group_size=2", "rollout.num_steps=4", "rollout.window.size=1", "learner.groups_per_update=4", "learner.optimizer_steps=1",
         "reward.0.max_groups=1", "reward.0.num_servers=4", "schedule.lease_timeout_s=100000", "schedule.stall_timeout_s=100000", *sets],
    )  # fmt: skip
    return config.model_copy(update={"reward": config.reward[:1]})


def simulate(url: str, config: RunConfig, fakes: str, limit_s: float = 100_000.0) -> SimulatedRun:
    """Run a config with fake engines to its end."""
    parts = compose(config, PromptSets(train=PROMPTS, test=()), url, 1, parse_fakes(fakes))
    time, store = SimulatedTime(), RunStore(url)
    for _ in claim_run(store, config.model_dump(mode="json"), config_digest=config_digest(config)):
        pass
    desk = WatchedCoordinator(
        store, parts.coordinator, incarnation=1, prompt_for=PromptOrder(PROMPTS, 0), clock=time.clock, wall=time.clock
    )
    desk.watch(time.clock)
    bodies = {"learner": time.drive(LearnerProcess(parts.learner, desk, pause=time.pause).loop())}
    for worker in parts.workers:
        bodies[worker.slot] = time.drive(build_local_worker(worker, desk, FakePolicy(), store, pause=time.pause).loop())
    for server in parts.servers:
        bodies[server.slot] = time.drive(scoring_loop(build_server(server, desk, pause=time.pause)))
    time.run(bodies, limit_s)
    desk.outcome().raise_if_failed()
    desk.close("done")
    return SimulatedRun(store=store, finished_at=desk.finished_at, manifests=desk.manifests)
