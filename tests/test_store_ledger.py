"""The ledger's rules one by one."""

import dataclasses

import pytest

from common.errors import CorruptFile
from common.store.ledger import Ledger
from common.store.ledger_entries import GroupFile, GroupState, LedgerSettings, Listing, RewardSpec, ScoreSummary, Values
from common.types import Drop, Manifest, Prompt

RULES = LedgerSettings(groups_per_update=2, group_size=4, max_staleness=1, num_updates=10, rewards=(RewardSpec(name="r"),))
SPREAD: Values = (0.0, 0.25, 0.5, 1.0)


def prompt_for(number: int) -> Prompt:
    return Prompt(id=f"p{number}", text="x", metadata={"tag": "text" if number % 2 else "shapes"})


def make_ledger(version: int = 0, **changes: object) -> Ledger:
    ledger = Ledger(dataclasses.replace(RULES, **changes), prompt_for)  # type: ignore[arg-type]
    ledger.published(version)
    return ledger


def lease(ledger: Ledger, now: float = 0.0, suffix: str = "") -> int | None:
    return ledger.lease("rollout.0", lambda number: f"L{number}{suffix}", now)


def make(ledger: Ledger, number: int, values: Values | None = SPREAD, *, lease_id: str | None = None, version: int = 0) -> None:
    lease_id = lease_id or f"L{number}"
    path = f"groups/000/g{number:08d}.{lease_id}.group.arrow"
    ledger.generated(GroupFile(number=number, lease_id=lease_id, path=path, version=version, num_bytes=5))
    if values is not None:
        ledger.scored(ScoreSummary(number=number, lease_id=lease_id, reward="r", values=values))


def cut(ledger: Ledger) -> Manifest:
    manifest = ledger.next_manifest(incarnation=1, config_digest="c")
    assert manifest is not None
    ledger.adopt(manifest)
    return manifest


@pytest.mark.parametrize(("staleness", "admitted"), [(0, 2), (1, 4), (2, 6)])
def test_admission_leases_s_plus_one_times_p_groups_and_no_more(staleness: int, admitted: int) -> None:
    ledger = make_ledger(max_staleness=staleness)
    assert [lease(ledger) for _ in range(admitted + 1)] == [*range(admitted), None]


def test_nothing_is_leased_before_the_first_version() -> None:
    ledger = Ledger(RULES, prompt_for)
    assert lease(ledger) is None


def test_with_s_zero_a_cut_batch_still_blocks_until_its_version_is_published() -> None:
    ledger = make_ledger(max_staleness=0)
    for number in (0, 1):
        assert lease(ledger) == number
        make(ledger, number)
    cut(ledger)
    assert lease(ledger) is None
    ledger.published(1)
    assert lease(ledger) == 2


def test_a_returned_number_is_leased_before_any_new_one_even_beyond_the_bound() -> None:
    ledger = make_ledger()
    assert [lease(ledger) for _ in range(4)] == [0, 1, 2, 3]
    ledger.leases.end("L2")
    ledger.leases.end("L1")
    assert [lease(ledger, suffix="again") for _ in range(3)] == [1, 2, None]


def test_a_run_issues_no_number_that_no_update_will_need() -> None:
    ledger = make_ledger(num_updates=1, max_staleness=2)
    assert [lease(ledger) for _ in range(3)] == [0, 1, None]
    ledger.drop_written(Drop(number=1, reason="attempts"))
    assert lease(ledger) == 2


def test_a_silent_lease_expires_after_thirty_seconds_and_a_beaten_one_after_the_group_timeout() -> None:
    ledger = make_ledger()
    lease(ledger, now=0.0)
    ledger.leases.beat(["L0"], 29.0)
    assert ledger.expire(59.0) == 0
    assert ledger.expire(59.1) == 1
    assert ledger.state(0) is GroupState.WAITING
    assert lease(ledger, now=100.0, suffix="b") == 0
    for now in range(100, 710, 10):
        ledger.leases.beat(["L0b"], float(now))
    assert ledger.expire(700.0) == 0
    assert ledger.expire(700.1) == 1


def test_three_failures_drop_a_number_and_returns_are_free() -> None:
    ledger = make_ledger()
    for attempt in range(5):
        assert lease(ledger, suffix=f"r{attempt}") == 0
        ledger.leases.end(f"L0r{attempt}")
    for attempt in range(3):
        assert ledger.decisions().drops == ()
        assert lease(ledger, suffix=f"f{attempt}") == 0
        ledger.fail(f"L0f{attempt}", "out of memory")
    (drop,) = ledger.decisions().drops
    assert drop == Drop(number=0, reason="attempts", detail="out of memory")
    assert ledger.state(0) is GroupState.WAITING, "a number leaves the sum only when its drop file is written"
    assert lease(ledger) == 1
    ledger.drop_written(drop)
    assert ledger.state(0) is GroupState.DROPPED
    assert ledger.counts()["issued"] == 2


