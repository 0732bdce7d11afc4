"""The JSON files: manifests, drops, evaluation results, the claim of an incarnation, status. Read strictly, written canonically."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from common.errors import CorruptFile
from common.store import paths
from common.store.directive import FleetReport
from common.store.run_store import RunStore
from common.types import Drop, Manifest

RecordT = TypeVar("RecordT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The content of config.i<N>.json: who started, with what."""

    incarnation: int
    writer_id: str  # random: two starts with one config differ
    started_at: str  # wall clock, for people only
    config_digest: str
    config: Mapping[str, Any]  # as resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The content of status.json, the one mutable file: a sign of life and a glance."""

    incarnation: int
    sequence: int  # grows with every refresh
    written_at: float  # wall clock, seconds: how fresh the sign of life is
    state: str  # running | done | stopped
    reason: str
    host: str
    process_id: int
    version: int  # newest published, -1 before the first
    manifests: int  # newest update that has one
    retired_through: int  # group files of updates up to here may be gone
    counts: Mapping[str, int] = field(default_factory=dict)
    fleet: FleetReport = field(default_factory=FleetReport)  # sizes, slots with their processes, last decisions
    alerts: tuple[str, ...] = ()  # of the sensors, as sentences


def encode_record(record: Any) -> bytes:
    """Return the canonical JSON of a dataclass of this run's types."""
    return (json.dumps(asdict(record), sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def decode_record(kind: type[RecordT], path: str, content: bytes) -> RecordT:
    """Return a dataclass from its JSON, strictly: every key known, every key there, every type right.

    Raises:
        CorruptFile: naming the file and what is wrong in it.
    """
    try:
        tables = json.loads(content)
        record = TypeAdapter(kind).validate_json(content)
    except (ValidationError, ValueError) as error:
        message = f"store: {path}: is no {kind.__name__} ({_first_line(error)}); committed files are never edited; restore it"
        raise CorruptFile(message) from None
    if json.loads(encode_record(record)) != tables:
        raise CorruptFile(f"store: {path}: has keys or types that no {kind.__name__} has; committed files are never edited; restore it")
    return record


def _first_line(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error)


def write_manifest(store: RunStore, manifest: Manifest) -> str:
    """Create the manifest of an update exclusively. Raises AlreadyExists when another one stands: adopt that."""
    path = paths.manifest_path(manifest.update)
    store.create_exclusive(path, encode_record(manifest), writer_id=f"i{manifest.incarnation:04d}")
    return path


def read_manifest(store: RunStore, update: int) -> Manifest:
    """Return the manifest of an update. Raises CorruptFile when it breaks its own rules, StoreError when it is missing."""
    path = paths.manifest_path(update)
    manifest = decode_record(Manifest, path, store.read(path))
    numbers = [group.number for group in manifest.groups]
    if manifest.update != update or not numbers or numbers != sorted(set(numbers)):
        raise CorruptFile(f"store: {path}: is update {manifest.update} with groups {numbers}; numbers rise, the name agrees; restore it")
    for group in manifest.groups:
        if any(len(values) != len(group.kept) for values in group.scores.values()):
            raise CorruptFile(f"store: {path}: group {group.number} has score lists of unlike length; each holds K values; restore it")
    return manifest


def write_drop(store: RunStore, drop: Drop, *, writer_id: str) -> str:
    """Create a drop file exclusively. Raises AlreadyExists when another reason stands first."""
    path = paths.drop_path(drop.number)
    store.create_exclusive(path, encode_record(drop), writer_id=writer_id)
    return path


def read_drop(store: RunStore, number: int) -> Drop:
    """Return why a number was dropped. Raises CorruptFile or StoreError."""
    path = paths.drop_path(number)
    drop = decode_record(Drop, path, store.read(path))
    if drop.number != number:
        raise CorruptFile(f"store: {path}: drops group {drop.number}; a file's name and content agree; restore it")
    return drop


def read_claim(store: RunStore, incarnation: int) -> Claim:
    """Return the claim of an incarnation. Raises CorruptFile or StoreError."""
    path = paths.config_path(incarnation)
    return decode_record(Claim, path, store.read(path))


def read_status(store: RunStore) -> Status | None:
    """Return status.json, None when there is none; one from before fleets or alerts were listed lists none. Raises CorruptFile."""
    if not store.exists(paths.STATUS):
        return None
    content = store.read(paths.STATUS)
    if b'"fleet"' not in content:
        content = content.replace(b"{", b'{"fleet": ' + json.dumps(asdict(FleetReport())).encode() + b", ", 1)
    if b'"alerts"' not in content:
        content = content.replace(b"{", b'{"alerts": [], ', 1)
    return decode_record(Status, paths.STATUS, content)


def write_status(store: RunStore, status: Status) -> None:
    """Refresh status.json."""
    store.replace(paths.STATUS, encode_record(status), writer_id=f"i{status.incarnation:04d}")
