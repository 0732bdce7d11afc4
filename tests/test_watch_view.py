"""What `flowfleet watch` shows: exact lines at fixed widths, plain lines of what changed, the exit codes, a real run."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from common.errors import StoreError, UserError
from common.store.directive import SlotReport
from common.store.run_store import RunStore
from deploy.commands import watch as commands
from deploy.fakes import parse_fakes
from deploy.options import StartOptions
from deploy.session import run_session
from deploy.watch.files import RunTail
from deploy.watch.plain import PlainLines
from deploy.watch.view import BLOCKS, number, span, sparkline, view
from deploy.watch.watch import watch_once, watch_run
from tests.run_fixtures import QUIET
from tests.simulated_run import small_fake_config
from tests.watch_runs import BEGAN, claim, fleet, put_evaluation, put_status, put_update, rising

APP = typer.Typer()
commands.register(APP)


def tail_of(store: RunStore, age_s: float = 3.0) -> RunTail:
    """A tail whose wall clock is so far behind the last status."""
    return RunTail(store, clock=lambda: 0.0, wall=lambda: BEGAN + age_s)


def shown(store: RunStore, width: int, height: int = 10_000, age_s: float = 3.0) -> list[str]:
    """The screen's lines as a terminal of this size shows them, without their colors."""
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(view(tail_of(store, age_s).look(), width, height))
    lines = [line.rstrip() for line in console.export_text(styles=False).splitlines()]
    assert max(len(line) for line in lines) <= width
    return lines


def busy_run(tmp_path: Path) -> RunStore:
    """Twenty updates of two rewards, two evaluations, drops, workers of which one crashed, an alert."""
    store = RunStore(str(tmp_path))
    claim(store, ("geneval_strict", "clip"))
    for update in range(1, 21):
        drops = {"attempts": 2} if update == 7 else {}
        means = {"geneval_strict": update / 100, "clip": 0.5 - update / 100}
        put_update(store, update, means, wait_s=6.0, drops=drops, coverage=1.0 if update < 20 else 0.75)
    for version, mean in ((0, 0.25), (10, 0.75), (20, 0.5)):
        put_evaluation(store, version, {"geneval_strict": mean})
    ill = SlotReport(state="resting", host="node-c", crashes=3)
    put_status(store, version=20, fleet=fleet(3, rollout__9=ill), alerts=("diversity left its band [0.1, 0.2]",))
    return store


