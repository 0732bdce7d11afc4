"""`flowfleet bundle`: small, whole where the run is broken, the same bytes twice, and no planted secret in any form."""

import base64
import hashlib
import io
import json
import secrets
import shutil
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import typer
from typer.testing import CliRunner

from common.errors import UserError
from common.store.manifests import read_status
from common.store.run_store import RunStore
from deploy.bundle.bundle import MAX_BYTES, BundleOptions, make_bundle, zipped
from deploy.bundle.machine import TAIL, installed_packages, tail
from deploy.bundle.parts import CUT, Part, shortened
from deploy.commands import doctor as doctor_command
from deploy.doctor.checks import Bench
from deploy.redact import MARK, PROMPT_MARK
from deploy.redact_rules import encodings
from tests.s3_server import BUCKET, served
from tests.test_fake_engines import run_fake

ROWS = [Bench(what="python", rule="new enough").ok("3.11"), Bench(what="disk", rule="1 GiB free").fail("0.5 GiB", "free some")]
DRIVER = 4711


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of fake engines, two updates."""
    folder = tmp_path_factory.mktemp("bundle") / "run"
    run_fake(folder, "schedule.num_updates=2", "evaluation.every=1", 'evaluation.rewards=["geneval_strict"]')
    return folder


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def opened(content: bytes) -> dict[str, str]:
    """Every file of a bundle as text."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {entry.filename: archive.read(entry).decode() for entry in archive.infolist()}


def bundled(run: Path | str, environ: dict[str, str] | None = None, **options: Any) -> dict[str, str]:
    return opened(make_bundle(str(run), ROWS, BundleOptions(**options), environ or {}))


def test_a_bundle_holds_what_a_report_needs_with_sizes_and_digests_and_nothing_else(run: Path) -> None:
    content = make_bundle(str(run), ROWS, BundleOptions(), {"OMP_NUM_THREADS": "1", "SOMETHING_ELSE": "private"})
    assert len(content) < MAX_BYTES
    files = opened(content)
    assert {
        "README.txt", "MANIFEST.json", "doctor.json", "doctor.txt", "machine.json", "pip-freeze.txt", "run/status.json", "run/config.i0001.json",
        "run/environment.i0001.json", "run/listing.json", "run/audit.json", "run/drops.json", "run/metrics/update_000002.i0001.json",
        "run/manifests/update_000002.json",
    } <= set(files)  # fmt: skip
    assert {Path(name).suffix for name in files} == {".json", ".txt"}  # no images, trajectories, weights
    manifest = json.loads(files["MANIFEST.json"])
    assert manifest["files"].keys() == files.keys() - {"MANIFEST.json"}
    for name, facts in manifest["files"].items():
        raw = files[name].encode()
        assert facts == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert manifest["problems"] == []
    assert json.loads(files["run/audit.json"])["is_clean"]
    assert json.loads(files["doctor.json"])["failed"] and "free some" in files["doctor.txt"]
    machine = json.loads(files["machine.json"])
    assert machine["variables"] == {"OMP_NUM_THREADS": "1"} and machine["commit"] and machine["packages"]["ray"]
    assert "private" not in "".join(files.values()) and "ray==" in files["pip-freeze.txt"]


def test_two_bundles_of_the_same_state_are_the_same_bytes(run: Path) -> None:
    assert make_bundle(str(run), ROWS, BundleOptions(), {}) == make_bundle(str(run), ROWS, BundleOptions(), {})


