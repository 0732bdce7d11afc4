"""Each alert of pipeline, rewards, fleet, store and target, firing and not firing."""

from tests.alert_cases import Case, Firing, run, tiny

QUIET = tuple[Firing, ...]()
RUNNING = run("slots", role="rollout", state="running")
STARTING = run("slots", role="rollout", state="starting")
IDLE = run("idle_ratio", role="learner")
STALENESS = run("max_staleness_updates")
INSTANCE = "127.0.0.1:9464"


def _case(alert: str, name: str, series: dict[str, str], at: str, fires: tuple[Firing, ...] = QUIET) -> Case:
    return Case(alert=f"Flowfleet{alert}", name=name, series=series, at=at, fires=fires)


def _groups(leased: str, generated: str, ready: str) -> dict[str, str]:
    found = {"leased": leased, "generated": generated, "ready": ready, "batched": "120x90", "waiting": "0x90"}
    return {run("groups", state=state): values for state, values in found.items()}


def _waits(name: str, fires: tuple[Firing, ...] = QUIET, **changes: str) -> Case:
    values = {"wait": "0 20 80 140", "staleness": "1x9", "leased": "0x9", "pending": "0x9", "starting": "0x9", "running": "0x9", **changes}
    series = {
        run("learner_wait_seconds"): values["wait"], STALENESS: values["staleness"], run("evaluations_pending"): values["pending"],
        STARTING: values["starting"], RUNNING: values["running"], **_groups(values["leased"], "0x9", "0x9"),
    }  # fmt: skip
    return _case("LearnerWaits", name, series, "1m", fires)


def _stalled(name: str, patience: str, at: str, fires: tuple[Firing, ...] = QUIET) -> Case:
    return _case("RunStalled", name, {run("idle_seconds"): "0+60x10", run("stall_timeout_seconds"): patience}, at, fires)


def _delivery(name: str, refused: str, mismatches: str, fires: tuple[Firing, ...] = QUIET) -> Case:
    series = {run("slot_refused", slot="rollout.0"): "0x9", run("slot_refused", slot="rollout.1"): refused}
    return _case("WeightsNotDelivered", name, {**series, run("receipt_mismatches_total"): mismatches}, "2m", fires)


def _queue(alert: str, name: str, idle: str, groups: dict[str, str], fires: tuple[Firing, ...] = QUIET, staleness: str = "1x60") -> Case:
    return _case(alert, name, {IDLE: idle, STALENESS: staleness, **groups}, "40m", fires)


def _stale(name: str, fires: tuple[Firing, ...] = QUIET, *, bound: str = "0x20", idle: str = "0.1x20", pending: str = "0x20") -> Case:
    series = {
        run("policy_version"): "0+1x20", STALENESS: "1x20", run("evaluations_pending"): pending,
        run("slot_policy_version", slot="rollout.0"): bound, run("slot_idle_ratio", slot="rollout.0"): idle,
        run("slot_policy_version", slot="rollout.1"): "0+1x20", run("slot_idle_ratio", slot="rollout.1"): "0.1x20",
    }  # fmt: skip
    return _case("StaleWeights", name, series, "8m", fires)


def _slow(name: str, slow: str, backlog: str, servers: dict[str, str], fires: tuple[Firing, ...] = QUIET) -> Case:
    """All images take either 3 to 10 s, or (slow) 10 to 30 s: the 90 % quantile is 9.3 or 28 s."""
    buckets = {"3": "0x60", "10": slow, "30": "0+10x60", "100": "0+10x60", "+Inf": "0+10x60"}
    series = {run("reward_latency_seconds_bucket", reward="ocr", le=le): values for le, values in buckets.items()}
    return _case("RewardSlow", name, {**series, run("reward_backlog_groups", reward="ocr"): backlog, **servers}, "30m", fires)


def _errors(name: str, coverage: str, nulls: str, fires: tuple[Firing, ...] = QUIET, at: str = "10m") -> Case:
    series = {
        run("reward_coverage_ratio", reward="ocr"): coverage, run("reward_images_total", reward="ocr"): "0+100x30",
        run("reward_null_scores_total", reward="ocr", reason="timeout"): nulls,
    }  # fmt: skip
    return _case("RewardErrors", name, series, at, fires)


