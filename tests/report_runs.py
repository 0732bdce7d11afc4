"""A run directory as a real run leaves it, with drawn images and made-up but lawful numbers: for the report's tests and its look."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from common.store import paths
from common.store.media import write_media
from common.store.run_store import RunStore
from common.types import MediaBatch

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
BASE_SKILL = dict(zip(TASKS, (0.86, 0.62, 0.42, 0.74, 0.33, 0.48), strict=True))
FINAL_SKILL = dict(zip(TASKS, (0.99, 0.92, 0.78, 0.95, 0.71, 0.86), strict=True))
COLORS = {"red": (214, 48, 49), "blue": (52, 101, 217), "green": (46, 160, 67), "yellow": (240, 200, 40), "purple": (130, 60, 190)}
SHAPES = ("circle", "square", "triangle")
PROTOCOL = {
    "snapshot": "ema", "num_steps": 12, "guidance_scale": 1.0, "seed": 20250505, "images_per_prompt": 1, "max_prompts": None,
    "sheet_size": 16, "rewards": ["geneval_strict"], "prompts_digest": "ab" * 32, "num_prompts": 120,
}  # fmt: skip


def put_json(store: RunStore, path: str, tables: Any) -> None:
    """Commit a JSON file."""
    store.create_exclusive(path, json.dumps(tables).encode(), writer_id="test")


def draw(seed: int, right: bool, size: int = 64) -> NDArray[np.uint8]:
    """A small scene: shapes on a plain ground; a wrong one has its colors bled and its edges lost."""
    generator = np.random.default_rng(seed)
    ground = tuple(int(v) for v in generator.integers(200, 245, 3))
    image = Image.new("RGB", (size * 4, size * 4), ground)
    canvas = ImageDraw.Draw(image)
    names = list(COLORS)
    for _ in range(int(generator.integers(1, 4))):
        x, y, r = (int(v) for v in (*generator.integers(size, 3 * size, 2), generator.integers(size // 2, size)))
        tone = COLORS[names[int(generator.integers(len(names)))]]
        kind = SHAPES[int(generator.integers(len(SHAPES)))]
        if kind == "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=tone)
        elif kind == "square":
            canvas.rectangle((x - r, y - r, x + r, y + r), fill=tone)
        else:
            canvas.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=tone)
    small = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float64)
    if not right:
        small = 0.6 * small + 0.4 * np.roll(small, (9, 7), axis=(0, 1))[..., ::-1]
    noise = generator.normal(0, 3 if right else 9, small.shape)
    result: NDArray[np.uint8] = np.clip(small + noise, 0, 255).astype(np.uint8)
    return result


def media_of(images: Sequence[NDArray[np.uint8]]) -> MediaBatch:
    """Images with simple statistics."""
    stack = np.stack(images)
    luma = stack.astype(np.float64).mean(axis=-1) / 255
    statistics = {
        "brightness_mean": luma.mean(axis=(1, 2)), "dark_share": (luma < 0.3).mean(axis=(1, 2)),
        "saturated_share": ((stack.max(-1).astype(int) - stack.min(-1)) > 120).mean(axis=(1, 2)),
        "edge_density": (np.abs(np.diff(luma, axis=2)) > 0.1).mean(axis=(1, 2)), "diversity": np.full(len(stack), luma.std()),
    }  # fmt: skip
    return MediaBatch(images=stack, statistics={name: np.asarray(values, dtype=np.float32) for name, values in statistics.items()})


def evaluation(store: RunStore, version: int, scores: dict[str, list[float | None]], text: str = "a {tag} of shapes number {index}") -> str:
    """Commit one evaluation of one reward: sheets of 16 images and result.json; tag -> one score a prompt."""
    directory = paths.eval_directory(version, "ema", "0123abcd")
    rows: list[dict[str, Any]] = []
    name = "geneval_strict"
    flat = [(tag, index, score) for tag, values in scores.items() for index, score in enumerate(values)]
    for number in range(0, len(flat), 16):
        part = flat[number : number + 16]
        sheet = paths.sheet_path(directory, number // 16, "aa11")
        images = [draw(abs(hash_of(tag, index)), right=bool(score)) for tag, index, score in part]
        write_media(store, sheet, media_of(images), {"number": number // 16})
        rows += [
            {"prompt_id": f"{tag}-{index:03d}", "text": text.format(tag=tag, index=index), "tag": tag, "sheet": number // 16,
             "row": row, "scores": {name: score}}
            for row, (tag, index, score) in enumerate(part)
        ]  # fmt: skip
    known = {tag: [value for value in values if value is not None] for tag, values in scores.items()}
    tasks = {tag: {"mean": float(np.mean(values)), "n": len(values)} for tag, values in known.items()}
    mean = float(np.mean([task["mean"] for task in tasks.values()]))
    total = sum(len(values) for values in known.values())
    sheets = {str(number): "aa11" for number in range(-(-len(flat) // 16))}
    rewards = {"geneval_strict": {"mean": mean, "tasks": tasks, "coverage": total / len(flat)}}
    named = {"version": version, "snapshot": "ema", "digest": "ff" * 32, "protocol": PROTOCOL}
    put_json(store, paths.result_path(directory), named | {"rewards": rewards, "rows": rows, "sheets": sheets})
    return directory


def hash_of(tag: str, index: int) -> int:
    """A seed that is the same in every process."""
    return TASKS.index(tag) * 1000 + index if tag in TASKS else 9000 + index


def metrics(update: int, num_updates: int, incarnation: int = 1) -> dict[str, Any]:
    """One update's record."""
    generator = np.random.default_rng(update)
    done = 1 - np.exp(-3.0 * update / num_updates)
    mean = 0.45 + 0.36 * done + generator.normal(0, 0.02)
    wait, learn = 1.6 + abs(generator.normal(0, 0.5)), 3.4 + generator.normal(0, 0.15)
    stale = int(generator.integers(5, 12)) if update > 1 else 0
    rewards = {
        name: {"mean": float(mean + shift), "std_in_group": 0.33 - 0.12 * done, "coverage": 1.0, "flat_share": 0.1 + 0.3 * done}
        for name, shift in (("geneval_strict", 0.0), ("geneval_dense", 0.14))
    }  # fmt: skip
    return {
        "update": update, "incarnation": incarnation, "time_unix": 1.7e9 + 6.0 * update + (3600 if incarnation > 1 else 0),
        "seconds": {"wait": float(wait), "read": 0.12, "learn": float(learn), "save": 0.08},
        "learner": {
            "loss": -0.01, "grad_norm": float(0.4 + abs(generator.normal(0, 0.08))), "ratio_mean": float(1 + generator.normal(0, 2e-5)),
            "ratio_max": float(1 + abs(generator.normal(3e-4, 5e-5))), "ratio_min": float(1 - abs(generator.normal(3e-4, 5e-5))),
            "clip_fraction_up": float(0.08 * done + abs(generator.normal(0, 0.01))), "clip_fraction_down": float(0.06 * done),
            "kl": float(1e-4 + 4e-3 * done * done + abs(generator.normal(0, 1e-4))), "advantage_abs_mean": 0.7,
        },
        "rewards": rewards, "flat_group_share": float(0.08 + 0.28 * done), "staleness": {"0": 12 - stale, "1": stale},
        "drops": {"attempts": 1} if update % 23 == 7 else {}, "images": 192,
        "image_statistics": {
            "brightness_mean": float(0.72 + generator.normal(0, 0.01)), "dark_share": float(0.05 + 0.01 * done),
            "saturated_share": float(0.16 + 0.03 * done), "edge_density": float(0.08 - 0.02 * done), "diversity": float(0.2 - 0.03 * done),
        },
    }  # fmt: skip


