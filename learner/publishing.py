"""Policy versions: the snapshots that rollouts and evaluation use, one file a version, created once."""

from collections.abc import Sequence

from common.errors import AlreadyExists
from common.logs import get_logger
from common.policy.adapters import read_publication, write_adapter_bytes
from common.policy.base import AdapterState, Policy
from common.store.paths import POLICY, adapter_path, parse_adapter
from common.types import AdapterId, Publication, SnapshotInfo
from learner.state import RunFiles
from learner.update import Learner

_log = get_logger("learner.publishing")


class Publisher:
    """Writes policy/iNNNN/vNNNNNN.safetensors for one incarnation."""

    def __init__(self, files: RunFiles, *, incarnation: int, snapshots: Sequence[str]) -> None:
        """snapshots: the names that the rollout config and the evaluation use."""
        self._files = files
        self._incarnation = incarnation
        self._snapshots = sorted(set(snapshots))
        self.num_differences = 0  # replayed versions whose weights differ from the file that was found

    def publish(self, learner: Learner) -> Publication:
        """Publish the learner's version, unless it or a newer one is out: a replay keeps what it finds.

        Returns:
            What stands: this version, or the newest one where that is newer.

        Raises:
            ConfigError: a snapshot that the objective does not keep.
        """
        states = {name: learner.snapshot_state(name) for name in self._snapshots}
        infos = {name: inspect_snapshot(learner.policy, state) for name, state in states.items()}
        content, adapter = write_adapter_bytes(states, infos, incarnation=self._incarnation, version=learner.version)
        found = self._published()
        if not found or max(found) < learner.version:
            path = adapter_path(self._incarnation, learner.version)
            if self._create(path, content):
                return Publication(adapter=adapter, path=path, snapshots=infos)
            found = found | {learner.version: path}
        if learner.version in found:
            self._compare(self._read(found[learner.version]).adapter, adapter)
        return self._read(found[max(found)])

    def _create(self, path: str, content: bytes) -> bool:
        try:
            self._files.create_exclusive(path, content, writer_id=f"learner.i{self._incarnation:04d}")
        except AlreadyExists:
            return False
        return True

    def _published(self) -> dict[int, str]:
        """Version -> path; of one version's files the highest incarnation's."""
        named = sorted((*name, path) for path in self._files.list(POLICY) if (name := parse_adapter(path)) is not None)
        return {version: path for _, version, path in named}

    def _read(self, path: str) -> Publication:
        return read_publication(self._files.read(path), path)

    def _compare(self, stands: AdapterId, replayed: AdapterId) -> None:
        if stands.digest != replayed.digest:
            self.num_differences += 1
            _log.warning("version %d has digest %s, the replay gives %s; the file stays", stands.version, stands.digest, replayed.digest)


def inspect_snapshot(policy: Policy, state: AdapterState) -> SnapshotInfo:
    """Return what a loader of this state must find."""
    with policy.using(state):
        return policy.inspect_adapter()
