"""Policy versions: the snapshots that rollouts and evaluation use, one file a version, created once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import AlreadyExists
from common.logs import get_logger
from common.policy.adapters import read_publication, write_adapter_bytes
from common.policy.base import AdapterState, Policy
from common.store.paths import POLICY, adapter_path, parse_adapter
from common.types import AdapterId, Publication, SnapshotInfo
from learner.state import RunFiles
from learner.update import Learner

_log = get_logger("learner.publishing")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenVersion:
    """A policy version as the bytes of its file: the learner may go on while it is written."""

    content: bytes
    adapter: AdapterId
    snapshots: Mapping[str, SnapshotInfo]


class Publisher:
    """Writes policy/iNNNN/vNNNNNN.safetensors for one incarnation."""

    def __init__(self, files: RunFiles, *, incarnation: int, snapshots: Sequence[str]) -> None:
        """snapshots: the names that the rollout config and the evaluation use."""
        self._files = files
        self._incarnation = incarnation
        self._snapshots = sorted(set(snapshots))
        self.num_differences = 0  # replayed versions whose weights differ from the file that was found

    def freeze(self, learner: Learner) -> FrozenVersion:
        """Return the learner's version of this moment; runs the canary's forwards, so it is the loop's to call.

        Raises:
            ConfigError: a snapshot that the objective does not keep.
        """
        states = {name: learner.snapshot_state(name) for name in self._snapshots}
        infos = {name: inspect_snapshot(learner.policy, state) for name, state in states.items()}
        content, adapter = write_adapter_bytes(states, infos, incarnation=self._incarnation, version=learner.version)
        return FrozenVersion(content=content, adapter=adapter, snapshots=infos)

    def publish(self, frozen: FrozenVersion) -> Publication:
        """Commit a version, unless it or a newer one is out: a replay keeps what it finds.

        Returns:
            What stands: this version, or the newest one where that is newer.
        """
        version, found = frozen.adapter.version, self._published()
        if not found or max(found) < version:
            path = adapter_path(self._incarnation, version)
            if self._create(path, frozen.content):
                return Publication(adapter=frozen.adapter, path=path, snapshots=frozen.snapshots)
            found = found | {version: path}
        if version in found:
            self._compare(self._read(found[version]).adapter, frozen.adapter)
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
