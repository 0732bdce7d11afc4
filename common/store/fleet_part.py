"""The Coordinator as the driver sees it: slots that are to leave, and what each slot has done. The caller holds the lock."""

from collections import Counter
from collections.abc import Iterable

from common.store.directive import Directive
from common.types import Stop


class FleetPart:
    """The newest directive, and counts by slot from which the driver tells work from crash loops and hangs."""

    def __init__(self) -> None:
        self.directive = Directive()
        self.work: Counter[str] = Counter()  # slot -> commits or updates, of this Coordinator's life
        self.overruns: Counter[str] = Counter()  # slot -> leases that outlived group_timeout_s while it went on beating

    def dismissal(self, slot: str) -> Stop | None:
        """The answer to a slot that is being drained, None for the others."""
        return Stop(reason=f"{slot} is drained: the fleet gets smaller") if slot in self.directive.drained else None

    def worked(self, slot: str | None) -> None:
        """A slot committed something; None: its lease had ended."""
        if slot is not None:
            self.work[slot] += 1

    def overran(self, slots: Iterable[str]) -> None:
        """Slots that beat but did not finish in time."""
        self.overruns.update(slots)
