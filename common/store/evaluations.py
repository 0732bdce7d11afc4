"""EvalBoard: evaluations under way. Pure: files come in as events, leases and finished evaluations come out.

An evaluation is pinned to one publication and snapshot. Its prompts are cut into sheets; a sheet has a number inside its
evaluation, the same for every version, so that seeds derived from (protocol seed, sheet, row) are frozen.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.store import paths
from common.store.config import EvaluationConfig
from common.store.leases import LeaseBook
from common.store.ledger_entries import LedgerSettings, RewardSpec, Values
from common.store.ledger_scoring import GrantedScoring, ScoreKey, ScoringBook
from common.types import Prompt, Publication

SheetKey = tuple[str, int]  # directory, sheet number


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalProtocol:
    """The frozen evaluation: what is drawn, how, and who judges."""

    config: EvaluationConfig
    prompts: tuple[Prompt, ...]  # selected, before repetition
    rewards: tuple[RewardSpec, ...]
    max_sequence_length: int = 0  # model.max_sequence_length: T5 tokens that are read of a prompt; 0 without T5
    embedded_guidance: float = 0.0  # model.embedded_guidance; 0: none
    grid_shift: float = 0.0  # model.grid_shift; 0: the scheduler's

    def described(self) -> dict[str, Any]:
        """Every field that the numbers depend on."""
        fields = self.config.model_dump(mode="json", exclude={"every", "at_start"})
        text = json.dumps([[prompt.id, prompt.text, dict(prompt.metadata)] for prompt in self.prompts], sort_keys=True, default=str)
        names = [reward.name for reward in self.rewards]
        model = {
            "max_sequence_length": self.max_sequence_length, "embedded_guidance": self.embedded_guidance, "grid_shift": self.grid_shift,
        }  # fmt: skip
        return {
            **fields,
            **{key: value for key, value in model.items() if value},  # absent at 0, so digests of other models stay
            "rewards": names,
            "prompts_digest": hashlib.sha256(text.encode()).hexdigest(),
            "num_prompts": len(self.prompts),
        }

    def digest(self) -> str:
        """A short name of the protocol: equal numbers can be compared only under equal digests."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:12]

    def sheets(self) -> tuple[tuple[Prompt, ...], ...]:
        """The prompts, each repeated images_per_prompt times, in sheets."""
        rows = [prompt for prompt in self.prompts for _ in range(self.config.images_per_prompt)]
        size = self.config.sheet_size
        return tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))


def select_prompts(prompts: Sequence[Prompt], max_prompts: int | None) -> tuple[Prompt, ...]:
    """Return the first prompts of a file, evenly over tags, in file order.

    Tags that are short give their share to the others.
    """
    if max_prompts is None or max_prompts >= len(prompts):
        return tuple(prompts)
    by_tag: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_tag.setdefault(prompt.tag, []).append(index)
    rounds = [(rank, index) for indices in by_tag.values() for rank, index in enumerate(indices)]
    chosen = sorted(index for _, index in sorted(rounds)[:max_prompts])
    return tuple(prompts[index] for index in chosen)


