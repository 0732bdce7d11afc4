"""Things are broken one by one, as a user would meet them: `flowfleet doctor` names each with its remedy, and exits with 1 when it stops a run."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from deploy.commands import doctor as doctor_command
from deploy.doctor.checks import Status
from deploy.doctor.machine import look_at_packages, look_at_python, look_at_shm
from tests.run_fixtures import SMALL
from tests.test_deploy_doctor import named, only

GIB = 2**30


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tiny_sd3_dir: Path, tmp_path: Path) -> Any:
    """`flowfleet doctor tiny-geneval --quick --json` on a small recipe: (exit code, rows). Only the recipe's own rewards are looked at."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("deploy.reward_card.known_cards", lambda: ())
    monkeypatch.setattr("deploy.doctor.machine.HUB", ("127.0.0.1", 1))
    app = typer.Typer()
    doctor_command.register(app)

    def ask(*sets: str, arguments: tuple[str, ...] = (), recipe: str = "tiny-geneval") -> tuple[int, list[Any]]:
        made = [part for item in (*SMALL, f'model.path="{tiny_sd3_dir}"', *sets) for part in ("--set", item)]
        command = ["doctor", recipe, "--quick", "--json", "--patience", "30", *arguments, *made]
        done: Result = CliRunner().invoke(app, command)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        told = json.loads(done.stdout)
        assert told["failed"] == (done.exit_code == 1)
        return done.exit_code, told["rows"]

    return ask


def row_of(rows: list[Any], what: str) -> Any:
    """The only row of that name."""
    (row,) = [row for row in rows if row["what"] == what]
    return row


def test_a_sound_machine_passes_and_the_json_keeps_its_keys(doctor: Any, tmp_path: Path) -> None:
    code, rows = doctor(arguments=("--run-dir", str(tmp_path / "run")))
    assert code == 0, [row for row in rows if row["status"] == "fail"]
    assert {frozenset(row) for row in rows} == {frozenset({"status", "what", "found", "rule", "remedy", "details"})}
    assert {row["status"] for row in rows} <= {"pass", "skip", "warn", "fail"}
    named_rows = {row["what"] for row in rows}
    assert named_rows >= {
        "recipe", "python", "packages", "torch", "devices", "gpu peers", "memory", "/dev/shm", "disk", "ulimit files", "ulimit processes", "clock",
        "port metrics", "port dashboard", "port report", "ray dashboard", "ray head", "ray token", "network", "store", "model", "store cap",
        "secrets", "prompts.train", "prompts.test",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@contextmanager
def listener() -> Iterator[int]:
    """A port of loopback that somebody holds."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield int(holder.getsockname()[1])


def expect(doctor: Any, what: str, found: str, remedy: str, *sets: str, arguments: tuple[str, ...] = ()) -> list[Any]:
    """The command fails, and this row says why and what to do. Returns all rows."""
    code, rows = doctor(*sets, arguments=arguments)
    row = row_of(rows, what)
    assert (code, row["status"]) == (1, "fail"), row
    assert re.search(found, row["found"]) and re.search(remedy, row["remedy"]), row
    return list(rows)


def test_a_taken_port(doctor: Any) -> None:
    with listener() as port:
        expect(doctor, "port metrics", f"127.0.0.1:{port}: Address already in use", "cluster.metrics_port", f"cluster.metrics_port={port}")


def test_a_disk_that_is_nearly_full(doctor: Any, tmp_path: Path) -> None:
    expect(
        doctor, "disk", "free at", "free some, choose another --run-dir", f"store.max_bytes={2**60}", arguments=("--run-dir", str(tmp_path))
    )


def test_a_token_file_that_others_can_read(doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    rows = expect(doctor, "ray token", "mode 644: others can read it", f"chmod 600 {token}")
    assert "0123456789abcdef" not in json.dumps(rows)


def test_a_rewards_package_that_is_not_installed(doctor: Any) -> None:
    sets = ("reward.0.name=hps_v2.1", 'evaluation.rewards=["hps_v2.1"]', 'reward.0.options={weights = "/nowhere/hps.safetensors"}')
    rows = expect(doctor, "reward hps_v2.1", "open_clip cannot be imported", "install what it names", *sets)
    missing = row_of(rows, "model of hps_v2.1: weights")
    assert missing["status"] == "fail" and "/nowhere/hps.safetensors does not exist" in missing["found"]


def test_a_key_that_no_recipe_has(doctor: Any) -> None:
    expect(
        doctor, "recipe", "unknown key 'learner.learning_rat'; the nearest key is 'learning_rate'", "mend the key", "learner.learning_rat=1"
    )


def test_a_model_that_is_not_here(doctor: Any) -> None:
    expect(doctor, "model", "model_index.json cannot be read", "set model.path", 'model.path="/nowhere/model"')


def test_a_device_that_is_not_here(doctor: Any) -> None:
    expect(doctor, "devices", "GPU", "model.device = cpu", "model.device=cuda:63")


def test_a_store_that_cannot_be_written(doctor: Any) -> None:
    expect(doctor, "store", "RunStore.create", "choose another --run-dir", arguments=("--run-dir", "/proc/self/run"))


def test_a_secret_in_the_recipe(doctor: Any) -> None:
    sets = ('reward.0.options={api_key = "planted-value-1"}',)
    rows = expect(doctor, "secrets", r"reward\.0\.options\.api_key look", "token_file", *sets)
    assert "planted-value-1" not in json.dumps(rows)


def test_limits_that_are_too_low(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.doctor.limits.look_at_limits.__defaults__", (lambda which: (256, 4096), Path("/nowhere")))
    rows = expect(doctor, "ulimit files", r"256 \(may be raised to 4096\)", "ulimit -n 65536")
    assert row_of(rows, "ulimit processes")["status"] == "fail"


class Room:
    """A file system with so many bytes free."""

    def __init__(self, free: int) -> None:
        self.free = free


def test_a_small_shared_memory_and_none_at_all_warn_with_the_containers_option(tmp_path: Path) -> None:
    small = only(look_at_shm(tmp_path, lambda path: Room(64 * 2**20)))
    assert (small.status, small.found) == (Status.WARN, "64 MiB free") and "--shm-size" in small.remedy
    assert only(look_at_shm(tmp_path / "none")).status is Status.WARN
    assert only(look_at_shm(tmp_path, lambda path: Room(GIB))).status is Status.OK


def test_a_python_and_a_package_that_are_too_old() -> None:
    python = only(look_at_python(">=3.99"))
    assert python.status is Status.FAIL and "asks for Python >=3.99" in python.rule and "make an environment" in python.remedy
    packages = only(look_at_packages({"ray": "99.0", "no-such-package": "1"}))
    assert packages.status is Status.FAIL and packages.remedy == "pip install -c constraints.txt -e ."
    assert re.search(r"ray [0-9.]+ is older than 99.0; no-such-package is missing", packages.found)
    assert named([python, packages], "python").status is Status.FAIL
