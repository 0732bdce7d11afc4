"""Media files: the decoded images of a group or of an evaluation sheet, as lossless WebP in Arrow."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from common.store import paths
from common.store.arrow_files import decode, encode, refuse
from common.store.run_store import RunStore
from common.types import FloatArray, MediaBatch, RolloutLease

MEDIA_SCHEMA = "media/1"
_STATISTIC = "statistic_"  # prefix of a statistic's column


def write_media_sheet(store: RunStore, lease: RolloutLease, media: MediaBatch) -> str:
    """Commit the images of an evaluation sheet, one a prompt of the lease.

    Returns:
        The sheet's path, for `commit_rollout`.

    Raises:
        CorruptFile: another number of images than prompts.
        StoreError: the store refused.
    """
    path = paths.sheet_path(lease.directory, lease.number, lease.lease_id)
    if len(media.images) != len(lease.prompts):
        refuse(path, f"has {len(media.images)} images for {len(lease.prompts)} prompts; a sheet is committed whole")
    adapter = lease.publication.adapter
    described = {
        "number": lease.number, "lease_id": lease.lease_id, "version": adapter.version, "digest": adapter.digest,
        "snapshot": lease.snapshot, "prompt_ids": [prompt.id for prompt in lease.prompts],
    }  # fmt: skip
    write_media(store, path, media, described)
    return path


def write_media(store: RunStore, path: str, media: MediaBatch, described: Mapping[str, Any]) -> None:
    """Commit a media file at `path`; `described` is kept in its metadata. Raises StoreError."""
    num_images, height, width, _ = media.images.shape
    columns: dict[str, pa.Array] = {
        "row": pa.array(range(num_images), pa.int32()),
        "image": pa.array([_to_webp(image) for image in media.images], pa.binary()),
        "width": pa.array([width] * num_images, pa.int32()),
        "height": pa.array([height] * num_images, pa.int32()),
    }
    for name, values in media.statistics.items():
        columns[_STATISTIC + name] = pa.array(np.asarray(values, dtype=np.float32))
    batch = pa.RecordBatch.from_pydict(columns)
    store.create_exclusive(path, encode(batch, schema_version=MEDIA_SCHEMA, metadata=described), writer_id="media")


def read_media(store: RunStore, path: str) -> MediaBatch:
    """Return the images of a group or sheet, [K, H, W, 3] uint8, and their statistics.

    Raises:
        CorruptFile: naming the file and the rule that it breaks.
        StoreError: missing or unreadable.
    """
    batch, _ = decode(path, store.read(path), schema_version=MEDIA_SCHEMA)
    missing = {"row", "image", "width", "height"} - set(batch.schema.names)
    if missing:
        refuse(path, f"lacks the columns {sorted(missing)}")
    sizes = set(zip(batch.column("height").to_pylist(), batch.column("width").to_pylist(), strict=True))
    images = [_from_webp(path, content) for content in batch.column("image").to_pylist()]
    if not images or {image.shape[:2] for image in images} != sizes or len(sizes) != 1:
        refuse(path, f"holds {len(images)} images of sizes {sorted(sizes)}; all images of a file have one size")
    return MediaBatch(images=np.stack(images), statistics=_statistics(batch))


def read_statistics(store: RunStore, path: str) -> dict[str, FloatArray]:
    """Return the image statistics of a media file, name -> [K], without decoding its images. Raises CorruptFile, StoreError."""
    return _statistics(decode(path, store.read(path), schema_version=MEDIA_SCHEMA)[0])


def _statistics(batch: pa.RecordBatch) -> dict[str, FloatArray]:
    return {name.removeprefix(_STATISTIC): batch.column(name).to_numpy() for name in batch.schema.names if name.startswith(_STATISTIC)}


def media_description(store: RunStore, path: str) -> dict[str, Any]:
    """Return what a media file says about itself, checked."""
    return decode(path, store.read(path), schema_version=MEDIA_SCHEMA)[1]


def _to_webp(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(sink, "WEBP", lossless=True, quality=30, method=1)
    return sink.getvalue()


def _from_webp(path: str, content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, TypeError) as error:
        refuse(path, f"holds an image that is no WebP ({error})")