def test_the_screen_says_what_matters_in_a_hundred_columns(tmp_path: Path) -> None:
    """ETA by hand: 10 s an update, 40 updates left. Learner: 6 of 10 s waiting; 4 groups are sampled, 2 wait for scores: rollouts lack."""
    lines = shown(busy_run(tmp_path), 100)
    blocks = "".join(BLOCKS[min(7, 8 * index // 19)] for index in range(20))
    assert lines == [
        "tiny-run · running · incarnation 1 · update 20/60 · version 20 · ETA 6m40s",
        "status.json: 3 s old, by process 4321 on node-a",
        "ALERT diversity left its band [0.1, 0.2]",
        "reward          mean by update           first     last     best",
        f"geneval_strict  {blocks}      0.01    0.200    0.200 at 20 scored 75%",
        f"clip            {blocks[::-1]}     0.490    0.300    0.490 at 1 scored 75%",
        "frozen evaluation of version 20 (ema, protocol 0123abcd)",
        "reward             base  newest  change    best",
        "geneval_strict    0.250   0.500  +0.250   0.750 at v10",
        "who waits: learner waits 60% for rollouts: add rollout workers",
        "groups: 60 issued (48 batched, 2 generated, 4 leased, 6 ready)",
        "staleness in updates, groups of update 20: 3 fresh, 9 stale by 1",
        "dropped before update 7: 2 attempts",
        "worker     state      crashes  host",
        "rollout.9  resting          3  node-c",
        "learner    running          0  node-a",
        "rollout.0  running          0  node-b",
        "rollout.1  running          0  node-b",
        "rollout.2  running          0  node-b",
        "10:00:00 rollout.7 is started",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_width_from_60_to_200_holds_the_same_facts(tmp_path: Path, width: int) -> None:
    text = "\n".join(shown(busy_run(tmp_path), width))
    for words in ("update 20/60", "geneval_strict ", "0.200 at 20", "0.750 at v10", "rollout.9", "node-c", "ALERT diversity", "2 attempts"):
        assert words in text


def test_many_rewards_and_workers_are_cut_and_counted(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    names = [f"reward_{index:02d}" for index in range(12)]
    claim(store, names)
    rising(store, 2, names)
    put_evaluation(store, 0, dict.fromkeys(names, 0.5))
    put_status(store, version=2, fleet=fleet(63, rollout__70=SlotReport(state="starting")))
    lines = shown(store, 80)
    assert lines.count("... and 4 more") == 2  # of 12 rewards, in both tables
    assert "... and 53 more (53 running)" in lines  # 63 workers, the learner and the one that starts; 12 are shown
    assert [line.split()[0] for line in lines if line.startswith(("rollout.", "learner"))][:4] == [
        "rollout.70",
        "learner",
        "rollout.0",
        "rollout.1",
    ]
    small = shown(store, 80, 24)
    assert small.count("... and 10 more") == 2 and "... and 63 more (63 running)" in small
    assert len(small) <= 24


def test_a_long_name_is_cut_and_what_could_steer_the_terminal_is_not_passed_on(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    name = "a_reward_with_a_name_of_forty_letters_12"
    claim(store, (name,))
    rising(store, 2, (name,))
    put_status(store, version=2, alerts=("evil \x1b[2Jtext\x07\nmore",))
    lines = shown(store, 80)
    assert "ALERT evil ?[2Jtext??more" in lines
    assert any(line.startswith("a_reward_with_a_nam…  ") for line in lines)


def test_before_the_first_update_the_screen_says_what_there_is_not(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    assert shown(store, 80) == [
        "tiny-run · starting · incarnation 1 · update 0/60",
        "incarnation 1 was started 2027-01-15T08:00:00Z and has not begun to work yet",
        "rewards: no update has ended yet",
        "frozen evaluation: none is on file yet",
        "who waits: starting",
    ]


def test_a_status_that_nobody_writes_is_a_verdict_and_there_is_no_eta(tmp_path: Path) -> None:
    lines = shown(busy_run(tmp_path), 200, age_s=372.0)
    assert lines[0].endswith("version 20")
    assert lines[1] == (
        "nobody writes status.json any more: it says running and is 6m12s old; look at the job's log, or start the same train command again"
    )


def test_scores_that_are_late_are_told_from_rollouts_that_are(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    for update in (1, 2, 3):
        put_update(store, update, {"ocr": 0.5}, wait_s=5.0)
    put_status(store, version=3, counts={"issued": 20, "leased": 1, "generated": 7})
    assert "who waits: learner waits 50% for scores: add reward servers" in shown(store, 80)
    put_update(store, 4, {"ocr": 0.5}, wait_s=0.0)  # updates 2 to 4 wait 10 of 30 s; the first one of a start does not count
    put_status(store, version=4, sequence=2)
    assert "who waits: learner waits 33% for rollouts: add rollout workers" in shown(store, 80)


def test_a_time_limit_bounds_the_time_left(tmp_path: Path) -> None:
    """Begun at 0 s, update 5 ended at 50 s; 55 updates at 10 s would be 550 s, the limit leaves 70."""
    store = RunStore(str(tmp_path))
    claim(store, time_limit_s=120.0)
    rising(store, 5)
    put_status(store, version=5)
    assert shown(store, 80)[0].endswith("ETA 70 s")


def test_blocks_numbers_and_spans_by_hand() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0], 10) == "▁▂▃█"
    assert sparkline([0.0, 2.0, 6.0, 8.0], 2) == "▁█"  # averaged to 1 and 7
    assert sparkline([3.0, 3.0], 10) == "▄▄" and sparkline([], 10) == ""
    assert [number(value) for value in (0.625, -0.0076, 12834.0, 0.0)] == ["0.625", "-0.0076", "1.28e+04", "0.000"]
    assert [span(value) for value in (42.0, 372.0, 11225.0)] == ["42 s", "6m12s", "3h07m"]


def test_plain_lines_tell_each_change_once(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    plain, tail = PlainLines(), tail_of(store)
    head = "tiny-run · starting · incarnation 1 · update 0/60"
    assert plain.lines(tail.look()) == [head, "incarnation 1 was started 2027-01-15T08:00:00Z and has not begun to work yet"]
    rising(store, 2)
    put_evaluation(store, 0, {"ocr": 0.25})
    put_status(store, version=2)
    tail = tail_of(store)  # its first look lists the evaluations
    assert plain.lines(tail.look()) == [
        "tiny-run · running · incarnation 1 · update 2/60 · version 2 · ETA 9m40s",
        "update 2/60; ocr 0.02; staleness 0.8; learner waited 10%; ETA 9m40s",
        "evaluation of version 0 (ema): ocr 0.250",
    ]
    assert plain.lines(tail.look()) == []
    put_update(store, 3, {"ocr": None}, drops={"scores": 1})
    put_update(store, 4, {"ocr": 0.75})
    put_evaluation(store, 4, {"ocr": 0.5})
    put_status(store, version=4, sequence=2, alerts=("dark",))
    assert plain.lines(tail_of(store).look()) == [
        "update 3/60; nothing was scored; staleness 0.8; learner waited 10%; dropped 1 scores",
        "update 4/60; ocr 0.750; staleness 0.8; learner waited 10%; ETA 9m20s",
        "evaluation of version 4 (ema): ocr 0.500 (base 0.250, +0.250)",
        "ALERT dark",
    ]
    claim(store)
    put_update(store, 4, {"ocr": 0.5}, incarnation=2)
    put_status(store, version=4, sequence=3, incarnation=2)
    assert plain.lines(tail_of(store).look()) == [
        "tiny-run · running · incarnation 2 · update 4/60 · version 4",
        "incarnation 2 went back: it goes on from update 4; what was told from there on is void",
        "update 4/60; ocr 0.500; staleness 0.8; learner waited 10%",
        "alert over: dark",
    ]


class Scripted:
    """A sleep that does the next thing of a story instead; after the last one, Ctrl-C."""

    def __init__(self, *acts: Callable[[], None]) -> None:
        self.acts = list(acts)

    def __call__(self, seconds: float) -> None:
        """Act."""
        if not self.acts:
            raise KeyboardInterrupt
        self.acts.pop(0)()


def test_a_run_is_watched_from_before_its_first_status_to_its_end_without_an_escape_code(tmp_path: Path) -> None:
    store, sink = RunStore(str(tmp_path)), io.StringIO()
    claim(store, num_updates=2)

    def work() -> None:
        rising(store, 2)
        put_status(store, version=2)

    story = Scripted(work, lambda: put_status(store, version=2, sequence=2, state="done", reason="all updates are done"))
    assert watch_run(tail_of(store), Console(file=sink, width=40), 2.0, sleep=story) == 0
    assert sink.getvalue().splitlines() == [
        "tiny-run · starting · incarnation 1 · update 0/2",
        "incarnation 1 was started 2027-01-15T08:00:00Z and has not begun to work yet",
        "tiny-run · running · incarnation 1 · update 2/2 · version 2 · ETA 0 s",
        "update 2/2; ocr 0.02; staleness 0.8; learner waited 10%; ETA 0 s",
        "tiny-run · done · incarnation 1 · update 2/2 · version 2",
    ]
    assert "\x1b" not in sink.getvalue()


def test_a_run_that_stopped_gives_its_reason_and_1_and_ctrl_c_gives_0(tmp_path: Path) -> None:
    store, sink = RunStore(str(tmp_path)), io.StringIO()
    claim(store)
    put_status(store)
    assert watch_run(tail_of(store), Console(file=sink), 2.0, sleep=Scripted()) == 0
    assert sink.getvalue().endswith("left; the run is not touched\n")
    put_status(store, sequence=2, state="stopped", reason="gate drops: too many drops")
    assert watch_run(tail_of(store), Console(file=sink, width=200), 2.0) == 1
    assert "stopped: gate drops: too many drops" in sink.getvalue()


@pytest.mark.parametrize(("written_at", "code"), [(BEGAN + 119.0, 1), (BEGAN + 121.0, 0)])
def test_a_run_whose_time_was_up_went_as_far_as_it_was_meant_to(tmp_path: Path, written_at: float, code: int) -> None:
    store = RunStore(str(tmp_path))
    claim(store, time_limit_s=120.0)
    put_status(store, state="stopped", reason="the time limit has passed", written_at=written_at)
    assert watch_once(tail_of(store), Console(file=io.StringIO())) == code


def test_a_terminal_is_drawn_in_place_and_the_last_picture_stays(tmp_path: Path) -> None:
    store, sink = busy_run(tmp_path), io.StringIO()
    console = Console(file=sink, force_terminal=True, width=100, height=50, color_system="truecolor")
    story = Scripted(lambda: put_status(store, version=20, sequence=2, state="done"))
    assert watch_run(tail_of(store), console, 2.0, sleep=story) == 0
    drawn = sink.getvalue()
    assert "\x1b[1;31mALERT diversity" in drawn  # bold red
    assert "\x1b[1A" in drawn  # the second picture goes over the first
    last = drawn.rpartition("tiny-run · ")[2]
    assert last.startswith("done") and "who waits" in last


def test_a_store_that_is_away_is_told_and_waited_for(tmp_path: Path) -> None:
    store, sink = RunStore(str(tmp_path)), io.StringIO()
    claim(store)
    put_status(store)
    console = Console(file=sink, width=200)

    class Flaky(RunTail):
        tries = 0

        def look(self):  # type: ignore[no-untyped-def]
            self.tries += 1
            if self.tries in (2, 3):
                raise StoreError("no answer")
            return super().look()

    story = Scripted(*[lambda: None] * 3)
    assert watch_run(Flaky(store, clock=lambda: 0.0, wall=lambda: BEGAN), console, 2.0, sleep=story) == 0
    assert sink.getvalue().splitlines()[1:] == [
        "no answer; looking again",
        "the run directory answers again",
        "left; the run is not touched",
    ]


def test_one_look_at_a_folder_without_a_run_is_the_user_s_mistake(tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, ["watch", str(tmp_path), "--once"])
    assert isinstance(result.exception, UserError) and "holds no run" in str(result.exception)


def test_one_look_says_1_of_a_run_that_nobody_drives(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    put_status(store)
    assert watch_once(tail_of(store), Console(file=io.StringIO())) == 0
    assert watch_once(tail_of(store, age_s=61.0), Console(file=io.StringIO())) == 1


def test_a_real_run_is_read_by_one_look(tmp_path: Path) -> None:
    config = small_fake_config("reward.0.num_servers=1", "evaluation.max_prompts=4", "evaluation.every=0", "schedule.num_updates=3")
    run_session(
        config, StartOptions(run_dir=str(tmp_path / "run"), local=True, fakes=parse_fakes("rollout=0s,learner=0s,reward=0s")), QUIET
    )
    result = CliRunner().invoke(APP, ["watch", str(tmp_path / "run"), "--once"], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(f"{config.run.name} · done · incarnation 1 · update 3/3 · version 3")
    assert any(line.startswith("frozen evaluation of version 3 (ema") for line in lines)
    name = config.reward[0].name
    assert any(line.startswith(name) and " at " in line for line in lines)
    assert "\x1b" not in result.output
