"""Publications that are known, and the slots whose weights did not arrive as published."""

from collections.abc import Callable, Collection

from common.errors import GateError
from common.types import LoadReceipt, Publication

CANARY_TOLERANCE = 0.05  # relative; plain norms are blind (architecture, section 6)
CANARY_FLOOR = 1e-6  # a fresh adapter's canary is 0
KEPT = 64  # newest versions held in memory, far above S + 2; an older one is read from its file again


class Publications:
    """What the learner published, by version.

    Args:
        read: version -> publication from the published file itself (after a restart), None when it cannot be told.
    """

    def __init__(self, read: Callable[[int], Publication | None]) -> None:
        self._read = read
        self._known: dict[int, Publication] = {}
        self._refused: dict[str, str] = {}  # slot -> what was wrong
        self.versions: dict[str, int] = {}  # slot -> version it bound last
        self.num_mismatches = 0  # receipts that differed

    def add(self, publication: Publication) -> None:
        """Keep a publication; the first of a version stands."""
        self._known.setdefault(publication.adapter.version, publication)
        for version in sorted(self._known)[:-KEPT]:
            self._known.pop(version, None)

    def get(self, version: int) -> Publication | None:
        """The publication of a version, None while nobody has told its receipt."""
        if version not in self._known:
            found = self._read(version)
            if found is None:
                return None
            self.add(found)
            return found
        return self._known[version]

    def refusal(self, slot: str) -> str | None:
        """Why a slot gets no lease, None when it may."""
        return self._refused.get(slot)

    def keep(self, slots: Collection[str]) -> None:
        """Forget the slots but these: they are gone for good."""
        self.versions = {slot: version for slot, version in self.versions.items() if slot in slots}
        self._refused = {slot: reason for slot, reason in self._refused.items() if slot in slots}

    def confirm(self, slot: str, receipt: LoadReceipt) -> None:
        """Compare what a slot bound with what was published.

        Raises:
            GateError: "weights"; the slot gets no lease until it sends a receipt that agrees.
        """
        problem = self._difference(receipt)
        if problem is None:
            self._refused.pop(slot, None)
            self.versions[slot] = receipt.adapter.version
            return
        message = (
            f"{slot} bound version {receipt.adapter.version} ({receipt.snapshot}) but {problem}; a worker samples only with the learner's "
            "weights; check that both load the same base model and lora.targets"
        )
        self._refused[slot] = message
        self.num_mismatches += 1
        raise GateError("weights", message)

    def _difference(self, receipt: LoadReceipt) -> str | None:
        published = self.get(receipt.adapter.version)
        if published is None:
            return "no such version is published"
        if published.adapter != receipt.adapter:
            return f"its digest is {receipt.adapter.digest}, not {published.adapter.digest}"
        expected = published.snapshots.get(receipt.snapshot)
        if expected is None:
            return f"the publication holds {sorted(published.snapshots)} only"
        if receipt.num_modules != expected.num_modules or receipt.num_modules == 0:
            return f"{receipt.num_modules} modules were bound, not {expected.num_modules}"
        if not abs(receipt.canary - expected.canary) <= max(CANARY_TOLERANCE * abs(expected.canary), CANARY_FLOOR):
            return f"its canary is {receipt.canary:.6g}, not {expected.canary:.6g} (within 5 %)"
        return None
