"""Audit: proves from the files of a run, alone, that each group was consumed once, in order, fresh enough and unaltered."""

import hashlib
import json
from dataclasses import dataclass

from common.errors import CorruptFile, StoreError
from common.policy.adapters import read_header, read_snapshots
from common.store import paths
from common.store.audit_files import FileAudit
from common.store.manifests import Claim, read_claim, read_drop, read_manifest, read_status
from common.store.recovery import adapters
from common.store.run_store import RunStore
from common.types import Drop, Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One broken rule."""

    # consumed_once, staleness, order, conservation, digest, group_file, scores, manifests, learner_state, config, evaluation, corrupt
    rule: str
    where: str  # the group, update or file
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What was looked at, and what is wrong."""

    num_manifests: int
    num_groups: int  # consumed
    num_drops: int
    num_retired: int  # consumed groups whose files were retired
    num_adapters: int
    violations: tuple[Violation, ...]

    @property
    def is_clean(self) -> bool:
        """Whether every rule holds."""
        return not self.violations


def audit(store: RunStore) -> AuditReport:
    """Return what the run directory proves. Raises StoreError only when it cannot be read at all."""
    return _Audit(store).run()


class _Audit:
    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._listing = store.list()
        self._violations: list[Violation] = []
        self._manifests: list[Manifest] = []
        self._drops: dict[int, Drop] = {}

    def _report(self, rule: str, where: str, message: str) -> None:
        self._violations.append(Violation(rule=rule, where=where, message=message))

    def run(self) -> AuditReport:
        """Check everything."""
        self._read()
        self._check_manifests()
        self._check_claims()
        self._check_order()
        self._check_conservation()
        versions = self._check_adapters()
        retired = self._check_groups(versions)
        self._check_states()
        return AuditReport(
            num_manifests=len(self._manifests), num_groups=sum(len(m.groups) for m in self._manifests), num_drops=len(self._drops),
            num_retired=retired, num_adapters=len(versions), violations=tuple(self._violations),
        )  # fmt: skip

    def _read(self) -> None:
        for path in self._listing:
            update, number = paths.parse_manifest(path), paths.parse_drop(path)
            try:
                if update is not None:
                    self._manifests.append(read_manifest(self._store, update))
                if number is not None:
                    self._drops[number] = read_drop(self._store, number)
            except CorruptFile as error:
                self._report("corrupt", path, str(error))
        self._manifests.sort(key=lambda manifest: manifest.update)

    def _check_manifests(self) -> None:
        """Contiguous; each group once; none dropped; staleness within the manifest's own bound."""
        present = {update for path in self._listing if (update := paths.parse_manifest(path)) is not None}
        for update in sorted(set(range(1, max(present, default=0) + 1)) - present):
            self._report("manifests", f"update {update}", f"manifest {update} is missing; manifests are contiguous from 1")
        consumed: dict[int, int] = {}
        for manifest in self._manifests:
            for group in manifest.groups:
                where = f"group {group.number}, update {manifest.update}"
                if group.number in consumed:
                    self._report("consumed_once", where, f"update {consumed[group.number]} consumed it too; each group is consumed once")
                consumed[group.number] = manifest.update
                if group.number in self._drops:
                    reason = self._drops[group.number].reason
                    self._report("conservation", where, f"was dropped ({reason}); no manifest holds a dropped group")
                staleness = manifest.update - 1 - group.version
                if not 0 <= staleness <= manifest.max_staleness:
                    self._report("staleness", where, f"staleness is {staleness}; the rule is 0 to {manifest.max_staleness}")

    def _check_claims(self) -> None:
        """Each manifest was cut by an incarnation that claimed the run with that config, under that config's S and P."""
        claims: dict[int, Claim] = {}
        for path in self._listing:
            incarnation = paths.parse_config(path)
            if incarnation is not None:
                try:
                    claims[incarnation] = read_claim(self._store, incarnation)
                except CorruptFile as error:
                    self._report("corrupt", path, str(error))
        for manifest in self._manifests:
            where, claim = f"update {manifest.update}", claims.get(manifest.incarnation)
            if claim is None or claim.config_digest != manifest.config_digest:
                self._report("config", where, f"incarnation {manifest.incarnation} did not claim the run with this config")
                continue
            staleness = claim.config.get("schedule", {}).get("max_staleness", manifest.max_staleness)
            num_groups = claim.config.get("learner", {}).get("groups_per_update", len(manifest.groups))
            if (staleness, num_groups) != (manifest.max_staleness, len(manifest.groups)):
                said = f"S = {manifest.max_staleness} and P = {len(manifest.groups)}"
                self._report("config", where, f"was cut under {said}; its config says {staleness} and {num_groups}")

    def _check_order(self) -> None:
        """Manifest m holds the lowest numbers that are neither consumed before nor dropped."""
        done: set[int] = set(self._drops)
        for manifest in self._manifests:
            numbers = {group.number for group in manifest.groups}
            skipped = sorted(set(range(max(numbers))) - numbers - done)
            for number in skipped:
                where = f"group {number}, update {manifest.update}"
                self._report("order", where, f"was passed over for group {max(numbers)}; the lowest come first")
            done |= numbers

    def _check_conservation(self) -> None:
        """Every number below the highest consumed one is consumed or dropped; drops in manifests are those on disk."""
        reported: dict[int, int] = {}
        for manifest in self._manifests:
            for drop in manifest.drops:
                where = f"group {drop.number}, update {manifest.update}"
                if drop.number in reported:
                    self._report("conservation", where, f"its drop is reported by update {reported[drop.number]} too; once is the rule")
                reported[drop.number] = manifest.update
                if self._drops.get(drop.number) != drop:
                    self._report("conservation", where, "the manifest reports a drop that drops/ does not hold so")

    def _check_adapters(self) -> set[int]:
        """Recorded digests equal recomputed ones; names agree with content. Returns the versions that ever were published."""
        published = adapters(self._store)
        for path in self._listing:
            name = paths.parse_adapter(path)
            if name is None:
                continue
            try:
                content = self._store.read(path)
                header = read_header(content, path)
                read_snapshots(content, path)
            except StoreError as error:
                self._report("digest", path, str(error))
                continue
            if (int(header["incarnation"]), int(header["version"])) != name:
                self._report("digest", path, f"its header says i{header['incarnation']} v{header['version']}; name and content agree")
        newest = max(published, default=None)
        if newest is not None and newest > len(self._manifests):
            self._report("manifests", f"update {newest}", f"v{newest} was published, and its manifest is missing")
        return set(published)

    def _check_groups(self, versions: set[int]) -> int:
        status = read_status(self._store)
        retired_through = status.retired_through if status else 0
        files = FileAudit(self._store, self._listing, self._report)
        retired = 0
        for manifest in self._manifests:
            for group in manifest.groups:
                is_retired = group.path not in files.present
                if is_retired and manifest.update > retired_through:
                    where = f"group {group.number}, update {manifest.update}"
                    self._report("group_file", where, f"{group.path} is missing and was not retired")
                retired += is_retired
                if not is_retired:
                    files.check_group(manifest, group)
                files.check_scores(manifest, group)
        files.check_evaluations()
        return retired

    def _check_states(self) -> None:
        """A learner state's folder counts by complete.json, and holds what that names."""
        complete = {update for path in self._listing if (update := paths.parse_learner_complete(path)) is not None}
        for update in sorted(complete):
            path = paths.learner_complete_path(update)
            if update > len(self._manifests):
                self._report("learner_state", path, f"is of update {update}, and there are {len(self._manifests)} manifests")
            try:
                told = json.loads(self._store.read(path))
                content = self._store.read(f"{paths.learner_directory(update)}/{told['file']}")
                if hashlib.sha256(content).hexdigest() != told["sha256"]:
                    self._report("learner_state", path, f"{told['file']} does not have the digest that it names")
            except (ValueError, KeyError, TypeError, StoreError) as error:
                self._report("learner_state", path, f"cannot be read ({error})")
