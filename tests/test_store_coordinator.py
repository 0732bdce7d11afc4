"""The Coordinator over real stores: whole runs, restarts, fences, evaluations, guards."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import Fenced, GateError, StallError, StoreError
from common.policy.adapters import read_publication
from common.store import paths
from common.store.claim import claim_run
from common.store.config import StoreConfig
from common.store.coordinator import Coordinator
from common.store.ending import EndKind
from common.store.evaluations import EvalProtocol, select_prompts
from common.store.groups import write_group
from common.store.ledger_entries import RewardSpec
from common.store.manifests import Claim, encode_record, read_status
from common.store.run_store import RunStore
from common.types import LeaseKind, LoadReceipt, Manifest, Prompt, RolloutLease, ScoringLease, Stop, Wait
from tests.store_fixtures import (
    PROMPTS,
    Clock,
    learn,
    make_coordinator,
    make_group,
    make_media,
    make_settings,
    publish,
    roll_out,
    run_to_end,
    score,
    work,
)


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run") if request.param == "file" else f"memory://{tmp_path.name}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ask(desk: Coordinator, slot: str = "rollout.0") -> RolloutLease:
    lease = desk.ask_rollout(slot)
    assert isinstance(lease, RolloutLease), lease
    return lease


def ask_scores(desk: Coordinator, reward: str = "r") -> tuple[ScoringLease, ...]:
    leases = desk.ask_scoring("reward.0", reward, 9)
    return leases if isinstance(leases, tuple) else ()


def test_a_run_ends_after_its_updates_in_strict_order_within_staleness(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    manifests = run_to_end(store, desk)
    assert [[group.number for group in manifest.groups] for manifest in manifests] == [[0, 1], [2, 3], [4, 5]]
    assert [[m.update - 1 - group.version for group in m.groups] for m in manifests] == [[0, 0], [1, 1], [1, 1]]
    assert desk.outcome().kind is EndKind.DONE
    for answer in (desk.ask_rollout("rollout.0"), desk.ask_scoring("reward.r.0", "r", 1), desk.next_manifest(4)):
        assert isinstance(answer, Stop)
    summary = desk.summary()
    assert summary["update"] == 3
    assert summary["metrics"] == {"kl": 1e-3, "flat_group_share": 0.25, "reward": 0.5, "images_per_s": 0, "staleness": 1.0}


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_groups_are_as_stale_as_the_config_allows_and_no_more(store: RunStore, clock: Clock, staleness: int) -> None:
    desk = make_coordinator(store, make_settings(num_updates=5, max_staleness=staleness), clock)
    manifests = run_to_end(store, desk, num_updates=5)
    found = [max(m.update - 1 - group.version for group in m.groups) for m in manifests]
    assert found == [min(update - 1, staleness) for update in range(1, 6)]


def test_leases_carry_the_newest_publication_the_prompt_and_the_window_round(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    waiting = desk.ask_rollout("rollout.0")
    assert isinstance(waiting, Wait)
    assert "no policy version is published" in waiting.reason
    publication = publish(store, desk, 0)
    leases = [ask(desk) for _ in range(4)]
    assert [(lease.number, lease.window_round) for lease in leases] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert {lease.snapshot for lease in leases} == {"live"}
    assert {lease.publication.path for lease in leases} == {publication.path}
    waiting = desk.ask_rollout("rollout.0")
    assert isinstance(waiting, Wait)
    assert "max_staleness admits no further group" in waiting.reason


def test_every_call_may_be_repeated(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    desk.publish(publish(store, desk, 0))
    for _ in range(2):
        lease = ask(desk)
        roll_out(store, desk, lease)
        roll_out(store, desk, lease)
        (scoring,) = ask_scores(desk)
        score(store, desk, scoring)
        score(store, desk, scoring)
        desk.return_rollout(lease.lease_id, "late")
        desk.fail_scoring(scoring.lease_id, "late")
    first, again = desk.next_manifest(1), desk.next_manifest(1)
    assert isinstance(first, Manifest)
    assert first == again
    assert desk.summary()["counts"]["batched"] == 2


def test_an_announced_file_must_exist_and_be_the_leases(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    lease = ask(desk)
    with pytest.raises(StoreError, match="is no file of lease"):
        desk.commit_rollout(lease.lease_id, paths.group_path(0, "other"), 1.0)
    with pytest.raises(StoreError, match=r"RunStore\.size"):
        desk.commit_rollout(lease.lease_id, paths.group_path(0, lease.lease_id), 1.0)


def test_a_restart_at_any_point_goes_on_from_the_files_alone(store: RunStore, clock: Clock) -> None:
    settings = make_settings(num_updates=4)
    desk = make_coordinator(store, settings, clock)
    publish(store, desk, 0)
    steps = 0
    manifests = []
    incarnation = 1
    for update in range(1, 5):
        while next(work(store, desk), None) is not None:
            steps += 1
            before = desk._ledger.durable_view()
            incarnation += 1
            desk = restart(store, settings, clock, incarnation)
            assert desk._ledger.durable_view() == before
        manifests.append(learn(store, desk, update, incarnation=incarnation))
    assert steps == 8 + 8  # no image was made or scored again
    assert [group.number for manifest in manifests for group in manifest.groups] == list(range(8))


def restart(store: RunStore, settings: Any, clock: Clock, incarnation: int, **options: Any) -> Coordinator:
    claim = Claim(incarnation=incarnation, writer_id="w", started_at="", config_digest="c0", config={})
    store.create_exclusive(paths.config_path(incarnation), encode_record(claim), writer_id="w")
    return make_coordinator(
        store, settings, clock, incarnation=incarnation, read_publication=lambda path: read_publication(store.read(path), path), **options
    )


def test_a_lease_that_outlived_a_restart_is_shown_by_its_beat_and_not_given_away(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    held, lost = ask(desk), ask(desk, "rollout.1")
    roll_out(store, desk, ask(desk))
    desk = restart(store, make_settings(), clock, 2, settle_s=6.0)
    desk.beat("rollout.0", [held.lease_id], {"images_per_second": 3.0})
    assert isinstance(desk.ask_rollout("rollout.1"), Wait)
    clock.now += 7
    assert ask(desk, "rollout.1").number == lost.number == 1
    roll_out(store, desk, held)
    assert desk.summary()["counts"] == {"waiting": 0, "leased": 1, "generated": 2, "ready": 0, "batched": 0, "dropped": 0, "issued": 3}
    assert desk.summary()["metrics"]["images_per_s"] == 3.0


def test_a_manifest_that_another_wrote_first_is_adopted(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    twin = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    twin = make_coordinator(store, make_settings(), clock)
    theirs = twin.next_manifest(1)
    assert isinstance(theirs, Manifest)
    assert desk.next_manifest(1) == theirs


def test_a_higher_incarnation_fences_manifests_and_publications(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    later = restart(store, make_settings(), clock, 2)
    with pytest.raises(Fenced, match="taken over"):
        desk.next_manifest(1)
    with pytest.raises(Fenced, match="taken over"):
        desk.tick()
    assert isinstance(later.next_manifest(1), Manifest)
    with pytest.raises(Fenced, match="v1 is of incarnation 1; 2 runs"):
        publish(store, later, 1, incarnation=1)


@pytest.mark.parametrize(
    ("change", "rule"),
    [({"num_modules": 0}, "0 modules were bound"), ({"canary": 0.106}, "canary is 0.106"), ({"snapshot": "behavior"}, "holds")],
)
def test_a_worker_whose_receipt_differs_gets_no_lease_until_it_agrees(clock: Clock, change: dict[str, Any], rule: str) -> None:
    store = RunStore("memory://receipts" + rule[:3])
    desk = make_coordinator(store, make_settings(), clock)
    publication = publish(store, desk, 0)
    good: dict[str, Any] = {"adapter": publication.adapter, "snapshot": "live", "num_modules": 1, "canary": 0.104}
    with pytest.raises(GateError, match=rule) as caught:
        desk.confirm_weights("rollout.0", LoadReceipt(**(good | change)))
    assert caught.value.name == "weights"
    assert isinstance(desk.ask_rollout("rollout.0"), Wait)
    ask(desk, "rollout.1")
    desk.confirm_weights("rollout.0", LoadReceipt(**good))
    ask(desk, "rollout.0")


def test_drops_are_files_before_they_leave_the_sum_and_manifests_copy_them(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    for _ in range(3):
        desk.fail_rollout(ask(desk).lease_id, "out of memory")
    assert json.loads(store.read(paths.drop_path(0))) == {"number": 0, "reason": "attempts", "detail": "out of memory"}
    for _ in work(store, desk):
        pass
    manifest = learn(store, desk, 1)
    assert [group.number for group in manifest.groups] == [1, 2]
    assert [drop.reason for drop in manifest.drops] == ["attempts"]


def test_a_drop_that_cannot_be_written_leaves_the_number_in_the_sum(tmp_path: Path, clock: Clock) -> None:
    full = True

    def hook(stage: str, path: str) -> None:
        if full and path.startswith("drops/") and stage == "sync":
            raise OSError(28, "No space left on device")

    store = RunStore(str(tmp_path), hook=hook)
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    for _ in range(2):
        desk.fail_rollout(ask(desk).lease_id, "x")
    lease = ask(desk)
    with pytest.raises(StoreError, match="No space left on device"):
        desk.fail_rollout(lease.lease_id, "x")
    assert desk.summary()["counts"]["dropped"] == 0
    full = False
    desk.tick()
    assert desk.summary()["counts"]["dropped"] == 1


def test_a_poison_image_becomes_nulls_with_their_reason_and_the_run_goes_on(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    roll_out(store, desk, ask(desk))
    for _ in range(3):
        (scoring,) = ask_scores(desk)
        desk.fail_scoring(scoring.lease_id, "decoder crashed")
    assert desk.summary()["drops"] == {"too_few_scores": 1}
    for _ in work(store, desk):
        pass
    assert [group.number for group in learn(store, desk, 1).groups] == [1, 2]


def test_silent_leases_come_back_and_beaten_ones_stay(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    first, second = ask(desk), ask(desk, "rollout.1")
    clock.now += 20
    desk.beat("rollout.1", [second.lease_id], {})
    clock.now += 20
    assert ask(desk, "rollout.2").number == first.number
    assert ask(desk, "rollout.2").number == 2


def test_too_many_drops_end_the_run_with_their_cause(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    for _ in range(3):
        for _ in range(3):
            desk.fail_rollout(ask(desk).lease_id, "out of memory")
    assert isinstance(desk.ask_rollout("rollout.0"), Stop)
    outcome = desk.tick()
    assert outcome.kind is EndKind.GUARD
    with pytest.raises(GateError, match="3 of the last 4 groups were dropped \\(3 attempts\\); last: group 2: out of memory"):
        outcome.raise_if_failed()


def test_a_learner_that_waits_too_long_ends_the_run_naming_the_role(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(stall_timeout_s=100.0), clock)
    publish(store, desk, 0)
    roll_out(store, desk, ask(desk))
    for _ in range(4):
        clock.now += 25
        answer = desk.next_manifest(1)
        assert isinstance(answer, Wait)
        assert answer.reason == "reward servers of r: group 0 is not scored"
    clock.now += 101
    assert isinstance(desk.next_manifest(1), Stop)
    with pytest.raises(StallError, match="the learner waited for reward servers of r: group 0 is not scored"):
        desk.outcome().raise_if_failed()


def test_at_the_time_limit_no_manifest_is_cut_and_the_last_version_is_evaluated_before_the_end(store: RunStore, clock: Clock) -> None:
    settings = make_settings(time_limit_s=60.0, eval_prompts=PROMPTS)
    desk = make_coordinator(store, settings, clock)
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    learn(store, desk, 1)
    clock.now += 61
    stop = desk.next_manifest(2)
    assert isinstance(stop, Stop)
    assert "time limit of 60.0 s" in stop.reason
    leases = list(work(store, desk))
    assert {lease.kind for lease in leases} >= {LeaseKind.EVAL}
    assert store.exists(paths.result_path(paths.eval_directory(1, "ema", settings.protocol.digest())))
    assert desk.outcome().kind is EndKind.TIME_LIMIT


def test_evaluations_run_at_the_start_regularly_and_at_the_end(store: RunStore, clock: Clock) -> None:
    settings = make_settings(num_updates=5, every=2, eval_prompts=PROMPTS)
    desk = make_coordinator(store, settings, clock)
    run_to_end(store, desk, num_updates=5)
    found = sorted(name.version for path in store.list("eval") if path.endswith("result.json") and (name := paths.parse_eval(path)))
    assert found == [0, 2, 4, 5]
    assert desk.outcome().kind is EndKind.DONE


def test_an_evaluations_verdict_is_the_mean_of_tag_means_and_says_what_it_rests_on(store: RunStore, clock: Clock) -> None:
    rewards = (RewardSpec(name="r"), RewardSpec(name="only_b", use="watch", tags=("b",)))
    settings = make_settings(eval_prompts=PROMPTS, rewards=rewards)
    desk = make_coordinator(store, settings, clock)
    publish(store, desk, 0)
    while not store.exists(path := paths.result_path(paths.eval_directory(0, "ema", settings.protocol.digest()))):
        lease = desk.ask_rollout("rollout.0")
        if isinstance(lease, RolloutLease):
            roll_out(store, desk, lease)
        for reward in ("r", "only_b"):
            for scoring in ask_scores(desk, reward):
                score(store, desk, scoring, num_null=1 if scoring.kind is LeaseKind.EVAL else 0)
    result = json.loads(store.read(path))
    # tags by prompt: a b | a b | a; image 0 of each sheet of two is null, image 1 scores 1/8; so tag a has 3 nulls, tag b 2 scores
    assert result["rewards"]["r"] == {"mean": 0.125, "tasks": {"a": {"mean": None, "n": 0}, "b": {"mean": 0.125, "n": 2}}, "coverage": 0.4}
    assert result["rewards"]["only_b"] == {"mean": 0.125, "tasks": {"b": {"mean": 0.125, "n": 2}}, "coverage": 1.0}
    places = [(row["sheet"], row["row"], row["tag"]) for row in result["rows"]]
    assert places == [(0, 0, "a"), (0, 1, "b"), (1, 0, "a"), (1, 1, "b"), (2, 0, "a")]
    assert result["rows"][1]["scores"] == {"r": 0.125, "only_b": 0.125}
    assert result["version"] == 0
    assert result["protocol"]["num_prompts"] == 5


def test_an_evaluation_survives_a_restart_and_keeps_its_sheets_and_scores(store: RunStore, clock: Clock) -> None:
    settings = make_settings(eval_prompts=PROMPTS)
    desk = make_coordinator(store, settings, clock)
    publish(store, desk, 0)
    made = 0
    incarnation = 1
    for lease in work(store, desk):
        made += lease.kind is LeaseKind.EVAL
        if made == 4:
            break
    incarnation += 1
    desk = restart(store, settings, clock, incarnation)
    made += sum(lease.kind is LeaseKind.EVAL for lease in work(store, desk))
    assert made == 3 + 3  # three sheets, each drawn once and scored once
    assert store.exists(paths.result_path(paths.eval_directory(0, "ema", settings.protocol.digest())))


def test_while_evaluations_wait_at_least_one_lease_in_eight_is_theirs(clock: Clock) -> None:
    store = RunStore("memory://share")
    desk = make_coordinator(store, make_settings(num_updates=30, max_staleness=20, eval_prompts=PROMPTS), clock)
    publish(store, desk, 0)
    kinds = [ask(desk).kind for _ in range(24)]
    assert [index for index, kind in enumerate(kinds) if kind is LeaseKind.EVAL] == [7, 15, 23]


def test_the_protocol_digest_depends_on_what_numbers_depend_on_only() -> None:
    protocol = make_settings(eval_prompts=PROMPTS).protocol

    def digest(**changes: Any) -> str:
        config = protocol.config.model_copy(update=changes)
        return EvalProtocol(config=config, prompts=protocol.prompts, rewards=protocol.rewards).digest()

    assert digest(every=7, at_start=False) == protocol.digest()
    assert len({digest(), digest(seed=1), digest(num_steps=3), digest(guidance_scale=2.0), digest(snapshot="live")}) == 5
    assert EvalProtocol(config=protocol.config, prompts=PROMPTS[:4], rewards=protocol.rewards).digest() != protocol.digest()


def test_evaluation_prompts_are_the_first_evenly_over_tags() -> None:
    prompts = [Prompt(id=str(index), text="x", metadata={"tag": tag}) for index, tag in enumerate("aaaaabbc")]
    assert [prompt.id for prompt in select_prompts(prompts, 5)] == ["0", "1", "5", "6", "7"]
    assert [prompt.id for prompt in select_prompts(prompts, 7)] == ["0", "1", "2", "3", "5", "6", "7"]
    assert select_prompts(prompts, None) == tuple(prompts)


def test_old_adapters_leave_but_the_newest_checkpointed_leased_and_evaluated_ones_stay(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(num_updates=8, eval_prompts=PROMPTS), clock)
    publish(store, desk, 0)
    for update in range(1, 7):
        while not isinstance(desk.next_manifest(update), Manifest):
            lease = desk.ask_rollout("rollout.0")
            if isinstance(lease, RolloutLease) and lease.kind is LeaseKind.TRAIN:
                roll_out(store, desk, lease)
            for scoring in ask_scores(desk, "r"):
                score(store, desk, scoring)
        if update == 2:
            store.create_exclusive(paths.learner_complete_path(2), b"{}", writer_id="learner")
        publish(store, desk, update)
        desk.finish_update(update, {})
    kept = sorted(paths.parse_adapter(path)[1] for path in store.list("policy"))  # type: ignore[index]
    assert kept == [0, 2, 4, 5, 6]  # 0: its evaluation is not done; 2: checkpointed; S + 2 = 3 newest


def test_at_the_cap_the_oldest_consumed_groups_leave_and_unbatched_ones_never(store: RunStore, clock: Clock) -> None:
    settings = make_settings(num_updates=4)
    object.__setattr__(settings, "store", StoreConfig.model_construct(max_bytes=1, updates_kept=None))
    desk = make_coordinator(store, settings, clock)
    publish(store, desk, 0)
    for update in (1, 2):
        for _ in work(store, desk):
            pass
        learn(store, desk, update)
    for _ in work(store, desk):
        pass
    numbers = {name.number for path in store.list("groups") if (name := paths.parse_group(path) or paths.parse_media(path))}
    assert numbers == {4, 5, 6, 7}
    status = read_status(store)
    assert status is not None
    assert status.retired_through == 2


def claim(store: RunStore, wall: Clock, *, takeover: bool = False, meanwhile: Any = None) -> tuple[int, list[str]]:
    """Drive claim_run; return the incarnation and what it waited for."""
    waits: list[str] = []
    steps = claim_run(store, {"a": 1}, config_digest="c0", environment=b"{}", takeover=takeover, clock=wall, wall=wall)
    while True:
        try:
            wait = next(steps)
        except StopIteration as end:
            return end.value.incarnation, waits
        waits.append(wait.reason)
        wall.now += wait.seconds
        if meanwhile:
            meanwhile()


def test_incarnations_are_claimed_one_after_another(store: RunStore, clock: Clock) -> None:
    assert claim(store, clock) == (1, [])
    assert claim(store, clock) == (2, [])
    assert store.list() == ["config.i0001.json", "config.i0002.json", "environment.i0001.json", "environment.i0002.json"]


def test_a_start_beside_a_live_run_is_refused_beside_a_dead_one_waits_and_takeover_does_neither(
    store: RunStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node1")
    assert claim(store, clock)[0] == 1
    desk = make_coordinator(store, make_settings(), clock, wall=clock)
    desk.tick()
    monkeypatch.setattr("socket.gethostname", lambda: "node2")
    incarnation, waits = claim(store, clock)
    assert (incarnation, len(waits)) == (2, 30)
    assert "was in use 0 s ago; waiting up to 60 s" in waits[0]
    desk = make_coordinator(store, make_settings(), clock, incarnation=2, wall=clock)
    desk.tick()
    with pytest.raises(Fenced, match=r"is run by another job .*--takeover"):
        claim(store, clock, meanwhile=desk.tick)
    assert claim(store, clock, takeover=True) == (3, [])


def test_a_start_after_a_clean_end_does_not_wait(store: RunStore, clock: Clock) -> None:
    assert claim(store, clock) == (1, [])
    desk = make_coordinator(store, make_settings(), clock, wall=clock)
    desk.tick()
    desk.close("interrupted")
    assert claim(store, clock) == (2, [])


def test_metrics_carry_the_ledgers_counts_and_what_components_bring(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    roll_out(store, desk, ask(desk))
    desk.beat("rollout.0", [], {"images_total": 4.0})
    desk.tick()
    value = desk.metrics.registry.get_sample_value
    assert value("flowfleet_groups", {"run": "test", "state": "generated"}) == 1
    assert value("flowfleet_groups_issued_total", {"run": "test"}) == 1
    assert value("flowfleet_rollout_images_total", {"run": "test", "slot": "rollout.0"}) == 4
    assert value("flowfleet_policy_version", {"run": "test"}) == 0


def test_waiting_shares_name_who_waits(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    for _ in range(100):
        for answer in (desk.next_manifest(1), desk.ask_rollout("rollout.0")):
            assert isinstance(answer, Wait)
        clock.now += answer.seconds
    shares = desk.summary()["waiting"]
    assert shares["learner"] == pytest.approx(1.0)
    assert shares["rollout"] == pytest.approx(1.0)


def test_a_group_of_a_lease_that_expired_is_still_taken(store: RunStore, clock: Clock) -> None:
    desk = make_coordinator(store, make_settings(), clock)
    publish(store, desk, 0)
    late = ask(desk)
    clock.now += 31
    again = ask(desk, "rollout.1")
    assert again.number == late.number
    group = make_group(late.number, late.lease_id, digest=late.publication.adapter.digest, prompt=late.prompts[0])
    desk.commit_rollout(late.lease_id, write_group(store, group, make_media()), 40.0)
    assert desk.summary()["counts"]["generated"] == 1
    roll_out(store, desk, again)
    assert desk.summary()["counts"]["generated"] == 1
