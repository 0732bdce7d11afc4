"""The Ledger's verdicts on groups, as functions of what is known of them: drops, the health of the run, a batch's record."""

from collections import Counter
from collections.abc import Sequence

from common.store.ledger_entries import Entry, LedgerSettings
from common.types import Drop, ManifestGroup

_HARMLESS_DROPS = ("flat", "stale")  # they say nothing about the system's health


def drop_of_files(entry: Entry, update: int, settings: LedgerSettings) -> Drop | None:
    """The drop that a group with files needs, were it to be consumed by `update`; None when it may stay.

    Staleness passes the bound only after S or P changed at a resume.
    """
    file = entry.chosen(settings)
    if file is None:
        return None
    staleness = update - 1 - file.version
    if staleness > settings.max_staleness:
        return Drop(number=entry.number, reason="stale", detail=f"staleness {staleness} in update {update}")
    kept = entry.kept(settings)
    if kept is None:
        return None
    if sum(kept) < settings.min_scored:
        detail = f"{sum(kept)} of {len(kept)} samples scored, {settings.min_scored} needed"
        return Drop(number=entry.number, reason="too_few_scores", detail=detail)
    if settings.replace_flat_groups and entry.is_flat(settings):
        return Drop(number=entry.number, reason="flat", detail="every train reward is the same on all samples")
    return None


def cause_to_stop(recent: Sequence[Drop], settings: LedgerSettings) -> str | None:
    """The cause to stop for when more than half of the last 2P issued groups were dropped; flat and stale do not count.

    Args:
        recent: the drops among the last 2P issued groups, in number order.
        settings: the rules in force.
    """
    bad = [drop for drop in recent if drop.reason not in _HARMLESS_DROPS]
    if len(bad) <= settings.groups_per_update:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(drop.reason for drop in bad).most_common())
    return (
        f"{len(bad)} of the last {2 * settings.groups_per_update} groups were dropped ({reasons}); "
        f"last: group {bad[-1].number}: {bad[-1].detail or 'no detail'}"
    )


def record_of(entry: Entry, prompt_id: str, settings: LedgerSettings) -> ManifestGroup:
    """A ready group as its manifest records it."""
    file = entry.chosen(settings)
    kept = entry.kept(settings)
    assert file is not None
    assert kept is not None
    return ManifestGroup(
        number=entry.number, path=file.path, media_path=file.path.replace(".group.arrow", ".media.arrow"), version=file.version,
        num_bytes=file.num_bytes, prompt_id=prompt_id, scores=dict(entry.filed(settings)), kept=kept,
    )  # fmt: skip
