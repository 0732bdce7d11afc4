"""A FLUX model through the whole system: a published recipe cut down to seconds, its resume, its frozen evaluation and its export."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from common.errors import ConfigError, ModelError
from common.policy.load import load_policy
from common.store.audit import audit
from common.store.run_store import RunStore
from deploy.config import RunConfig, load_config
from deploy.doctor.gpu import model_bytes
from deploy.gates import check_config
from deploy.lora.export import ExportRequest, export_run
from deploy.model_card.loading import load_code
from deploy.model_card.sources import base_facts
from deploy.report.eval_table import describe_protocol
from deploy.session import run_session
from deploy.subjects import JudgeOptions, SubjectKind, read_subject
from tests.run_fixtures import QUIET, SMALL, history_digests, local_options, published_digests, small_config

SIZES = (
    "model.dtype=float32", "model.device=cpu", "model.height=64", "model.width=64", "model.max_sequence_length=64", "model.lora.alpha=8",
    "prompts.train=deploy/prompts/tiny-geneval/train.jsonl", "prompts.test=deploy/prompts/tiny-geneval/test.jsonl",
    "rollout.num_workers=1", "learner.num_ranks=1", "rollout.window.kind=first", "rollout.window.size=2", "learner.objective.kl_beta=0.01",
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


def test_its_exported_lora_and_another_familys_run_are_evaluated(
    run: RunStore, tiny_flux_dir: Path, tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    export_run(run, ExportRequest(out=tmp_path / "lora", snapshot="live", card_samples=False))
    judge = flux_config(tiny_flux_dir)
    subject = read_subject(str(tmp_path / "lora"), judge, JudgeOptions())
    assert (subject.kind, subject.config.model.embedded_guidance) == (SubjectKind.LORA, 3.5)
    assert subject.lora is not None
    policy = load_policy(subject.config.model)
    assert policy.load_adapter(subject.lora.state) == policy.num_adapter_modules
    small = small_config(
        tiny_sd3_dir, "tiny-geneval-grpo", "schedule.num_updates=1", "schedule.max_staleness=0", "evaluation.at_start=false"
    )
    run_session(small, local_options(tmp_path / "sd3"), QUIET)
    other = read_subject(str(tmp_path / "sd3"), judge, JudgeOptions())  # told nothing that its own network does not take
    told = other.config.model
    assert (told.family, told.embedded_guidance, told.max_sequence_length, told.height) == ("sd3", 0.0, 0, 64)


def test_an_embedded_guidance_that_does_not_fit_ends_a_run_at_its_gates(tiny_flux_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"guidance-distilled and model\.embedded_guidance is 0"):
        check_config(flux_config(tiny_flux_dir, "model.embedded_guidance=0"))


def test_single_file_copies_beside_the_parts_are_no_part_of_the_models_size(tiny_flux_dir: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_flux_dir, tmp_path / "model")
    before = model_bytes(flux_config(root))
    assert before == sum(file.stat().st_size for file in root.glob("*/*.safetensors"))
    shutil.copy(root / "transformer" / "diffusion_pytorch_model.safetensors", root / "flux1-dev.safetensors")
    assert model_bytes(flux_config(root)) == before
    assert model_bytes(flux_config(tmp_path / "nowhere")) == 0


def test_the_cards_code_sets_the_runs_own_grid(tiny_flux_dir: Path) -> None:
    config = flux_config(tiny_flux_dir, "model.grid_shift=3.0", "evaluation.guidance_scale=2.0")
    program = load_code("diffusers", config, base_facts(str(tiny_flux_dir)), "a red circle")
    assert 'negative_prompt="", true_cfg_scale=2.0' in program
    names: dict[str, object] = {}
    exec(program[: program.index("pipe.load_lora_weights")], names)  # the test's subject: what the card tells its reader to run
    scheduler = names["pipe"].scheduler  # type: ignore[attr-defined]
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    torch.testing.assert_close(scheduler.sigmas, load_policy(config.model, with_vae=False, with_text=False).sigmas(4), atol=1e-6, rtol=0)


def test_a_run_on_a_directory_of_another_family_ends_at_its_gates(tiny_sd3_dir: Path, tiny_flux_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"set model\.family=sd3"):
        check_config(flux_config(tiny_sd3_dir))
    with pytest.raises(ModelError, match=r"set model\.family=flux"):
        check_config(small_config(tiny_flux_dir, "tiny-geneval-grpo"))
