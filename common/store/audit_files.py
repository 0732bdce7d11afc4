"""The part of the audit that opens group, score and evaluation files and compares them with what the manifests say."""

from collections.abc import Callable, Sequence

from common.errors import StoreError
from common.policy.adapters import read_header
from common.store import paths
from common.store.eval_results import read_result
from common.store.groups import read_group
from common.store.run_store import RunStore
from common.store.scores import read_scores
from common.types import Manifest, ManifestGroup

Report = Callable[[str, str, str], None]  # rule, where, message


class FileAudit:
    """Checks the files that manifests and evaluation results rest on.

    Args:
        store: the run directory.
        listing: all its paths.
        report: told every violation.
    """

    def __init__(self, store: RunStore, listing: Sequence[str], report: Report) -> None:
        self._store = store
        self._report = report
        self.present = set(listing)

    def check_group(self, manifest: Manifest, group: ManifestGroup) -> None:
        """The group file is whole, and is the one that the manifest describes."""
        where = f"group {group.number}, update {manifest.update}"
        try:
            found = read_group(self._store, group.path, group_size=len(group.kept))
            num_bytes = self._store.size(group.path)
        except StoreError as error:
            self._report("group_file", where, str(error))
            return
        said = (group.number, group.version, group.prompt_id, group.num_bytes)
        holds = (found.number, found.adapter.version, found.prompt.id, num_bytes)
        if said != holds:
            self._report("group_file", where, f"manifest says (number, version, prompt, bytes) {said}, {group.path} holds {holds}")
        if group.media_path not in self.present:
            self._report("group_file", where, f"{group.media_path} is missing; images leave with their group file only")
        adapter = paths.adapter_path(found.adapter.incarnation, found.adapter.version)
        if adapter in self.present and self._digest_of(adapter) not in (None, found.adapter.digest):
            self._report("digest", where, f"was sampled with digest {found.adapter.digest[:12]}, {adapter} records another")

    def _digest_of(self, path: str) -> str | None:
        try:
            return read_header(self._store.read(path), path)["digest"]
        except StoreError:
            return None

    def check_scores(self, manifest: Manifest, group: ManifestGroup) -> None:
        """The manifest's raw scores equal the score files'."""
        where = f"group {group.number}, update {manifest.update}"
        name = paths.parse_group(group.path)
        if name is None or name.number != group.number:
            self._report("group_file", where, f"the manifest's path {group.path} is no file of this group")
            return
        for reward, values in group.scores.items():
            path = paths.score_path(group.number, name.lease_id, reward)
            try:
                filed = tuple(score.value for score in read_scores(self._store, path).scores)
            except StoreError as error:
                self._report("scores", where, str(error))
                continue
            if filed != values:
                self._report("scores", where, f"the manifest's {reward} scores are not those of {path}")

    def check_evaluations(self) -> None:
        """Each evaluation's rows equal the score files of the sheets that it names."""
        for path in sorted(self.present):
            if path.startswith(f"{paths.EVAL}/") and path.endswith("/result.json"):
                try:
                    self._check_evaluation(path.removesuffix("/result.json"))
                except StoreError as error:
                    self._report("evaluation", path, str(error))

    def _check_evaluation(self, directory: str) -> None:
        result = read_result(self._store, directory)
        sheets: dict[str, str | None] = result.get("sheets", {})
        rewards = sorted({reward for row in result["rows"] for reward in row["scores"]})
        for number, lease_id in sheets.items():
            rows = [row for row in result["rows"] if str(row["sheet"]) == number]
            for reward in rewards:
                path = paths.sheet_score_path(directory, int(number), lease_id or "", reward)
                judged = [row for row in rows if reward in row["scores"]]
                if not judged or lease_id is None:
                    continue
                filed = [score.value for score in read_scores(self._store, path).scores]
                if any(row["scores"][reward] != filed[row["row"]] for row in judged):
                    self._report("evaluation", f"{directory}, sheet {number}", f"its {reward} scores are not those of {path}")