def test_the_lowest_numbers_are_batched_in_order_however_late_the_lowest_is() -> None:
    ledger = make_ledger()
    for number in (1, 2, 3):
        lease(ledger)
        make(ledger, number)
    assert ledger.next_manifest(incarnation=1, config_digest="c") is None
    assert ledger.holding_up() == (0, GroupState.LEASED)
    make(ledger, 0)
    assert [group.number for group in cut(ledger).groups] == [0, 1]
    assert [group.number for group in cut(ledger).groups] == [2, 3]


@pytest.mark.parametrize(("num_null", "ready"), [(0, True), (1, True), (2, False)])
def test_a_group_is_ready_with_three_quarters_of_its_samples_scored_and_dropped_below(num_null: int, ready: bool) -> None:
    ledger = make_ledger()
    make(ledger, 0, (*[None] * num_null, *SPREAD[num_null:]))
    assert (ledger.state(0) is GroupState.READY) == ready
    assert [drop.reason for drop in ledger.decisions().drops] == ([] if ready else ["too_few_scores"])


def test_samples_count_as_scored_only_when_every_applicable_train_reward_scored_them() -> None:
    ledger = make_ledger(rewards=(RewardSpec(name="r"), RewardSpec(name="q")))
    make(ledger, 0, (None, 1.0, 1.0, 0.0))
    assert ledger.state(0) is GroupState.GENERATED
    ledger.scored(ScoreSummary(number=0, lease_id="L0", reward="q", values=(1.0, None, 1.0, 0.0)))
    (drop,) = ledger.decisions().drops
    assert drop.reason == "too_few_scores"
    assert drop.detail.startswith("2 of 4 samples scored, 3 needed")


def test_a_reward_judges_only_its_tags_and_is_absent_elsewhere() -> None:
    ledger = make_ledger(rewards=(RewardSpec(name="r"), RewardSpec(name="ocr", tags=("text",))))
    for number in (0, 1):
        make(ledger, number)
    assert [key.number for key in ledger.wanted_scores("ocr")] == [1]
    assert ledger.state(0) is GroupState.READY
    ledger.scored(ScoreSummary(number=1, lease_id="L1", reward="ocr", values=SPREAD))
    manifest = cut(ledger)
    assert [sorted(group.scores) for group in manifest.groups] == [["r"], ["ocr", "r"]]


def test_a_watch_reward_never_blocks_and_is_recorded_when_it_was_in_time() -> None:
    ledger = make_ledger(rewards=(RewardSpec(name="r"), RewardSpec(name="w", use="watch")))
    for number in (0, 1):
        make(ledger, number)
    assert [key.number for key in ledger.wanted_scores("w")] == [0, 1]
    ledger.scored(ScoreSummary(number=1, lease_id="L1", reward="w", values=(None, None, None, 0.5)))
    manifest = cut(ledger)
    assert [sorted(group.scores) for group in manifest.groups] == [["r"], ["r", "w"]]
    assert manifest.groups[1].kept == (True, True, True, True)


def test_after_three_failures_of_a_reward_nulls_are_called_for_and_the_poison_image_blocks_nothing() -> None:
    ledger = make_ledger()
    make(ledger, 0, None)
    ids = iter("abcdef")
    for _ in range(3):
        (granted,) = ledger.lease_scores("r", 4, slot="s", now=0.0, new_id=lambda: next(ids))
        assert ledger.lease_scores("r", 4, slot="t", now=0.0, new_id=lambda: next(ids)) == []
        ledger.scoring.fail(granted.lease_id, "decoder crashed")
    assert ledger.lease_scores("r", 4, slot="s", now=0.0, new_id=lambda: next(ids)) == []
    (null,) = ledger.decisions().nulls
    assert null.key.number == 0
    assert null.error == "attempts: 3 failed, last: decoder crashed"
    ledger.scored(ScoreSummary(number=0, lease_id="L0", reward="r", values=(None,) * 4))
    assert [drop.reason for drop in ledger.decisions().drops] == ["too_few_scores"]


@pytest.mark.parametrize("replace", [False, True])
def test_flat_groups_stay_unless_the_config_replaces_them(replace: bool) -> None:
    ledger = make_ledger(replace_flat_groups=replace)
    make(ledger, 0, (0.5, 0.5 + 5e-9, None, 0.5))
    make(ledger, 1, (0.5, 0.5 + 2e-8, 0.5, 0.5))
    assert [(drop.number, drop.reason) for drop in ledger.decisions().drops] == ([(0, "flat")] if replace else [])
    assert (ledger.next_manifest(incarnation=1, config_digest="c") is None) == replace


