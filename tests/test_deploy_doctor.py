"""`flowfleet doctor`: each thing that is broken on purpose is named with its remedy, nothing hangs, nothing is left behind."""

import io
import json
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from common.errors import ConfigError, DataError, StoreError
from common.types import Prompt, Score
from deploy.commands import doctor as doctor_command
from deploy.config import RunConfig, load_config
from deploy.doctor.checks import Bench, Check, Row, Status, has_failed, run_check, run_checks, show
from deploy.doctor.gpu import look_at_devices
from deploy.doctor.machine import look_at_disk, look_at_packages, look_at_python, version_key
from deploy.doctor.ports import Door, look_at_dashboard, look_at_ports, wide_listeners
from deploy.doctor.ray import look_at_ray, look_at_store
from deploy.doctor.recipe import look_at_model, look_at_prompts, optional_checks, recipe_checks, spans
from deploy.reward_card import find_card, known_cards, render_card
from reward_servers.cards import RewardCard
from reward_servers.scorers.base import KnownCase, PlainScorer
from tests.run_fixtures import QUIET, small_config

PATIENCE = 30.0  # deadlines are the product's; a loaded test machine must not decide


def only(rows: Any) -> Row:
    (row,) = rows
    assert isinstance(row, Row)
    return row


def named(rows: list[Row], what: str) -> Row:
    return only([row for row in rows if row.what == what])


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the command sets it; this puts back what was there
    made = typer.Typer()
    doctor_command.register(made)
    made.callback()(lambda: None)  # a second command's place: typer would drop the name of an only one
    return made


class Quoter(PlainScorer):
    """Needs the word "quoted" in a prompt; scores its known image by `value`."""

    version = "1"

    def __init__(self, name: str = "quoter", value: float = 1.0) -> None:
        self.name, self._value = name, value

    def check_prompt(self, prompt: Prompt) -> None:
        if "quoted" not in prompt.text:
            raise DataError("the text lacks quoted; write it")

    def score(self, images: Any, prompts: Any) -> list[Score]:
        return [Score(sample_index=index, value=self._value) for index in range(len(prompts))]

    def known_case(self) -> KnownCase:
        return KnownCase(image=np.zeros((8, 8, 3), dtype=np.uint8), prompt=Prompt(id="k", text="quoted"), expected=1.0, tolerance=1e-6)


def test_a_check_that_hangs_fails_by_its_deadline_and_the_next_ones_still_run() -> None:
    never = threading.Event()

    def hang() -> list[Row]:
        never.wait(600)
        return []

    started = time.monotonic()
    slow = Check(what="slow", rule="answers", remedy="mend it", look=hang, deadline_s=0.2)
    good = Check(what="good", rule="answers", remedy="mend it", look=lambda: [Bench(what="good", rule="answers").ok("yes")])
    rows = run_checks([slow, good], QUIET)
    never.set()
    assert time.monotonic() - started < 60
    assert [(row.what, row.status, row.found) for row in rows] == [
        ("slow", Status.FAIL, "no answer within 0.2 s; on a busy machine pass --patience 5"),
        ("good", Status.OK, "yes"),
    ]


@pytest.mark.parametrize(
    "error", [StoreError("the bucket is away"), ImportError("no module named x"), RuntimeError("driver"), OSError("full")]
)
def test_what_a_check_raises_becomes_its_row(error: Exception) -> None:
    def broken() -> list[Row]:
        raise error

    row = only(run_check(Check(what="a", rule="b", remedy="c", look=broken), PATIENCE))
    assert (row.status, row.rule, row.remedy) == (Status.FAIL, "b", "c")
    assert str(error) in row.found


def test_this_machine_passes_what_every_machine_must() -> None:
    assert only(look_at_python()).status is Status.OK
    assert only(look_at_packages()).status is Status.OK
    assert only(look_at_devices(None)).status is Status.OK
    assert version_key("2.13.0+cpu") == (2, 13, 0) > version_key("2.6")


def test_a_device_that_is_not_here_fails(tiny_sd3_dir: Path) -> None:
    row = only(look_at_devices(small_config(tiny_sd3_dir, "tiny-geneval", "model.device=cuda:63")))
    assert (row.status, row.rule) == (Status.FAIL, "model.device = cuda:63 is here")
    assert "model.device = cpu" in row.remedy