def _bytes(groups: str, learner: str) -> dict[str, str]:
    kinds = {"groups": groups, "learner": learner, "policy": "10x20", "other": "10x20"}
    return {run("store_limit_bytes"): "1000x20", **{run("store_bytes", kind=kind): values for kind, values in kinds.items()}}


def _target(up: str, update: str, planned: str = "300x90", instance: str = INSTANCE) -> dict[str, str]:
    labels = {"job": "flowfleet", "instance": instance}
    return {
        f'up{{job="flowfleet",instance="{instance}"}}': up, run("update", **labels): update, run("updates_planned", **labels): planned,
    }  # fmt: skip


WANTED = {run("slots_wanted", pool="reward.ocr"): "2x60", run("slots_wanted", pool="rollout"): "4x60"}
SAMPLED = _groups("4x60", "1x60", "1x60")
SCORED_LATE = _groups("1x60", "8x60", "0x60")
PIPELINE_CASES = (
    _stalled("more than half of the patience", "900x10", "8m", tiny("8m 0s")),
    _stalled("less than half of it", "900x10", "7m"),
    _stalled("a patient run", "7200x10", "10m"),
    _waits("nothing in flight fires at once", tiny("20s")),
    _waits("a crashed worker starts while another runs", tiny("20s"), starting="1x9", running="1x9"),
    _waits("groups are being sampled", leased="3x9"),
    _waits("the first workers load their model", starting="2x9"),
    _waits("the only worker draws an evaluation", pending="1x9"),
    _waits("a synchronous run saves its update", staleness="0x9"),
    _waits("a synchronous run waits for longer", tiny("1m 20s"), staleness="0x9", wait="0 80 140 200"),
    _queue("QueueEmpty", "the learner waits nine tenths of its time", "0.9x60", SAMPLED, tiny("90%")),
    _queue("QueueEmpty", "38 % as a healthy run with one worker", "0.38x60", SAMPLED),
    _queue("QueueEmpty", "a synchronous run takes turns", "0.9x60", SAMPLED, staleness="0x60"),
    _queue("QueueEmpty", "the rewards are the bottleneck", "0.9x60", SCORED_LATE),
    _case("QueueEmpty", "ten minutes of it are a start", {IDLE: "0.9x60", STALENESS: "1x60", **SAMPLED}, "10m"),
    _queue("QueueFull", "most groups wait for scores", "0.9x60", SCORED_LATE, tiny("90%")),
    _queue("QueueFull", "a full queue that starves nobody", "0.1x60", SCORED_LATE),
    _queue("QueueFull", "rollouts are the bottleneck", "0.9x60", SAMPLED),
    _case("ConservationError", "a group too many", {run("conservation_error_groups"): "0 0 -1"}, "2m", tiny("1")),
    _case("ConservationError", "the sum is right", {run("conservation_error_groups"): "0x9"}, "5m"),
    _stale("eight versions behind, two minutes after five", tiny("8", slot="rollout.0")),
    _stale("four behind is what strict order and the margin allow", bound="0 0 0 0 0+1x16"),
    _stale("a slot that was not asked for anything", idle="0.9x20"),
    _stale("an old version is being evaluated", pending="1x20"),
    _delivery("a refused slot, by name", "0 1 1", "0 1 1", tiny(slot="rollout.1")),
    _delivery("a mismatch that the next load mended", "0x9", "0 1 1", tiny()),
    _delivery("every receipt agrees", "0x9", "0x9"),
)  # fmt: skip
REWARD_CASES = (
    _errors("a fifth of the images is not scored", "0.8x30", "0x30", tiny(reward="ocr")),
    _errors("a fifth of the asked images fails just now", "0.95x30", "0+20x30", tiny(reward="ocr")),
    _errors("one in fifty fails", "0.98x30", "0+2x30"),
    _errors("the first group had two failures", "0.875 0.98x30", "2x30", at="3m"),
    _slow("28 s an image, and six groups wait for two servers", "0x60", "6x60", WANTED, tiny("28s", reward="ocr")),
    _slow("the same in one process, without a fleet", "0x60", "6x60", {}, tiny("28s", reward="ocr")),
    _slow("28 s an image, and the servers keep up", "0x60", "1x60", WANTED),
    _slow("9 s an image, and a queue", "0+10x60", "6x60", WANTED),
    _case("RewardPoolDown", "every breaker is open",
          {run("reward_pool_down", reward="ocr"): "0 1 1", run("reward_pool_down", reward="clip"): "0x9"}, "2m", tiny(reward="ocr")),
    _case("RewardPoolDown", "the servers score", {run("reward_pool_down", reward="ocr"): "0x9"}, "5m"),
    _case("RewardPoolDown", "it was down and scores again", {run("reward_pool_down", reward="ocr"): "1 1 0 0 0 0"}, "4m"),
)  # fmt: skip
FLEET_CASES = (
    _case("CrashLoop", "a crash a minute", {run("slot_crashes_total", role="rollout"): "0 1 2 3 4 4 4"}, "5m", tiny(role="rollout")),
    _case("CrashLoop", "two accidents", {run("slot_crashes_total", role="rollout"): "0 1 1 1 2 2 2x20"}, "10m"),
    _case("CrashLoop", "one an hour", {run("slot_crashes_total", role="rollout"): "0x10 1x60 2x60 3x60"}, "140m"),
)  # fmt: skip
STORE_CASES = (
    _case("StoreNearlyFull", "states and records leave no room", _bytes("50x20", "830x20"), "5m", tiny("85%")),
    _case("StoreNearlyFull", "all bytes together pass the cap", _bytes("900x20", "100x20"), "5m", tiny("102%")),
    _case("StoreNearlyFull", "a long run stays just under its cap", _bytes("880x20", "90x20"), "15m"),
    _case("StoreAway", "a minute without the store", {run("store_up"): "1 0 0 0"}, "2m", tiny()),
    _case("StoreAway", "it answers", {run("store_up"): "1x9"}, "5m"),
    _case("StateTooOld", "four updates old, and due at each",
          {run("learner_state_age_updates"): "1 2 3 4 5 6", run("learner_state_every_updates"): "1x9"}, "4m", tiny("5")),
    _case("StateTooOld", "two updates old while a state is written",
          {run("learner_state_age_updates"): "1 2 3 2 1 2", run("learner_state_every_updates"): "1x9"}, "5m"),
    _case("StateTooOld", "nine updates old, and due every tenth",
          {run("learner_state_age_updates"): "9x9", run("learner_state_every_updates"): "10x9"}, "5m"),
)  # fmt: skip
TARGET_CASES = (
    _case("TargetDown", "a run vanished at update 42", _target("1x5 0x60", "42x5 stale"), "10m",
          tiny("42", instance=INSTANCE)),
    _case("TargetDown", "a run that was through", _target("1x5 0x60", "300x5 stale"), "10m"),
    _case("TargetDown", "a run that said that it ends",
          {**_target("1x5 0x60", "42x5 stale"), run("run_ending", job="flowfleet", instance=INSTANCE): "0x4 1 stale"}, "10m"),
    _case("TargetDown", "after an hour it is history", _target("1x5 0x90", "42x5 stale"), "80m"),
    _case("TargetDown", "the run goes on elsewhere",
          {**_target("1x5 0x60", "42x5 stale"), **_target("1x60", "42x60", instance="10.0.0.2:9464")}, "10m"),
    _case("TargetDown", "a Coordinator that came back", _target("1x5 0 1x60", "42x5 stale 42x60"), "10m"),
    _case("TargetDown", "nothing ran here yet", {f'up{{job="flowfleet",instance="{INSTANCE}"}}': "0x60"}, "30m"),
    _case("TargetAbsent", "no target at all", {'up{job="ray",instance="a"}': "1x60"}, "10m", (Firing(labels={"job": "flowfleet"}),)),
    _case("TargetAbsent", "a target that is down is a target", _target("0x60", "stale"), "10m"),
)  # fmt: skip
OPERATION_CASES = (*PIPELINE_CASES, *REWARD_CASES, *FLEET_CASES, *STORE_CASES, *TARGET_CASES)