def training_samples(
    store: RunStore, update: int, *, groups: int = 12, size: int = 16, prompt: str = "two green squares and a red circle"
) -> None:
    """Commit the history of one update and its groups' images."""
    rows = []
    for number in range((update - 1) * groups, update * groups):
        generator = np.random.default_rng(number)
        scores = (generator.random(size) < 0.7).astype(float)
        write_media(
            store,
            paths.media_path(number, "bb22"),
            media_of([draw(number * 100 + k, bool(scores[k])) for k in range(size)]),
            {"number": number},
        )
        for sample, score in enumerate(scores):
            rows.append({
                "update": update, "group": number, "sample_index": sample, "prompt_id": f"p{number}", "prompt": prompt,
                "version": update - 1, "staleness": 0, "kept": True, "trained": True,
                "advantage": float((score - scores.mean()) / (scores.std() + 1e-4)),
                "weighted_reward": float(score), "reward.geneval_strict": float(score), "reward.geneval_dense": None,
            })  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    store.create_exclusive(paths.history_path(update), sink.getvalue(), writer_id="test")


def start(store: RunStore, incarnation: int = 1, name: str = "tiny-geneval") -> None:
    """Commit the claim and the environment of a start."""
    config = {"run": {"name": name, "seed": 1}, "model": {"path": "models/tiny-sd3"}, "schedule": {"num_updates": 60, "max_staleness": 1}}
    claim = {
        "incarnation": incarnation,
        "writer_id": "w",
        "started_at": "2026-01-01T00:00:00Z",
        "config_digest": "5e1f" * 16,
        "config": config,
    }
    put_json(store, paths.config_path(incarnation), claim)
    environment = {
        "commit": "8c1d2e3f4a5b",
        "versions": {"torch": "2.6", "python": "3.11"},
        "cpu": "a processor",
        "num_cpus": 2,
        "memory_bytes": 8 * 2**30,
    }
    put_json(store, paths.environment_path(incarnation), environment)


def whole_run(store: RunStore, num_updates: int = 60, *, every: int = 10, prompts_a_task: int = 20, resumed_at: int = 40) -> None:
    """Commit a whole run that rose, with one resume."""
    start(store)
    start(store, 2)
    for update in range(1, num_updates + 1):
        incarnation = 1 if update < resumed_at else 2
        put_json(store, paths.metrics_path(update, incarnation), metrics(update, num_updates, incarnation))
    for version in range(0, num_updates + 1, every):
        done = 1 - np.exp(-3.0 * version / num_updates)
        scores: dict[str, list[float | None]] = {}
        for position, tag in enumerate(TASKS):
            luck = np.random.default_rng(position).random(prompts_a_task)  # a prompt's own hardness: what was right stays right
            wobble = np.random.default_rng([version, position]).normal(0, 0.04, prompts_a_task)
            skill = BASE_SKILL[tag] + (FINAL_SKILL[tag] - BASE_SKILL[tag]) * done
            scores[tag] = [float(value) for value in luck + wobble < skill]
        evaluation(store, version, scores)
    training_samples(store, num_updates)
