"""A FLUX model through the whole system: a published recipe cut down to seconds, its resume, its frozen evaluation and its export."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image

from common.errors import ModelError
from common.store.audit import audit
from common.store.run_store import RunStore
from deploy.config import RunConfig, load_config
from deploy.gates import check_config
from deploy.lora.export import ExportRequest, export_run
from deploy.report.eval_table import describe_protocol
from deploy.session import run_session
from tests.run_fixtures import QUIET, SMALL, history_digests, local_options, published_digests, small_config

SIZES = (
    "model.dtype=float32", "model.device=cpu", "model.height=64", "model.width=64", "model.max_sequence_length=64", "model.lora.alpha=8",
    "prompts.train=deploy/prompts/tiny-geneval/train.jsonl", "prompts.test=deploy/prompts/tiny-geneval/test.jsonl",
    "rollout.num_workers=1", "rollout.window.kind=first", "rollout.window.size=2", "learner.objective.kl_beta=0.01",
    "schedule.max_staleness=0", "schedule.num_updates=2", "store.max_bytes=2_000_000_000", "evaluation.sheet_size=8",
    "cluster.rollout_gpus=0", "cluster.learner_gpus=0",
)  # fmt: skip


def flux_config(model: Path, *sets: str) -> RunConfig:
    """flux1-pickscore as it is shipped, but for its sizes and its judge."""
    small = [item for item in SMALL if not item.startswith("reward.1.")]  # the recipe has one judge
    return load_config("flux1-pickscore", [*small, f'model.path="{model}"', *SIZES, *sets])


@pytest.fixture(scope="module")
def run(tiny_flux_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Two synchronous updates."""
    run_dir = tmp_path_factory.mktemp("runs") / "flux"
    run_session(flux_config(tiny_flux_dir), local_options(run_dir), QUIET)
    return RunStore(str(run_dir))


def test_a_run_trains_is_audited_clean_and_its_adapter_moves(run: RunStore, tiny_flux_dir: Path) -> None:
    report = audit(run)
    assert report.is_clean
    assert report.num_manifests == 2
    metrics = json.loads(run.read("metrics/update_000002.i0001.json"))
    assert metrics["learner"]["kl"] > 0  # after the first update the base is elsewhere
    assert len(set(published_digests(Path(run.url)).values())) == 2  # each update moves it


def test_a_run_cut_in_two_equals_the_whole_one(run: RunStore, tiny_flux_dir: Path, tmp_path: Path) -> None:
    run_session(flux_config(tiny_flux_dir, "schedule.num_updates=1"), local_options(tmp_path), QUIET)
    run_session(flux_config(tiny_flux_dir), local_options(tmp_path), QUIET)
    assert published_digests(tmp_path)[2] == published_digests(Path(run.url))[2]
    assert history_digests(tmp_path) == history_digests(Path(run.url))


def test_an_objective_over_clean_latents_trains_it_too(tiny_flux_dir: Path, tmp_path: Path) -> None:
    sets = [item for item in (*SMALL, *SIZES) if not item.startswith(("rollout.window", "learner.objective.kl_beta"))]
    config = load_config(
        "flux1-geneval-awm",
        [
            *sets,
            f'model.path="{tiny_flux_dir}"',
            "reward.1.use=train",
            "schedule.num_updates=1",
            "learner.objective.timesteps_per_sample=2",
        ],
    )
    run_session(config, local_options(tmp_path), QUIET)
    report = audit(RunStore(str(tmp_path)))
    assert (report.is_clean, report.num_manifests) == (True, 1)
    assert json.loads((tmp_path / "metrics/update_000001.i0001.json").read_text())["learner"]["grad_norm"] > 0


def test_the_protocol_of_its_evaluation_names_the_embedded_guidance(run: RunStore) -> None:
    protocol = json.loads(next(iter(Path(run.url).glob("eval/*/result.json"))).read_text())["protocol"]
    assert protocol["embedded_guidance"] == 3.5
    assert "64 T5 tokens, embedded guidance 3.5" in describe_protocol(protocol, "0" * 12)
    assert "grid shift 3" in describe_protocol(protocol | {"grid_shift": 3.0}, "0" * 12)


@pytest.mark.parametrize("fmt", ["diffusers", "peft"])
def test_the_cards_own_code_draws_what_a_pipeline_with_the_lora_draws(
    run: RunStore, tiny_flux_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str
) -> None:
    out = tmp_path / "lora"
    export_run(run, ExportRequest(out=out, fmt=fmt, snapshot="live"))
    (program,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "FluxPipeline" in program
    assert "guidance_scale=3.5" in program
    monkeypatch.chdir(out)
    names: dict[str, object] = {}
    exec(program, names)  # the test's subject: what the card tells its reader to run
    drawn = names["image"]
    assert isinstance(drawn, Image.Image)
    pipe = FluxPipeline.from_pretrained(str(tiny_flux_dir))
    alone = dict(names) | {"pipe": pipe}
    exec(program[program.index("image = pipe(") :], alone)
    assert drawn.size == (64, 64)
    assert not np.array_equal(np.asarray(drawn), np.asarray(alone["image"]))  # two steps of learning show


def test_a_run_on_a_directory_of_another_family_ends_at_its_gates(tiny_sd3_dir: Path, tiny_flux_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"set model\.family=sd3"):
        check_config(flux_config(tiny_sd3_dir))
    with pytest.raises(ModelError, match=r"set model\.family=flux"):
        check_config(small_config(tiny_flux_dir, "tiny-geneval-grpo"))
