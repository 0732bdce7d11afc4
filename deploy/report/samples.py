"""Images for the page: the same prompts and seeds over time, and the last update's best and worst training samples."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from common.store import paths
from common.store.arrow_files import decode
from common.store.manifests import decode_record
from common.store.media import MEDIA_SCHEMA
from common.types import Manifest
from deploy.report.records import EvaluationRecord, EvaluationRow, RunFiles, RunHistory, TrainSample

MAX_PROMPTS = 12
MAX_VERSIONS = 9
MAX_TRAIN_SAMPLES = 8
MAX_KEPT_SIDE = 96  # pixels; larger images are made smaller
THUMBNAIL_SIDE = 192
_STATISTIC = "statistic_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One image with what was said of it."""

    uri: str  # data:image/webp, "" when the image is not (or no more) there
    scores: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRow:
    """One prompt over the evaluated versions."""

    prompt: str
    tag: str
    shots: tuple[Shot, ...]  # one a column


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGrid:
    """The same prompts and seeds over time."""

    versions: tuple[int, ...]  # the columns
    rows: tuple[GridRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainShot:
    """One training sample and its image."""

    sample: TrainSample
    shot: Shot


class ImageShelf(Protocol):
    """Where a page's images come from."""

    @property
    def files(self) -> RunFiles:
        """The run directory."""
        ...

    def uri(self, path: str, row: int) -> str:
        """Return what stands in an image's src; "" when the image is not there."""
        ...

    def statistics(self, path: str) -> dict[str, list[float]]:
        """Return the statistics of a media file's images by name. Raises CorruptFile or StoreError."""
        ...


@dataclass(slots=True)
class MediaShelf:
    """Media files, each read once; images stand in the page as data URIs."""

    files: RunFiles
    _batches: dict[str, pa.RecordBatch] = field(default_factory=dict)

    def uri(self, path: str, row: int) -> str:
        """Return an image as a data URI: its own lossless bytes when small, else a thumbnail. Raises CorruptFile."""
        if not path:
            return ""
        images = self._batch(path).column("image")
        if row >= len(images):
            return ""
        return to_thumbnail(images[row].as_py())

    def statistics(self, path: str) -> dict[str, list[float]]:
        """Return the statistics of a file's images by name."""
        return statistics_of(self._batch(path))

    def _batch(self, path: str) -> pa.RecordBatch:
        if path not in self._batches:
            self._batches[path] = read_media_batch(self.files, path)
        return self._batches[path]


def read_media_batch(files: RunFiles, path: str) -> pa.RecordBatch:
    """Return a media file's rows: image (WebP bytes) and statistic_<name>. Raises CorruptFile or StoreError."""
    batch, _ = decode(path, files.read(path), schema_version=MEDIA_SCHEMA)
    return batch


def statistics_of(batch: pa.RecordBatch) -> dict[str, list[float]]:
    """The statistics of a media file's rows by name."""
    names = [name for name in batch.schema.names if name.startswith(_STATISTIC)]
    return {name.removeprefix(_STATISTIC): [float(value) for value in batch.column(name).to_pylist()] for name in names}


def to_thumbnail(content: bytes) -> str:
    """Return WebP bytes as a data URI, made smaller when a side exceeds MAX_KEPT_SIDE."""
    return "data:image/webp;base64," + base64.b64encode(small_webp(content, THUMBNAIL_SIDE)).decode()


def small_webp(content: bytes, side: int) -> bytes:
    """Return WebP bytes as they are when no side exceeds MAX_KEPT_SIDE, else of at most `side` pixels."""
    with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
        if max(image.size) <= MAX_KEPT_SIDE:
            return content
        small = image.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        sink = io.BytesIO()
        small.save(sink, "WEBP", quality=80, method=4)
        return sink.getvalue()


def base_statistics(shelf: ImageShelf, base: EvaluationRecord | None) -> dict[str, list[float]]:
    """Return the image statistics of the base's evaluation, over all its sheets."""
    found: dict[str, list[float]] = {}
    for path in sorted({row.sheet for row in base.rows if row.sheet} if base else ()):
        for name, values in shelf.statistics(path).items():
            found.setdefault(name, []).extend(values)
    return found


def sample_grid(history: RunHistory, shelf: ImageShelf, max_versions: int = MAX_VERSIONS) -> SampleGrid | None:
    """Return the grid: prompts evenly over tags and, inside a tag, evenly over the file (never by score); versions evenly over the run."""
    if not history.evaluations or not history.evaluations[0].rows:
        return None
    chosen = _spread(history.evaluations, max_versions)
    rows = []
    for first in _choose_prompts(history.evaluations[0].rows):
        shots = [_find_shot(evaluation, first, shelf) for evaluation in chosen]
        rows.append(GridRow(prompt=first.text, tag=first.tag, shots=tuple(shots)))
    return SampleGrid(versions=tuple(evaluation.version for evaluation in chosen), rows=tuple(rows))


def _spread(evaluations: Sequence[EvaluationRecord], limit: int) -> list[EvaluationRecord]:
    """At most `limit`, first and last among them."""
    positions = np.unique(np.linspace(0, len(evaluations) - 1, min(limit, len(evaluations))).round().astype(int))
    return [evaluations[position] for position in positions]


def _choose_prompts(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """The first image of at most MAX_PROMPTS prompts, the tags as even as can be."""
    prompts: dict[str, dict[str, EvaluationRow]] = {}
    for row in rows:
        prompts.setdefault(row.tag, {}).setdefault(row.prompt_id, row)
    share = max(MAX_PROMPTS // len(prompts), 1)
    chosen: list[EvaluationRow] = []
    for found in list(prompts.values())[:MAX_PROMPTS]:
        own = list(found.values())
        positions = np.unique(np.linspace(0, len(own) - 1, min(share, len(own))).round().astype(int))
        chosen.extend(own[position] for position in positions)
    return chosen


def _find_shot(evaluation: EvaluationRecord, wanted: EvaluationRow, shelf: ImageShelf) -> Shot:
    for row in evaluation.rows:
        if row.prompt_id == wanted.prompt_id:
            return Shot(uri=shelf.uri(row.sheet, row.row), scores=tuple(row.scores.items()))
    return Shot(uri="", scores=())


def train_extremes(history: RunHistory, shelf: ImageShelf) -> tuple[list[TrainShot], list[TrainShot]]:
    """Return the best and the worst samples of the last update, one a group at most, whose images are still there."""
    scored = [sample for sample in history.last_samples if sample.weighted_reward is not None]
    media = _media_paths(shelf.files, scored)
    ordered = sorted(scored, key=lambda sample: (-(sample.weighted_reward or 0.0), sample.group, sample.sample_index))
    best = _first_of_groups(ordered, media)
    worst = _first_of_groups(ordered[::-1], media)
    return [_train_shot(sample, media, shelf) for sample in best], [_train_shot(sample, media, shelf) for sample in worst]


def _first_of_groups(ordered: Sequence[TrainSample], media: dict[int, str]) -> list[TrainSample]:
    first: dict[int, TrainSample] = {}
    for sample in ordered:
        if sample.group in media:
            first.setdefault(sample.group, sample)
    return list(first.values())[:MAX_TRAIN_SAMPLES]


def _train_shot(sample: TrainSample, media: dict[int, str], shelf: ImageShelf) -> TrainShot:
    uri = shelf.uri(media[sample.group], sample.sample_index)
    return TrainShot(sample=sample, shot=Shot(uri=uri, scores=tuple(sample.scores.items())))


def _media_paths(files: RunFiles, samples: Sequence[TrainSample]) -> dict[int, str]:
    """Group -> its media file that is still there; where two leases left one, the manifest says which was used."""
    numbers = {sample.group for sample in samples}
    found: dict[int, list[str]] = {}
    for folder in sorted({paths.media_path(number, "x").rpartition("/")[0] for number in numbers}):  # not every group of a long run
        for path in files.list(folder):
            name = paths.parse_media(path)
            if name is not None and name.number in numbers:
                found.setdefault(name.number, []).append(path)
    used = _used_media(files, samples[0].update) if any(len(candidates) > 1 for candidates in found.values()) else set()
    return {number: next((path for path in candidates if path in used), candidates[0]) for number, candidates in found.items()}


def _used_media(files: RunFiles, update: int) -> set[str]:
    """The media files that the update's manifest names. Raises CorruptFile or StoreError."""
    path = paths.manifest_path(update)
    manifest = decode_record(Manifest, path, files.read(path))
    return {group.media_path for group in manifest.groups}
