"""Whose weights the policy holds while it samples, with proof that they arrived."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from common.errors import GateError
from common.policy.base import AdapterState, Policy
from common.types import AdapterId, LoadReceipt, Publication

AdapterLoader = Callable[[Publication, str], AdapterState]
"""Reads one snapshot of a published file; raises StoreError when the store refuses or its digest differs."""

CANARY_TOLERANCE = 0.05  # relative, against the learner's
CANARY_FLOOR = 1e-6  # absolute: a fresh adapter's canary is 0


class Weights(Protocol):
    """Gives a policy the weights of a lease."""

    def bound(self, publication: Publication, snapshot: str) -> AbstractContextManager[LoadReceipt]:
        """Within the context the policy runs with that snapshot."""
        ...


class WeightKeeper:
    """For a policy of the worker's own: copies a snapshot in place and keeps it until another is asked for."""

    def __init__(self, policy: Policy, loader: AdapterLoader) -> None:
        self._policy, self._loader = policy, loader
        self._held: LoadReceipt | None = None

    def ensure(self, publication: Publication, snapshot: str) -> LoadReceipt:
        """Make the policy hold that snapshot; skip when it does already.

        Raises:
            GateError: gate "weights": no module bound, or a module count or canary other than the learner's.
            StoreError: the file cannot be read.
        """
        held = self._held
        if held is None or (held.adapter, held.snapshot) != (publication.adapter, snapshot):
            self._held = None  # a load that fails half way leaves no claim
            self._policy.load_adapter(self._loader(publication, snapshot))
            held = inspect_weights(self._policy, publication, snapshot)
            self._held = held
        return held

    @contextmanager
    def bound(self, publication: Publication, snapshot: str) -> Iterator[LoadReceipt]:
        """Ensure the snapshot; it stays loaded afterwards."""
        yield self.ensure(publication, snapshot)


class BorrowedWeights:
    """For a policy shared with the learner (--local): the snapshot is in place only within the context, then what was there."""

    def __init__(self, policy: Policy, loader: AdapterLoader) -> None:
        self._policy, self._loader = policy, loader
        self._cached: tuple[AdapterId, str, AdapterState] | None = None
        self._receipt: LoadReceipt | None = None

    @contextmanager
    def bound(self, publication: Publication, snapshot: str) -> Iterator[LoadReceipt]:
        """Run with the snapshot, then restore. Raises as WeightKeeper.ensure does."""
        if self._cached is None or self._cached[:2] != (publication.adapter, snapshot):
            self._cached, self._receipt = (publication.adapter, snapshot, self._loader(publication, snapshot)), None
        with self._policy.using(self._cached[2]):
            if self._receipt is None:
                self._receipt = inspect_weights(self._policy, publication, snapshot)
            yield self._receipt


def inspect_weights(policy: Policy, publication: Publication, snapshot: str) -> LoadReceipt:
    """Return the receipt of the adapter that the policy holds now.

    Raises:
        GateError: gate "weights": it is not what the learner published.
    """
    expected = publication.snapshots.get(snapshot)
    name = f"snapshot {snapshot!r} of version {publication.adapter.version}"
    if expected is None:
        raise GateError("weights", f"{name} is not published; there are {sorted(publication.snapshots)}; mend rollout.snapshot")
    found = policy.inspect_adapter()
    if found.num_modules == 0 or found.num_modules != expected.num_modules:
        raise GateError(
            "weights",
            f"{name} bound {found.num_modules} LoRA modules, the learner published {expected.num_modules}; they must be equal and not 0; "
            "make both sides load the same model and model.lora.targets",
        )
    if not abs(found.canary - expected.canary) <= CANARY_TOLERANCE * abs(expected.canary) + CANARY_FLOOR:
        raise GateError(
            "weights",
            f"{name} has canary {found.canary:.6g} here and {expected.canary:.6g} at the learner, more than 5 % apart: "
            "the weights did not arrive; make both sides load the same model, dtype and file",
        )
    return LoadReceipt(adapter=publication.adapter, snapshot=snapshot, num_modules=found.num_modules, canary=found.canary)
