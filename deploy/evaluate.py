"""`flowfleet eval`: the rollout and scoring loops, in one process, on a desk that only evaluates."""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import ConfigError, FlowfleetError
from common.policy.adapters import read_publication, read_snapshots, write_adapter_bytes
from common.policy.base import AdapterState, Policy
from common.policy.load import load_policy
from common.store import paths
from common.store.claim import newest_incarnation
from common.store.eval_results import write_result
from common.store.evaluations import EvalBoard
from common.store.ledger_scoring import GrantedScoring, ScoreKey
from common.store.recovery import adapters, score_summary
from common.store.run_store import RunStore
from common.types import LeaseKind, LoadReceipt, Publication, RolloutLease, ScoringLease, Stop, Wait
from deploy.compose import RunParts, compose, evaluation_protocol, resolved_model, single_worker
from deploy.config import RunConfig, load_config, resolve
from deploy.gates import load_prompts, make_scorers
from deploy.local_run import IDLE_S, take_turns
from deploy.options import run_config_of
from reward_servers.build import build_server
from reward_servers.server import scoring_loop
from rollout_workers.build import build_local_worker

BASE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate."""

    target: str  # a run or a model directory
    recipe: str | None = None
    prompts: str | None = None
    snapshot: str | None = None
    sets: tuple[str, ...] = ()
    out: Path | None = None


class EvalDesk:
    """RolloutDesk and ScoringDesk of one evaluation, in one process; over when every sheet is scored."""

    def __init__(self, store: RunStore, board: EvalBoard, publication: Publication) -> None:
        self._store, self._board = store, board
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
        lease_id = f"e-{secrets.token_hex(6)}"
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
        granted = self._board.lease_scores(reward, limit, slot=slot, now=time.monotonic(), new_id=lambda: f"s-{secrets.token_hex(6)}")
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


def evaluate(request: EvaluationRequest, console: Console) -> dict[str, Any]:
    """Evaluate a run's weights or a base model under the frozen protocol; never writes into the run.

    Returns:
        The result as `result.json` holds it, with `digest_of_protocol`.

    Raises:
        ConfigError, DataError, ModelError: what was asked cannot be evaluated.
    """
    config, source = _subject(request)
    prompts = load_prompts(config, make_scorers(config))
    url = f"memory://eval-{secrets.token_hex(6)}"
    store, parts = RunStore(url), compose(config, prompts, url, 1)
    policy = load_policy(resolved_model(config.model))
    publication = _publish(store, source, config.evaluation.snapshot, policy)
    protocol = evaluation_protocol(config, prompts)
    desk = EvalDesk(store, EvalBoard(protocol, parts.coordinator.ledger), publication)
    _drive(desk, parts, store, policy, console)
    result = write_result(store, desk.evaluation, protocol)
    result["digest_of_protocol"] = protocol.digest()
    if request.out is not None:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        request.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return result


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


def _subject(request: EvaluationRequest) -> tuple[RunConfig, bytes | None]:
    """The configuration that judges, and the published file to judge (None: the base model)."""
    store = RunStore(request.target)
    is_run = newest_incarnation(store) > 0
    if not is_run and request.recipe is None:
        raise ConfigError(
            f"eval: {request.target} holds no run; a model directory needs --recipe, whose protocol and rewards judge it; e.g. --recipe tiny-geneval"
        )
    config = load_config(request.recipe, []) if request.recipe else run_config_of(store)
    sets = [*request.sets]
    if not is_run:
        if request.snapshot not in (None, BASE):
            raise ConfigError(f"eval: {request.target} is a model directory, which has no snapshot {request.snapshot!r}; name a run")
        sets.append(f'model.path="{request.target}"')
    if request.prompts:
        sets.append(f'prompts.test="{request.prompts}"')
    if request.snapshot not in (None, BASE):
        sets.append(f'evaluation.snapshot="{request.snapshot}"')
    config = resolve(config.model_dump(mode="json", exclude_none=True), sets, request.target)
    if not is_run or request.snapshot == BASE:
        return config, None
    published = adapters(store)
    if not published:
        raise ConfigError(f"eval: {request.target} has published no version yet; wait for the first, or pass --snapshot base")
    return config, store.read(published[max(published)])


def _publish(store: RunStore, source: bytes | None, snapshot: str, policy: Policy) -> Publication:
    """Put the weights into the evaluation's own store; the base model is a fresh adapter at version 0."""
    if source is None:
        state: AdapterState = policy.read_adapter()
        content, adapter = write_adapter_bytes({snapshot: state}, {snapshot: policy.inspect_adapter()}, incarnation=1, version=0)
        path = paths.adapter_path(1, adapter.version)
        store.create_exclusive(path, content, writer_id="eval")
        return read_publication(content, path)
    snapshots = read_snapshots(source)
    if snapshot not in snapshots:
        raise ConfigError(f"eval: snapshot {snapshot!r} was not published by this run, only {sorted(snapshots)}; choose one of them")
    given = read_publication(source, "adapter")
    path = paths.adapter_path(given.adapter.incarnation, given.adapter.version)
    store.create_exclusive(path, source, writer_id="eval")
    return read_publication(source, path)
