"""`flowfleet compare A B`: the frozen evaluations of two subjects and their base, from the runs' files where they stand there, else drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console

from common.errors import ConfigError
from common.policy.config import DRAWN_BY
from common.store import paths
from common.store.evaluations import EvalProtocol
from common.store.run_store import RunStore
from common.store.scores import read_scores
from deploy.compose import resolved_model
from deploy.config import RunConfig
from deploy.evaluate import draw_evaluation, protocol_of
from deploy.options import run_config_of
from deploy.report.compare_page import Comparison, PageFacts, Side, make_comparison, write_comparison
from deploy.report.eval_table import describe_protocol
from deploy.report.reader import read_history
from deploy.report.records import EvaluationRecord, RunFiles
from deploy.report.samples import MediaShelf
from deploy.subjects import JudgeOptions, Subject, SubjectKind, is_same_base, judging_config, read_subject

BASE_LETTER: Final = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """What to compare: each a run, an exported LoRA or a base model directory."""

    first: str  # A
    second: str  # B
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    first_version: int | None = None  # of a run; None = the newest
    second_version: int | None = None
    out: Path = Path("compare.html")


@dataclass(frozen=True, slots=True, kw_only=True)
class OneEvaluation:
    """RunFiles that show one evaluation's folder only."""

    files: RunFiles
    directory: str

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        return self.files.read(path)

    def list(self, prefix: str = "") -> list[str]:
        """Return the folder's paths."""
        return [path for path in self.files.list(self.directory) if path.startswith(prefix)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A finished evaluation, wherever it lies."""

    store: RunStore
    directory: str
    origin: str


def compare(request: CompareRequest, console: Console) -> Comparison:
    """Evaluate what is not evaluated yet, and write the page to `request.out`.

    Both sides are drawn and judged by one configuration: --recipe's, else A's run's, else B's. Runs are only read.

    Raises:
        ConfigError, DataError, ModelError: what was asked cannot be compared.
        CorruptFile: a file of a stored evaluation breaks its form.
    """
    judge = _judge(request)
    first = read_subject(request.first, judge, request.judge, request.first_version)
    second = read_subject(request.second, judge, request.judge, request.second_version)
    protocol = protocol_of(first.config)
    base = _base_of(first)
    runs = [subject.run for subject in (first, second) if subject.run is not None]
    sides: dict[str, Side] = {}
    for letter, subject in (("A", first), ("B", second), (BASE_LETTER, base)):
        if letter != BASE_LETTER or not any(_is_base(each, base) for each in (first, second)):
            sides[letter] = _side(letter, subject, protocol, runs, console)
    comparison = make_comparison(sides.get(BASE_LETTER), sides["A"], sides["B"])
    write_comparison(request.out, comparison, _facts(comparison, protocol, (first, second)))
    return comparison


def _judge(request: CompareRequest) -> RunConfig:
    if request.judge.recipe is not None:
        return judging_config(request.first, request.judge.recipe)
    try:
        return judging_config(request.first, None)
    except ConfigError:
        return judging_config(request.second, None)


def _base_of(subject: Subject) -> Subject:
    """The base model under a subject."""
    return Subject(kind=SubjectKind.BASE, target=subject.config.model.path, config=subject.config)


def _is_base(subject: Subject, base: Subject) -> bool:
    return subject.kind is SubjectKind.BASE and is_same_base(subject, base)


def _side(letter: str, subject: Subject, protocol: EvalProtocol, runs: Sequence[RunStore], console: Console) -> Side:
    found = _stored(subject, protocol, runs)
    if found is None:
        console.print(f"{letter}: {subject.name}: drawing {len(protocol.prompts)} prompts", highlight=False, soft_wrap=True, markup=False)
        drawn = draw_evaluation(subject, protocol, console)
        found = _Found(store=drawn.store, directory=drawn.directory, origin="drawn for this page")
    files = OneEvaluation(files=found.store, directory=found.directory)
    return Side(letter=letter, name=subject.name, origin=found.origin, record=_record(files), shelf=MediaShelf(files))


def _stored(subject: Subject, protocol: EvalProtocol, runs: Sequence[RunStore]) -> _Found | None:
    """The evaluation that a run holds already: of the subject's own run, or of any run's version 0 where the subject is its base."""
    if subject.kind is SubjectKind.LORA:
        return None
    directory = paths.eval_directory(subject.version, protocol.config.snapshot, protocol.digest())
    for run in [subject.run] if subject.kind is SubjectKind.RUN and subject.run is not None else runs:
        if run.exists(paths.result_path(directory)) and _is_alike(run, subject) and _is_whole(run, directory):
            return _Found(store=run, directory=directory, origin=f"from the run's own evaluation, {directory}")
    return None


def _is_alike(run: RunStore, subject: Subject) -> bool:
    """Whether the run drew and judged as this comparison would: the same base, image size, text length and rewards' options."""
    own, wanted = run_config_of(run), subject.config
    one, other = resolved_model(own.model), resolved_model(wanted.model)
    drawn = [(Path(model.path).resolve(), model.dtype, *(getattr(model, key) for key in DRAWN_BY)) for model in (one, other)]
    judged = [
        {reward.name: (reward.options, reward.tags) for reward in config.reward if reward.name in _judges(config)}
        for config in (own, wanted)
    ]
    return drawn[0] == drawn[1] and judged[0] == judged[1]


def _judges(config: RunConfig) -> tuple[str, ...]:
    return config.evaluation.rewards or tuple(reward.name for reward in config.reward)


def _is_whole(run: RunStore, directory: str) -> bool:
    """Whether every image of the evaluation is still there."""
    return all(row.sheet for row in _record(OneEvaluation(files=run, directory=directory)).rows)


def _record(files: OneEvaluation) -> EvaluationRecord:
    (record,) = read_history(files).evaluations
    return record


def _facts(comparison: Comparison, protocol: EvalProtocol, subjects: Sequence[Subject]) -> PageFacts:
    first, second = comparison.pair
    rewards = ", ".join(comparison.rewards)
    facts = [("prompts", str(len(protocol.prompts))), ("images a side", str(len(first.record.rows))), ("rewards", rewards)]
    facts += [("base", subjects[0].config.model.path), ("protocol", protocol.digest())]
    return PageFacts(
        title=f"{second.name} against {first.name}", facts=tuple(facts), protocol=describe_protocol(protocol.described(), protocol.digest()),
        warnings=tuple(_warnings(comparison, subjects)),
    )  # fmt: skip


def _warnings(comparison: Comparison, subjects: Sequence[Subject]) -> list[str]:
    """What makes two columns less comparable than they look."""
    found = []
    if not is_same_base(*subjects):
        models = " and ".join(subject.config.model.path for subject in subjects)
        found.append(f"A and B stand on different base models ({models}); the base column is A's.")
    for reward in comparison.rewards:
        versions = {side.letter: _scorer_versions(side, reward) for side in comparison.sides}
        if len(set(versions.values())) > 1:
            told = "; ".join(f"{letter}: {version}" for letter, version in versions.items())
            found.append(f"{reward} was scored by different scorer versions ({told}); remove the older evaluation and compare again.")
    for side in comparison.sides:
        for reward in comparison.rewards:
            if side.record.rewards[reward].coverage < 1:
                share = side.record.rewards[reward].coverage
                found.append(f"{side.letter}: only {share:.1%} of the images have a {reward} score; the others are left out on every side.")
    return found


def _scorer_versions(side: Side, reward: str) -> str:
    """The scorer's versions in an evaluation's score files."""
    files = side.shelf.files
    assert isinstance(files, OneEvaluation) and isinstance(files.files, RunStore), "sides are made here"
    names = [path for path in files.list() if (name := paths.parse_sheet_score(path)) is not None and name.reward == reward]
    return ", ".join(sorted({read_scores(files.files, path).scorer_version for path in names}))