@dataclass(slots=True, kw_only=True)
class Sheet:
    """One sheet of an evaluation, with every file committed for it."""

    number: int
    prompts: tuple[Prompt, ...]
    files: set[str] = field(default_factory=set)  # lease ids
    scores: dict[str, dict[str, Values]] = field(default_factory=dict)  # lease id -> reward -> values

    def chosen(self) -> str | None:
        """The lease whose images stand: most rewards filed, then smallest id."""
        return min(self.files, key=lambda lease_id: (-len(self.scores.get(lease_id, {})), lease_id), default=None)

    def filed(self) -> dict[str, Values]:
        """Reward -> values of the images that stand."""
        lease_id = self.chosen()
        return self.scores.get(lease_id, {}) if lease_id else {}

    def missing(self, rewards: Sequence[RewardSpec]) -> list[str]:
        """Rewards that judge a prompt of this sheet and have not filed."""
        filed = self.filed()
        return [r.name for r in rewards if r.name not in filed and any(r.applies_to(prompt.tag) for prompt in self.prompts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation under way."""

    publication: Publication
    snapshot: str
    directory: str
    sheets: tuple[Sheet, ...]


class EvalBoard:
    """Evaluations in version order: sheets to sample, sheets to score, verdicts to write."""

    def __init__(self, protocol: EvalProtocol, settings: LedgerSettings) -> None:
        self.protocol = protocol
        self._max_attempts = settings.max_attempts
        self._evaluations: dict[str, Evaluation] = {}
        timeouts = {"silence_s": settings.lease_timeout_s, "total_s": settings.group_timeout_s}
        self.leases: LeaseBook[SheetKey] = LeaseBook(**timeouts)
        self.scoring = ScoringBook(**timeouts, max_attempts=settings.max_attempts)

    @property
    def is_enabled(self) -> bool:
        """Whether there is anything to evaluate on, and anybody to judge."""
        return bool(self.protocol.prompts and self.protocol.rewards)

    def directory_of(self, version: int) -> str:
        """Where the evaluation of a version lies."""
        return paths.eval_directory(version, self.protocol.config.snapshot, self.protocol.digest())

    def request(self, publication: Publication) -> Evaluation | None:
        """Begin the evaluation of a publication; None when it is under way or nothing is configured."""
        directory = self.directory_of(publication.adapter.version)
        if not self.is_enabled or directory in self._evaluations:
            return None
        sheets = tuple(Sheet(number=number, prompts=prompts) for number, prompts in enumerate(self.protocol.sheets()))
        evaluation = Evaluation(publication=publication, snapshot=self.protocol.config.snapshot, directory=directory, sheets=sheets)
        self._evaluations[directory] = evaluation
        return evaluation

    def pending(self) -> list[Evaluation]:
        """Evaluations under way, oldest version first."""
        return sorted(self._evaluations.values(), key=lambda evaluation: evaluation.publication.adapter.version)

    def get(self, directory: str) -> Evaluation | None:
        """The evaluation under way in a folder."""
        return self._evaluations.get(directory)

    def lease(self, slot: str, lease_id: str, now: float) -> tuple[Evaluation, Sheet] | None:
        """Lease the first sheet that nobody has drawn; None when there is none."""
        for evaluation in self.pending():
            for sheet in evaluation.sheets:
                key = (evaluation.directory, sheet.number)
                if sheet.files or self.leases.holds(key) or self.leases.attempts[key] >= self._max_attempts:
                    continue
                self.leases.grant(key, lease_id, slot=slot, now=now, version=evaluation.publication.adapter.version)
                return evaluation, sheet
        return None

    def drawn(self, directory: str, number: int, lease_id: str) -> None:
        """A sheet's media file exists."""
        sheet = self._sheet(directory, number)
        if sheet is not None:
            sheet.files.add(lease_id)
            self.leases.end_key((directory, number))

    def scored(self, key: ScoreKey, values: Values) -> None:
        """A sheet's score file exists."""
        sheet = self._sheet(key.directory, key.number)
        if sheet is not None and len(values) == len(sheet.prompts):
            sheet.scores.setdefault(key.lease_id, {}).setdefault(key.reward, values)

    def _sheet(self, directory: str, number: int) -> Sheet | None:
        evaluation = self._evaluations.get(directory)
        return evaluation.sheets[number] if evaluation and number < len(evaluation.sheets) else None

    def _unscored(self) -> list[ScoreKey]:
        keys = []
        for evaluation in self.pending():
            for sheet in evaluation.sheets:
                lease_id = sheet.chosen()
                if lease_id is not None:
                    keys += [
                        ScoreKey(number=sheet.number, lease_id=lease_id, reward=reward, directory=evaluation.directory)
                        for reward in sheet.missing(self.protocol.rewards)
                    ]
        return keys

    def lease_scores(self, reward: str, limit: int, *, slot: str, now: float, new_id: Callable[[], str]) -> list[GrantedScoring]:
        """Lease up to `limit` sheets to score."""
        wanted = [key for key in self._unscored() if key.reward == reward]
        return self.scoring.ask(wanted, limit, slot=slot, now=now, new_id=new_id)

    def exhausted(self) -> list[ScoreKey]:
        """Sheets that a reward failed on too often: their scores are to be filed as nulls."""
        return [key for key in self._unscored() if self.scoring.is_exhausted(key)]

    def expire(self, now: float) -> int:
        """Expire the silent leases; return how many there were."""
        return len(self.leases.expire(now)) + self.scoring.expire(now)

    def finished(self) -> list[Evaluation]:
        """Evaluations whose every sheet is scored, or could not be drawn."""
        return [each for each in self.pending() if all(self._is_done(each.directory, sheet) for sheet in each.sheets)]

    def _is_done(self, directory: str, sheet: Sheet) -> bool:
        if not sheet.files:
            key = (directory, sheet.number)
            return self.leases.attempts[key] >= self._max_attempts and not self.leases.holds(key)
        return not sheet.missing(self.protocol.rewards)

    def close(self, directory: str) -> None:
        """The verdict is written."""
        self._evaluations.pop(directory, None)

    def pinned_versions(self) -> set[int]:
        """Policy versions that evaluations still need."""
        return {evaluation.publication.adapter.version for evaluation in self._evaluations.values()}
