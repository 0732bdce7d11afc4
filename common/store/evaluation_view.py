"""From the results of evaluations to the evaluation part of /metrics."""

from collections.abc import Mapping
from typing import Any, Final

from common.errors import CorruptFile
from common.logs import get_logger
from common.metrics import RunMetrics
from common.store import paths
from common.store.eval_results import read_result
from common.store.evaluations import EvalBoard
from common.store.run_store import RunStore

ALL: Final = "all"  # the task of the mean over tasks
UNTAGGED: Final = "untagged"  # the task of prompts without a tag
MAX_TASKS: Final = 32  # a reward; the mean counts all
_log = get_logger("coordinator")


class EvaluationView:
    """Shows the newest finished evaluation, and the base model's. One caller at a time."""

    def __init__(self, metrics: RunMetrics) -> None:
        self._metrics = metrics
        self._newest = -1

    def take(self, result: Mapping[str, Any]) -> None:
        """Show a result; an older one than that shown changes only the base's."""
        means = _means(result)
        if result["version"] == 0:
            self._metrics.replace("evaluation_base_score", means)
        if result["version"] >= self._newest:
            self._newest, snapshot = result["version"], result["snapshot"]
            self._metrics.replace("evaluation_score", {(reward, task, snapshot): mean for (reward, task), mean in means.items()})
            self._metrics.replace("evaluation_version", {(snapshot,): result["version"]})

    def restore(self, store: RunStore, board: EvalBoard) -> set[int]:
        """Show what earlier starts evaluated by the protocol of this one; a damaged result is said and left out.

        Returns:
            The versions whose result is there, a damaged one's too: it stands until its folder is removed.

        Raises:
            StoreError: the store refused.
        """
        names = {path: name for path in store.list(paths.EVAL) if (name := paths.parse_eval(path)) is not None}
        results = {name.version for path, name in names.items() if path == paths.result_path(board.directory_of(name.version))}
        for version in sorted({0, max(results)} & results) if results else ():
            directory = board.directory_of(version)
            try:
                self.take(read_result(store, directory))
            except CorruptFile as error:
                _log.warning("an evaluation is not shown: %s", error)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                _log.warning(
                    "an evaluation is not shown: store: %s: is no evaluation's result (%r); remove the folder, and the version is evaluated again",
                    paths.result_path(directory), error,
                )  # fmt: skip
        return results


def _means(result: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    means: dict[tuple[str, ...], float] = {}
    for reward, table in result["rewards"].items():
        tasks = {ALL: table["mean"]} | {task or UNTAGGED: row["mean"] for task, row in sorted(table["tasks"].items())[:MAX_TASKS]}
        means |= {(reward, task): float(mean) for task, mean in tasks.items() if mean is not None}
    return means
