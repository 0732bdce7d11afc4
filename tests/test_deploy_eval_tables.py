"""Evaluation's numbers: bootstrap intervals against a slow oracle and a closed form, the protocol's digest, LoRA files, eval leases in training."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from scipy.stats import binom

from common.config import config_digest
from common.errors import ConfigError, DataError, ModelError
from common.policy.adapters import write_adapter_bytes
from common.policy.config import LoraConfig, ModelConfig
from common.policy.fake import FakePolicy
from common.policy.load import load_policy
from common.store import paths
from common.store.audit import audit
from common.store.claim import claim_run
from common.store.eval_results import read_result
from common.store.evaluations import EvalProtocol
from common.store.prompts_order import PromptOrder
from common.store.run_store import RunStore
from common.types import Manifest, Prompt, SnapshotInfo, Stop, Wait
from deploy.commands.evaluation import show_evaluation
from deploy.compose import compose
from deploy.config import load_config
from deploy.evaluate import EvaluationRequest, evaluate, protocol_of
from deploy.fakes import parse_fakes
from deploy.gates import PromptSets
from deploy.lora.export import export_adapter
from deploy.lora.files import read_lora
from deploy.report.bootstrap import by_prompt, estimates, resampled_means
from deploy.report.compare import BOOTSTRAP_SEED, MEAN, NUM_RESAMPLES, run_table
from deploy.report.eval_table import describe_protocol, eval_lines
from deploy.report.pairs import pair_lines
from deploy.report.reader import read_history
from learner.build import LearnerProcess
from reward_servers.build import build_server
from reward_servers.server import scoring_loop
from rollout_workers.build import build_local_worker
from tests.report_runs import TASKS, evaluation, start
from tests.run_fixtures import QUIET, SMALL
from tests.simulated_run import PROMPTS, SimulatedTime, WatchedCoordinator, small_fake_config


def oracle_interval(tasks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Percentile bootstrap within tasks, one resample and one prompt at a time; the draws are the product's own streams."""
    totals = [0.0] * NUM_RESAMPLES
    for position, values in enumerate(tasks):
        generator = np.random.default_rng([BOOTSTRAP_SEED, position])
        draws = np.concatenate([generator.integers(0, len(values), (1000, len(values))) for _ in range(NUM_RESAMPLES // 1000)])
        for index in range(NUM_RESAMPLES):
            total = 0.0
            for drawn in draws[index]:
                total += values[drawn]
            totals[index] += total / len(values) / len(tasks)
    ordered = sorted(totals)
    return tuple(_quantile(ordered, share) for share in (0.025, 0.975))  # type: ignore[return-value]


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between order statistics."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def test_an_interval_equals_a_slow_bootstrap_over_prompts_within_tasks() -> None:
    tasks = [[0.0, 1.0, 0.25, 0.5, 1.0], [0.9, 0.1, 0.4]]
    *_, ((whole),) = estimates([np.array(values)[:, None] for values in tasks])
    low, high = oracle_interval(tasks)
    # sums in another order: 1e-12 is far above rounding and far below a resample's step
    assert (whole.low, whole.high) == pytest.approx((low, high), abs=1e-12)
    assert whole.value == pytest.approx((2.75 / 5 + 1.4 / 3) / 2)


@pytest.mark.parametrize(("rights", "size"), [(20, 40), (3, 60), (150, 200)])
def test_of_right_and_wrong_prompts_the_interval_is_the_binomials(rights: int, size: int) -> None:
    """Closed form: the mean of a resample of n zeros and ones is Binomial(n, p) / n, so its quantiles are known."""
    values = np.array([1.0] * rights + [0.0] * (size - rights))[:, None]
    ((found,), _) = estimates([values])
    for share, bound in ((0.025, found.low), (0.975, found.high)):
        exact = binom.ppf(share, size, rights / size) / size
        assert abs(bound - exact) <= 1 / size + 1e-12  # 10,000 resamples may miss a quantile by one right prompt
    spread = resampled_means(values, 0).std()
    assert spread == pytest.approx(np.sqrt(rights / size * (1 - rights / size) / size), rel=0.03)  # sd of a sd from 10,000: 0.7 %


def test_equal_prompts_have_an_interval_of_no_width_and_images_of_a_prompt_count_once() -> None:
    rows = [("a", "p", (1.0,)), ("a", "p", (0.0,)), ("a", "q", (0.5,))]
    tasks = by_prompt(rows)
    assert tasks["a"].tolist() == [[0.5], [0.5]]
    ((found,), _) = estimates(list(tasks.values()))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def result_of_rows(rows: Sequence[tuple[str, str, float | None]]) -> dict[str, Any]:
    """A result.json of one reward, its means by hand."""
    tasks: dict[str, Any] = {}
    for tag in dict.fromkeys(tag for tag, _, _ in rows):
        known = [value for own, _, value in rows if own == tag and value is not None]
        tasks[tag] = {"mean": sum(known) / len(known) if known else None, "n": len(known)}
    means = [task["mean"] for task in tasks.values() if task["mean"] is not None]
    entry = {"mean": sum(means) / len(means) if means else None, "tasks": tasks, "coverage": 1.0}
    told = [{"prompt_id": name, "tag": tag, "scores": {"r": value}} for tag, name, value in rows]
    return {"rewards": {"r": entry}, "rows": told}


def test_the_table_of_an_evaluation_has_the_mean_over_tasks_first_and_says_what_it_rests_on() -> None:
    result = result_of_rows([("b", "1", 1.0), ("b", "2", 0.0), ("a", "3", 1.0), ("a", "4", None), ("c", "5", None)])
    mean, *tasks = eval_lines(result)
    assert (mean.task, mean.is_mean, mean.mean, mean.num_prompts, mean.num_images) == (MEAN, True, 0.75, 3, 3)
    assert [(line.task, line.mean, line.num_images) for line in tasks] == [("b", 0.5, 2), ("a", 1.0, 1), ("c", None, 0)]
    assert (tasks[0].low, tasks[0].high) == (0.0, 1.0)
    assert (tasks[2].low, tasks[2].high) == (None, None)  # nothing scored is no number


def test_a_difference_has_the_same_interval_here_and_in_a_runs_report() -> None:
    store = RunStore("memory://pairs-report")
    start(store)
    for version, shares in ((0, (0.3, 0.6)), (5, (0.6, 0.5))):
        draw = np.random.default_rng(version)
        evaluation(store, version, {tag: [float(v) for v in draw.random(8) < p] for tag, p in zip(TASKS[:2], shares, strict=True)})
    history = read_history(store)
    lines = pair_lines("geneval_strict", history.evaluations[0], history.evaluations[1])
    assert [line.row for line in lines] == run_table(history)


def test_a_tie_counts_half_a_win_and_the_other_way_round_the_rate_is_the_rest() -> None:
    store = RunStore("memory://pairs-wins")
    start(store)
    evaluation(store, 0, {"counting": [0.0, 0.0, 1.0, 1.0, None]})
    evaluation(store, 5, {"counting": [1.0, 0.0, 1.0, 0.0, 1.0]})
    first, second = read_history(store).evaluations
    (line,), (back,) = pair_lines("geneval_strict", first, second), pair_lines("geneval_strict", second, first)
    assert (line.wins, line.ties, line.losses, line.row.n) == (1, 2, 1, 4)  # the fifth has no score on one side
    assert line.win_rate.value == 0.5
    assert back.win_rate.low == pytest.approx(1 - line.win_rate.high)
    assert (line.row.before, line.row.after, line.row.difference) == (0.5, 0.5, 0.0)


def test_the_digest_of_the_recorded_demo_stands_and_the_text_length_is_part_of_it() -> None:
    protocol = protocol_of(load_config("tiny-demo", []))
    assert protocol.digest() == "8fc640ab94d7"  # what runs before model.max_sequence_length was covered have stored
    assert "max_sequence_length" not in protocol.described()
    longer = EvalProtocol(config=protocol.config, prompts=protocol.prompts, rewards=protocol.rewards, max_sequence_length=256)
    assert longer.digest() != protocol.digest()
    assert longer.described() == {**protocol.described(), "max_sequence_length": 256}
    assert "256 T5 tokens" in describe_protocol(longer.described(), longer.digest())
    assert protocol_of(load_config("tiny-demo", ["model.max_sequence_length=256"])).digest() == longer.digest()


GENEVAL_LINES = (
    '{"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a photo of a square"}\n'
    '{"tag": "counting", "include": [{"class": "circle", "count": 3}], "exclude": [{"class": "circle", "count": 4}], '
    '"prompt": "a photo of three circles"}\n'
    '{"tag": "position", "include": [{"class": "star", "count": 1}, {"class": "heart", "count": 1, "position": ["left of", 0]}], '
    '"prompt": "a photo of a heart left of a star"}\n'
)
OCR_LINES = 'A shop window that says "OPEN" in red letters.\nA poster with the words "Summer Sale".\n'


def small_sets(model: Path, *sets: str) -> tuple[str, ...]:
    return (*SMALL, f'model.path="{model}"', *sets)


def test_genevals_metadata_and_ocr_txt_are_evaluated_as_they_are(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    geneval, ocr = tmp_path / "metadata.jsonl", tmp_path / "ocr.txt"
    geneval.write_text(GENEVAL_LINES)
    ocr.write_text(OCR_LINES)
    strict = ('evaluation.rewards=["geneval_strict"]', "reward.1.name=geneval_strict")
    request = EvaluationRequest(
        target=str(tiny_sd3_dir), recipe="tiny-geneval", prompts=str(geneval), sets=small_sets(tiny_sd3_dir, *strict)
    )
    result = evaluate(request, QUIET)
    assert [(row["prompt_id"], row["tag"]) for row in result["rows"]] == [("1", "single_object"), ("2", "counting"), ("3", "position")]
    assert set(result["rewards"]["geneval_strict"]["tasks"]) == {"single_object", "counting", "position"}
    protocol = protocol_of(load_config("tiny-geneval", [*small_sets(tiny_sd3_dir), f'prompts.test="{ocr}"']))
    assert [prompt.text for prompt in protocol.prompts] == OCR_LINES.splitlines()
    quoted = ("reward.1.name=geneval_strict", 'evaluation.rewards=["geneval_strict"]', f'prompts.test="{ocr}"')
    with pytest.raises(DataError, match="2 of 2 prompts lack what their rewards need: line 1"):
        protocol_of(load_config("tiny-geneval", [*small_sets(tiny_sd3_dir, *quoted)]))


@pytest.fixture(scope="module")
def exported(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained LoRA of rank 4 and alpha 12, in both layouts."""
    model = ModelConfig(path=str(tiny_sd3_dir), lora=LoraConfig(rank=4, alpha=12))
    policy = load_policy(model)
    generator = torch.Generator().manual_seed(3)
    state = {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in policy.read_adapter().items()}
    told = {"ema": SnapshotInfo(num_modules=policy.num_adapter_modules, canary=0.1)}
    content, _ = write_adapter_bytes({"ema": state}, told, incarnation=1, version=7)
    place = tmp_path_factory.mktemp("lora")
    return {fmt: export_adapter(content, "ema", model, place / fmt, fmt) for fmt in ("peft", "diffusers")}


def evaluate_lora(directory: Path, model: Path, out: Path) -> dict[str, Any]:
    return evaluate(EvaluationRequest(target=str(directory), recipe="tiny-geneval", sets=small_sets(model), out=out), QUIET)


def test_a_lora_gives_the_same_file_twice_to_the_byte_and_the_same_numbers_in_both_layouts(
    exported: Mapping[str, Path], tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    once = evaluate_lora(exported["peft"], tiny_sd3_dir, tmp_path / "once.json")
    evaluate_lora(exported["peft"], tiny_sd3_dir, tmp_path / "again.json")
    other = evaluate_lora(exported["diffusers"], tiny_sd3_dir, tmp_path / "other.json")
    assert (tmp_path / "once.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert once["rows"] == other["rows"]
    assert once["subject"]["num_modules"] == other["subject"]["num_modules"] == 15
    base = evaluate(EvaluationRequest(target=str(tiny_sd3_dir), recipe="tiny-geneval", sets=small_sets(tiny_sd3_dir)), QUIET)
    assert once["subject"]["canary"] > 0.01 and base["subject"]["canary"] == 0.0
    assert base["rows"] != once["rows"]
    stored = json.loads((tmp_path / "once.json").read_text())
    assert stored["intervals"][0]["low"] <= stored["intervals"][0]["mean"] <= stored["intervals"][0]["high"]
    assert "percentile bootstrap" in stored["interval_method"]


def test_the_protocol_is_printed_with_the_numbers(exported: Mapping[str, Path], tiny_sd3_dir: Path, tmp_path: Path) -> None:
    result = evaluate_lora(exported["peft"], tiny_sd3_dir, tmp_path / "result.json")
    sink = io.StringIO()
    show_evaluation(result, Console(file=sink, width=200))
    shown = sink.getvalue()
    for part in (f"protocol {result['protocol_digest']}: ODE, 2 steps, guidance (CFG) 1, seed 20250505", "8 prompts (digest", "snapshot ema",
                 "jpeg_compressibility", "15 LoRA modules bound", "percentile bootstrap"):  # fmt: skip
        assert part in shown


def rewrite(directory: Path, target: Path, rename: Any, **config: Any) -> Path:
    """A copy of a peft export with other keys or another config."""
    from safetensors.torch import load_file

    target.mkdir()
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({rename(name): tensor.clone() for name, tensor in tensors.items()}, target / "adapter_model.safetensors")
    told = json.loads((directory / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(told))
    return target


def test_a_lora_that_binds_nothing_or_only_in_part_is_refused_with_its_keys(
    exported: Mapping[str, Path], tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    source = exported["peft"]
    foreign = rewrite(source, tmp_path / "foreign", lambda name: name.replace("transformer_blocks", "down_blocks"))
    with pytest.raises(
        ModelError, match=r"binds 0 modules of the base: its 30 keys are base_model\.model\.down_blocks\.0.*transformer_blocks"
    ):
        read_lora(foreign, tiny_sd3_dir)
    part = rewrite(source, tmp_path / "part", lambda name: name.replace("transformer_blocks.0.attn.to_q", "text_encoder.0.to_q"))
    with pytest.raises(ModelError, match=r"2 of 30 tensors bind to no module of the base \(text_encoder\.0\.to_q"):
        read_lora(part, tiny_sd3_dir)
    dora = rewrite(source, tmp_path / "dora", lambda name: name, use_dora=True)
    with pytest.raises(ModelError, match="use_dora = True; a plain LoRA is read"):
        read_lora(dora, tiny_sd3_dir)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        read_lora(tmp_path / "empty", tiny_sd3_dir)
    with pytest.raises(ConfigError, match="needs --recipe"):
        evaluate(EvaluationRequest(target=str(source)), QUIET)


def test_rank_and_alpha_come_from_the_file_and_a_bare_file_scales_by_one(
    exported: Mapping[str, Path], tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    assert [(lora.config.rank, lora.config.alpha) for lora in (read_lora(path, tiny_sd3_dir) for path in exported.values())] == [
        (4, 12)
    ] * 2
    tensors = load_file(exported["diffusers"] / "pytorch_lora_weights.safetensors")
    bare, told = tmp_path / "bare", tmp_path / "told"
    for folder in (bare, told):
        folder.mkdir()
    save_file(tensors, bare / "pytorch_lora_weights.safetensors")
    assert read_lora(bare, tiny_sd3_dir).config.alpha == 4  # diffusers reads it so: alpha = rank
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    save_file(tensors | {f"{name}.alpha": torch.tensor(8.0) for name in modules}, told / "pytorch_lora_weights.safetensors")
    assert read_lora(told, tiny_sd3_dir).config.alpha == 8


class EvalWatcher(WatchedCoordinator):
    """Notes when evaluation sheets were leased."""

    def ask_rollout(self, slot: str) -> Any:
        lease = super().ask_rollout(slot)
        if not isinstance(lease, Stop | Wait) and lease.directory:
            self.sheets = [*self.__dict__.get("sheets", []), (self._watch_clock(), lease.directory)]
        return lease


def simulate_evaluated(url: str, every: int) -> tuple[RunStore, EvalWatcher]:
    """Twelve updates of 4 s by four workers of 3.2 s a group; an evaluation has six sheets of one prompt."""
    sets = (
        "rollout.num_workers=4",
        "schedule.num_updates=12",
        "schedule.max_staleness=1",
        f"evaluation.every={every}",
        "evaluation.sheet_size=1",
    )
    config = small_fake_config(*sets, 'evaluation.rewards=["geneval_strict"]')
    prompts = tuple(Prompt(id=f"t{index}", text=f"test {index}") for index in range(6))
    config = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"rewards": (config.reward[0].name,), "at_start": bool(every)})}
    )
    parts = compose(
        config, PromptSets(train=PROMPTS, test=prompts if every else ()), url, 1, parse_fakes("rollout=3.2s,learner=4s,reward=0.3s")
    )
    time, store = SimulatedTime(), RunStore(url)
    for _ in claim_run(store, config.model_dump(mode="json"), config_digest=config_digest(config)):
        pass
    desk = EvalWatcher(store, parts.coordinator, incarnation=1, prompt_for=PromptOrder(PROMPTS, 0), clock=time.clock, wall=time.clock)
    desk.watch(time.clock)
    bodies = {"learner": time.drive(LearnerProcess(parts.learner, desk, pause=time.pause).loop())}
    for worker in parts.workers:
        bodies[worker.slot] = time.drive(build_local_worker(worker, desk, FakePolicy(), store, pause=time.pause).loop())
    for server in parts.servers:
        bodies[server.slot] = time.drive(scoring_loop(build_server(server, desk, pause=time.pause)))
    time.run(bodies, 10_000.0)
    desk.outcome().raise_if_failed()
    return store, desk


def test_periodic_evaluations_run_through_eval_leases_while_training_goes_on() -> None:
    """Sheets are leased between updates; the run pays the workers' time for them (6 x 3.2 s over 4 workers), and never stands still."""
    plain = simulate_evaluated("memory://plain-12", 0)[1]
    store, desk = simulate_evaluated("memory://evaluated-12", 4)
    results = [path for path in store.list(paths.EVAL) if path.endswith("/result.json")]
    assert [read_result(store, path.removesuffix("/result.json"))["version"] for path in results] == [0, 4, 8, 12]
    during = [sum(at < desk.finished_at[update] for at, _ in desk.sheets) for update in (4, 8, 12)]
    assert during[0] >= 1 and during[-1] >= 13  # the evaluations of 0, 4 (all sheets) and 8 (a sheet at least) began before the last update
    for directory in {directory for _, directory in desk.sheets} - {desk.sheets[-1][1]}:
        own = [at for at, name in desk.sheets if name == directory]
        assert any(min(own) <= finished <= max(own) + 3.2 for finished in desk.finished_at.values()), f"no update ended during {directory}"
    gaps = np.diff([desk.finished_at[update] for update in sorted(desk.finished_at)])
    assert gaps.max() <= 4.0 + 2 * 3.2 + 1.0  # a learner's update, two groups that stood behind sheets, polls
    extra = desk.finished_at[12] - plain.finished_at[12]
    assert extra <= 3 * 6 * 3.2 / 4 + 3 * 3.2  # the three evaluations that training saw, and a rounding of a lease each
    assert all(isinstance(manifest, Manifest) for manifest in desk.manifests.values())
    assert audit(store).violations == ()
