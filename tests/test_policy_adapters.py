"""The published file's bytes: the same in every process, and float32. Digests and damage: test_policy_files.py."""

import json

import torch

from common.policy.adapters import read_adapter, write_adapter_bytes
from common.types import SnapshotInfo

Snapshots = dict[str, dict[str, torch.Tensor]]
INFOS = {"ema": SnapshotInfo(num_modules=1, canary=0.125), "live": SnapshotInfo(num_modules=1, canary=1 / 3)}


def snapshots() -> Snapshots:
    generator = torch.Generator().manual_seed(0)
    return {name: {f"block.0.lora_{half}.weight": torch.randn(2, 3, generator=generator) for half in "AB"} for name in ("live", "ema")}


def written() -> bytes:
    return write_adapter_bytes(snapshots(), INFOS, incarnation=2, version=17)[0]


def test_the_files_bytes_are_the_same_in_every_process() -> None:
    """safetensors alone would write the header in an order that changes with the process."""
    content = written()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert content[8 : 8 + size].rstrip(b" ") == json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def test_halves_are_published_as_float32() -> None:
    half = {"live": {"a": torch.tensor([0.1, 2.0]).bfloat16()}}
    content, _ = write_adapter_bytes(half, {"live": SnapshotInfo(num_modules=1, canary=0.0)}, incarnation=1, version=0)
    found = read_adapter(content, "live")["a"]
    assert found.dtype == torch.float32
    assert torch.equal(found, half["live"]["a"].float())