@pytest.fixture
def planted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, str], list[str]]:
    """A run, an environment and Ray's logs, full of secrets. Returns the Ray folder, the environment and every secret."""
    known, in_config, shaped = secrets.token_hex(16), secrets.token_urlsafe(24), "hf_" + secrets.token_hex(16)
    from_file, basic = "file" + secrets.token_hex(16), base64.b64encode(b"someone:" + secrets.token_hex(12).encode()).decode()
    claim = json.loads((run / "config.i0001.json").read_text())
    (tmp_path / "judge-token").write_text(from_file + "\n")
    claim["config"]["reward"][0]["options"] = {"api_key": in_config, "token_file": str(tmp_path / "judge-token"), "note": f"see {shaped}"}
    (run / "config.i0001.json").write_text(json.dumps(claim))
    record = json.loads((run / "metrics" / "update_000002.i0001.json").read_text())
    record["error"] = (
        f"judge: status 401 at https://me:{in_config}@example.org/v1?X-Amz-Signature={shaped}; sent {json.dumps({'t': known})}"
    )
    (run / "metrics" / "update_000002.i0001.json").write_text(json.dumps(record))
    status = json.loads((run / "status.json").read_text())
    status["host"], status["fleet"]["driver_process_id"] = socket.gethostname(), DRIVER
    status["reason"] = f"cookie: session={shaped}"
    (run / "status.json").write_text(json.dumps(status))
    logs = tmp_path / "ray" / f"session_2026-01-02_03-04-05_000006_{DRIVER}" / "logs"
    logs.mkdir(parents=True)
    lines = [
        "first line", f"HF_TOKEN={known}", f"wrapped {known[:11]}", f"{known[11:]} on two lines", f"url ?token%3D{quote(known)}", f"x {from_file}",
        f"'Authorization': 'Basic {basic}'", f"Authorization: Bearer {shaped}", f'{{\\"api_key\\": \\"{in_config}\\"}}',
        f"coded {base64.b64encode(f'user:{known}:more'.encode()).decode()}", f"hex {known.encode().hex()}", f"--judge-token {in_config}", "last line",
    ]  # fmt: skip
    (logs / "worker-aa-01000000-99.err").write_text("\n".join(lines))
    (logs / "raylet.out").write_text(f"password: {shaped}\n" * 3)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "ray", {"WANDB_API_KEY": known, "PATH": "/usr/bin"}, [known, in_config, shaped, from_file, basic]


def test_no_planted_secret_is_in_a_bundle_in_any_form(run: Path, planted: tuple[Path, dict[str, str], list[str]]) -> None:
    ray_folder, environ, planted_values = planted
    files = bundled(run, environ, ray_folder=ray_folder)
    log = files["ray/worker-aa-01000000-99.err"]
    assert "first line" in log and "last line" in log and "ray/raylet.out" in files
    for name, text in {**files, "names": "\n".join(files)}.items():
        for value in planted_values:
            assert not [form for form in encodings(value) if form in text], name
            assert value not in text.replace("\n", ""), name
    for name in ("run/config.i0001.json", "run/metrics/update_000002.i0001.json", "run/status.json", "ray/raylet.out"):
        assert MARK in files[name], name
    assert log.count(MARK) >= 9
    assert json.loads(files["run/config.i0001.json"])["config"]["reward"][0]["options"]["api_key"] == MARK


def test_the_search_would_see_a_secret_that_stays(
    run: Path, planted: tuple[Path, dict[str, str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_folder, environ, planted_values = planted
    monkeypatch.setattr("deploy.bundle.bundle.Redactor.text", lambda self, text, depth=0: text)
    monkeypatch.setattr("deploy.bundle.bundle.Redactor.document", lambda self, text: text)
    together = "".join(bundled(run, environ, ray_folder=ray_folder).values())
    assert all(value in together for value in planted_values if value != planted_values[0]) and quote(planted_values[0]) in together


def test_prompts_are_left_out_unless_they_are_asked_for(run: Path) -> None:
    (result,) = sorted((run / "eval").glob("v000002*/result.json"))
    rows = json.loads(result.read_text())["rows"]
    text = rows[0]["text"]
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"reason": f"while it drew '{text}'"}))
    without, with_them = bundled(run), bundled(run, with_prompts=True)
    name = f"run/{result.relative_to(run)}"
    assert text not in "".join(without.values()) and PROMPT_MARK in without["run/status.json"]
    assert "rows" not in json.loads(without[name]) and json.loads(without[name])["rewards"]
    assert text in with_them[name] and text in with_them["run/status.json"]
    assert "without their rows" in without["README.txt"] and "--with-prompts" in with_them["README.txt"]


def test_home_and_host_stand_as_signs_unless_names_are_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "somebody"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("deploy.redact.socket.gethostname", lambda: "gpu-node-17")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"reason": f"{home}/run on gpu-node-17"}))
    assert json.loads(bundled(run)["run/status.json"])["reason"] == "~/run on HOST"
    assert json.loads(bundled(run, with_names=True)["run/status.json"])["reason"] == f"{home}/run on gpu-node-17"


def test_a_broken_run_still_gives_a_bundle_that_names_what_could_not_be_read(run: Path) -> None:
    (run / "status.json").write_bytes(b'{"state": "runn')
    (run / "config.i0001.json").write_bytes(b"\xff\xfe\x00 cut")
    (run / "eval" / "v000001.ema.aaaaaaaa").mkdir(parents=True)
    (run / "eval" / "v000001.ema.aaaaaaaa" / "result.json").write_bytes(b"[]")
    (run / "drops" / "000").mkdir(parents=True)
    (run / "drops" / "000" / "g00000007.json").write_bytes(b"{}")
    (run / "manifests" / "update_000001.json").unlink()
    files = bundled(run)
    problems = " ".join(json.loads(files["MANIFEST.json"])["problems"])
    for what in ("config", "aaaaaaaa", "drops", "ray logs"):
        assert what in problems, problems
    assert files["run/status.json"].startswith('{"state": "runn') and "run/metrics/update_000002.i0001.json" in files
    audit = files.get("run/audit.json")
    assert (audit is not None and not json.loads(audit)["is_clean"]) or "audit" in problems


