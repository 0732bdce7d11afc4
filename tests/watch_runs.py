"""A run directory under way, written with the store's own writers and numbers that a test can tell by heart."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.store import paths
from common.store.claim import claim_run
from common.store.directive import FleetReport, SlotReport
from common.store.manifests import Status, write_status
from common.store.run_store import RunStore

BEGAN = 1_800_000_000.0  # wall clock of the first start
UPDATE_S = 10.0  # between two updates
DIGEST = "0123abcd"


def claim(store: RunStore, rewards: Sequence[str] = ("ocr",), *, num_updates: int = 60, time_limit_s: float | None = None) -> int:
    """Claim the next incarnation with as much of a config as the viewers look at."""
    config = {
        "run": {"name": "tiny-run", "seed": 1}, "reward": [{"name": name, "use": "train"} for name in rewards],
        "schedule": {"num_updates": num_updates, "time_limit_s": time_limit_s},
    }  # fmt: skip
    claiming = claim_run(store, config, config_digest="5e1f" * 16, takeover=True, wall=lambda: BEGAN)
    try:
        next(claiming)
    except StopIteration as done:
        return int(done.value.incarnation)
    raise AssertionError("a takeover waits for nobody")


def put_update(
    store: RunStore, update: int, means: Mapping[str, float | None], *, incarnation: int = 1, wait_s: float = 1.0, coverage: float = 1.0,
    drops: Mapping[str, int] | None = None, staleness: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Commit one update's metrics, in the learner's form; of its ten seconds `wait_s` are waited."""
    record = {
        "update": update, "incarnation": incarnation, "time_unix": BEGAN + 3600 * (incarnation - 1) + UPDATE_S * update,
        "seconds": {"wait": wait_s, "read": 0.0, "learn": UPDATE_S - wait_s, "save": 0.0}, "learner": {"loss": -0.25, "kl": 0.5 * update},
        "rewards": {name: {"mean": mean, "std_in_group": 0.25, "coverage": coverage, "flat_share": 0.5} for name, mean in means.items()},
        "flat_group_share": 0.125, "staleness": dict(staleness or {"0": 3, "1": 9}), "drops": dict(drops or {}), "images": 48,
        "image_statistics": {"diversity": 0.125, "fft_grid_peak": None},
    }  # fmt: skip
    _put(store, paths.metrics_path(update, incarnation), record)


def put_evaluation(store: RunStore, version: int, means: Mapping[str, float | None]) -> None:
    """Commit the verdict of a frozen evaluation with two tasks, both at the mean."""
    rewards = {
        name: {"mean": mean, "tasks": {"easy": {"mean": mean, "n": 4}, "hard": {"mean": mean, "n": 4}}, "coverage": 1.0}
        for name, mean in means.items()
    }
    rows = [{"prompt_id": f"p{index}", "text": "a picture", "tag": "easy", "sheet": 0, "row": index, "scores": {}} for index in range(50)]
    result = {
        "version": version, "snapshot": "ema", "digest": "ff" * 32, "protocol": {"num_steps": 4}, "protocol_digest": DIGEST,
        "rewards": rewards, "rows": rows, "sheets": {"0": "aa11"},
    }  # fmt: skip
    directory = paths.eval_directory(version, "ema", DIGEST)
    _put(store, paths.result_path(directory), result)
    _put(store, paths.sheet_path(directory, 0, "aa11"), "images, which nobody may read")


def put_status(
    store: RunStore, *, state: str = "running", version: int = 0, sequence: int = 1, incarnation: int = 1, **changes: Any
) -> None:
    """Refresh status.json as the Coordinator does."""
    fields: dict[str, Any] = {
        "written_at": BEGAN, "reason": "", "host": "node-a", "process_id": 4321, "retired_through": 0, "manifests": version,
        "counts": {"issued": 60, "waiting": 0, "leased": 4, "generated": 2, "ready": 6, "batched": 48, "dropped": 0},
    }  # fmt: skip
    write_status(store, Status(**{**fields, **changes}, state=state, version=version, sequence=sequence, incarnation=incarnation))


def fleet(num_workers: int, **ill: SlotReport) -> FleetReport:
    """So many running rollout workers on node-b, one learner, and others by name ("__" for a dot)."""
    slots = {f"rollout.{index}": SlotReport(state="running", host="node-b", process_ids=(100 + index,)) for index in range(num_workers)}
    slots |= {"learner": SlotReport(state="running", host="node-a", process_ids=(99,))}
    slots |= {name.replace("__", "."): report for name, report in ill.items()}
    return FleetReport(driver_process_id=4321, sizes={"rollout": num_workers}, slots=slots, decisions=("10:00:00 rollout.7 is started",))


def rising(store: RunStore, num_updates: int, names: Sequence[str] = ("ocr",), *, incarnation: int = 1, first: int = 1) -> None:
    """Updates with means update / 100."""
    for update in range(first, num_updates + 1):
        put_update(store, update, dict.fromkeys(names, update / 100), incarnation=incarnation)


def _put(store: RunStore, path: str, tables: Any) -> None:
    store.create_exclusive(path, json.dumps(tables).encode(), writer_id="test")
