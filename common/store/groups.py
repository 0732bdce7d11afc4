"""Group files: trajectories in plain Arrow types. Writing one commits the group (architecture, section 3).

Shape letters: K samples, W stochastic steps kept, L latents kept, C h w latent channels, height, width.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa

from common.store import paths
from common.store.arrow_files import decode, encode, read_tensor, refuse, tensor_column
from common.store.media import read_media, write_media, write_media_sheet
from common.store.run_store import RunStore
from common.store.scores import read_scores, write_scores
from common.types import AdapterId, FloatArray, MediaBatch, Prompt, PromptFeatures, RolloutGroup, SamplerSpec, Trajectory

__all__ = ["read_group", "read_media", "read_scores", "write_group", "write_media_sheet", "write_scores"]

GROUP_SCHEMA = "group/1"
_STEP_COLUMNS = ("timestep", "sigma", "next_sigma", "behavior_log_prob")
_FEATURE_COLUMNS = ("prompt_embeds", "pooled", "negative_embeds", "negative_pooled")


def write_group(store: RunStore, group: RolloutGroup, media: MediaBatch) -> str:
    """Commit a group: its images first, then the group file, which is the commit point.

    Args:
        group: K trajectories.
        media: [K, H, W, 3] images of the same samples, by media_row.

    Returns:
        The group file's path in the run directory.

    Raises:
        CorruptFile: the group breaks a rule (samples missing, a log-prob that is not finite ...); nothing was written.
        StoreError: the store refused; nothing is committed.
    """
    path = paths.group_path(group.number, group.lease_id)
    _check_group(path, group)
    if len(media.images) != len(group.trajectories):
        refuse(path, f"comes with {len(media.images)} images for {len(group.trajectories)} samples; a group is committed whole")
    write_media(store, paths.media_path(group.number, group.lease_id), media, {"run": group.run, "number": group.number})
    store.create_exclusive(path, encode_group(group, media.images.shape[1:3]), writer_id=group.lease_id)
    return path


def encode_group(group: RolloutGroup, image_size: tuple[int, ...]) -> bytes:
    """Return the bytes of a group file; `image_size` is (H, W)."""
    rows = group.trajectories
    fields: list[pa.Field] = []
    arrays: list[pa.Array] = []

    def add(name: str, array: pa.Array) -> None:
        fields.append(pa.field(name, array.type, nullable=False))
        arrays.append(array)

    add("sample_index", pa.array([row.sample_index for row in rows], pa.int16()))
    add("seed", pa.array([row.seed for row in rows], pa.uint64()))
    add("step_index", pa.array([row.step_index for row in rows], pa.list_(pa.int16())))
    for name, part in _step_values(rows):
        add(name, pa.array(part, pa.list_(pa.float32())))
    for name, tensor in (("latents", [r.latents for r in rows]), ("final_latents", [r.final_latents for r in rows])):
        field, array = tensor_column(name, np.stack(tensor))
        fields.append(field)
        arrays.append(array)
    add("latent_index", pa.array([row.latent_index for row in rows], pa.list_(pa.int16())))
    for name, value in _feature_values(group.features):
        shape = {"shape": json.dumps(None if value is None else list(value.shape))}
        flat = None if value is None else np.asarray(value, dtype=np.float32).reshape(-1)
        fields.append(pa.field(name, pa.list_(pa.float32()), nullable=True, metadata=shape))
        arrays.append(pa.array([flat, *[None] * (len(rows) - 1)], pa.list_(pa.float32())))
    add("width", pa.array([image_size[1]] * len(rows), pa.int32()))
    add("height", pa.array([image_size[0]] * len(rows), pa.int32()))
    add("media_row", pa.array([row.media_row for row in rows], pa.int32()))
    batch = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))
    return encode(batch, schema_version=GROUP_SCHEMA, metadata=_metadata(group))


def _step_values(rows: tuple[Trajectory, ...]) -> list[tuple[str, list[FloatArray]]]:
    return [
        ("timestep", [row.timestep for row in rows]),
        ("sigma", [row.sigma for row in rows]),
        ("next_sigma", [row.next_sigma for row in rows]),
        ("behavior_log_prob", [row.behavior_log_prob for row in rows]),
    ]


def _feature_values(features: PromptFeatures) -> list[tuple[str, FloatArray | None]]:
    values = (features.prompt_embeds, features.pooled, features.negative_embeds, features.negative_pooled)
    return list(zip(_FEATURE_COLUMNS, values, strict=True))


def _metadata(group: RolloutGroup) -> dict[str, Any]:
    prompt = {"id": group.prompt.id, "text": group.prompt.text, "metadata": dict(group.prompt.metadata)}
    return {
        "run": group.run, "number": group.number, "lease_id": group.lease_id, "prompt": prompt,
        "adapter": dataclasses.asdict(group.adapter), "sampler": dataclasses.asdict(group.sampler),
        "seconds": group.seconds, "num_samples": len(group.trajectories),
    }  # fmt: skip


def read_group(store: RunStore, path: str, *, group_size: int | None = None) -> RolloutGroup:
    """Return a committed group.

    Args:
        store: the run directory.
        path: of the group file.
        group_size: K; when given, a file with another number of samples is refused.

    Raises:
        CorruptFile: naming the file and the rule that it breaks.
        StoreError: missing or unreadable.
    """
    batch, described = decode(path, store.read(path), schema_version=GROUP_SCHEMA)
    expected = described.get("num_samples") if group_size is None else group_size
    if batch.num_rows != expected or batch.num_rows == 0:
        refuse(path, f"has {batch.num_rows} of {expected} samples; a group is committed whole")
    try:
        group = _build(path, batch, described)
    except (KeyError, TypeError) as error:
        refuse(path, f"lacks or mistypes {error}")
    _check_group(path, group)
    return group


def read_group_metadata(store: RunStore, path: str) -> dict[str, Any]:
    """Return what a group file says about itself (run, number, lease_id, prompt, adapter, sampler, seconds, num_samples), checked."""
    return decode(path, store.read(path), schema_version=GROUP_SCHEMA)[1]


def _build(path: str, batch: pa.RecordBatch, described: dict[str, Any]) -> RolloutGroup:
    latents = read_tensor(path, batch, "latents")
    final_latents = read_tensor(path, batch, "final_latents")
    columns = {name: batch.column(name).to_pylist() for name in ("sample_index", "seed", "media_row")}
    steps = {name: _rows(batch, name, np.float32) for name in _STEP_COLUMNS}
    index = {name: _rows(batch, name, np.int16) for name in ("step_index", "latent_index")}
    trajectories = tuple(
        Trajectory(
            sample_index=columns["sample_index"][row], seed=columns["seed"][row], step_index=index["step_index"][row],
            timestep=steps["timestep"][row], sigma=steps["sigma"][row], next_sigma=steps["next_sigma"][row],
            latents=latents[row], latent_index=index["latent_index"][row], behavior_log_prob=steps["behavior_log_prob"][row],
            final_latents=final_latents[row], media_row=columns["media_row"][row],
        )
        for row in range(batch.num_rows)
    )  # fmt: skip
    sampler = {**described["sampler"], "window": tuple(described["sampler"]["window"])}
    return RolloutGroup(
        run=described["run"], number=described["number"], lease_id=described["lease_id"], prompt=Prompt(**described["prompt"]),
        adapter=AdapterId(**described["adapter"]), sampler=SamplerSpec(**sampler), seconds=described["seconds"],
        features=_read_features(path, batch), trajectories=trajectories,
    )  # fmt: skip


def _rows(batch: pa.RecordBatch, name: str, dtype: Any) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(values, dtype=dtype) for values in batch.column(name).to_pylist()]


def _read_features(path: str, batch: pa.RecordBatch) -> PromptFeatures:
    found: dict[str, FloatArray | None] = {}
    for name in _FEATURE_COLUMNS:
        shape = json.loads(batch.schema.field(name).metadata[b"shape"])
        scalar = batch.column(name)[0]
        if (shape is None) != (not scalar.is_valid):
            refuse(path, f"column {name!r} is null where its shape says {shape}; features are non-null in row 0")
        found[name] = None if shape is None else scalar.values.to_numpy().reshape(shape).copy()
    embeds, pooled = found["prompt_embeds"], found["pooled"]
    if embeds is None or pooled is None:
        refuse(path, "has no prompt embeddings in row 0; a learner needs this file and the base transformer, nothing else")
    return PromptFeatures(
        prompt_embeds=embeds, pooled=pooled, negative_embeds=found["negative_embeds"], negative_pooled=found["negative_pooled"]
    )


def _check_group(path: str, group: RolloutGroup) -> None:
    """Raise CorruptFile unless the group is whole, well shaped and finite."""
    name = paths.parse_group(path)
    if name is None or (name.number, name.lease_id) != (group.number, group.lease_id):
        refuse(path, f"holds group {group.number} of lease {group.lease_id}; a file's name and content agree")
    rows = group.trajectories
    if [row.sample_index for row in rows] != list(range(len(rows))) or not rows:
        refuse(path, f"has samples {[row.sample_index for row in rows]}; the rule is 0 to K-1, each once, in order")
    if sorted(row.media_row for row in rows) != list(range(len(rows))):
        refuse(path, f"has media rows {[row.media_row for row in rows]}; the rule is one image a sample")
    for row in rows:
        _check_row(path, row, rows[0].latents.shape)


def _check_row(path: str, row: Trajectory, shape: tuple[int, ...]) -> None:
    place = f"sample {row.sample_index}"
    steps = (row.step_index, row.timestep, row.sigma, row.next_sigma, row.behavior_log_prob)
    if len({len(part) for part in steps}) != 1:
        refuse(path, f"{place}: step columns have lengths {[len(part) for part in steps]}; all hold W values")
    if row.latents.shape != shape or len(row.latent_index) != len(row.latents) or row.latents.shape[1:] != row.final_latents.shape:
        refuse(path, f"{place}: latents {row.latents.shape}, {len(row.latent_index)} index, clean {row.final_latents.shape}; they agree")
    if not np.isfinite(row.behavior_log_prob).all():
        refuse(path, f"{place}: behavior_log_prob {row.behavior_log_prob.tolist()} is not finite; a ratio needs a number")
    if not (np.isfinite(row.latents).all() and np.isfinite(row.final_latents).all()):
        refuse(path, f"{place}: latents are not finite; the sampler diverged")