def test_an_empty_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing lies at"):
        bundled(tmp_path / "none")


def test_what_does_not_fit_is_left_out_last_logs_first_and_said(
    run: Path, tmp_path: Path, planted: tuple[Path, dict[str, str], list[str]]
) -> None:
    ray_folder, environ, _ = planted
    noise = secrets.token_bytes(40_000).hex("\n")  # hardly compresses: 20 tails of it are more than the bound below
    for index in range(20):
        (next(ray_folder.iterdir()) / "logs" / f"worker-{index:02d}-01000000-7.out").write_text(noise)
    content = make_bundle(str(run), ROWS, BundleOptions(ray_folder=ray_folder, max_bytes=400_000), environ)
    assert len(content) < 400_000
    files = opened(content)
    left_out = json.loads(files["MANIFEST.json"])["left_out"]
    assert any("no room within 400000 bytes" in line for line in left_out)
    assert {"run/status.json", "run/config.i0001.json", "doctor.json"} <= set(files)


def test_long_texts_lose_their_middle_and_logs_their_beginning(tmp_path: Path) -> None:
    text = shortened("a" * 100 + "b" * 300, most=200)
    assert text == "a" * 50 + CUT.format(200) + "b" * 150
    log = tmp_path / "log"
    log.write_text("".join(f"line {index}\n" for index in range(20_000)))
    kept = tail(log)
    assert kept.startswith("[...]\nline ") and kept.endswith("line 19999\n") and len(kept) <= TAIL + 10
    assert installed_packages().splitlines() == sorted(installed_packages().splitlines(), key=str.lower)


def test_a_zip_is_the_same_whatever_the_order_and_closed_to_others() -> None:
    parts = [Part(path="b.txt", text="2"), Part(path="a.txt", text="1")]
    assert zipped(parts) == zipped(parts[::-1])
    with zipfile.ZipFile(io.BytesIO(zipped(parts))) as archive:
        assert [(e.filename, e.date_time, e.external_attr >> 16) for e in archive.infolist()] == [
            ("a.txt", (1980, 1, 1, 0, 0, 0), 0o600), ("b.txt", (1980, 1, 1, 0, 0, 0), 0o600),
        ]  # fmt: skip


@pytest.fixture
def remote(run: Path) -> Iterator[tuple[str, str]]:
    """The same run on S3, and the secret that stands in the environment."""
    with served():
        store = RunStore(f"s3://{BUCKET}/bundled")
        for path in (path for path in run.rglob("*") if path.is_file()):
            store.create_exclusive(str(path.relative_to(run)), path.read_bytes(), writer_id="copy")
        yield store.url, "planted-secret-8d1f6c27"


def test_a_run_on_s3_gives_the_same_records(run: Path, remote: tuple[str, str]) -> None:
    url, secret = remote
    files, local = bundled(url, {"AWS_SECRET_ACCESS_KEY": secret}), bundled(run)
    assert files["run/metrics/update_000002.i0001.json"] == local["run/metrics/update_000002.i0001.json"]
    assert json.loads(files["run/audit.json"])["is_clean"] and secret not in "".join(files.values())
    status = read_status(RunStore(url))
    assert status is not None and json.loads(files["run/status.json"])["version"] == status.version


def test_the_command_writes_a_closed_file_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.doctor.machine.machine_checks", lambda *args, **kwargs: [])
    app = typer.Typer()
    doctor_command.register(app)
    out = tmp_path / "report.zip"
    done = CliRunner().invoke(app, ["bundle", str(run), "--out", str(out), "--audit-seconds", "0"])
    assert done.exit_code == 0, done.output
    assert out.stat().st_mode & 0o777 == 0o600 and "look through it" in done.output
    assert "run/audit.json: not asked for" in json.loads(opened(out.read_bytes())["MANIFEST.json"])["left_out"]
    again = CliRunner().invoke(app, ["bundle", str(run), "--out", str(out)])
    assert isinstance(again.exception, UserError) and "exists and is not overwritten" in str(again.exception)
