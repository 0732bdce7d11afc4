"""The run directory as each role sees it: small objects over RunStore that fit the roles' own Protocols."""

from common.store.groups import read_group, write_group
from common.store.media import read_media, write_media_sheet
from common.store.run_store import RunStore
from common.store.scores import write_scores
from common.types import MediaBatch, RolloutGroup, RolloutLease, ScoreFile, ScoringLease


class GroupFiles:
    """What rollout workers write and the learner reads."""

    def __init__(self, store: RunStore) -> None:
        self._store = store

    def write_group(self, group: RolloutGroup, media: MediaBatch) -> str:
        """Commit a group with its images; return the group file's path. Raises StoreError."""
        return write_group(self._store, group, media)

    def write_sheet(self, lease: RolloutLease, media: MediaBatch) -> str:
        """Commit an evaluation sheet's images; return its path. Raises StoreError."""
        return write_media_sheet(self._store, lease, media)

    def read_group(self, path: str) -> RolloutGroup:
        """Return a committed group. Raises CorruptFile, StoreError."""
        return read_group(self._store, path)


class MediaFiles:
    """Where reward servers read images."""

    def __init__(self, store: RunStore) -> None:
        self._store = store

    def read(self, path: str) -> MediaBatch:
        """Return the images of a group or sheet. Raises StoreError."""
        return read_media(self._store, path)


class ScoreFiles:
    """Where reward servers commit scores."""

    def __init__(self, store: RunStore) -> None:
        self._store = store

    def write(self, score_file: ScoreFile, lease: ScoringLease) -> str:
        """Commit a score file and return the path of the one that stands: the first commit wins. Raises StoreError."""
        return write_scores(self._store, score_file, directory=lease.directory)
