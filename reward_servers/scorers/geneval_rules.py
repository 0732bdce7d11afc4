"""GenEval's scoring rules on detections: pure, and ignorant of the detector.

Sources: GenEval (Ghosh et al. 2023, djghosh13/geneval, evaluation/evaluate_images.py) for the strict rule; Flow-GRPO
(Liu et al. 2025, yifan123/reward-server, gen_eval.py) for the dense one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from reward_servers.detection import Detection

TASKS: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS: Final = ("left of", "right of", "above", "below")
CONFIDENCE: Final = 0.3
COUNTING_CONFIDENCE: Final = 0.9
MAX_BOXES: Final = 16
"""Boxes a class."""
SHRINK: Final = 0.1
"""Share of two boxes' extents by which an axis of their offset is shrunk towards 0."""
RELATION_BORDER: Final = 0.5

Box = tuple[float, float, float, float]
Found = Mapping[str, Sequence[Detection]]
"""Detections by class, the most confident first."""
ColorOf = Callable[[Detection], str | None]


def kept_detections(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Group detections by class: above the task's confidence, the most confident first, at most MAX_BOXES a class, no NMS."""
    threshold = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda item: -item.confidence):
        if detection.confidence > threshold and len(found.get(detection.label, ())) < MAX_BOXES:
            found.setdefault(detection.label, []).append(detection)
    return found


def relations_of(box: Box, other: Box) -> frozenset[str]:
    """Return how a box lies to another: the offset of the centers, shrunk by the boxes' extents, over the offset's norm."""
    first, second = np.array(box, dtype=np.float64).reshape(2, 2), np.array(other, dtype=np.float64).reshape(2, 2)
    offset = first.mean(axis=0) - second.mean(axis=0)
    extents = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    shrunk = np.maximum(np.abs(offset) - SHRINK * extents, 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):
        return frozenset()
    x, y = shrunk / np.linalg.norm(offset)
    holds = (x < -RELATION_BORDER, x > RELATION_BORDER, y < -RELATION_BORDER, y > RELATION_BORDER)
    return frozenset(relation for relation, is_true in zip(RELATIONS, holds, strict=True) if is_true)


def _all_hold(relation: str, objects: Sequence[Detection], targets: Sequence[Detection]) -> bool:
    return all(relation in relations_of(item.box, target.box) for item in objects for target in targets)


def strict_score(found: Found, metadata: Mapping[str, Any], color_of: ColorOf) -> float:
    """Return 1.0 when an image meets its prompt by the official rule, else 0.0.

    Args:
        found: of kept_detections.
        metadata: {tag, include: [{class, count, color?, position?}], exclude?: [{class, count}]}.
        color_of: names the color of a detection.
    """
    groups: list[Sequence[Detection] | None] = []
    for wanted in metadata["include"]:
        objects = list(found.get(wanted["class"], ()))[: wanted["count"]]
        is_met = len(objects) == wanted["count"]
        if is_met and "color" in wanted:
            is_met = all(color_of(item) == wanted["color"] for item in objects)
        if is_met and "position" in wanted:
            relation, target = wanted["position"]
            targets = groups[target]
            is_met = targets is not None and _all_hold(relation, objects, targets)
        groups.append(objects if is_met else None)
    excluded = any(len(found.get(item["class"], ())) >= item["count"] for item in metadata.get("exclude", ()))
    return float(not excluded and all(group is not None for group in groups))


def _closeness(wanted: int, came: int) -> float:
    return 1.0 - abs(wanted - came) / wanted


def dense_flowgrpo_score(found: Found, metadata: Mapping[str, Any], color_of: ColorOf) -> float:
    """Return Flow-GRPO's training reward, bug-compatible: unclipped, and a failed relation adds 0 and still the 1."""
    terms = _dense_terms(found, metadata, color_of, failed_relation=(0.0, 1.0))
    return sum(terms) / len(terms)


def dense_score(found: Found, metadata: Mapping[str, Any], color_of: ColorOf) -> float:
    """Return the dense reward with each term in [0, 1] and the position counted once."""
    terms = [min(max(term, 0.0), 1.0) for term in _dense_terms(found, metadata, color_of, failed_relation=(0.0,))]
    return sum(terms) / len(terms)


def _dense_terms(found: Found, metadata: Mapping[str, Any], color_of: ColorOf, failed_relation: tuple[float, ...]) -> list[float]:
    """Return the terms of all include entries; exclude entries do not count here."""
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for wanted in metadata["include"]:
        objects, count = found.get(wanted["class"], ()), wanted["count"]
        terms.append(_closeness(count, len(objects)))
        is_met = len(objects) == count
        if not is_met and ("color" in wanted or "position" in wanted):
            terms.append(0.0)
        if is_met and "color" in wanted:
            num_right = sum(color_of(item) == wanted["color"] for item in objects)
            terms.append(_closeness(count, num_right))
            is_met = num_right == count
        if is_met and "position" in wanted:
            relation, target = wanted["position"]
            targets = groups[target]
            is_met = targets is not None and _all_hold(relation, objects, targets)
            # a target that was not met itself adds one 0 in both variants
            terms.extend((1.0,) if is_met else (0.0,) if targets is None else failed_relation)
        groups.append(objects if is_met else None)
    return terms
