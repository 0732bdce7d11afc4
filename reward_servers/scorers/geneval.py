"""GenEval as a reward: a detector's boxes judged by one of three rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw

from common.errors import DataError
from common.types import Prompt, Score
from reward_servers.detection import ColorClassifier, ColorModel, Detection, Detector, find_objects, own_color
from reward_servers.scorers.base import Image, KnownCase, PlainScorer, score_each
from reward_servers.scorers.geneval_rules import (
    RELATIONS,
    TASKS,
    ColorOf,
    Found,
    dense_flowgrpo_score,
    dense_score,
    kept_detections,
    strict_score,
)

Rule = Callable[[Found, Mapping[str, Any], ColorOf], float]
RULES: Final[dict[str, Rule]] = {
    "geneval_dense": dense_score,
    "geneval_dense_flowgrpo": dense_flowgrpo_score,
    "geneval_strict": strict_score,
}


class DetectedGenEval(PlainScorer):
    """GenEval's rules over any detector; the strict result stands in the details of every variant."""

    def __init__(self, name: str, detector: Detector, color_classifier: ColorClassifier = own_color, *, rule: str = "") -> None:
        """Score by RULES[rule], or by RULES[name] where no rule is named; the version follows the detector and the color model."""
        self.name = name
        self.version = f"1-{detector.name}-{detector.version}"
        self._rule = RULES[rule or name]
        self._detector = detector
        self._color_classifier = color_classifier
        self._colors = detector.colors
        if isinstance(color_classifier, ColorModel):
            self.version += f"-{color_classifier.version}"
            self._colors = color_classifier.colors

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError when the metadata are not GenEval's, or name what the detector cannot find."""
        check_metadata(prompt.metadata)
        for item in _entries(prompt.metadata):
            _check_known("class", item["class"], self._detector.labels)
            if "color" in item:
                _check_known("color", item["color"], self._colors)

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]; details: strict (0 or 1)."""
        return score_each(images, prompts, self._judge)

    def _judge(self, image: Image, prompt: Prompt) -> tuple[float, Mapping[str, float]]:
        check_metadata(prompt.metadata)
        named: dict[int, str | None] = {}  # both rules ask for the same colors, and a color may cost a model's call

        def color_of(detection: Detection) -> str | None:
            if id(detection) not in named:
                named[id(detection)] = self._color_classifier(image, detection)
            return named[id(detection)]

        labels = tuple(dict.fromkeys(item["class"] for item in _entries(prompt.metadata)))
        found = kept_detections(find_objects(self._detector, image, labels), prompt.tag)
        strict = strict_score(found, prompt.metadata, color_of)
        return self._rule(found, prompt.metadata, color_of), {"strict": strict}


class GenEval(DetectedGenEval):
    """GenEval's rules over the detector `shapes`, which knows one image by heart."""

    def known_case(self) -> KnownCase:
        """Return a blue square that is asked for as such, which scores 1 by every rule."""
        canvas = PillowImage.new("RGB", (64, 64), (235, 235, 235))
        ImageDraw.Draw(canvas).rectangle([22, 20, 41, 39], fill=(36, 84, 220))
        metadata = {"tag": "colors", "include": [{"class": "square", "count": 1, "color": "blue"}], "exclude": []}
        prompt = Prompt(id="known", text="a photo of a blue square", metadata=metadata)
        return KnownCase(image=np.asarray(canvas), prompt=prompt, expected=1.0, tolerance=1e-6)


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Make sure that metadata are GenEval's.

    Raises:
        DataError: naming the entry and the rule that it breaks.
    """
    tag, include, exclude = metadata.get("tag"), metadata.get("include"), metadata.get("exclude", [])
    if tag not in TASKS:
        raise DataError(f"metadata tag is {tag!r}; GenEval's tasks are {', '.join(TASKS)}")
    if not isinstance(include, Sequence) or isinstance(include, str) or not include:
        raise DataError(f'metadata include is {include!r}; it must list at least one {{"class": ..., "count": ...}}')
    if not isinstance(exclude, Sequence) or isinstance(exclude, str):
        raise DataError(f'metadata exclude is {exclude!r}; it must be a list of {{"class": ..., "count": ...}}')
    for index, item in enumerate(include):
        _check_entry(f"include[{index}]", item)
        _check_position(f"include[{index}]", item, index)
    for index, item in enumerate(exclude):
        _check_entry(f"exclude[{index}]", item)


def _entries(metadata: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return (*metadata["include"], *metadata.get("exclude", ()))


def _check_entry(where: str, item: Any) -> None:
    if not isinstance(item, Mapping) or not isinstance(item.get("class"), str):
        raise DataError(f'metadata {where} is {item!r}; it must be an object with a "class"')
    count = item.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise DataError(f'metadata {where} has "count" {count!r}; it must be an integer of at least 1')
    if "color" in item and not isinstance(item["color"], str):
        raise DataError(f'metadata {where} has "color" {item["color"]!r}; it must be a string')


def _check_position(where: str, item: Mapping[str, Any], index: int) -> None:
    if "position" not in item:
        return
    position = item["position"]
    if not isinstance(position, Sequence) or len(position) != 2 or position[0] not in RELATIONS:
        raise DataError(f'metadata {where} has "position" {position!r}; it must be [relation, index], a relation of {", ".join(RELATIONS)}')
    if not isinstance(position[1], int) or isinstance(position[1], bool) or not 0 <= position[1] < index:
        raise DataError(f'metadata {where} has "position" {position!r}; its index must point to an earlier include entry')


def _check_known(key: str, value: str, known: tuple[str, ...]) -> None:
    if known and value not in known:
        raise DataError(f"metadata {key} {value!r} is nothing that the detector can find; it knows {', '.join(known)}")