def test_a_disk_smaller_than_the_runs_cap_fails(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    huge = small_config(tiny_sd3_dir, "tiny-geneval", f"store.max_bytes={2**60}")
    disk = named(list(look_at_disk(tmp_path / "not" / "there" / "yet", huge)), "disk")
    assert disk.status is Status.FAIL and f"free at {tmp_path}" in disk.found and "store.max_bytes" in disk.remedy


def test_a_taken_port_fails_and_a_free_one_does_not(tiny_sd3_dir: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        config = small_config(tiny_sd3_dir, "tiny-geneval", f"cluster.metrics_port={port}")
        row = named(list(look_at_ports(config)), "port metrics")
        assert row.status is Status.FAIL and str(port) in row.found and "cluster.metrics_port" in row.remedy
        assert only(look_at_ray("http://127.0.0.1:1")).status is Status.FAIL  # nobody serves port 1
        assert only(look_at_ray(f"127.0.0.1:{port}")).status is Status.OK
    assert named(list(look_at_ports(config)), "port metrics").status is Status.OK


HEAD = "  sl  local_address rem_address   st\n"


def test_a_dashboard_that_the_network_reaches_fails_unless_it_asks_for_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "tcp"
    table.write_text(
        HEAD + "   0: 0100007F:2049 00000000:0000 0A\n   1: 00000000:0016 00000000:0000 0A\n"
    )  # 8265 on loopback; ssh wide open
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert only(look_at_dashboard([table])).status is Status.OK
    table.write_text(HEAD + "   0: 00000000:2049 00000000:0000 0A\n")
    assert wide_listeners([table], 8265) == ["0.0.0.0"]

    def seen(door: Door) -> Status:
        return only(look_at_dashboard([table], ask=lambda host, port: door)).status

    assert [seen(door) for door in Door] == [Status.FAIL, Status.OK, Status.FAIL]  # open, asks for a token, silent
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert [seen(door) for door in Door] == [Status.FAIL, Status.OK, Status.OK]  # what it says itself counts more than a variable


def test_the_kernels_addresses_are_read_in_both_families(tmp_path: Path) -> None:
    table = tmp_path / "tcp6"
    rows = ["0" * 32, f"{'0' * 24}01000000", f"{'0' * 16}FFFF00000100007F", "B80D0120" + "0" * 16 + "01000000"]
    table.write_text(HEAD + "".join(f"   {index}: {row}:2049 {'0' * 32}:0000 0A\n" for index, row in enumerate(rows)))
    assert wide_listeners([table], 8265) == ["::", "2001:db8::1"]  # ::1 and ::ffff:127.0.0.1 are loopback


def test_the_store_probe_leaves_nothing_and_a_broken_place_fails(tmp_path: Path) -> None:
    assert only(look_at_store(str(tmp_path / "runs" / "new"))).status is Status.OK
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("not a folder")
    row = only(run_check(Check(what="store", rule="b", remedy="c", look=lambda: look_at_store(str(tmp_path / "file" / "run"))), PATIENCE))
    assert row.status is Status.FAIL


def test_a_model_directory_that_lacks_a_part_fails(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    assert only(look_at_model(small_config(tiny_sd3_dir, "tiny-geneval"))).status is Status.OK
    config = small_config(tmp_path / "gone", "tiny-geneval")
    row = only(run_check(Check(what="model", rule="b", remedy="c", look=lambda: look_at_model(config)), PATIENCE))
    assert row.status is Status.FAIL and "model_index.json cannot be read" in row.found


def broken_config(tiny_sd3_dir: Path, tmp_path: Path) -> tuple[RunConfig, Path]:
    """Fifteen prompts of thirty lack what the reward needs; empty lines count as lines."""
    lines = ["", *(f'{{"text": "number {index}{" quoted" if index % 2 else ""}"}}' for index in range(30))]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    sets = (f'prompts.train="{path}"', f'prompts.test="{path}"', "reward.0.name=quoter")
    return small_config(tiny_sd3_dir, "tiny-geneval", *sets, 'evaluation.rewards=["quoter"]'), path


def test_every_line_that_lacks_what_a_reward_needs_is_listed(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    config, path = broken_config(tiny_sd3_dir, tmp_path)
    row = only(look_at_prompts("train", path, config, {"quoter": Quoter()}))
    assert row.status is Status.FAIL
    assert row.found == f"15 of 30 prompts lack it: lines {', '.join(str(line) for line in range(2, 31, 2))}"
    assert list(row.details) == [f"{path}: line {line}: quoter: the text lacks quoted; write it" for line in range(2, 31, 2)]
    sink = io.StringIO()
    show([row], Console(file=sink, width=120))
    assert sink.getvalue().count("the text lacks quoted") == 15
    assert spans([3, 7, 8, 9, 12]) == "3, 7-9, 12"


def fake_registry(monkeypatch: pytest.MonkeyPatch, **made: Any) -> None:
    """Rewards by name; an exception is raised instead."""

    def make(name: str, options: Mapping[str, Any]) -> Any:
        if isinstance(made[name], Exception):
            raise made[name]
        return made[name]

    monkeypatch.setattr("deploy.doctor.recipe.make_scorer", make)
    monkeypatch.setattr("deploy.doctor.recipe.configured_scorer", lambda reward: make(reward.name, reward.options))


def test_a_reward_of_the_recipe_that_cannot_run_fails_and_one_that_is_not_used_only_warns(
    tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = broken_config(tiny_sd3_dir, tmp_path)
    missing = ConfigError("reader x: no module named x; install the extra: pip install 'flowfleet[x]'")
    fake_registry(
        monkeypatch, quoter=missing, jpeg_incompressibility=Quoter("jpeg_incompressibility"), spare=missing, right=Quoter("right")
    )
    spare = RewardCard(name="spare", description="d", range="0..1", source="s", licence="l", extra="x", needs="nothing")
    right = RewardCard(name="right", description="d", range="0..1", source="s", licence="l", needs="nothing")
    asked = RewardCard(name="asked", description="d", range="0..1", source="s", licence="l", needs="server")
    distant = RewardCard(name="distant", description="d", range="0..1", source="s", licence="l", model="nobody/nothing-of-this-name")
    rows = run_checks(recipe_checks(config, [spare, right, distant, asked]), QUIET, PATIENCE)
    assert "asks a server" in named(rows, "reward asked").found and named(rows, "reward asked").status is Status.WARN
    failed = named(rows, "reward quoter")
    assert failed.status is Status.FAIL and "install the extra" in failed.found
    spare_row, distant_row = named(rows, "reward spare"), named(rows, "reward distant")
    assert spare_row.status is Status.WARN and spare_row.remedy == "pip install 'flowfleet[x]'"
    assert distant_row.status is Status.WARN and "nobody/nothing-of-this-name is not on this machine" in distant_row.found
    assert named(rows, "reward right").status is Status.OK
    prompts = named(rows, "prompts.train")
    assert prompts.status is Status.FAIL  # jpeg's stand-in judges them, too
    assert has_failed(rows)


def test_a_scorer_that_scores_its_known_image_wrong_fails(tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = broken_config(tiny_sd3_dir, tmp_path)
    fake_registry(monkeypatch, quoter=Quoter(value=0.25), jpeg_incompressibility=Quoter("jpeg_incompressibility"))
    row = named(run_checks(recipe_checks(config, []), QUIET, PATIENCE), "reward quoter")
    assert row.status is Status.FAIL and "scored its known image 0.2500, expected 1.0000" in row.found
    card = RewardCard(name="quoter", description="d", range="0..1", source="s", licence="l", needs="nothing")
    unused = only(run_checks(optional_checks([card]), QUIET, PATIENCE))
    assert unused.status is Status.WARN and "expected 1.0000" in unused.found  # no run stops for it


def test_the_command_exits_with_0_when_nothing_fails_and_names_a_mistyped_key_with_1(
    app: typer.Typer, tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    good = CliRunner().invoke(app, ["doctor", "tiny-geneval", "--quick", "--patience", "30", "--set", f'model.path="{tiny_sd3_dir}"', "--run-dir", str(tmp_path / "run")],
                              env={"COLUMNS": "220", "RAY_ADDRESS": ""})  # fmt: skip
    assert good.exit_code == 0, good.output
    assert "0 fail" in good.output and "reward geneval_strict" in good.output and "prompts.test" in good.output
    bad = CliRunner().invoke(
        app, ["doctor", "tiny-geneval", "--quick", "--patience", "30", "--set", "learner.learning_rat=1"], env={"COLUMNS": "220"}
    )
    assert bad.exit_code == 1
    assert "learning_rate" in bad.output


def test_the_built_in_recipes_prompts_carry_what_their_rewards_need() -> None:
    for name in ("tiny-geneval", "tiny-demo", "tiny-multi"):
        rows = run_checks([check for check in recipe_checks(load_config(name, []), []) if check.what != "model"], QUIET, PATIENCE)
        assert not has_failed(rows), [row for row in rows if row.status is Status.FAIL]


def test_a_reward_card_shows_every_field_as_text() -> None:
    card = RewardCard(
        name="r[bold]", description="measures [red]x[/red]", range="0..1", source="a paper", licence="MIT", model="m/n", revision="abc",
        verified="not verified with real weights",
    )  # fmt: skip
    sink = io.StringIO()
    Console(file=sink, width=120).print(render_card(card))
    shown = sink.getvalue()
    for part in (
        "r[bold]",
        "measures [red]x[/red]",
        "a paper",
        "m/n",
        "abc",
        "not measured",
        "not verified with real weights",
        "pip extra",
    ):
        assert part in shown
    assert find_card("ocr_strict", known_cards()).licence
    with pytest.raises(ConfigError, match="the nearest name is 'ocr_strict'"):
        find_card("ocr_strikt", known_cards())
    assert json.dumps([each.name for each in known_cards()])
