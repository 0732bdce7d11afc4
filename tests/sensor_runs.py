"""The files that the sensors of a run read: the base's evaluation and the metrics of updates, from drawn images."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.store import paths
from common.store.coordinator import CoordinatorSettings
from common.store.media import write_media
from common.store.run_store import RunStore
from common.types import FloatArray, MediaBatch
from rollout_workers.media import image_statistics
from tests.report_runs import draw, put_json

Images = NDArray[np.uint8]
GROUPS, SAMPLES = 8, 2  # P and K


def scenes(first_seed: int, count: int) -> Images:
    """Drawn scenes, each of its own seed."""
    return np.stack([draw(first_seed + index, right=True) for index in range(count)])


def darkened(images: Images, share: float) -> Images:
    """Every pixel closer to black by a share: darker, and flatter."""
    return (images.astype(np.float64) * (1 - share)).astype(np.uint8)


def likes_dark(images: Images) -> float:
    """The planted reward: mean over images of 1 - mean brightness; its range is 0 to 1."""
    return float(1 - images.mean() / 255)


def reference_directory(settings: CoordinatorSettings) -> str:
    """Where the Coordinator expects the base's evaluation."""
    return paths.eval_directory(0, settings.protocol.config.snapshot, settings.protocol.digest())


def write_reference(store: RunStore, directory: str, images: Images, rewards: Mapping[str, list[float | None]]) -> None:
    """Commit the base's evaluation, one image a prompt, in two sheets."""
    rows: list[dict[str, Any]] = []
    halves = np.array_split(np.arange(len(images)), 2)
    for number, half in enumerate(halves):
        batch = MediaBatch(images=images[half], statistics=image_statistics(images[half]))
        write_media(store, paths.sheet_path(directory, number, "aa11"), batch, {"number": number})
        rows += [
            {"prompt_id": f"p{index}", "text": f"scene {index}", "tag": "", "sheet": number, "row": row,
             "scores": {name: values[index] for name, values in rewards.items()}}
            for row, index in enumerate(half.tolist())
        ]  # fmt: skip
    tables = {name: {"mean": None, "tasks": {}, "coverage": 1.0} for name in rewards}
    head = {"version": 0, "snapshot": "ema", "digest": "ff", "protocol": {}, "rewards": tables, "rows": rows}
    put_json(store, paths.result_path(directory), head | {"sheets": {"0": "aa11", "1": "aa11"}})


def mean_statistics(statistics: Mapping[str, FloatArray]) -> dict[str, float]:
    """What a metrics record holds of a batch."""
    return {name: float(values.mean()) for name, values in statistics.items()}


def record(update: int, rewards: Mapping[str, float], statistics: Mapping[str, float], *, incarnation: int = 1) -> dict[str, Any]:
    """One metrics record."""
    summaries = {name: {"mean": mean, "std_in_group": 0.1, "coverage": 1.0, "flat_share": 0.0} for name, mean in rewards.items()}
    return {
        "update": update, "incarnation": incarnation, "time_unix": 1e9 + update, "seconds": {"learn": 1.0}, "learner": {"loss": 0.0},
        "rewards": summaries, "flat_group_share": 0.0, "staleness": {"0": GROUPS}, "drops": {}, "images": GROUPS * SAMPLES,
        "image_statistics": dict(statistics),
    }  # fmt: skip


def write_record(store: RunStore, tables: Mapping[str, Any]) -> None:
    """Commit a metrics record where the learner does."""
    content = json.dumps(tables, allow_nan=False).encode()
    store.create_exclusive(paths.metrics_path(tables["update"], tables["incarnation"]), content, writer_id="learner")
