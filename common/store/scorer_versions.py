"""ScorerVersions: which version of its scorer each reward of a run is scored by. One curve is of one scorer."""

from collections.abc import Iterable, Mapping
from typing import Final

from common.errors import CorruptFile
from common.logs import get_logger
from common.store import paths
from common.store.run_store import RunStore
from common.store.scores import read_scores
from common.types import ScoreFile

NOBODY: Final = "none"  # the version of a file of nulls that the Coordinator wrote after too many attempts
_log = get_logger("coordinator")


class ScorerVersions:
    """Reward -> the scorer version that every further score of the run must be of: the first that is noted. The caller holds the lock.

    Args:
        found: what earlier starts were scored by, see `read_scorer_versions`.
    """

    def __init__(self, found: Mapping[str, str]) -> None:
        self._versions = dict(found)

    def of(self, reward: str) -> str:
        """The version; "" before the reward's first score."""
        return self._versions.get(reward, "")

    def note(self, file: ScoreFile) -> None:
        """A score file was committed; one of another version (two servers that began at once) is kept, and said."""
        if file.scorer_version == NOBODY:
            return
        first = self._versions.setdefault(file.reward, file.scorer_version)
        if first != file.scorer_version:
            _log.warning(
                "reward %s: group or sheet %d was scored by %s, the run by %s: its servers are not alike",
                file.reward, file.number, file.scorer_version, first,
            )  # fmt: skip


def read_scorer_versions(store: RunStore, rewards: Iterable[str]) -> dict[str, str]:
    """Return reward -> the version in its newest score file, of a training group or else of an evaluation; rewards without one are absent.

    A damaged file is left out. Raises StoreError.
    """
    files = [(name, path) for path in store.list(paths.SCORES) if (name := paths.parse_score(path)) is not None]
    sheets = [(name, path) for path in store.list(paths.EVAL) if (name := paths.parse_sheet_score(path)) is not None]
    found = {}
    for reward in rewards:
        newest = (path for name, path in reversed(sheets + files) if name.reward == reward)
        version = next((version for path in newest if (version := _version_of(store, path)) != NOBODY), None)
        if version is not None:
            found[reward] = version
    return found


def _version_of(store: RunStore, path: str) -> str:
    try:
        return read_scores(store, path).scorer_version
    except CorruptFile:  # the reader who needs its scores says so
        return NOBODY
