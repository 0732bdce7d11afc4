"""Everything that a model card tells of one published version, read from the run's files; what they lack stays empty."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.store.audit import AuditReport, audit
from common.store.eval_results import read_result
from common.store.run_store import RunStore
from deploy.config import RunConfig
from deploy.model_card.cost import RunCost, read_cost
from deploy.model_card.pictures import CurveFile, Samples, curve_files, draw_samples
from deploy.model_card.sources import BaseFacts, PromptFacts, RewardFacts, base_facts, prompt_facts, reward_facts, trained_prompts
from deploy.redact import Redactor, known_names, known_secrets, token_files
from deploy.report.compare import TableRow, run_table
from deploy.report.eval_table import EvalLine, describe_protocol, eval_lines
from deploy.report.image_curves import SensorRecord, read_sensors
from deploy.report.reader import read_history
from deploy.report.records import EvaluationRecord, RunHistory
from deploy.report.samples import MediaShelf


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRequest:
    """What is exported."""

    version: int
    snapshot: str  # live, ema or behavior
    fmt: str  # peft, diffusers or kohya
    digest: str  # of the published version
    with_samples: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedLine:
    """One line of the card's evaluation table."""

    tuned: EvalLine
    base: EvalLine | None  # None: no evaluation of the base
    change: TableRow | None  # over the prompts that both sides scored

    @property
    def task(self) -> str:
        """What the line is called."""
        return self.tuned.task or "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class BetterVersion:
    """An earlier version with a higher frozen score than the one that the card shows."""

    reward: str
    version: int
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """One version of a run."""

    request: CardRequest
    config: RunConfig
    shown_config: Mapping[str, Any]  # the same, without secrets, the user's name or home directory
    history: RunHistory  # as far as the version
    base: BaseFacts
    train_prompts: PromptFacts
    test_prompts: PromptFacts
    trained_prompts: int  # different prompts in the manifests
    trained_groups: int
    rewards: tuple[RewardFacts, ...]
    evaluation: EvaluationRecord | None  # the newest one that is no newer than the version; None: none was made
    lines: tuple[EvaluatedLine, ...]
    protocol: str  # in one line
    cost: RunCost
    sensors: SensorRecord
    curves: tuple[CurveFile, ...]
    samples: Samples | None
    audit: AuditReport

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation is of the exported weights themselves."""
        found = self.evaluation
        return found is not None and (found.version, found.snapshot) == (self.request.version, self.request.snapshot)

    @property
    def better_versions(self) -> list[BetterVersion]:
        """For each reward the best earlier version, where one scored higher than the evaluation that the card shows."""
        found = []
        for name, result in self.evaluation.rewards.items() if self.evaluation else ():
            earlier = [
                BetterVersion(reward=name, version=record.version, mean=mean)
                for record in self.history.evaluations
                if name in record.rewards and (mean := record.rewards[name].mean) is not None and mean > (result.mean or 0.0)
            ]
            found += [max(earlier, key=lambda one: one.mean)] if earlier and result.mean is not None else []
        return found


def read_facts(store: RunStore, config: RunConfig, request: CardRequest) -> CardFacts:
    """Return what the run's files tell of a version.

    Raises:
        CorruptFile: a file that is there breaks its form; the message names it.
        StoreError: the run cannot be read.
    """
    history = _until(read_history(store), request.version)
    shelf = MediaShelf(store)
    tuned = history.newest
    rows = run_table(history)
    sensors = read_sensors(history, shelf)
    shown = _shown(history.config)
    evaluated = [record for record in (history.base, tuned) if record is not None]
    is_exact = tuned is not None and (tuned.version, tuned.snapshot) == (request.version, request.snapshot)
    num_prompts, num_groups = trained_prompts(store, request.version)
    return CardFacts(
        request=request, config=config, shown_config=shown, history=history, base=_shown_base(config, shown),
        train_prompts=_shown_prompts(config.prompts.train, shown["prompts"]["train"]),
        test_prompts=_shown_prompts(config.prompts.test, shown["prompts"]["test"]),
        trained_prompts=num_prompts, trained_groups=num_groups, rewards=tuple(reward_facts(store, config, evaluated)),
        evaluation=tuned, lines=tuple(_lines(store, history.base, tuned, rows)),
        protocol=describe_protocol(tuned.protocol, tuned.digest) if tuned else "",
        cost=read_cost(store, history, rows if is_exact else [], request.version), sensors=sensors,
        curves=tuple(curve_files(history, sensors)),
        samples=draw_samples(history, shelf, tuned) if request.with_samples and tuned else None, audit=audit(store),
    )  # fmt: skip


def _until(history: RunHistory, version: int) -> RunHistory:
    """The run as it stood when the version was published: nothing later may speak for it."""
    return replace(
        history, updates=tuple(record for record in history.updates if record.update <= version),
        evaluations=tuple(record for record in history.evaluations if record.version <= version),
    )  # fmt: skip


def _shown(config: Mapping[str, Any]) -> dict[str, Any]:
    redactor = Redactor(known_secrets(os.environ, token_files(os.environ)), names=known_names())
    shown: dict[str, Any] = redactor.tree(json.loads(json.dumps(config)))
    return shown


def _shown_base(config: RunConfig, shown: Mapping[str, Any]) -> BaseFacts:
    return replace(base_facts(config.model.path), path=str(shown["model"]["path"]))


def _shown_prompts(path: str, shown: object) -> PromptFacts:
    return replace(prompt_facts(path), path=str(shown))


def _lines(store: RunStore, base: EvaluationRecord | None, tuned: EvaluationRecord | None, rows: Sequence[TableRow]) -> list[EvaluatedLine]:
    if tuned is None:
        return []
    before = _by_name(eval_lines(read_result(store, base.directory))) if base is not None else {}
    changes = {(row.reward, row.task): row for row in rows}
    return [
        EvaluatedLine(tuned=line, base=before.get(key), change=changes.get(key))
        for key, line in _by_name(eval_lines(read_result(store, tuned.directory))).items()
    ]


def _by_name(lines: Sequence[EvalLine]) -> dict[tuple[str, str], EvalLine]:
    return {(line.reward, line.task): line for line in lines}
