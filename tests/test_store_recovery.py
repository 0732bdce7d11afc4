"""A Coordinator that starts over what an earlier one left: whose images stand, which evaluations are still owed."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import StoreError
from common.policy.adapters import read_publication
from common.store import paths
from common.store.audit import audit
from common.store.config import StoreConfig
from common.store.coordinator import Coordinator
from common.store.coordinator_settings import CoordinatorSettings
from common.store.directive import Directive
from common.store.ending import EndKind
from common.store.manifests import Claim, encode_record, read_manifest, read_status
from common.store.prompts_order import PromptOrder
from common.store.run_store import RunStore
from common.types import LeaseKind, Manifest, RolloutLease, Stop
from tests.log_lines import heard
from tests.store_fixtures import PROMPTS, Clock, learn, make_settings, publish, roll_out, work, write_state

CONFIG = {"schedule": {"max_staleness": 1}, "learner": {"groups_per_update": 2}}


def start(
    store: RunStore, clock: Clock, incarnation: int, *, settings: CoordinatorSettings | None = None, order_seed: int = 3
) -> Coordinator:
    """The next start of the run, whose prompts come in the order of a seed."""
    claim = Claim(incarnation=incarnation, writer_id="w", started_at="", config_digest="c0", config=CONFIG)
    store.create_exclusive(paths.config_path(incarnation), encode_record(claim), writer_id="w")
    return Coordinator(
        store, settings or make_settings(), incarnation=incarnation, prompt_for=PromptOrder(PROMPTS, order_seed), clock=clock,
        read_publication=lambda path: read_publication(store.read(path), path),
    )  # fmt: skip


def one_group(store: RunStore, desk: Coordinator) -> RolloutLease:
    """Publish version 0 and draw group 0; nobody scores it."""
    publish(store, desk, 0)
    lease = desk.ask_rollout("rollout.0")
    assert isinstance(lease, RolloutLease)
    roll_out(store, desk, lease)
    return lease


# ---- images and prompts


def test_images_of_another_prompt_are_never_scored_against_the_numbers_new_one(tmp_path: Path) -> None:
    store, clock = RunStore(str(tmp_path)), Clock()
    drawn = one_group(store, start(store, clock, 1))
    assert PromptOrder(PROMPTS, 5)(0) != drawn.prompts[0]  # what the next start wants instead
    with heard() as lines:
        desk = start(store, clock, 2, order_seed=5)
    assert f"{paths.group_path(0, drawn.lease_id)} was drawn for prompt" in lines.text
    assert not isinstance(desk.ask_scoring("reward.r.0", "r", 9), tuple)
    pairs = {}  # what is scored: images of which prompt, against which
    for lease in work(store, desk):
        if isinstance(lease, RolloutLease):
            pairs[lease.lease_id] = lease.prompts[0].text
        else:
            assert pairs[lease.group_lease_id] == lease.prompts[0].text == PromptOrder(PROMPTS, 5)(lease.number).text
    manifest = learn(store, desk, 1, incarnation=2)
    assert [group.number for group in manifest.groups] == [0, 1]
    assert drawn.lease_id not in manifest.groups[0].path
    assert audit(store).violations == ()  # manifest and group file name the same prompt


def test_images_of_the_same_prompt_are_kept(tmp_path: Path) -> None:
    store, clock = RunStore(str(tmp_path)), Clock()
    drawn = one_group(store, start(store, clock, 1))
    with heard() as lines:
        desk = start(store, clock, 2)
    assert "was drawn for" not in lines.text
    leases = desk.ask_scoring("reward.r.0", "r", 9)
    assert isinstance(leases, tuple)
    assert [(lease.number, lease.group_lease_id, lease.prompts) for lease in leases] == [(0, drawn.lease_id, 4 * drawn.prompts)]


# ---- the last evaluation


def evaluated(store: RunStore) -> list[int]:
    """Versions that have a result."""
    found = (paths.parse_eval(path) for path in store.list("eval") if path.endswith("result.json"))
    return sorted(name.version for name in found if name is not None)


def until_the_time_limit(store: RunStore, clock: Clock) -> tuple[Coordinator, CoordinatorSettings]:
    """One update, the base's evaluation and no other; the limit has passed."""
    settings = make_settings(time_limit_s=60.0, eval_prompts=PROMPTS)
    desk = start(store, clock, 1, settings=settings)
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    learn(store, desk, 1)
    for _ in work(store, desk):
        pass
    assert evaluated(store) == [0]
    clock.now += 61.0
    return desk, settings


def finish(store: RunStore, desk: Coordinator) -> EndKind:
    """Let workers and servers do what is left, and the driver tick."""
    desk.tick(Directive(learner_left=True))
    for _ in work(store, desk):
        desk.tick(Directive(learner_left=True))
    return desk.tick(Directive(learner_left=True)).kind


def test_a_coordinator_that_restarts_after_the_learner_left_still_evaluates_the_last_version(tmp_path: Path) -> None:
    store, clock = RunStore(str(tmp_path)), Clock()
    desk, settings = until_the_time_limit(store, clock)
    assert isinstance(desk.next_manifest(2), Stop)  # the learner saves its state and leaves
    desk = start(store, clock, 2, settings=settings)
    assert finish(store, desk) is EndKind.TIME_LIMIT
    assert evaluated(store) == [0, 1]


