"""From a run's files to a RunHistory: tolerant of what is not there yet, strict about what is."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import CorruptFile
from common.store import paths
from deploy.report.records import (
    EvaluationRecord,
    EvaluationRow,
    RewardResult,
    RewardSummary,
    RunFiles,
    RunHistory,
    TaskResult,
    TrainSample,
    UpdateRecord,
)

_HISTORY = re.compile(r"history/update_(?P<update>\d{6,})\.parquet")
_START = re.compile(r"(?P<kind>config|environment)\.i(?P<incarnation>\d{4,})\.json")
_REWARD = "reward."
RecordT = TypeVar("RecordT")


def read_history(files: RunFiles) -> RunHistory:
    """Return everything that the report tells about a run.

    Args:
        files: the run directory; any part of it may not exist yet.

    Raises:
        CorruptFile: a file that is there breaks its form; the message names it.
    """
    listing = files.list("")
    starts = _read_starts(files, listing)
    claim = starts.get("config", {})
    config = claim.get("config", claim)
    evaluations = _read_evaluations(files, listing)
    followed = _followed(evaluations)
    return RunHistory(
        name=str(config.get("run", {}).get("name", "") or "unnamed run"),
        config=config,
        config_digest=str(claim.get("config_digest") or hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()),
        environment=starts.get("environment", {}),
        incarnations=len([path for path in listing if paths.parse_config(path) is not None]),
        updates=_read_updates(files, listing),
        evaluations=followed,
        num_other_evaluations=len(evaluations) - len(followed),
        last_samples=_read_last_samples(files, listing),
    )


def _refuse(path: str, rule: str) -> NoReturn:
    raise CorruptFile(f"report: {path}: {rule}; committed files are never edited; restore it, or move it away to report without it")


def _read_json(files: RunFiles, path: str) -> dict[str, Any]:
    try:
        tables = json.loads(files.read(path))
    except ValueError as error:  # bad JSON and bad UTF-8 both
        _refuse(path, f"is no JSON ({error})")
    if not isinstance(tables, dict):
        _refuse(path, f"holds a {type(tables).__name__}; the rule is one JSON object")
    return tables


def _build(path: str, make: Callable[[Mapping[str, Any]], RecordT], tables: Mapping[str, Any]) -> RecordT:
    """Make a record of a file's tables; what lacks or has the wrong type is told with the file's name."""
    try:
        return make(tables)
    except KeyError as error:
        _refuse(path, f"lacks the key {error}")
    except (TypeError, ValueError, AttributeError) as error:
        _refuse(path, f"has a value of the wrong type ({error})")


def _read_starts(files: RunFiles, listing: list[str]) -> dict[str, dict[str, Any]]:
    """The newest config and environment files."""
    newest: dict[str, tuple[int, str]] = {}
    for path in listing:
        found = _START.fullmatch(path)
        if found:
            newest[found["kind"]] = max(newest.get(found["kind"], (0, "")), (int(found["incarnation"]), path))
    return {kind: _read_json(files, path) for kind, (_, path) in newest.items()}


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _read_updates(files: RunFiles, listing: list[str]) -> tuple[UpdateRecord, ...]:
    starts: dict[int, dict[int, str]] = {}
    for path in listing:
        found = paths.parse_metrics(path)
        if found is not None:
            update, incarnation = found
            starts.setdefault(incarnation, {})[update] = path
    return tuple(_build(path, _update_record, _read_json(files, path)) for path in _standing(starts))


def _standing(starts: Mapping[int, Mapping[int, str]]) -> list[str]:
    """The metrics files that count, by update: where a start began again, what earlier starts wrote from there on is superseded.

    Args:
        starts: incarnation -> update -> path.
    """
    standing: dict[int, str] = {}
    for _, own in sorted(starts.items()):
        begun = min(own)
        standing = {update: path for update, path in standing.items() if update < begun} | dict(own)
    return [path for _, path in sorted(standing.items())]


def _update_record(tables: Mapping[str, Any]) -> UpdateRecord:
    return UpdateRecord(
        update=int(tables["update"]),
        incarnation=int(tables["incarnation"]),
        time_unix=float(tables["time_unix"]),
        seconds={name: float(value) for name, value in tables["seconds"].items()},
        learner={name: float(value) for name, value in tables["learner"].items() if value is not None},
        rewards={name: _reward_summary(value) for name, value in tables["rewards"].items()},
        flat_group_share=float(tables["flat_group_share"]),
        staleness={int(name): int(value) for name, value in tables["staleness"].items()},
        drops={name: int(value) for name, value in tables["drops"].items()},
        images=int(tables["images"]),
        image_statistics={name: float(value) for name, value in tables["image_statistics"].items() if value is not None},
    )


def _reward_summary(tables: Mapping[str, Any]) -> RewardSummary:
    return RewardSummary(
        mean=_optional(tables["mean"]),
        std_in_group=_optional(tables["std_in_group"]),
        coverage=float(tables["coverage"]),
        flat_share=float(tables["flat_share"]),
    )


def _read_evaluations(files: RunFiles, listing: list[str]) -> list[EvaluationRecord]:
    present = set(listing)
    found = []
    for path in listing:
        if path.startswith(f"{paths.EVAL}/") and path.endswith("/result.json"):
            make = partial(_evaluation, path.removesuffix("/result.json"), present)
            found.append(_build(path, make, _read_json(files, path)))
    return found


def _evaluation(directory: str, present: set[str], tables: Mapping[str, Any]) -> EvaluationRecord:
    named = {int(number): paths.sheet_path(directory, int(number), lease) for number, lease in tables["sheets"].items() if lease}
    chosen = {number: path for number, path in named.items() if path in present}
    return EvaluationRecord(
        directory=directory,
        version=int(tables["version"]),
        snapshot=str(tables["snapshot"]),
        digest=directory.rsplit(".", 1)[-1],
        protocol=dict(tables["protocol"]),
        rewards={name: _reward_result(value) for name, value in tables["rewards"].items()},
        rows=tuple(_evaluation_row(row, chosen) for row in tables["rows"]),
    )


def _reward_result(tables: Mapping[str, Any]) -> RewardResult:
    tasks = {tag: TaskResult(mean=_optional(task["mean"]), n=int(task["n"])) for tag, task in tables["tasks"].items()}
    return RewardResult(mean=_optional(tables["mean"]), tasks=tasks, coverage=float(tables["coverage"]))


def _evaluation_row(tables: Mapping[str, Any], sheets: Mapping[int, str]) -> EvaluationRow:
    return EvaluationRow(
        prompt_id=str(tables["prompt_id"]),
        text=str(tables["text"]),
        tag=str(tables["tag"]),
        sheet=sheets.get(int(tables["sheet"]), ""),
        row=int(tables["row"]),
        scores={name: _optional(value) for name, value in tables["scores"].items()},
    )


def _followed(evaluations: list[EvaluationRecord]) -> tuple[EvaluationRecord, ...]:
    """The evaluations of one protocol, one a version: the protocol with most versions (then the newest), its most used snapshot first."""
    if not evaluations:
        return ()
    versions: dict[str, set[int]] = {}
    for record in evaluations:
        versions.setdefault(record.digest, set()).add(record.version)
    digest = max(versions, key=lambda name: (len(versions[name]), max(versions[name]), name))
    own = [record for record in evaluations if record.digest == digest]
    used = Counter(record.snapshot for record in own if record.version > 0)
    chosen: dict[int, EvaluationRecord] = {}
    for record in sorted(own, key=lambda record: (used[record.snapshot], record.snapshot)):
        chosen[record.version] = record
    main = max(used, key=lambda name: (used[name], name)) if used else None
    return tuple(record for version, record in sorted(chosen.items()) if version == 0 or record.snapshot == main)


def _read_last_samples(files: RunFiles, listing: list[str]) -> tuple[TrainSample, ...]:
    histories = [path for path in listing if _HISTORY.fullmatch(path)]
    if not histories:
        return ()
    path = max(histories, key=lambda name: int(name.removeprefix("history/update_").removesuffix(".parquet")))
    try:
        rows = pq.read_table(io.BytesIO(files.read(path))).to_pylist()
    except pa.ArrowException as error:
        _refuse(path, f"is no parquet file ({str(error).splitlines()[0]})")
    return tuple(_build(path, _train_sample, row) for row in rows)


def _train_sample(row: Mapping[str, Any]) -> TrainSample:
    return TrainSample(
        update=int(row["update"]),
        group=int(row["group"]),
        sample_index=int(row["sample_index"]),
        prompt=str(row["prompt"]),
        version=int(row["version"]),
        staleness=int(row["staleness"]),
        weighted_reward=_optional(row["weighted_reward"]),
        advantage=float(row["advantage"]),
        scores={name.removeprefix(_REWARD): _optional(value) for name, value in row.items() if name.startswith(_REWARD)},
    )
