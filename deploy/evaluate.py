"""`flowfleet eval`: the rollout and scoring loops, in one process, on a desk that only evaluates."""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import ConfigError, FlowfleetError, GateError
from common.policy.adapters import read_publication, read_snapshots, write_adapter_bytes
from common.policy.base import Policy
from common.policy.load import load_policy
from common.prompts import check_prompts, read_prompts
from common.store import paths
from common.store.eval_results import write_result
from common.store.evaluations import EvalBoard, EvalProtocol
from common.store.ledger_scoring import GrantedScoring, ScoreKey
from common.store.recovery import score_summary
from common.store.run_store import RunStore
from common.types import LeaseKind, LoadReceipt, Publication, RolloutLease, ScoringLease, Stop, Wait
from deploy.compose import RunParts, compose, evaluation_protocol, resolved_model, single_worker
from deploy.config import RunConfig, shipped_path
from deploy.gates import PromptSets, TaggedScorer
from deploy.local_run import IDLE_S, take_turns
from deploy.report.bootstrap import METHOD
from deploy.report.eval_table import eval_lines
from deploy.subjects import JudgeOptions, Subject, judging_config, read_subject
from reward_servers.build import build_server
from reward_servers.environments import configured_scorer, release_scorers
from reward_servers.server import scoring_loop
from rollout_workers.build import build_local_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate."""

    target: str  # a run, an exported LoRA or a base model directory
    recipe: str | None = None
    prompts: str | None = None
    snapshot: str | None = None
    version: int | None = None
    sets: tuple[str, ...] = ()
    out: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnEvaluation:
    """A finished evaluation in a store of its own."""

    store: RunStore  # memory://
    directory: str
    result: Mapping[str, Any]  # of result.json
    num_modules: int  # LoRA modules bound
    canary: float  # relative change of the velocity on the fixed input; 0 = the base


class EvalDesk:
    """RolloutDesk and ScoringDesk of one evaluation, in one process; over when every sheet is scored.

    Lease ids count from 0, so that the same weights give the same files to the byte.
    """

    def __init__(self, store: RunStore, board: EvalBoard, publication: Publication) -> None:
        self._store, self._board, self._numbers = store, board, count()
        evaluation = board.request(publication)
        if evaluation is None:
            raise ConfigError("eval: the protocol has no prompts or no rewards; set prompts.test and evaluation.rewards")
        self.evaluation = evaluation

    @property
    def is_over(self) -> bool:
        """Whether every sheet is drawn and scored."""
        return bool(self._board.finished())

    def ask_rollout(self, slot: str) -> RolloutLease | Wait | Stop:
        """Lease the next sheet."""
        if self.is_over:
            return Stop(reason="the evaluation is done")
        lease_id = f"e-{next(self._numbers):012x}"
        granted = self._board.lease(slot, lease_id, time.monotonic())
        if granted is None:
            return Wait(seconds=0.0, reason="scores")
        evaluation, sheet = granted
        return RolloutLease(
            lease_id=lease_id, kind=LeaseKind.EVAL, number=sheet.number, prompts=sheet.prompts, publication=evaluation.publication,
            snapshot=evaluation.snapshot, directory=evaluation.directory,
        )  # fmt: skip

    def confirm_weights(self, slot: str, receipt: LoadReceipt) -> None:
        """The worker compared its receipt with the publication already."""

    def commit_rollout(self, lease_id: str, path: str, seconds: float) -> None:
        """A sheet is drawn."""
        sheet = paths.parse_sheet(path)
        assert sheet is not None, "an evaluation writes sheets only"
        self._board.drawn(path.rpartition("/")[0], sheet.number, lease_id)

    def fail_rollout(self, lease_id: str, error: str) -> None:
        """Raise: an evaluation without all its images is none."""
        raise FlowfleetError(f"eval: a sheet could not be drawn: {error}")

    def return_rollout(self, lease_id: str, reason: str) -> None:
        """Take a sheet back."""
        self._board.leases.end(lease_id)

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Nothing expires in one process."""

    def ask_scoring(self, slot: str, reward: str, limit: int) -> tuple[ScoringLease, ...] | Wait | Stop:
        """Lease sheets to score."""
        if self.is_over:
            return Stop(reason="the evaluation is done")
        granted = self._board.lease_scores(reward, limit, slot=slot, now=time.monotonic(), new_id=lambda: f"s-{next(self._numbers):012x}")
        return tuple(self._lease(each) for each in granted) or Wait(seconds=0.0, reason="images")

    def _lease(self, granted: GrantedScoring) -> ScoringLease:
        key = granted.key
        return ScoringLease(
            lease_id=granted.lease_id, kind=LeaseKind.EVAL, number=key.number, reward=key.reward, group_lease_id=key.lease_id,
            media_path=paths.sheet_path(key.directory, key.number, key.lease_id), directory=key.directory,
            prompts=self.evaluation.sheets[key.number].prompts,
        )  # fmt: skip

    def commit_scores(self, lease_id: str, path: str) -> None:
        """A sheet is scored."""
        summary, name = score_summary(self._store, path), paths.parse_sheet_score(path)
        assert name is not None, "an evaluation scores sheets only"
        key = ScoreKey(number=name.number, lease_id=name.lease_id, reward=name.reward, directory=path.rpartition("/")[0])
        self._board.scored(key, summary.values)
        self._board.scoring.leases.end(lease_id)

    def fail_scoring(self, lease_id: str, error: str) -> None:
        """Raise: the reward cannot judge."""
        raise FlowfleetError(f"eval: a sheet could not be scored: {error}")

    def return_scoring(self, lease_id: str, reason: str) -> None:
        """Take a sheet back."""
        self._board.scoring.leases.end(lease_id)

    def stop_scoring(self, lease_id: str, error: str) -> None:
        """Raise: the reward's config, or its hanging, ends the evaluation."""
        raise GateError("reward", f"eval: {error}")


