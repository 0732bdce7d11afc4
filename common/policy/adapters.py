"""A published policy version as one safetensors file: float32, keys `<snapshot>.<canonical name>`, with its digest inside."""

import hashlib
import json
from collections.abc import Mapping

import safetensors
import torch
from safetensors.torch import load, save

from common.errors import CorruptFile
from common.policy.base import AdapterState
from common.policy.published import REMEDY, read_header, read_publication
from common.types import AdapterId, SnapshotInfo

__all__ = ["adapter_digest", "read_adapter", "read_header", "read_publication", "read_snapshots", "write_adapter_bytes"]


def adapter_digest(snapshots: Mapping[str, AdapterState]) -> str:
    """Return the sha256 (hex) over names, shapes and float32 bytes of all snapshots, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_flatten(snapshots).items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def write_adapter_bytes(
    snapshots: Mapping[str, AdapterState], infos: Mapping[str, SnapshotInfo], *, incarnation: int, version: int
) -> tuple[bytes, AdapterId]:
    """Encode a version.

    Args:
        snapshots: name -> float32 adapter state.
        infos: name -> bound modules and canary, as the learner found them.

    Returns:
        The file's bytes, equal for equal arguments in every process, and the version's identity.
    """
    adapter = AdapterId(incarnation=incarnation, version=version, digest=adapter_digest(snapshots))
    described = {name: {"num_modules": info.num_modules, "canary": info.canary} for name, info in sorted(infos.items())}
    header = {"incarnation": str(incarnation), "version": str(version), "digest": adapter.digest, "snapshots": json.dumps(described)}
    return _with_sorted_header(save(_flatten(snapshots), metadata=header)), adapter


def read_snapshots(content: bytes, path: str = "adapter") -> dict[str, dict[str, torch.Tensor]]:
    """Return every snapshot of a published file, verified against its digest. Raises CorruptFile."""
    header = read_header(content, path)
    try:
        tensors = load(content)
    except safetensors.SafetensorError as error:
        raise CorruptFile(f"adapter file {path}: it does not parse ({error}); {REMEDY}") from error
    snapshots: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, canonical = key.partition(".")
        snapshots.setdefault(name, {})[canonical] = tensor
    found = adapter_digest(snapshots)
    if found != header["digest"]:
        raise CorruptFile(
            f"adapter file {path}: its weights digest to {found[:12]}, its header says {header['digest'][:12]}; "
            f"they must be equal; {REMEDY}"
        )
    return snapshots


def read_adapter(content: bytes, snapshot: str) -> AdapterState:
    """Return one snapshot of a published file, verified. Raises CorruptFile when it is absent or the digest differs."""
    snapshots = read_snapshots(content)
    if snapshot not in snapshots:
        raise CorruptFile(
            f"adapter file: snapshot {snapshot!r} is not in it, only {sorted(snapshots)}; set rollout.snapshot to one of them"
        )
    return snapshots[snapshot]


def _with_sorted_header(content: bytes) -> bytes:
    """safetensors writes metadata in an order that differs by process; equal versions must be equal files."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _flatten(snapshots: Mapping[str, AdapterState]) -> dict[str, torch.Tensor]:
    return {
        f"{snapshot}.{name}": tensor.detach().to("cpu", torch.float32).contiguous()
        for snapshot, state in snapshots.items()
        for name, tensor in state.items()
    }
