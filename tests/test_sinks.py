"""TensorBoard and Weights & Biases: what they get equals the run's files, once; and whatever a sink does, the run does not notice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import typer
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from common.config import config_digest
from common.errors import ConfigError, GateError, UserError
from common.store import paths
from common.store.claim import claim_run
from common.store.ending import EndKind, Outcome
from common.store.manifests import read_claim
from common.store.run_store import RunStore
from deploy import session
from deploy.commands import watch as commands
from deploy.compose import compose
from deploy.fakes import parse_fakes
from deploy.gates import check_fake_config
from deploy.local_run import run_local
from deploy.options import StartOptions
from deploy.redact import MARK
from deploy.signals import HANDLED, StopSignals
from deploy.sinks.follow import open_follower
from deploy.sinks.packages import load
from deploy.sinks.settings import SinksSection, TensorboardSettings, WandbSettings
from deploy.sinks.starter import GRACE_S, TAIL_BYTES, WORDS, FollowerProcess, following, last_words, redacted
from tests.log_lines import heard
from tests.run_fixtures import history_digests, manifest_facts, published_digests
from tests.simulated_run import small_fake_config
from tests.watch_runs import claim, put_evaluation, put_status, put_update, rising

PATIENCE_S = 240.0
QUICK = parse_fakes("rollout=0s,learner=0s,reward=0s")
APP = typer.Typer()
commands.register(APP)
Series = dict[str, list[tuple[int, float]]]

FAKE_WANDB = '''
"""Stands for wandb: writes down what it is told, or misbehaves."""
import json, os, time

MODE, FILE = os.environ["FAKE_WANDB"], os.environ["FAKE_WANDB_FILE"]

def tell(*what):
    with open(FILE, "a") as file:
        file.write(json.dumps(what) + "\\n")

tell("import", os.getpid())
if MODE == "missing":
    raise ModuleNotFoundError("No module named 'wandb'")

class Settings:
    def __init__(self, **given): self.given = given

class Run:
    def define_metric(self, *names, **given): pass
    def log(self, scalars):
        tell("log", scalars)
        if MODE == "raise": raise ValueError(f"refused, says the key {os.environ.get('WANDB_API_KEY')}")
    def finish(self): tell("finish")

def init(*, settings, config, **given):
    tell("init", given, config["run"]["name"])
    if MODE == "hang": time.sleep(10000)
    return Run()
'''


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a fake wandb before all others on the path of new processes; returns the file in which it writes."""

    def install(mode: str) -> Path:
        package = tmp_path / "packages" / "wandb"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(FAKE_WANDB)
        file = tmp_path / "wandb.jsonl"
        file.touch()
        for name, value in (("PYTHONPATH", str(package.parent)), ("FAKE_WANDB", mode), ("FAKE_WANDB_FILE", str(file))):
            monkeypatch.setenv(name, value)
        return file

    return install


def told(file: Path, what: str) -> list[list[Any]]:
    """What the fake wandb wrote of a kind."""
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [entry[1:] for entry in entries if entry[0] == what]


def wait_until(holds: Callable[[], Any], what: str) -> None:
    """Wait for a condition. Raises AssertionError that names it."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.05)


def scalars_in(directory: Path) -> Series:
    """Tag -> (step, value), as TensorBoard itself reads its files."""
    board = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def send(store: RunStore, sink: str = "tensorboard", section: SinksSection | None = None) -> None:
    """One follower's life: open, send what is new, close."""
    follower = open_follower(store, sink, section or SinksSection())
    follower.step()
    follower.close()


