"""The verdict of an evaluation, and its reading back."""

import json
from collections.abc import Sequence
from typing import Any

from common.errors import AlreadyExists, CorruptFile
from common.store import paths
from common.store.evaluations import EvalProtocol, Evaluation
from common.store.run_store import RunStore


def result_of(evaluation: Evaluation, protocol: EvalProtocol) -> dict[str, Any]:
    """Return the content of result.json.

    Per reward: the mean over a tag's scored images; the unweighted mean of those means over tags; coverage = scored share of
    the images that the reward applies to. Nothing scored is null, never a number.
    """
    rows = []
    for sheet in evaluation.sheets:
        filed = sheet.filed()
        for row, prompt in enumerate(sheet.prompts):
            scores = {r.name: filed[r.name][row] if r.name in filed else None for r in protocol.rewards if r.applies_to(prompt.tag)}
            place = {"sheet": sheet.number, "row": row}
            rows.append({"prompt_id": prompt.id, "text": prompt.text, "tag": prompt.tag, **place, "scores": scores})
    adapter = evaluation.publication.adapter
    return {
        "version": adapter.version, "snapshot": evaluation.snapshot, "digest": adapter.digest,
        "protocol": protocol.described(), "protocol_digest": protocol.digest(),
        "rewards": {reward.name: _table(reward.name, rows) for reward in protocol.rewards}, "rows": rows,
        "sheets": {str(sheet.number): sheet.chosen() for sheet in evaluation.sheets},
    }  # fmt: skip


def _table(reward: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    asked: dict[str, list[float | None]] = {}
    for row in rows:
        if reward in row["scores"]:
            asked.setdefault(row["tag"], []).append(row["scores"][reward])
    tasks = {}
    for tag in sorted(asked):
        scored = [value for value in asked[tag] if value is not None]
        tasks[tag] = {"mean": sum(scored) / len(scored) if scored else None, "n": len(scored)}
    means = [task["mean"] for task in tasks.values() if task["mean"] is not None]
    total = sum(len(values) for values in asked.values())
    coverage = sum(int(task["n"] or 0) for task in tasks.values()) / total if total else 0.0
    return {"mean": sum(means) / len(means) if means else None, "tasks": tasks, "coverage": coverage}


def write_result(store: RunStore, evaluation: Evaluation, protocol: EvalProtocol) -> dict[str, Any]:
    """Commit the verdict; the first one stands. Returns it. Raises StoreError."""
    result = result_of(evaluation, protocol)
    content = (json.dumps(result, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
    try:
        store.create_exclusive(paths.result_path(evaluation.directory), content, writer_id="eval")
    except AlreadyExists:
        return read_result(store, evaluation.directory)
    return result


def read_result(store: RunStore, directory: str) -> dict[str, Any]:
    """Return a verdict. Raises CorruptFile when it is no JSON object with its fields, StoreError when it is missing."""
    path = paths.result_path(directory)
    try:
        result = json.loads(store.read(path))
    except ValueError as error:
        raise CorruptFile(f"store: {path}: is no JSON ({error}); remove the folder, and the version is evaluated again") from None
    if not isinstance(result, dict) or not {"version", "snapshot", "protocol", "rewards", "rows"} <= result.keys():
        raise CorruptFile(f"store: {path}: lacks fields of an evaluation result; remove the folder, and the version is evaluated again")
    return result
