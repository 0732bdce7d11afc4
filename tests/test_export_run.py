"""`flowfleet export`: a run's version becomes a directory that its own card says how to load, whole or not at all."""

import re
from pathlib import Path

import pytest
import torch
import typer
from diffusers import StableDiffusion3Pipeline
from typer.testing import CliRunner

from common.errors import ConfigError, CorruptFile, UserError
from common.store import paths
from common.store.run_store import RunStore
from deploy.commands.export import register
from deploy.lora.export import ExportRequest, export_run
from deploy.lora.kohya import KOHYA_WEIGHTS
from tests.export_runs import bare_run, card_config, card_run, trained_state
from tests.report_runs import put_json

WEIGHTS = {"peft": "adapter_model.safetensors", "diffusers": "pytorch_lora_weights.safetensors", "kohya": KOHYA_WEIGHTS}


@pytest.fixture(scope="module")
def run(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    config = card_config(tiny_sd3_dir)
    return card_run(tmp_path_factory.mktemp("runs") / "whole", config, trained_state(config.model))


def command(*arguments: str) -> str:
    """Run the command under an app of its own; an error passes through."""
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["export", *arguments], catch_exceptions=False).output


def program(directory: Path) -> str:
    """The one Python program of an export's card."""
    (found,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return found


@pytest.mark.parametrize("fmt", ["peft", "diffusers"])
def test_the_cards_own_code_loads_the_lora_and_its_image_is_not_the_bases(
    run: RunStore, tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str
) -> None:
    out = tmp_path / "new" / "lora"
    told = command(run.url, "--out", str(out), "--format", fmt)
    assert told.startswith("version 6, snapshot ema:")
    assert {path.name for path in out.iterdir()} >= {"README.md", "config.toml", "curves", "samples", WEIGHTS[fmt]}
    assert [path.name for path in out.parent.iterdir()] == ["lora"]  # and nothing beside it
    assert all(path.stat().st_mode & 0o777 == (out / "README.md").stat().st_mode & 0o777 for path in out.iterdir() if path.is_file())
    monkeypatch.chdir(out)
    names: dict[str, object] = {}
    exec(program(out), names)  # the test's subject: what the card tells its reader to run
    drawn = names["image"]
    pipe = StableDiffusion3Pipeline.from_pretrained(str(tiny_sd3_dir), text_encoder_3=None, tokenizer_3=None)
    alone: dict[str, object] = {"torch": torch, "pipe": pipe}
    exec(program(out)[program(out).index("image = pipe(") :], alone)
    assert drawn.size == (64, 64)
    assert drawn.tobytes() != alone["image"].tobytes()


def test_the_kohya_cards_code_gives_the_change_of_every_module(run: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(run.url, "--out", str(tmp_path / "lora"), "--format", "kohya", "--no-card-samples")
    assert not (tmp_path / "lora" / "samples").exists()
    assert "--no-card-samples" in (tmp_path / "lora" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "lora")
    names: dict[str, object] = {}
    exec(program(tmp_path / "lora"), names)
    changes = names["changes"]
    assert changes["joint_blocks_0_x_block_attn_qkv"].shape == (3 * 32, 32)  # the fixture's model is 32 wide
    assert all(bool(change.any()) for change in changes.values())


def test_a_snapshot_or_version_that_is_not_there_is_refused_by_name(run: RunStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"version 3 holds no snapshot 'ema', only live; pass --snapshot"):
        export_run(run, ExportRequest(out=tmp_path / "lora", version=3))
    with pytest.raises(UserError, match=r"holds no version 4; published and kept: \[3, 6\]"):
        export_run(run, ExportRequest(out=tmp_path / "lora", version=4))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_the_run_leaves_no_directory(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    config = card_config(tiny_sd3_dir)
    broken = bare_run(tmp_path / "run", config, trained_state(config.model))
    put_json(broken, paths.metrics_path(1, 1), {"update": 1})
    with pytest.raises(CorruptFile, match=r"metrics/update_000001\.i0001\.json"):
        export_run(broken, ExportRequest(out=tmp_path / "lora"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_kohya_refuses_what_it_cannot_name_before_anything_is_written(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    config = card_config(tiny_sd3_dir, 'model.lora.targets=["attn.to_q","norm1.linear"]')
    store = bare_run(tmp_path / "run", config, trained_state(config.model))
    with pytest.raises(ConfigError, match=r"norm1\.linear has no settled name"):
        export_run(store, ExportRequest(out=tmp_path / "lora", fmt="kohya"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
