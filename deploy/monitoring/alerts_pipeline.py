"""Alerts on the flow of groups: who waits for whom, weights on their way out, scores on their way back."""

from typing import Final

from deploy.monitoring.alert import Alert, promql

STALL_SHARE: Final = 0.5
"""Of schedule.stall_timeout_s, the run's own measure of patience: the other half is left to act before the run ends."""
WAIT_S: Final = 15
"""Between a publication and the next leases lie at most some asks of .2 s each: nothing in flight for longer will not come by itself."""
SYNCHRONOUS_WAIT_S: Final = 60
"""The same at max_staleness 0, where nothing is in flight either while the files of an update are saved."""
STARVED: Final = 0.6
"""The learner's idle share. Healthy runs waited for up to 38 % (docs/operations.md, Sizing); above .6 it waits more than it works."""
UNSCORED: Final = 0.5
"""Share of the groups in flight that wait for scores: where rewards keep up nearly all are being sampled, or ready."""
VERSIONS_BEHIND: Final = 3
"""On top of max_staleness: strict order lets a slot that samples fall behind by max_staleness + 1; two more pass over late heartbeats."""
BUSY: Final = 0.5
"""Idle share of a slot: one that waits for more may not have been asked for anything since; it binds the newest version when it is."""
COVERAGE: Final = 0.9
"""Of the newest 64 groups' images. Below .75 of a group's scores the group is dropped: between the two is time to act."""
NULLS: Final = 0.1
"""Share of the asked images without a score; the same bound, over 15 minutes."""
SLOW_S: Final = 10
"""An image's scoring: at ten seconds a group of 24 keeps a server busy for four minutes."""

_IN_FLIGHT = 'state=~"leased|generated|ready"'


def _waits_at(operator: str) -> str:
    """Whether groups in flight wait for scores, as a share, while the learner starves."""
    return promql(f"""
        max by (run) (avg_over_time(flowfleet_idle_ratio{{role="learner"}}[15m])) > {STARVED}
        and on (run)
          sum by (run) (avg_over_time(flowfleet_groups{{state="generated"}}[15m]))
          {operator} on (run)
          {UNSCORED} * sum by (run) (avg_over_time(flowfleet_groups{{{_IN_FLIGHT}}}[15m]))""")


