"""What the Coordinator needs of a run's configuration."""

from dataclasses import dataclass

from common.store.config import ScheduleConfig, StoreConfig
from common.store.evaluations import EvalProtocol
from common.store.ledger_entries import LedgerSettings, RewardSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """The rules in force."""

    run: str
    config_digest: str
    schedule: ScheduleConfig
    store: StoreConfig
    groups_per_update: int  # P
    group_size: int  # K
    rollout_snapshot: str  # which snapshot samples training groups
    rewards: tuple[RewardSpec, ...]
    protocol: EvalProtocol
    state_interval: int = 1  # updates between LearnerStates; shown only
    objective: str = ""  # the learner's; shown only
    software_version: str = ""  # of flowfleet; shown only

    @property
    def ledger(self) -> LedgerSettings:
        """The ledger's part."""
        schedule = self.schedule
        return LedgerSettings(
            groups_per_update=self.groups_per_update, group_size=self.group_size, max_staleness=schedule.max_staleness,
            num_updates=schedule.num_updates, rewards=self.rewards, max_attempts=schedule.max_attempts,
            lease_timeout_s=schedule.lease_timeout_s, group_timeout_s=schedule.group_timeout_s,
            replace_flat_groups=schedule.replace_flat_groups, min_scored_share=schedule.min_scored_share,
        )  # fmt: skip
