"""Reading a run directory back: what the listing says, parsed. Group files that manifests or drops settle are not opened."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.errors import StoreError
from common.logs import get_logger
from common.store import paths
from common.store.evaluations import EvalBoard
from common.store.groups import read_group_metadata
from common.store.ledger_entries import GroupFile, Listing, ScoreSummary
from common.store.ledger_scoring import ScoreKey
from common.store.manifests import read_drop, read_manifest
from common.store.run_store import RunStore
from common.store.scores import read_scores
from common.types import Drop, Manifest, Prompt, Publication, ScoreFile

_log = get_logger("store")


def read_listing(store: RunStore, prompt_for: Callable[[int], Prompt]) -> Listing:
    """Return what the run directory says. An unsettled group drawn for another prompt than its number's is left out, and made again.

    Raises:
        CorruptFile: a manifest, drop, unsettled group or score file breaks its schema.
        StoreError: unreadable.
    """
    updates = sorted(update for path in store.list(paths.MANIFESTS) if (update := paths.parse_manifest(path)) is not None)
    manifests = tuple(read_manifest(store, update) for update in updates)
    numbers = (number for path in store.list(paths.DROPS) if (number := paths.parse_drop(path)) is not None)
    drops = tuple(read_drop(store, number) for number in numbers)
    settled = _settled(manifests, drops)
    groups = []
    for path, num_bytes in sorted(store.sizes(paths.GROUPS).items()):
        name = paths.parse_group(path)
        if name is not None and name.number not in settled:
            file = group_file(store, path, num_bytes)
            if _is_drawn_for(file, prompt_for(file.number)):
                groups.append(file)
    known = {(group.number, group.lease_id) for group in groups}
    summaries = []
    for path in store.list(paths.SCORES):
        score = paths.parse_score(path)
        if score is not None and (score.number, score.lease_id) in known:
            summaries.append(score_summary(store, path))
    return Listing(groups=tuple(groups), scores=tuple(summaries), drops=drops, manifests=manifests, newest_version=newest_version(store))


def _settled(manifests: Iterable[Manifest], drops: Iterable[Drop]) -> set[int]:
    return {group.number for manifest in manifests for group in manifest.groups} | {drop.number for drop in drops}


def _is_drawn_for(file: GroupFile, prompt: Prompt) -> bool:
    if file.drawn_for == (prompt.id, prompt.text):
        return True
    _log.warning(
        "recovery: %s was drawn for prompt %s, and number %d is now %s: it is left out, and the number is drawn again; the prompt file, "
        "its order or run.seed changed since; restore them to use it", file.path, file.drawn_for, file.number, (prompt.id, prompt.text),
    )  # fmt: skip
    return False


def newest_version(store: RunStore) -> int | None:
    """The newest published policy version, None before the first."""
    return max(adapters(store), default=None)


def adapters(store: RunStore) -> dict[int, str]:
    """Version -> path of the published adapters; of one version's files the highest incarnation's."""
    found = sorted((*name, path) for path in store.list(paths.POLICY) if (name := paths.parse_adapter(path)) is not None)
    return {version: path for _, version, path in found}


def recall(store: RunStore, read: Callable[[str], Publication] | None, version: int) -> Publication | None:
    """Return the publication of a version from its own file, None when there is none or nobody can read it."""
    path = adapters(store).get(version) if read else None
    return read(path) if read and path else None


def group_file(store: RunStore, path: str, num_bytes: int) -> GroupFile:
    """Return what the ledger needs of a group file, from its content. Raises CorruptFile."""
    described = read_group_metadata(store, path)
    return GroupFile(
        number=described["number"], lease_id=described["lease_id"], path=path, version=described["adapter"]["version"], num_bytes=num_bytes,
        drawn_for=(described["prompt"]["id"], described["prompt"]["text"]),
    )  # fmt: skip


def score_summary(store: RunStore, path: str) -> ScoreSummary:
    """Return what the ledger needs of a score file. Raises CorruptFile."""
    return summary_of(read_scores(store, path))


def summary_of(file: ScoreFile) -> ScoreSummary:
    """Return what the ledger needs of a score file's content."""
    return ScoreSummary(number=file.number, lease_id=file.lease_id, reward=file.reward, values=tuple(score.value for score in file.scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSheets:
    """The sheets and score files that an evaluation already has."""

    directory: str
    drawn: tuple[tuple[int, str], ...]  # number, lease
    scored: tuple[tuple[ScoreKey, tuple[float | None, ...]], ...]

    def tell(self, board: EvalBoard) -> None:
        """Count them as done on the board of a begun evaluation."""
        for number, lease_id in self.drawn:
            board.drawn(self.directory, number, lease_id)
        for key, values in self.scored:
            board.scored(key, values)


def find_sheets(store: RunStore, directory: str) -> FoundSheets:
    """Return what an evaluation has. An unreadable file is left out, and made again. Raises StoreError."""
    listed = store.list(directory)
    sheets = [sheet for path in listed if (sheet := paths.parse_sheet(path)) is not None]
    scored = []
    for path in listed:
        name = paths.parse_sheet_score(path)
        if name is not None:
            try:
                summary = score_summary(store, path)
            except StoreError as error:
                _log.warning("%s", error)
                continue
            scored.append((ScoreKey(number=name.number, lease_id=name.lease_id, reward=name.reward, directory=directory), summary.values))
    return FoundSheets(directory=directory, drawn=tuple((sheet.number, sheet.lease_id) for sheet in sheets), scored=tuple(scored))