def test_more_than_half_of_the_last_two_p_dropped_stops_the_run_and_flat_or_stale_drops_do_not_count() -> None:
    ledger = make_ledger()
    for number, reason in enumerate(["flat", "stale", "flat", "stale", "attempts", "too_few_scores"]):
        ledger.drop_written(Drop(number=number, reason=reason))
    assert ledger.unhealthy() is None
    ledger.drop_written(Drop(number=6, reason="too_few_scores", detail="0 of 4"))
    cause = ledger.unhealthy()
    assert cause is not None
    assert cause.startswith("3 of the last 4 groups were dropped (2 too_few_scores, 1 attempts)")
    for number in (7, 8):
        make(ledger, number)
    assert ledger.unhealthy() is None, "only the last 2P count"


def test_drops_of_an_earlier_life_do_not_stop_a_resumed_run() -> None:
    drops = tuple(Drop(number=number, reason="attempts") for number in range(4))
    assert Ledger.rebuild(Listing(drops=drops), RULES, prompt_for).unhealthy() is None


def test_of_rival_files_the_most_scored_wins_then_the_newest_version_then_the_smallest_id() -> None:
    ledger = make_ledger()
    make(ledger, 0, None, lease_id="z")
    make(ledger, 0, None, lease_id="b", version=1)
    assert ledger.wanted_scores("r")[0].lease_id == "b"
    make(ledger, 0, None, lease_id="a", version=1)
    assert ledger.wanted_scores("r")[0].lease_id == "a"
    ledger.scored(ScoreSummary(number=0, lease_id="z", reward="r", values=SPREAD))
    make(ledger, 1)
    assert [group.path.split(".")[1] for group in cut(ledger).groups] == ["z", "L1"]


def test_when_s_shrinks_at_a_resume_groups_that_would_be_too_old_are_dropped_as_stale_first() -> None:
    ledger = make_ledger(max_staleness=2)
    for number in range(6):
        lease(ledger)
        make(ledger, number)
    groups = tuple(GroupFile(number=number, lease_id=f"L{number}", path="p", version=0, num_bytes=1) for number in range(6))
    scores = tuple(ScoreSummary(number=number, lease_id=f"L{number}", reward="r", values=SPREAD) for number in range(6))
    listing = Listing(groups=groups, scores=scores, newest_version=0)
    shrunk = Ledger.rebuild(listing, dataclasses.replace(RULES, max_staleness=0), prompt_for)
    assert [(drop.number, drop.reason) for drop in shrunk.decisions().drops] == [(number, "stale") for number in (2, 3, 4, 5)]
    assert Ledger.rebuild(listing, dataclasses.replace(RULES, max_staleness=2), prompt_for).decisions().drops == ()


def test_an_adopted_manifest_overrides_memory_and_drop_files() -> None:
    ledger = make_ledger()
    for number in (0, 1):
        make(ledger, number)
    theirs = ledger.next_manifest(incarnation=2, config_digest="c")
    assert theirs is not None
    ledger.drop_written(Drop(number=0, reason="attempts"))
    ledger.adopt(theirs)
    assert ledger.state(0) is GroupState.BATCHED
    assert ledger.counts()["dropped"] == 0
    ledger.adopt(theirs)
    assert ledger.last_update == 1, "adopting again changes nothing"


def test_drops_are_copied_into_the_next_manifest_once() -> None:
    ledger = make_ledger()
    drop = Drop(number=1, reason="too_few_scores")
    ledger.drop_written(drop)
    for number in (0, 2, 3, 4):
        make(ledger, number)
    assert cut(ledger).drops == (drop,)
    assert cut(ledger).drops == ()


def test_contradicting_manifests_are_refused_by_name() -> None:
    ledger = make_ledger()
    for number in range(4):
        make(ledger, number)
    first = cut(ledger)
    with pytest.raises(CorruptFile, match="manifest 3 follows 1; manifests are contiguous"):
        ledger.adopt(dataclasses.replace(first, update=3))
    with pytest.raises(CorruptFile, match="manifest 2 holds group 0, which update 1 consumed"):
        ledger.adopt(dataclasses.replace(first, update=2))


def test_scores_of_another_length_than_k_are_refused_by_name() -> None:
    with pytest.raises(CorruptFile, match=r"scores of group 0 by r hold 3 values; the rule is K = 4"):
        make(make_ledger(), 0, SPREAD[:3])


def test_a_worker_that_outlived_a_restart_gets_its_number_back() -> None:
    ledger = Ledger.rebuild(Listing(newest_version=0), RULES, prompt_for)
    assert ledger.readopt(1, "L1", "rollout.0", 0.0)
    assert not ledger.readopt(1, "other", "rollout.1", 0.0)
    assert [lease(ledger), lease(ledger)] == [0, 2]
    assert ledger.state(1) is GroupState.LEASED
