"""history/update_*.parquet: what happened to every sample of an update."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.types import Manifest, ManifestGroup, RolloutGroup
from learner.advantages import AdvantageBatch


def encode_history(manifest: Manifest, groups: Sequence[RolloutGroup], batch: AdvantageBatch) -> bytes:
    """Return the parquet file of an update: a row a sample, in group and sample order.

    Columns: update, group, sample_index, prompt_id, prompt, version, staleness, kept, trained (kept, not of a flat group,
    and chosen by the advantage's kind and subset),
    advantage, weighted_reward (null where not kept), and reward.<name> for every reward, raw, null where not scored or not applicable.
    """
    names = sorted({name for entry in manifest.groups for name in entry.scores})
    rows = [
        _facts(manifest, entry, groups[position], sample) | _outcome(entry, batch, position, sample) | _raw(entry, sample, names)
        for position, entry in enumerate(manifest.groups)
        for sample in range(len(entry.kept))
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema(names)), sink)
    return sink.getvalue()


def _schema(rewards: Sequence[str]) -> pa.Schema:
    fixed = [
        ("update", pa.int32()), ("group", pa.int64()), ("sample_index", pa.int16()), ("prompt_id", pa.string()), ("prompt", pa.string()),
        ("version", pa.int32()), ("staleness", pa.int32()), ("kept", pa.bool_()), ("trained", pa.bool_()), ("advantage", pa.float32()),
        ("weighted_reward", pa.float32()),
    ]  # fmt: skip
    return pa.schema([*fixed, *((f"reward.{name}", pa.float32()) for name in rewards)])


def _facts(manifest: Manifest, entry: ManifestGroup, group: RolloutGroup, sample: int) -> dict[str, Any]:
    return {
        "update": manifest.update,
        "group": entry.number,
        "sample_index": sample,
        "prompt_id": entry.prompt_id,
        "prompt": group.prompt.text,
        "version": entry.version,
        "staleness": manifest.update - 1 - entry.version,
    }


def _outcome(entry: ManifestGroup, batch: AdvantageBatch, position: int, sample: int) -> dict[str, Any]:
    weighted = float(batch.rewards[position, sample])
    return {
        "kept": entry.kept[sample],
        "trained": bool(batch.mask[position, sample]),
        "advantage": float(batch.advantages[position, sample]),
        "weighted_reward": None if np.isnan(weighted) else weighted,
    }


def _raw(entry: ManifestGroup, sample: int, names: Sequence[str]) -> dict[str, float | None]:
    return {f"reward.{name}": entry.scores[name][sample] if name in entry.scores else None for name in names}
