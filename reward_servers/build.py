"""Builds a reward server from its config section."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from common.fakes import FakeSpec
from common.gauges import Gauges
from common.heartbeat import Heartbeat, HeldLeases
from common.protocols import Scorer, ScoringDesk
from common.store.faces import MediaFiles, ScoreFiles
from common.store.run_store import RunStore
from reward_servers.breaker import Breaker
from reward_servers.calls import DeadlineCalls, DirectCalls
from reward_servers.config import RewardConfig
from reward_servers.environments import configured_scorer
from reward_servers.fake import FAKE_MICRO_BATCH, FakeScorer
from reward_servers.server import RewardServer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """All that a reward server is made from; plain config, so it crosses process borders."""

    slot: str  # reward.NAME.0 ...
    store_url: str
    run: str
    reward: RewardConfig
    fake: FakeSpec | None = None  # a fake engine instead of the scorer


def build_server(
    settings: ServerSettings, desk: ScoringDesk, *, pause: Callable[[float], None] = time.sleep, is_restarted: bool = False
) -> RewardServer:
    """Return a server with its scorer loaded.

    Args:
        settings: of the server.
        desk: where it asks.
        pause: how a fake engine spends its seconds; a simulation passes its own.
        is_restarted: whether somebody starts its process again when the scorer hangs or is broken.

    Raises:
        ConfigError: an unknown reward or option.
    """
    store, reward = RunStore(settings.store_url), settings.reward
    server = RewardServer(
        desk=desk, slot=settings.slot, run=settings.run, reward=reward.name, scorer=_scorer(settings, pause),
        source=MediaFiles(store), sink=ScoreFiles(store), max_groups=reward.max_groups, micro_batch=reward.micro_batch,
        retries=reward.retries, on_failure=reward.on_failure, calls=DeadlineCalls(reward.name, reward.deadline_s),
        breaker=Breaker(failures=reward.breaker_failures, pause_s=reward.breaker_pause_s), is_restarted=is_restarted,
        use=reward.use, held=HeldLeases(), gauges=Gauges(),
    )  # fmt: skip
    return server if settings.fake is None else replace(server, micro_batch=FAKE_MICRO_BATCH, calls=DirectCalls())


def _scorer(settings: ServerSettings, pause: Callable[[float], None]) -> Scorer:
    reward = settings.reward
    if settings.fake is not None:
        return FakeScorer(reward.name, seconds=settings.fake.seconds_of(settings.slot), pause=pause)
    return configured_scorer(reward)


def build_heartbeat(server: RewardServer, desk: ScoringDesk, *, retry_on: tuple[type[Exception], ...] = ()) -> Heartbeat:
    """Return the heartbeat that keeps the server's leases alive."""
    return Heartbeat(server.slot, desk, server.held, server.gauges.snapshot, retry_on=retry_on)