def test_a_tick_between_the_learners_stop_and_its_request_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = RunStore(str(tmp_path)), Clock()
    desk, _ = until_the_time_limit(store, clock)
    request = desk._state.request_evaluations

    def late() -> None:
        desk.outcome()  # the driver's, while the learner's call holds no lock
        request()

    monkeypatch.setattr(desk._state, "request_evaluations", late)
    assert isinstance(desk.next_manifest(2), Stop)
    assert desk.outcome().kind is EndKind.RUNNING
    assert finish(store, desk) is EndKind.TIME_LIMIT
    assert evaluated(store) == [0, 1]


class Refusal:
    """A store that refuses whatever touches a folder, while it is told to."""

    def __init__(self) -> None:
        self.folder = ""
        self.seen: list[tuple[str, str]] = []

    def __call__(self, stage: str, path: str) -> None:
        self.seen.append((stage, path))
        if self.folder and path.startswith(self.folder):
            raise OSError(5, "Input/output error")


def test_a_store_that_refuses_at_the_last_publication_delays_its_evaluation_and_loses_it_not(tmp_path: Path) -> None:
    refusal, clock = Refusal(), Clock()
    store = RunStore(str(tmp_path), hook=refusal)
    settings = make_settings(num_updates=1, eval_prompts=PROMPTS)
    desk = start(store, clock, 1, settings=settings)
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    refusal.folder = "eval"
    learn(store, desk, 1)  # durable, so the learner is not to end for it
    assert desk.tick().kind is EndKind.RUNNING
    refusal.folder = ""
    assert finish(store, desk) is EndKind.DONE
    assert evaluated(store) == [0, 1]


def test_an_evaluation_whose_sheets_cannot_be_listed_is_begun_later_with_all_of_them(tmp_path: Path) -> None:
    refusal, clock = Refusal(), Clock()
    store = RunStore(str(tmp_path), hook=refusal)
    settings = make_settings(num_updates=1, eval_prompts=PROMPTS)
    desk = start(store, clock, 1, settings=settings)
    publish(store, desk, 0)
    drawn = next(lease for lease in work(store, desk) if isinstance(lease, RolloutLease) and lease.kind is LeaseKind.EVAL)
    again = start(store, clock, 2, settings=settings)
    again._board.close(drawn.directory)  # as before the look that is refused
    refusal.folder = "eval"
    with pytest.raises(StoreError, match="Input/output error"):
        again._state.request_evaluations()
    assert again._board.pending() == []
    refusal.folder = ""
    again.tick()
    sheets = {lease.number for lease in work(store, again) if isinstance(lease, RolloutLease) and lease.kind is LeaseKind.EVAL}
    assert sheets == {0, 1, 2} - {drawn.number}


def test_a_publication_that_no_evaluation_is_due_for_asks_no_file_about_one(tmp_path: Path) -> None:
    refusal, clock = Refusal(), Clock()
    store = RunStore(str(tmp_path), hook=refusal)
    desk = start(store, clock, 1, settings=make_settings(eval_prompts=PROMPTS))
    publish(store, desk, 0)
    for _ in work(store, desk):
        pass
    refusal.seen.clear()
    learn(store, desk, 1)
    desk.tick()
    assert [(stage, path) for stage, path in refusal.seen if path.startswith("eval/v000001")] == []


def test_a_finished_run_that_is_started_again_evaluates_nothing_twice(tmp_path: Path) -> None:
    store, clock = RunStore(str(tmp_path)), Clock()
    desk, settings = until_the_time_limit(store, clock)
    assert isinstance(desk.next_manifest(2), Stop)
    assert finish(store, desk) is EndKind.TIME_LIMIT
    desk = start(store, clock, 2, settings=settings)
    clock.now += 61.0
    before = store.list("eval")
    assert isinstance(desk.next_manifest(2), Stop)
    assert finish(store, desk) is EndKind.TIME_LIMIT
    assert store.list("eval") == before


# ---- what the store refuses after a durable update


@pytest.mark.parametrize("folder", ["policy", "learner", "status.json"])
def test_a_refusal_after_a_durable_update_costs_the_learner_nothing_and_is_made_up_for(folder: str, tmp_path: Path) -> None:
    refusal, clock = Refusal(), Clock()
    store = RunStore(str(tmp_path), hook=refusal)
    desk = start(store, clock, 1, settings=replace(make_settings(num_updates=4), store=StoreConfig(updates_kept=1)))
    publish(store, desk, 0)
    for update in (1, 2):
        for _ in work(store, desk):
            pass
        assert isinstance(desk.next_manifest(update), Manifest)
        write_state(store, update)
        publish(store, desk, update)
        refusal.folder = folder if update == 2 else ""
        desk.finish_update(update, {})  # the second retires the groups of update 1, were it not refused
    assert "Input/output error" in desk.summary()["store_trouble"]
    old = [group.path for group in read_manifest(store, 1).groups]
    assert [store.exists(path) for path in old] == [True, True]  # nothing goes that was not announced
    refusal.folder = ""
    desk.finish_update(2, {})
    assert [store.exists(path) for path in old] == [False, False]
    status = read_status(store)
    assert status is not None
    assert status.retired_through == 1
