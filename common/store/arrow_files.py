"""Arrow IPC files of plain types: one record batch, uncompressed, schema version and a content digest in the metadata.

Anything else is refused on reading with the file and the broken rule named. Extension types are refused because a reader may
run code for them.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from common.errors import CorruptFile

_SCHEMA_KEY = "flowfleet.schema"
_DIGEST_KEY = "flowfleet.sha256"
_JSON_KEY = "flowfleet.json"
_EXTENSION_KEY = b"ARROW:extension:name"


def refuse(path: str, rule: str) -> NoReturn:
    """Raise CorruptFile for a file and the rule that it breaks."""
    raise CorruptFile(f"store: {path}: {rule}; the file is not used; remove it, and the group or scores are made again")


def encode(batch: pa.RecordBatch, *, schema_version: str, metadata: Mapping[str, Any]) -> bytes:
    """Return the bytes of an IPC file.

    Args:
        batch: the only record batch; its fields carry their shapes in their metadata.
        schema_version: e.g. "group/1".
        metadata: JSON values that describe the file.
    """
    own = {
        _SCHEMA_KEY: schema_version,
        _DIGEST_KEY: content_digest(batch),
        _JSON_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False),
    }
    batch = batch.replace_schema_metadata(own)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def decode(path: str, content: bytes, *, schema_version: str) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Return the record batch and the metadata of an IPC file, checked.

    Raises:
        CorruptFile: truncated, another schema version, an extension type, several batches, or a digest that differs.
    """
    try:
        reader = pa.ipc.open_file(pa.BufferReader(content))
        _check_schema(path, reader.schema, schema_version)
        if reader.num_record_batches != 1:
            refuse(path, f"holds {reader.num_record_batches} record batches; the rule is one")
        batch = reader.get_batch(0)
        batch.validate(full=True)
        digest = content_digest(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        refuse(path, f"is no readable Arrow IPC file ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    stored = reader.schema.metadata
    if stored.get(_DIGEST_KEY.encode(), b"").decode() != digest:
        refuse(path, "content differs from the digest that its writer recorded")
    return batch, json.loads(stored[_JSON_KEY.encode()])


def _check_schema(path: str, schema: pa.Schema, schema_version: str) -> None:
    found = (schema.metadata or {}).get(_SCHEMA_KEY.encode(), b"").decode()
    if found != schema_version:
        refuse(path, f"has schema version {found!r}; this code reads {schema_version!r}")
    for field in schema:
        _check_field(path, field)


def _check_field(path: str, field: pa.Field) -> None:
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or _EXTENSION_KEY in (field.metadata or {}):
        refuse(path, f"column {field.name!r} has an extension type; the rule is plain Arrow types only")
    for position in range(kind.num_fields):
        _check_field(path, kind.field(position))


def content_digest(batch: pa.RecordBatch) -> str:
    """Return the sha256 (hex) over names, types, nulls and values of a batch, whatever its padding and offsets."""
    state = hashlib.sha256(str(batch.num_rows).encode())
    for field, column in zip(batch.schema, batch.columns, strict=True):
        state.update(f"/{field.name}:{field.type}".encode())
        _update(state, column)
    return state.hexdigest()


def _update(state: Any, array: pa.Array) -> None:
    state.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        _update(state, array.flatten())
    elif pa.types.is_list(kind) or pa.types.is_map(kind):
        state.update(np.diff(array.offsets.to_numpy()).tobytes())
        for child in (array.keys, array.items) if pa.types.is_map(kind) else (array.flatten(),):
            _update(state, child)
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        for value in array.to_pylist():
            part = b"" if value is None else value if isinstance(value, bytes) else value.encode()
            state.update(f"{len(part)}:".encode())
            state.update(part)
    else:
        state.update(array.fill_null(0).to_numpy(zero_copy_only=False).tobytes())


def tensor_column(name: str, values: np.ndarray[Any, Any]) -> tuple[pa.Field, pa.Array]:
    """Return the field and array of [rows, *shape] float32 as fixed_size_list<float32> with the shape in its metadata.

    A size of 0 (no latents kept) is a list<float32> of empty lists: some readers refuse fixed lists of length 0.
    """
    rows = values.shape[0]
    size = int(np.prod(values.shape[1:]))
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    if size:
        array: pa.Array = pa.FixedSizeListArray.from_arrays(flat, size)
    else:
        array = pa.array([[]] * rows, pa.list_(pa.float32()))
    return pa.field(name, array.type, nullable=False, metadata={"shape": json.dumps(list(values.shape[1:]))}), array


def read_tensor(path: str, batch: pa.RecordBatch, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a tensor column as [rows, *shape] float32."""
    field = batch.schema.field(name)
    shape = json.loads((field.metadata or {}).get(b"shape", b"null"))
    if shape is None:
        refuse(path, f"column {name!r} has no shape in its field metadata")
    flat = batch.column(name).flatten().to_numpy(zero_copy_only=False)
    if flat.size != batch.num_rows * int(np.prod(shape)) or flat.dtype != np.float32:
        refuse(path, f"column {name!r} holds {flat.size} {flat.dtype} values; the rule is {batch.num_rows} rows of float32 {shape}")
    result: np.ndarray[Any, np.dtype[np.float32]] = flat.reshape(batch.num_rows, *shape).copy()
    return result