def singles(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """As TensorBoard keeps numbers: in single precision."""
    return [(step, float(np.float32(value))) for step, value in values]


# ---- TensorBoard


def test_tensorboard_reads_back_what_the_metrics_files_say(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store, ("ocr", "clip"))
    put_update(store, 1, {"ocr": 0.1, "clip": None}, drops={"attempts": 2})
    put_update(store, 2, {"ocr": 0.3, "clip": 0.7})
    put_evaluation(store, 0, {"ocr": 0.25})
    put_evaluation(store, 2, {"ocr": 0.6})
    put_evaluation(store, 3, {"ocr": 0.9})  # its update is not recorded yet
    send(store)
    found = scalars_in(tmp_path / "reports" / "tensorboard")
    records = [json.loads(store.read(paths.metrics_path(update, 1))) for update in (1, 2)]
    for reward, key in (("ocr", "mean"), ("ocr", "std_in_group"), ("ocr", "coverage"), ("ocr", "flat_share"), ("clip", "mean")):
        values = [(r["update"], r["rewards"][reward][key]) for r in records if r["rewards"][reward][key] is not None]
        assert found[f"reward/{reward}/{key}"] == singles(values), key
    for area, part in (("learner", "learner"), ("seconds", "seconds"), ("images", "image_statistics")):
        for name in records[0][part]:
            values = [(r["update"], r[part][name]) for r in records if r[part][name] is not None]
            assert found.get(f"{area}/{name}", []) == singles(values), name
    assert found["drops/attempts"] == [(1, 2.0)]
    assert found["pipeline/flat_group_share"] == [(1, 0.125), (2, 0.125)]
    assert found["pipeline/staleness"] == [(1, 0.75), (2, 0.75)]  # 9 of 12 groups are stale by 1
    assert found["evaluation/ocr/all"] == found["evaluation/ocr/hard"] == singles([(0, 0.25), (2, 0.6)])
    assert "images/fft_grid_peak" not in found  # null is no number


def test_a_later_follower_sends_only_what_is_new(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    rising(store, 3)
    put_evaluation(store, 0, {"ocr": 0.25})
    send(store)
    rising(store, 5, first=4)
    put_evaluation(store, 3, {"ocr": 0.5})
    send(store)
    send(store)
    found = scalars_in(tmp_path / "reports" / "tensorboard")
    assert found["reward/ocr/mean"] == singles([(update, update / 100) for update in range(1, 6)])
    assert found["evaluation/ocr/all"] == [(0, 0.25), (3, 0.5)]


def test_a_rewind_voids_what_was_sent_from_its_first_update_on(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    claim(store)
    rising(store, 5)
    for version in (0, 2, 4):
        put_evaluation(store, version, {"ocr": version / 10})
    send(store)
    claim(store)
    put_update(store, 4, {"ocr": 0.9}, incarnation=2)
    send(store)
    found = scalars_in(tmp_path / "reports" / "tensorboard")
    assert found["reward/ocr/mean"] == singles([(1, 0.01), (2, 0.02), (3, 0.03), (4, 0.9)])
    assert found["evaluation/ocr/all"] == singles([(0, 0.0), (2, 0.2), (4, 0.4)])
    put_update(store, 5, {"ocr": 0.8}, incarnation=2)
    send(store)
    assert scalars_in(tmp_path / "reports" / "tensorboard")["reward/ocr/mean"][3:] == singles([(4, 0.9), (5, 0.8)])


def test_updates_that_a_dying_follower_sent_without_noting_it_count_once(tmp_path: Path) -> None:
    store, shared = RunStore(str(tmp_path)), tmp_path / "board"
    section = SinksSection(tensorboard=TensorboardSettings(directory=str(shared)))
    claim(store)
    board = shared / f"tiny-run-{read_claim(store, 1).writer_id}"
    rising(store, 2)
    send(store, section=section)
    noted = (board / "flowfleet_sent.json").read_bytes()
    rising(store, 4, first=3)
    send(store, section=section)
    (board / "flowfleet_sent.json").write_bytes(noted)  # as if it had died before it noted 3 and 4
    send(store, section=section)
    assert [step for step, _ in scalars_in(board)["learner/loss"]] == [1, 2, 3, 4]


def test_runs_that_share_a_folder_keep_their_numbers_apart(tmp_path: Path) -> None:
    shared, stores = tmp_path / "board", [RunStore(str(tmp_path / name)) for name in ("first", "second")]
    section = SinksSection(tensorboard=TensorboardSettings(directory=str(shared)))
    for store, num_updates in zip(stores, (3, 5), strict=True):
        claim(store)
        rising(store, num_updates)
        send(store, section=section)
    rising(stores[0], 4, first=4)
    claim(stores[1])  # its rewind concerns it alone
    put_update(stores[1], 2, {"ocr": 0.9}, incarnation=2)
    for store in stores:
        send(store, section=section)
    steps = [scalars_in(shared / f"tiny-run-{read_claim(store, 1).writer_id}")["learner/loss"] for store in stores]
    assert [[step for step, _ in values] for values in steps] == [[1, 2, 3, 4], [1, 2]]
    assert len(list(shared.iterdir())) == 2


def test_a_remote_run_has_its_own_folder_where_the_driver_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = RunStore(f"memory://sinks-{tmp_path.name}")
    claim(store)
    rising(store, 2)
    send(store)
    found = scalars_in(tmp_path / "tensorboard" / f"tiny-run-{read_claim(store, 1).writer_id}")
    assert [step for step, _ in found["learner/loss"]] == [1, 2]


def test_a_note_that_another_run_left_counts_for_nothing_and_one_without_a_key_is_the_run_s_own(tmp_path: Path) -> None:
    before, store = RunStore(str(tmp_path / "before")), RunStore(str(tmp_path / "after"))
    board = tmp_path / "after" / "reports" / "tensorboard"
    claim(before)
    rising(before, 5)
    send(before)
    (tmp_path / "after").mkdir()
    (tmp_path / "before" / "reports").rename(tmp_path / "after" / "reports")  # a run directory of which only reports/ was kept
    claim(store)
    rising(store, 2)
    send(store)
    assert [step for step, _ in scalars_in(board)["learner/loss"]] == [1, 2]
    note = json.loads((board / "flowfleet_sent.json").read_text())
    assert note.pop("key") == read_claim(store, 1).writer_id
    (board / "flowfleet_sent.json").write_text(json.dumps(note))  # as it was written before there were keys
    send(store)
    assert json.loads((board / "flowfleet_sent.json").read_text()) == note  # nothing was sent again
    assert [step for step, _ in scalars_in(board)["learner/loss"]] == [1, 2]


# ---- Weights & Biases


def follow_to_the_end(store: RunStore, ended: Callable[[], bool], section: SinksSection) -> None:
    """Followers as a driver starts them, let go once a condition holds."""
    with following(section, store.url):
        wait_until(ended, "the follower")


def test_wandb_gets_each_update_once_and_a_rewind_opens_a_run_told_from_the_beginning(
    tmp_path: Path, fake_wandb: Callable[[str], Path]
) -> None:
    store, file = RunStore(str(tmp_path / "run")), fake_wandb("well")
    section = SinksSection(wandb=WandbSettings(enabled=True, mode="offline"), every_s=0.1)
    claim(store)
    rising(store, 2)
    put_evaluation(store, 0, {"ocr": 0.25})
    follow_to_the_end(store, lambda: len(told(file, "log")) == 3, section)
    key = json.loads(store.read(paths.config_path(1)))["writer_id"]
    ((given, name),) = told(file, "init")
    assert name == "tiny-run" and (given["id"], given["resume"], given["mode"]) == (key, "allow", "offline")
    (first,), (second,), (evaluation,) = told(file, "log")
    assert (first["update"], first["reward/ocr/mean"], second["reward/ocr/mean"]) == (1, 0.01, 0.02)
    assert (evaluation["evaluation/version"], evaluation["evaluation/ocr/all"]) == (0, 0.25)
    assert len(told(file, "finish")) == 1

    claim(store)
    put_update(store, 2, {"ocr": 0.9}, incarnation=2)
    follow_to_the_end(store, lambda: len(told(file, "log")) == 6, section)
    assert [given["id"] for given, _ in told(file, "init")] == [key, key, f"{key}-i2"]  # resumed, found to be rewound, opened anew
    again = [entry for (entry,) in told(file, "log")[3:]]
    assert [entry.get("reward/ocr/mean") for entry in again] == [0.01, 0.9, None] and again[2]["evaluation/version"] == 0


# ---- a run beside ill sinks


def fake_run(run_dir: Path, section: SinksSection, *, until: Callable[[], bool] = lambda: True) -> None:
    """--local --fake to the end, followed as a session does it; it ends no sooner than `until` holds."""
    config = small_fake_config(
        "reward.0.num_servers=1", "evaluation.max_prompts=4", "evaluation.every=0", "schedule.max_staleness=0", "schedule.num_updates=3"
    )
    prompts, store = check_fake_config(config), RunStore(str(run_dir))
    for _ in claim_run(store, config.model_dump(mode="json"), config_digest=config_digest(config)):
        raise AssertionError("nobody else runs this run")
    parts = compose(config, prompts, str(run_dir), 1, QUICK)
    with following(section, str(run_dir)):
        wait_until(until, "the sink's trouble to begin")
        run_local(parts, lambda summary: None).raise_if_failed()


def facts(run_dir: Path) -> list[Any]:
    """What two equal runs have in common."""
    return [manifest_facts(run_dir), published_digests(run_dir), history_digests(run_dir)]


@pytest.fixture(scope="module")
def lone_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without sinks."""
    run_dir = tmp_path_factory.mktemp("lone") / "run"
    fake_run(run_dir, SinksSection())
    return run_dir


@pytest.mark.parametrize(
    ("mode", "begins", "codes", "words"),
    [
        ("hang", "init", (4, -9), "it said nothing"),
        ("raise", "init", (1,), "ValueError: refused, says the key [REDACTED]"),
        ("missing", "import", (2,), "No module named 'wandb'); pip install \"flowfleet[wandb]\""),
    ],
)
def test_a_sink_that_hangs_raises_or_is_missing_leaves_the_run_as_it_is(
    mode: str, begins: str, codes: tuple[int, ...], words: str, tmp_path: Path, lone_run: Path, fake_wandb: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = fake_wandb(mode)
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-key")
    section = SinksSection(wandb=WandbSettings(enabled=True), every_s=0.1, finish_timeout_s=1.0 if mode == "hang" else PATIENCE_S)
    with heard() as log:
        fake_run(tmp_path / "run", section, until=lambda: bool(told(file, begins)))
    warnings = sorted({line for line in log.text.splitlines() if line.startswith("sink ")})  # a line may be heard at two loggers
    assert len(warnings) == 1 and words in warnings[0]
    assert any(warnings[0].startswith(f"sink wandb ended (code {code}): ") for code in codes)  # a busy machine may have to kill what hangs
    assert "flowfleet sink RUN --to wandb" in warnings[0] and "s3cr3t-key" not in warnings[0]
    assert facts(tmp_path / "run") == facts(lone_run)


def test_a_followed_run_and_its_tensorboard_tell_the_same_and_a_command_finds_nothing_left(tmp_path: Path, lone_run: Path) -> None:
    run_dir = tmp_path / "run"
    fake_run(run_dir, SinksSection(tensorboard=TensorboardSettings(enabled=True), every_s=0.1, finish_timeout_s=PATIENCE_S))
    assert facts(run_dir) == facts(lone_run)
    sent = json.loads((run_dir / "reports" / "tensorboard" / "flowfleet_sent.json").read_text())
    assert (sent["update"], sorted(version for version, _ in sent["evaluations"])) == (3, [0, 3])
    before, files = scalars_in(run_dir / "reports" / "tensorboard"), sorted((run_dir / "reports" / "tensorboard").iterdir())
    result = CliRunner().invoke(APP, ["sink", str(run_dir), "--to", "tensorboard"])
    assert result.exit_code == 0 and "tensorboard has update 3 and 2 evaluations" in result.output
    assert sorted((run_dir / "reports" / "tensorboard").iterdir()) == files  # nothing was even opened
    elsewhere = tmp_path / "elsewhere"
    result = CliRunner().invoke(APP, ["sink", str(run_dir), "--to", "tensorboard", "--dir", str(elsewhere)])
    (own,) = elsewhere.iterdir()  # a subfolder of the run's
    assert result.exit_code == 0 and f"tensorboard --logdir {own}" in result.output
    assert scalars_in(own) == before


def test_a_follower_ends_when_its_driver_is_killed(tmp_path: Path, fake_wandb: Callable[[str], Path]) -> None:
    file, store = fake_wandb("hang"), RunStore(str(tmp_path / "run"))
    claim(store)
    section = SinksSection(wandb=WandbSettings(enabled=True), finish_timeout_s=0.5)
    driver = (
        "import sys, time\nfrom deploy.sinks.settings import SinksSection\nfrom deploy.sinks.starter import following\n"
        "with following(SinksSection.model_validate_json(sys.argv[1]), sys.argv[2]):\n    time.sleep(10000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, section.model_dump_json(), store.url])
    try:
        wait_until(lambda: told(file, "init"), "the hanging sink")
        ((follower,),) = told(file, "import")
        assert psutil.pid_exists(follower)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_until(lambda: not _is_alive(follower), "the follower's end")


def _is_alive(process_id: int) -> bool:
    try:
        return bool(psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ---- the end


@pytest.mark.parametrize(
    ("outcome", "error"),
    [(Outcome(kind=EndKind.DONE, reason="all updates"), None), (Outcome(kind=EndKind.GUARD, reason="too many", gate="drops"), GateError)],
)
def test_after_the_run_one_signal_ends_the_wait_for_sinks_and_the_exit_code_stays(
    outcome: Outcome, error: type[Exception] | None, tmp_path: Path, fake_wandb: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, timeout_s = fake_wandb("hang"), 60.0
    signaled_at: list[float] = []
    late: list[int] = []  # signals that nobody took

    def drive(parts: Any, options: StartOptions, live: Any, signals: StopSignals) -> Outcome:
        signals.arm()
        wait_until(lambda: told(file, "init"), "the hanging sink")
        return outcome

    def interrupt() -> None:
        wait_until(lambda: "for sinks (wandb)" in log.text or is_left.is_set(), "the wait for sinks")
        signaled_at.append(time.monotonic())
        for number in HANDLED:  # the second one is one too many
            os.kill(os.getpid(), number)

    monkeypatch.setattr(session, "_drive", drive)
    config = small_fake_config("sinks.wandb.enabled=true", f"sinks.finish_timeout_s={timeout_s}")
    options, console = StartOptions(run_dir=str(tmp_path / "run"), local=True, fakes=QUICK), Console(file=(tmp_path / "said").open("w"))
    is_left, impatient = threading.Event(), threading.Thread(target=interrupt)
    before = {number: signal.signal(number, lambda number, frame: late.append(number)) for number in HANDLED}
    try:
        with heard() as log:
            impatient.start()
            if error is None:
                session.run_session(config, options, console)
            else:
                with pytest.raises(error):
                    session.run_session(config, options, console)
            left_at = time.monotonic()
    finally:
        is_left.set()
        impatient.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    console.file.close()
    assert f"waiting up to {timeout_s + GRACE_S:.0f} s for sinks (wandb)" in log.text
    assert "sink wandb ended (code -9)" in log.text and "the run goes on" not in log.text
    assert "drains" not in (tmp_path / "said").read_text()
    ((follower,),) = told(file, "import")
    assert not _is_alive(follower) and left_at - signaled_at[0] < timeout_s


def test_a_sink_that_is_gone_is_not_waited_for(tmp_path: Path, fake_wandb: Callable[[str], Path]) -> None:
    store = RunStore(str(tmp_path / "run"))
    fake_wandb("missing")
    claim(store)
    with heard() as log:
        follow_to_the_end(store, lambda: "sink wandb ended" in log.text, SinksSection(wandb=WandbSettings(enabled=True)))
    assert "waiting up to" not in log.text and "the run goes on without it" in log.text


# ---- last words


def child(script: str) -> FollowerProcess:
    """Some process in a follower's place."""
    command = [sys.executable, "-c", f"import os, sys\n{script}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    return FollowerProcess("wandb", process)


def test_a_progress_bar_without_end_fills_neither_memory_nor_the_log() -> None:
    megabytes = 16
    tracemalloc.start()
    try:
        with heard() as log:
            follower = child(f"for _ in range({megabytes}): os.write(2, b'x' * 1_000_000)\nos.write(2, b'\\r' + b'y' * 1000)\nsys.exit(5)")
            wait_until(lambda: "sink wandb ended (code 5)" in log.text, "its end")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    follower.wait_or_kill(GRACE_S)
    (line,) = {line for line in log.text.splitlines() if line.startswith("sink ")}
    assert f"(code 5): {'y' * WORDS}...; " in line and len(line) < WORDS + 150
    assert peak < 4_000_000  # of 16 MB


def test_last_words_are_the_last_line_that_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "4f1d8c" * 7
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert last_words(b"") == last_words(b" \r\n") == "it said nothing"
    assert last_words(f"Traceback\nValueError: key {key}\r\n \n".encode()) == f"ValueError: key {MARK}"
    assert last_words(b"1%\r50%\r99%\r") == "99%"
    long = last_words(f"begin\n{key} {'z' * 1000}".encode())
    assert long == f"{MARK} {'z' * (WORDS - len(MARK) - 1)}..."  # redacted before it is cut
    cut = last_words((key[1:].encode() + b"a" * 5000 + b"the end")[-TAIL_BYTES:])
    assert cut == f"...{'a' * (WORDS - 7)}the end"


def test_a_follower_that_has_ended_is_not_killed_by_its_old_number(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    follower = child("")
    follower.let_go()
    follower.wait_or_kill(PATIENCE_S)
    monkeypatch.setattr(os, "killpg", lambda group, number: killed.append(group))
    follower.kill()
    assert killed == []
    monkeypatch.undo()

    def refuse(group: int, number: int) -> None:
        killed.append(group)
        raise PermissionError("not yours")

    lively = child("sys.stdin.read()")
    monkeypatch.setattr(os, "killpg", refuse)
    lively.kill()  # suppressed
    assert len(killed) == 1
    lively.let_go()
    lively.wait_or_kill(PATIENCE_S)


# ---- mistakes


def test_mistakes_are_told_with_their_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(str(tmp_path))
    with pytest.raises(UserError, match="holds no run"):
        open_follower(store, "tensorboard", SinksSection())
    claim(store)
    with pytest.raises(UserError, match="'csv' is unknown; choose tensorboard or wandb"):
        open_follower(store, "csv", SinksSection())
    (tmp_path / "left_by_wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r'a folder of that name is no package\); pip install "flowfleet\[wandb\]"'):
        load("left_by_wandb", "wandb")
    monkeypatch.setenv("WANDB_API_KEY", "4f1d8c" * 7)
    assert redacted(f"key {'4f1d8c' * 7} was refused") == f"key {MARK} was refused"
    with heard() as log, following(SinksSection(wandb=WandbSettings(enabled=True)), "memory://run"):
        pass
    assert "sink wandb: memory://run lives in one process and cannot be followed" in log.text


def test_the_command_leaves_a_run_alone_that_sends_its_numbers_itself(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    for _ in claim_run(
        store, {"run": {"name": "own"}, "schedule": {"num_updates": 2}, "sinks": {"tensorboard": {"enabled": True}}}, config_digest="a"
    ):
        raise AssertionError("nobody waits")
    put_status(store, written_at=time.time())
    result = CliRunner().invoke(APP, ["sink", str(tmp_path), "--to", "tensorboard"])
    assert isinstance(result.exception, UserError) and "sends its numbers to tensorboard itself" in str(result.exception)
