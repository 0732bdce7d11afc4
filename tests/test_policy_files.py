"""Published adapters: the bytes carry their digest, and no damaged byte passes for weights."""

import hashlib
import struct

import pytest
import torch

from common.errors import CorruptFile
from common.policy.adapters import adapter_digest, read_adapter, read_publication, read_snapshots, write_adapter_bytes
from common.types import SnapshotInfo

STATE = {"b.lora_A.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a.lora_B.weight": torch.tensor([[0.5], [-2.0]])}
GOLDEN = "7654dd4854e7b821de7cc3b3e9259a317203fcb91263fddbd3a0e3665697f74e"
INFOS = {"ema": SnapshotInfo(num_modules=3, canary=0.25), "live": SnapshotInfo(num_modules=3, canary=0.5)}


def published() -> bytes:
    doubled = {name: 2 * tensor for name, tensor in STATE.items()}
    return write_adapter_bytes({"live": STATE, "ema": doubled}, INFOS, incarnation=2, version=17)[0]


def test_the_digest_is_golden_and_that_of_names_shapes_and_bytes() -> None:
    """A changed digest would disown every file that was published before."""
    by_hand = hashlib.sha256(
        b"live.a.lora_B.weight:(2, 1);" + struct.pack("<2f", 0.5, -2.0) + b"live.b.lora_A.weight:(2, 3);" + struct.pack("<6f", *range(6))
    )
    assert adapter_digest({"live": STATE}) == by_hand.hexdigest() == GOLDEN


def test_the_digest_depends_on_the_values_and_not_on_how_they_lie_in_memory() -> None:
    reordered = dict(reversed(STATE.items()))
    strided = {name: tensor.t().contiguous().t() for name, tensor in STATE.items()}
    trained = {name: tensor.double().requires_grad_() for name, tensor in STATE.items()}
    assert {adapter_digest({"live": state}) for state in (reordered, strided, trained)} == {GOLDEN}


def test_the_digest_sees_a_name_a_shape_a_last_bit_and_a_snapshot() -> None:
    nudged = STATE["b.lora_A.weight"].clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    variants = [
        {"ema": STATE},
        {"live": STATE, "ema": STATE},
        {"live": {"c.lora_A.weight": STATE["b.lora_A.weight"], "a.lora_B.weight": STATE["a.lora_B.weight"]}},
        {"live": STATE | {"b.lora_A.weight": STATE["b.lora_A.weight"].reshape(3, 2)}},
        {"live": STATE | {"b.lora_A.weight": nudged}},
    ]
    assert len({GOLDEN, *map(adapter_digest, variants)}) == 6


def test_a_version_comes_back_as_it_was_written() -> None:
    content, adapter = write_adapter_bytes({"live": STATE}, {"live": INFOS["live"]}, incarnation=2, version=17)
    assert (adapter.incarnation, adapter.version, adapter.digest) == (2, 17, GOLDEN)
    publication = read_publication(content, "policy/i0002/v000017.safetensors")
    assert publication.adapter == adapter
    assert publication.path == "policy/i0002/v000017.safetensors"
    assert publication.snapshots == {"live": INFOS["live"]}
    state = read_adapter(content, "live")
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], tensor) and state[name].dtype == torch.float32 for name, tensor in STATE.items())


def test_snapshots_of_one_file_stay_apart() -> None:
    content = published()
    assert set(read_snapshots(content)) == {"live", "ema"}
    assert all(torch.equal(read_adapter(content, "ema")[name], 2 * tensor) for name, tensor in STATE.items())
    assert read_publication(content, "p").snapshots == INFOS


def test_a_snapshot_that_is_not_in_the_file_is_refused_by_name() -> None:
    with pytest.raises(CorruptFile, match=r"'behavior' is not in it, only \['ema', 'live'\]"):
        read_adapter(published(), "behavior")


def test_one_flipped_bit_anywhere_gives_the_same_weights_or_a_corrupt_file() -> None:
    """Every byte of a small file; whatever else it raised would be a bug. A flip among the weights is always seen."""
    content = published()
    first_weight = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        try:
            state = read_adapter(bytes(flipped), "live")
        except CorruptFile:
            refused += 1
        else:
            assert position < first_weight
            assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
        try:
            read_publication(bytes(flipped), "p")
        except CorruptFile:
            assert position < first_weight
    assert refused > len(content) - first_weight


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, published()[:40], published()[:-3], published() + b"tail"], ids=len)
def test_what_is_no_whole_adapter_file_is_refused_with_the_remedy(content: bytes) -> None:
    with pytest.raises(CorruptFile, match="resume from an earlier LearnerState"):
        read_adapter(content, "live")


def test_a_safetensors_file_of_somebody_else_is_refused() -> None:
    from safetensors.torch import save

    with pytest.raises(CorruptFile, match="header does not parse"):
        read_publication(save(STATE), "policy/i0001/v000001.safetensors")
