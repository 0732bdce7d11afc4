"""Score files: one reward's raw word on each image of a group or sheet. null = not scored; a failure is never a number."""

import math

import pyarrow as pa

from common.errors import AlreadyExists
from common.store import paths
from common.store.arrow_files import decode, encode, refuse
from common.store.run_store import RunStore
from common.types import Score, ScoreFile

SCORE_SCHEMA = "scores/1"
_DETAILS = pa.map_(pa.string(), pa.float32())


def score_file_path(file: ScoreFile, directory: str = "") -> str:
    """Where the scores of a group ("" directory) or of an evaluation sheet (its directory) lie."""
    if directory:
        return paths.sheet_score_path(directory, file.number, file.lease_id, file.reward)
    return paths.score_path(file.number, file.lease_id, file.reward)


def write_scores(store: RunStore, file: ScoreFile, *, directory: str = "") -> str:
    """Commit a score file; the first commit wins, and a later one changes nothing.

    Args:
        store: the run directory.
        file: K scores, sample_index 0 to K-1 in order.
        directory: of the scoring lease: "" for a training group, the evaluation's folder for a sheet.

    Returns:
        The path of the score file that stands.

    Raises:
        CorruptFile: a score that is not finite, or samples missing; nothing was written.
        StoreError: the store refused.
    """
    path = score_file_path(file, directory)
    _check_scores(path, file)
    rows = file.scores
    batch = pa.RecordBatch.from_pydict(
        {
            "sample_index": pa.array([row.sample_index for row in rows], pa.int16()),
            "raw": pa.array([row.value for row in rows], pa.float32()),
            "details": pa.array([list(row.details.items()) for row in rows], _DETAILS),
            "error": pa.array([row.error for row in rows], pa.string()),
            "latency_s": pa.array([row.latency_s for row in rows], pa.float32()),
            "scorer_version": pa.array([file.scorer_version] * len(rows), pa.string()),
        }
    )
    described = {"run": file.run, "number": file.number, "lease_id": file.lease_id, "reward": file.reward, "num_samples": len(rows)}
    try:
        store.create_exclusive(path, encode(batch, schema_version=SCORE_SCHEMA, metadata=described), writer_id=file.lease_id)
    except AlreadyExists:
        return path
    return path


def read_scores(store: RunStore, path: str) -> ScoreFile:
    """Return a committed score file; values are float32.

    Raises:
        CorruptFile: naming the file and the rule that it breaks.
        StoreError: missing or unreadable.
    """
    batch, described = decode(path, store.read(path), schema_version=SCORE_SCHEMA)
    try:
        rows = batch.to_pylist()
        scores = tuple(
            Score(
                sample_index=row["sample_index"], value=row["raw"], details=dict(row["details"]),
                error=row["error"], latency_s=row["latency_s"],
            )
            for row in rows
        )  # fmt: skip
        file = ScoreFile(
            run=described["run"], number=described["number"], lease_id=described["lease_id"], reward=described["reward"],
            scorer_version=rows[0]["scorer_version"] if rows else "", scores=scores,
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        refuse(path, f"lacks or mistypes {error}")
    if len(scores) != described.get("num_samples"):
        refuse(path, f"has {len(scores)} of {described.get('num_samples')} samples; scores are committed whole")
    _check_scores(path, file)
    return file


def _check_scores(path: str, file: ScoreFile) -> None:
    indices = [score.sample_index for score in file.scores]
    if indices != list(range(len(indices))) or not indices:
        refuse(path, f"has samples {indices}; the rule is 0 to K-1, each once, in order")
    for score in file.scores:
        if score.value is not None and not math.isfinite(score.value):
            refuse(path, f"sample {score.sample_index} scored {score.value}; a failure is null with its reason, never a number")
        if score.value is None and not score.error:
            refuse(path, f"sample {score.sample_index} is null without a reason; name it in error")
    name = paths.parse_score(path) or paths.parse_sheet_score(path)
    if name is None or (name.number, name.lease_id, name.reward) != (file.number, file.lease_id, file.reward):
        refuse(path, f"holds {file.reward} of group {file.number}, lease {file.lease_id}; a file's name and content agree")
