"""Weights arrive with a receipt, or the run stops."""

import dataclasses

import pytest
import torch

from common.errors import GateError
from common.types import Publication, SnapshotInfo
from rollout_workers.weights import BorrowedWeights, WeightKeeper
from tests.fakes import FakePolicy, FakePolicyFiles, adapter_state


def published(version: int = 1, scale: float = 0.1) -> tuple[FakePolicyFiles, Publication]:
    files = FakePolicyFiles()
    return files, files.publish(version, {"live": adapter_state(scale), "ema": adapter_state(scale / 2)})


def changed(publication: Publication, **changes: float) -> Publication:
    info = dataclasses.replace(publication.snapshots["live"], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(publication, snapshots={**publication.snapshots, "live": info})


def test_a_keeper_loads_a_snapshot_once_and_receipts_what_it_found() -> None:
    files, publication = published()
    policy = FakePolicy()
    keeper = WeightKeeper(policy, files.load)
    receipt = keeper.ensure(publication, "live")
    assert torch.equal(policy.read_adapter()["mix.up"], adapter_state(0.1)["mix.up"])
    assert (receipt.adapter, receipt.snapshot, receipt.num_modules) == (publication.adapter, "live", 1)
    assert receipt.canary == publication.snapshots["live"].canary > 0
    assert keeper.ensure(publication, "live") == receipt
    assert files.num_loads == policy.num_loads == 1


def test_another_snapshot_or_version_is_loaded_anew() -> None:
    files, publication = published()
    later = files.publish(2, {"live": adapter_state(0.3)})
    policy = FakePolicy()
    keeper = WeightKeeper(policy, files.load)
    asked = [(publication, "live", 0.1), (publication, "ema", 0.05), (later, "live", 0.3), (publication, "live", 0.1)]
    for wanted, snapshot, scale in asked:
        keeper.ensure(wanted, snapshot)
        assert torch.equal(policy.read_adapter()["mix.up"], adapter_state(scale)["mix.up"])
    assert files.num_loads == 4


def test_a_fresh_adapter_whose_canary_is_0_passes() -> None:
    files, publication = published(scale=0.0)
    assert WeightKeeper(FakePolicy(), files.load).ensure(publication, "live").canary == 0.0


@pytest.mark.parametrize(("factor", "passes"), [(1.04, True), (0.96, True), (1.06, False), (0.9, False), (0.0, False)])
def test_a_canary_more_than_5_percent_off_stops_the_run(factor: float, passes: bool) -> None:
    files, publication = published()
    canary = publication.snapshots["live"].canary / factor if factor else 0.0
    keeper = WeightKeeper(FakePolicy(), files.load)
    if passes:
        keeper.ensure(changed(publication, canary=canary), "live")
        return
    with pytest.raises(GateError, match="5 %") as caught:
        keeper.ensure(changed(publication, canary=canary), "live")
    assert caught.value.name == "weights"
    assert f"{canary:.6g}" in str(caught.value)
    assert f"{publication.snapshots['live'].canary:.6g}" in str(caught.value)


def test_a_canary_that_is_not_a_number_stops_the_run() -> None:
    files, publication = published()
    with pytest.raises(GateError):
        WeightKeeper(FakePolicy(), files.load).ensure(changed(publication, canary=float("nan")), "live")


def test_an_adapter_bound_to_nothing_stops_the_run() -> None:
    class Unbound(FakePolicy):
        def inspect_adapter(self) -> SnapshotInfo:
            return SnapshotInfo(num_modules=0, canary=0.0)

    files, publication = published()
    with pytest.raises(GateError, match="bound 0 LoRA modules, the learner published 1"):
        WeightKeeper(Unbound(), files.load).ensure(publication, "live")
    with pytest.raises(GateError, match="bound 1 LoRA modules, the learner published 2"):
        WeightKeeper(FakePolicy(), files.load).ensure(changed(publication, num_modules=2), "live")


def test_after_a_failed_load_nothing_counts_as_held() -> None:
    files, publication = published()
    policy = FakePolicy()
    keeper = WeightKeeper(policy, files.load)
    keeper.ensure(publication, "live")
    with pytest.raises(GateError):
        keeper.ensure(changed(files.publish(2, {"live": adapter_state(0.2)}), canary=9.0), "live")
    keeper.ensure(publication, "live")
    assert policy.num_loads == 3
    assert torch.equal(policy.read_adapter()["mix.up"], adapter_state(0.1)["mix.up"])


def test_borrowed_weights_are_in_place_only_within_the_context() -> None:
    files, publication = published()
    policy = FakePolicy()
    policy.load_adapter(adapter_state(0.7))
    weights = BorrowedWeights(policy, files.load)
    for _ in range(2):
        with weights.bound(publication, "live") as receipt:
            assert torch.equal(policy.read_adapter()["mix.up"], adapter_state(0.1)["mix.up"])
            assert receipt.canary == publication.snapshots["live"].canary
        assert torch.equal(policy.read_adapter()["mix.up"], adapter_state(0.7)["mix.up"])
    assert files.num_loads == 1
    with pytest.raises(GateError), weights.bound(changed(files.publish(2, {"live": adapter_state(0.2)}), canary=9.0), "live"):
        pass
    assert torch.equal(policy.read_adapter()["mix.up"], adapter_state(0.7)["mix.up"])