STALLED: Final = Alert(
    name="FlowfleetRunStalled", area="pipeline", severity="critical",
    expr=f"max by (run) (flowfleet_idle_seconds) > on (run) {STALL_SHARE} * max by (run) (flowfleet_stall_timeout_seconds)",
    hold_reason="the gauge is itself a duration",
    summary="{{ $labels.run }}: nothing was committed or published for {{ $value | humanizeDuration }}",
    when=f"the idle time exceeds {STALL_SHARE:.0%} of schedule.stall_timeout_s",
    means="Some role hangs, or none is there. At stall_timeout_s the run ends, state saved, exit code 3.",
    remedy="`flowfleet watch RUN` shows who waits for whom, `flowfleet status RUN` every slot, host and process. If an update is slow: "
    "`--set schedule.stall_timeout_s=N` at the next start; the same command goes on after an end.",
)  # fmt: skip
LEARNER_WAITS: Final = Alert(
    name="FlowfleetLearnerWaits", area="pipeline", severity="critical",
    expr=promql(f"""
        max by (run) (flowfleet_learner_wait_seconds)
          > on (run) ({WAIT_S} + {SYNCHRONOUS_WAIT_S - WAIT_S} * (max by (run) (flowfleet_max_staleness_updates) == bool 0))
        and on (run) sum by (run) (flowfleet_groups{{{_IN_FLIGHT}}}) == 0
        unless on (run) max by (run) (flowfleet_evaluations_pending) > 0
        unless on (run) (
          sum by (run) (flowfleet_slots{{role="rollout",state="starting"}}) > 0
          unless on (run) sum by (run) (flowfleet_slots{{role="rollout",state="running"}}) > 0
        )"""),
    hold_reason="with nothing in flight no time will mend it",
    summary="{{ $labels.run }}: the learner has waited for {{ $value | humanizeDuration }}, and no group is on its way",
    when=f"the learner has waited for {WAIT_S} s ({SYNCHRONOUS_WAIT_S} s at max_staleness 0) while no group is leased, generated or "
    "ready; not during an evaluation, nor while the first rollout workers start",
    means="Nobody samples: no rollout worker is alive or admitted, its weights are refused, or a reward's pool is down.",
    remedy="`flowfleet status RUN`: are slots running, what do the last decisions say? `flowfleet scale RUN --rollout N` asks for workers. "
    "After schedule.stall_timeout_s the run ends, state saved.",
)  # fmt: skip
QUEUE_EMPTY: Final = Alert(
    name="FlowfleetQueueEmpty", area="pipeline", severity="info",
    expr=_waits_at("<=") + "\nand on (run) max by (run) (flowfleet_max_staleness_updates) > 0",
    hold="15m", hold_reason="a matter of money, not of time: a start, an evaluation or a lost node pass within a quarter of an hour",
    summary="{{ $labels.run }}: the learner starves for rollouts, it waits {{ $value | humanizePercentage }} of its time",
    when=f"in the mean of 15 minutes the learner waited more than {STARVED:.0%} of its time, and groups were still being sampled; not at "
    "max_staleness 0, where both take turns",
    means="Sampling is the bottleneck.",
    remedy="`flowfleet scale RUN --rollout N`, or `--autoscale` at the next start. `flowfleet train RECIPE --dry-run` prints the balance.",
)  # fmt: skip
QUEUE_FULL: Final = Alert(
    name="FlowfleetQueueFull", area="pipeline", severity="warning",
    expr=_waits_at(">"),
    hold="5m", hold_reason="the means are over 15 minutes already; five more let a restarted server catch up",
    summary="{{ $labels.run }}: groups wait for scores while the learner waits {{ $value | humanizePercentage }} of its time",
    when=f"in the mean of 15 minutes the learner waited more than {STARVED:.0%} of its time, and more than {UNSCORED:.0%} of the groups "
    "in flight were not scored",
    means="Scoring is the bottleneck: the queue before the rewards is full, so that nothing new is admitted.",
    remedy="flowfleet_reward_backlog_groups says which reward. `flowfleet scale RUN --reward NAME=N` starts servers; num_gpus "
    "and max_groups of that reward may change at the next start.",
)  # fmt: skip
CONSERVATION: Final = Alert(
    name="FlowfleetConservationError", area="pipeline", severity="critical",
    expr="max by (run) (abs(flowfleet_conservation_error_groups)) > 0",
    hold_reason="the sum is taken under one lock: it is never off for a moment",
    summary="{{ $labels.run }}: {{ $value | humanize }} groups are in no state, or in two",
    when="issued groups differ from the sum of consumed, dropped and held ones",
    means="A fault of flowfleet itself: a group may be lost or trained on twice.",
    remedy="`flowfleet stop RUN`, then `flowfleet audit RUN`: it proves from the files whether anything was used twice. Report it with "
    "`flowfleet bundle RUN`.",
)  # fmt: skip
STALE_WEIGHTS: Final = Alert(
    name="FlowfleetStaleWeights", area="pipeline", severity="warning",
    expr=promql(f"""
        (
          max by (run) (flowfleet_policy_version) - on (run) group_right () max by (run, slot) (flowfleet_slot_policy_version)
          > on (run) group_left ()
          (max by (run) (flowfleet_max_staleness_updates) + {VERSIONS_BEHIND})
        )
        and on (run, slot) max by (run, slot) (flowfleet_slot_idle_ratio) < {BUSY}
        unless on (run) max by (run) (flowfleet_evaluations_pending) > 0"""),
    hold="2m", hold_reason="after an evaluation of an old version a slot first finishes its sheet",
    summary="{{ $labels.run }}: {{ $labels.slot }} works with weights that are {{ $value | humanize }} versions old",
    when=f"a busy slot's version is more than max_staleness + {VERSIONS_BEHIND} behind the newest, outside evaluations",
    means="The slot does not take new weights: it hangs in a group, or cannot read the adapter files. No stale group is trained on (the "
    "ledger forbids it), but its work is lost, and the learner waits for the lowest number.",
    remedy="`flowfleet status RUN`: the slot's host and process id; look at its log there. Ended, it is started again under the same "
    "name, and its group is remade.",
)  # fmt: skip
NOT_DELIVERED: Final = Alert(
    name="FlowfleetWeightsNotDelivered", area="pipeline", severity="critical",
    expr=promql("""
        max by (run, slot) (flowfleet_slot_refused) == 1
        or on (run) sum by (run) (increase(flowfleet_receipt_mismatches_total[5m])) > 0"""),
    hold_reason="a receipt is exact: there is no healthy mismatch",
    summary="{{ $labels.run }}: weights did not arrive as published {{ $labels.slot }}",
    when="a slot is refused leases, or a load receipt of the last 5 minutes differed from the publication",
    means="The slot bound other weights than the learner published (digest, modules or canary): another base model, other lora.targets, "
    "or a damaged file.",
    remedy="The Coordinator's log says what differed. Compare the node's model snapshot with the learner's (`flowfleet doctor RECIPE` "
    "on that node), then end the slot's process; it is started again.",
)  # fmt: skip
REWARD_ERRORS: Final = Alert(
    name="FlowfleetRewardErrors", area="rewards", severity="warning",
    expr=promql(f"""
        min by (run, reward) (flowfleet_reward_coverage_ratio) < {COVERAGE}
        or on (run, reward)
          sum by (run, reward) (increase(flowfleet_reward_null_scores_total[15m]))
          / on (run, reward) sum by (run, reward) (increase(flowfleet_reward_images_total[15m]))
          > {NULLS}"""),
    hold="2m", hold_reason="the first groups of a run are few: one of 16 images with two failures stands at .875",
    summary="{{ $labels.run }}: reward {{ $labels.reward }} fails on images",
    when=f"less than {COVERAGE:.0%} of the newest groups' images were scored, or more than {NULLS:.0%} of 15 minutes' images got no score",
    means="The scorer refuses images, times out, or its service fails. Failures are null, never 0, but groups with under 3/4 of their "
    "scores are dropped, and the run stops when half of them are.",
    remedy="The reasons: flowfleet_reward_null_scores_total by reason, and the reward server's log. "
    "`flowfleet reward test NAME --prompts FILE --images DIR` tries the scorer alone.",
)  # fmt: skip
REWARD_SLOW: Final = Alert(
    name="FlowfleetRewardSlow", area="rewards", severity="warning",
    expr=promql(f"""
        histogram_quantile(0.9, sum by (run, reward, le) (rate(flowfleet_reward_latency_seconds_bucket[15m]))) > {SLOW_S}
        and on (run, reward)
          max by (run, reward) (avg_over_time(flowfleet_reward_backlog_groups[15m]))
          > on (run, reward) (
            max by (run, reward) (label_replace(flowfleet_slots_wanted{{pool=~"reward[.].+"}}, "reward", "$1", "pool", "reward[.](.+)"))
            or on (run, reward) 0 * max by (run, reward) (flowfleet_reward_backlog_groups) + 1
          )"""),
    hold="5m", hold_reason="quantile and backlog are means of 15 minutes; five more let a started server work the queue off",
    summary="{{ $labels.run }}: reward {{ $labels.reward }} takes {{ $value | humanizeDuration }} an image (90 % quantile), and groups "
    "queue up",
    when=f"over 15 minutes a tenth of the images took more than {SLOW_S} s to score, and more groups waited than the reward has servers",
    means="The scorer or the service behind it is slow, and sampling outruns it.",
    remedy="`flowfleet scale RUN --reward NAME=N`. num_gpus and max_groups of the reward may change at the next start; a watch reward "
    "may judge fewer groups (sample_every, in a new run).",
)  # fmt: skip
POOL_DOWN: Final = Alert(
    name="FlowfleetRewardPoolDown", area="rewards", severity="critical",
    expr="max by (run, reward) (max_over_time(flowfleet_reward_pool_down[1m])) == 1",
    hold_reason="a breaker opens after five whole failures in a row; the last minute counts, since each trial half opens it for a moment",
    summary="{{ $labels.run }}: every server of reward {{ $labels.reward }} has its breaker open",
    when="within the last minute every server of a reward had its breaker open",
    means="Whole groups fail, one after the other. For a train reward no new group is admitted, and after breaker_limit_s the run ends; "
    "a watch reward only stays blank.",
    remedy="`flowfleet status RUN` shows the last error. Mend what the scorer needs (service, token, model file); the servers try again "
    "by themselves.",
)  # fmt: skip
PIPELINE: Final = (STALLED, LEARNER_WAITS, QUEUE_EMPTY, QUEUE_FULL, CONSERVATION, STALE_WEIGHTS, NOT_DELIVERED)
REWARDS: Final = (REWARD_ERRORS, REWARD_SLOW, POOL_DOWN)
