"""Alerts on processes, the store, and the target itself."""

from typing import Final

from deploy.monitoring.alert import Alert, promql

CRASHES: Final = 3
"""Processes of a role that ended unasked within 15 minutes: one or two are an accident, a preempted spot node or somebody's kill."""
UNRETIRABLE: Final = 0.8
"""Of store.max_bytes, by what retirement does not free (states, adapters, records): above it little room is left for the groups of the
next updates. All bytes together are no sign: a long run stays just under its cap by design."""
LATE_UPDATES: Final = 2
"""On top of learner.state_interval: a state is written beside the update after it, and one more is a margin for a slow store."""

CRASH_LOOP: Final = Alert(
    name="FlowfleetCrashLoop", area="fleet", severity="warning",
    expr=f"sum by (run, role) (increase(flowfleet_slot_crashes_total[15m])) > {CRASHES - 0.5:g}",
    hold_reason="the count is over 15 minutes",
    summary="{{ $labels.run }}: {{ $labels.role }} processes keep ending unasked",
    when=f"{CRASHES} or more processes of a role ended unasked within 15 minutes",
    means="A process dies again and again (memory, a driver, a model file), or a node is lost. A slot that dies five times without any "
    "work ends the run.",
    remedy="`flowfleet status RUN`: crashes in a row and host of each slot, and in the last decisions how they ended. `flowfleet doctor "
    "RECIPE` on that node; fewer processes a node when memory is the cause.",
)  # fmt: skip
STORE_FULL: Final = Alert(
    name="FlowfleetStoreNearlyFull", area="store", severity="warning",
    expr=promql(f"""
        sum by (run) (flowfleet_store_bytes{{kind!="groups"}}) / on (run) max by (run) (flowfleet_store_limit_bytes) > {UNRETIRABLE}
        or on (run)
          sum by (run) (flowfleet_store_bytes) / on (run) max by (run) (flowfleet_store_limit_bytes) > 1"""),
    hold="2m", hold_reason="old groups leave once an update; quick runs pass their own update within two minutes",
    summary="{{ $labels.run }}: the run directory is at {{ $value | humanizePercentage }} of store.max_bytes",
    when=f"what is not group files takes more than {UNRETIRABLE:.0%} of store.max_bytes, or everything together more than all of it",
    means="Old groups are retired at the cap, but what is left cannot leave: states, adapters, records, or updates after the newest "
    "LearnerState.",
    remedy="Raise the cap at the next start (`--set store.max_bytes=N`), or keep fewer states (`--set learner.states_kept=1 --allow-change "
    "learner.states_kept`). This is the run's own cap; the disk's free space is in Ray's metrics.",
)  # fmt: skip
STORE_AWAY: Final = Alert(
    name="FlowfleetStoreAway", area="store", severity="critical",
    expr="min by (run) (flowfleet_store_up) == 0",
    hold="30s", hold_reason="object stores refuse for some seconds now and then, and the roles try again by themselves",
    summary="{{ $labels.run }}: the store is away, and the run waits for it",
    when="the store has refused for 30 seconds",
    means="Nothing is acknowledged without a commit: workers hold at most one group and back off. After schedule.stall_timeout_s the "
    "run ends, state saved.",
    remedy="Mend the file system, credentials or network; `flowfleet doctor RECIPE` probes the store. The run goes on by itself.",
)  # fmt: skip
STATE_OLD: Final = Alert(
    name="FlowfleetStateTooOld", area="store", severity="warning",
    expr=promql(f"""
        max by (run) (flowfleet_learner_state_age_updates)
          > on (run) (max by (run) (flowfleet_learner_state_every_updates) + {LATE_UPDATES})"""),
    hold="1m", hold_reason="quick runs finish several updates while one state is written",
    summary="{{ $labels.run }}: the newest LearnerState is {{ $value | humanize }} updates old",
    when=f"more than learner.state_interval + {LATE_UPDATES} updates are finished since the newest durable LearnerState",
    means="States are not written, or too slowly: a crash would replay that many updates.",
    remedy="Look at the learner's log and at the store's speed; `flowfleet status RUN`. Before a planned stop use `flowfleet stop RUN`, "
    "which saves a state.",
)  # fmt: skip
TARGET_DOWN: Final = Alert(
    name="FlowfleetTargetDown", area="target", severity="warning",
    expr=promql("""
        max by (run, instance) (last_over_time(flowfleet_update[1h]) < last_over_time(flowfleet_updates_planned[1h]))
        and on (instance) max by (instance) (up{job="flowfleet"}) == 0
        unless on (run) max by (run) (flowfleet_update)
        unless on (run, instance) max by (run, instance) (last_over_time(flowfleet_run_ending[1h])) == 1"""),
    hold="1m", hold_reason="a Coordinator that was killed is back within seconds",
    summary="{{ $labels.run }}: {{ $labels.instance }} answers no more, at update {{ $value | humanize }} of a run that was not through",
    when="a target is down for a minute that within the last hour showed a run short of schedule.num_updates; the alert ends by itself "
    "after that hour",
    means="The Coordinator or its host is gone, or the network between. A run that its time limit, a guard or `flowfleet stop` ended "
    "has said so before (flowfleet_run_ending) and is left out.",
    remedy="`flowfleet status RUN` reads the files and says whether it ended, and why. Else start the same train command again: it goes "
    "on from them.",
)  # fmt: skip
TARGET_ABSENT: Final = Alert(
    name="FlowfleetTargetAbsent", area="target", severity="warning",
    expr='absent(up{job="flowfleet"})',
    hold="5m", hold_reason="Prometheus has no targets for a moment when it starts or reads its configuration again",
    summary="Prometheus has no target of the job flowfleet",
    when="Prometheus has had no target of the job flowfleet for 5 minutes, neither up nor down",
    means="Nothing is watched: the scrape configuration lost the job, or its discovery finds nothing.",
    remedy="Compare with deploy/prometheus/prometheus.yml; `promtool check config FILE`; Prometheus' page Status, Targets.",
)  # fmt: skip
FLEET: Final = (CRASH_LOOP,)
STORE: Final = (STORE_FULL, STORE_AWAY, STATE_OLD)
TARGET: Final = (TARGET_DOWN, TARGET_ABSENT)
