"""The published file: digest, header, and every way in which a damaged one is refused."""

import hashlib
import json

import numpy as np
import pytest
import torch

from common.errors import CorruptFile
from common.policy.adapters import adapter_digest, read_adapter, read_publication, read_snapshots, write_adapter_bytes
from common.types import SnapshotInfo

Snapshots = dict[str, dict[str, torch.Tensor]]
INFOS = {"ema": SnapshotInfo(num_modules=1, canary=0.125), "live": SnapshotInfo(num_modules=1, canary=1 / 3)}


def snapshots() -> Snapshots:
    generator = torch.Generator().manual_seed(0)
    return {name: {f"block.0.lora_{half}.weight": torch.randn(2, 3, generator=generator) for half in "AB"} for name in ("live", "ema")}


def written() -> bytes:
    return write_adapter_bytes(snapshots(), INFOS, incarnation=2, version=17)[0]


def test_the_digest_is_sha256_over_sorted_names_shapes_and_float32_bytes() -> None:
    state = {"live": {"b.weight": torch.tensor([[1.0, -2.5]]), "a.weight": torch.tensor([3.0])}}
    expected = hashlib.sha256()
    expected.update(b"live.a.weight:(1,);" + np.array([3.0], dtype="<f4").tobytes())
    expected.update(b"live.b.weight:(1, 2);" + np.array([1.0, -2.5], dtype="<f4").tobytes())
    assert adapter_digest(state) == expected.hexdigest()


def test_the_digest_ignores_order_and_layout_and_nothing_else() -> None:
    plain = snapshots()
    digest = adapter_digest(plain)
    reordered = {name: dict(reversed(plain[name].items())) for name in reversed(plain)}
    strided = {name: {key: tensor.t().contiguous().t() for key, tensor in state.items()} for name, state in plain.items()}
    assert adapter_digest(reordered) == adapter_digest(strided) == digest
    key = "block.0.lora_A.weight"
    nudged, reshaped, renamed = snapshots(), snapshots(), snapshots()
    nudged["live"][key].view(torch.int32)[0, 0] ^= 1  # the last bit of one value
    reshaped["live"][key] = reshaped["live"][key].reshape(3, 2)
    renamed["live"]["block.1.lora_A.weight"] = renamed["live"].pop(key)
    swapped = {"live": plain["ema"], "ema": plain["live"]}
    assert len({digest, *(adapter_digest(other) for other in (nudged, reshaped, renamed, swapped))}) == 5


def test_a_version_comes_back_bit_for_bit_with_what_it_says_of_itself() -> None:
    content, adapter = write_adapter_bytes(snapshots(), INFOS, incarnation=2, version=17)
    publication = read_publication(content, "policy/i0002/v000017.safetensors")
    assert publication.adapter == adapter
    assert (adapter.incarnation, adapter.version, adapter.digest) == (2, 17, adapter_digest(snapshots()))
    assert dict(publication.snapshots) == INFOS  # the canary too, in full precision
    assert publication.path == "policy/i0002/v000017.safetensors"
    for name, state in snapshots().items():
        found = read_adapter(content, name)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)
    assert read_snapshots(content).keys() == {"live", "ema"}


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


def test_a_flipped_bit_of_the_weights_is_corrupt() -> None:
    content = bytearray(written())
    content[-3] ^= 1
    with pytest.raises(CorruptFile, match="digest"):
        read_adapter(bytes(content), "live")


@pytest.mark.parametrize("size", [0, 4, 40, 400, -1])
def test_a_cut_file_is_corrupt(size: int) -> None:
    with pytest.raises(CorruptFile):
        read_adapter(written()[:size], "live")


def test_a_file_that_is_no_adapter_is_corrupt() -> None:
    with pytest.raises(CorruptFile, match=r"here\.safetensors"):
        read_publication(b"not a safetensors file at all, but long enough", "here.safetensors")


def test_a_snapshot_that_was_not_published_is_named_with_those_that_were() -> None:
    with pytest.raises(CorruptFile, match=r"'behavior'.*\['ema', 'live'\]"):
        read_adapter(written(), "behavior")
