"""Builds a reward server from its config section."""

from dataclasses import dataclass

from common.gauges import Gauges
from common.heartbeat import Heartbeat, HeldLeases
from common.protocols import ScoringDesk
from common.store.faces import MediaFiles, ScoreFiles
from common.store.run_store import RunStore
from reward_servers.config import RewardConfig
from reward_servers.registry import make_scorer
from reward_servers.server import RewardServer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """All that a reward server is made from; plain config, so it crosses process borders."""

    slot: str  # reward.NAME.0 ...
    store_url: str
    run: str
    reward: RewardConfig


def build_server(settings: ServerSettings, desk: ScoringDesk) -> RewardServer:
    """Return a server with its scorer loaded. Raises ConfigError for an unknown reward or option."""
    store = RunStore(settings.store_url)
    return RewardServer(
        desk=desk, slot=settings.slot, run=settings.run, reward=settings.reward.name,
        scorer=make_scorer(settings.reward.name, settings.reward.options),
        source=MediaFiles(store), sink=ScoreFiles(store), max_groups=settings.reward.max_groups,
        held=HeldLeases(), gauges=Gauges(),
    )  # fmt: skip


def build_heartbeat(server: RewardServer, desk: ScoringDesk, *, retry_on: tuple[type[Exception], ...] = ()) -> Heartbeat:
    """Return the heartbeat that keeps the server's leases alive."""
    return Heartbeat(server.slot, desk, server.held, server.gauges.snapshot, retry_on=retry_on)