def evaluate(request: EvaluationRequest, console: Console) -> dict[str, Any]:
    """Evaluate a run's weights, an exported LoRA or a base model under the frozen protocol; never writes into the run.

    Returns:
        The result as `result.json` holds it, with `digest_of_protocol`, its `subject`, and `intervals` by `interval_method`; the same
        weights give the same result, to the byte of the file `request.out`.

    Raises:
        ConfigError, DataError, ModelError: what was asked cannot be evaluated.
    """
    options = JudgeOptions(recipe=request.recipe, prompts=request.prompts, snapshot=request.snapshot, sets=request.sets)
    subject = read_subject(request.target, judging_config(request.target, request.recipe), options, request.version)
    drawn = draw_evaluation(subject, protocol_of(subject.config), console)
    result = dict(drawn.result) | {
        "digest_of_protocol": drawn.result["protocol_digest"],
        "subject": {"kind": subject.kind.value, "name": subject.name, "num_modules": drawn.num_modules, "canary": drawn.canary},
        "interval_method": METHOD,
        "intervals": [asdict(line) for line in eval_lines(drawn.result)],
    }
    if request.out is not None:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        request.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return result


def protocol_of(config: RunConfig) -> EvalProtocol:
    """The frozen evaluation of a configuration, its prompts read and checked against the rewards that judge. Raises DataError, ConfigError."""
    path = shipped_path(config.prompts.test)
    prompts = read_prompts(path)
    protocol = evaluation_protocol(config, PromptSets(train=(), test=prompts))
    wanted = {spec.name for spec in protocol.rewards}
    judges = [reward for reward in config.reward if reward.name in wanted]
    scorers = [configured_scorer(reward) for reward in judges]
    try:
        check_prompts(protocol.prompts, [TaggedScorer(*each) for each in zip(scorers, judges, strict=True)], path)
    finally:
        release_scorers(scorers)
    return protocol


def draw_evaluation(subject: Subject, protocol: EvalProtocol, console: Console) -> DrawnEvaluation:
    """Draw and score every sheet of the protocol, in a store of its own. Raises ModelError, ConfigError, GateError (other weights arrived)."""
    config, url = subject.config, f"memory://eval-{secrets.token_hex(6)}"
    store, parts = RunStore(url), compose(config, PromptSets(train=(), test=protocol.prompts), url, 1)
    policy = load_policy(resolved_model(config.model))
    publication = _publish(store, subject, policy)
    desk = EvalDesk(store, EvalBoard(protocol, parts.coordinator.ledger), publication)
    _drive(desk, parts, store, policy, console)
    result = write_result(store, desk.evaluation, protocol)
    told = publication.snapshots[protocol.config.snapshot]
    return DrawnEvaluation(
        store=store, directory=desk.evaluation.directory, result=result, num_modules=told.num_modules, canary=told.canary
    )


def _drive(desk: EvalDesk, parts: RunParts, store: RunStore, policy: Policy, console: Console) -> None:
    worker = build_local_worker(single_worker(parts), desk, policy, store)
    wanted = {spec.name for spec in parts.coordinator.protocol.rewards}
    servers = {server.reward.name: server for server in parts.servers if server.reward.name in wanted}
    loops: dict[str, Iterator[Wait]] = {"rollout": worker.loop()}
    loops |= {name: scoring_loop(build_server(server, desk)) for name, server in servers.items()}
    with console.status("evaluating"):
        while loops:
            take_turns(loops)
            time.sleep(IDLE_S)


def _publish(store: RunStore, subject: Subject, policy: Policy) -> Publication:
    """Put the weights into the evaluation's own store; the base model is a fresh adapter at version 0."""
    snapshot = subject.config.evaluation.snapshot
    if subject.run is not None and subject.version > 0:
        source = _published(subject, snapshot)
    else:
        state = policy.read_adapter() if subject.lora is None else subject.lora.state
        with policy.using(state):
            info = policy.inspect_adapter()
        source, _ = write_adapter_bytes({snapshot: state}, {snapshot: info}, incarnation=1, version=subject.version)
    given = read_publication(source, "adapter")
    path = paths.adapter_path(given.adapter.incarnation, given.adapter.version)
    store.create_exclusive(path, source, writer_id="eval")
    return read_publication(source, path)


def _published(subject: Subject, snapshot: str) -> bytes:
    """The published file of a run's version. Raises ConfigError when it was retired, or lacks the snapshot."""
    assert subject.run is not None, "a version is a run's"
    if not subject.path:
        kept = sorted(name[1] for path in subject.run.list(paths.POLICY) if (name := paths.parse_adapter(path)) is not None)
        raise ConfigError(f"eval: {subject.target} keeps no weights of version {subject.version}, only of {kept}; choose one of them")
    source = subject.run.read(subject.path)
    if snapshot not in (found := read_snapshots(source)):
        raise ConfigError(f"eval: snapshot {snapshot!r} was not published by this run, only {sorted(found)}; choose one of them")
    return source
