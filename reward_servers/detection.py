"""What a detector tells the GenEval rules: labeled boxes, and nothing of how they were found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One object found in an image."""

    label: str  # class name, as prompts' metadata writes it
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    confidence: float  # in [0, 1]
    color: str | None = None  # a color name, None when it is none of those that prompts name
    mask: NDArray[np.bool_] | None = None  # [H, W], for a ColorClassifier that looks at pixels


class Detector(Protocol):
    """Finds objects. Scoring rules know nothing else of it."""

    name: str
    version: str  # changes whenever a detection can change
    labels: tuple[str, ...]  # classes that it can find; empty = any (open vocabulary)
    colors: tuple[str, ...]  # colors that prompts may ask for; empty = any

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Find the objects of an image [H, W, 3] uint8 RGB, in any order."""
        ...


@runtime_checkable
class PromptedDetector(Protocol):
    """A detector of an open vocabulary, which is told what to look for."""

    def detect_classes(self, image: NDArray[np.uint8], labels: Sequence[str]) -> list[Detection]:
        """Find the objects of these classes in an image [H, W, 3] uint8 RGB, in any order."""
        ...


def find_objects(detector: Detector, image: NDArray[np.uint8], labels: Sequence[str]) -> list[Detection]:
    """Ask a detector of an open vocabulary for the classes `labels`, and any other one for all that it knows."""
    if isinstance(detector, PromptedDetector):
        return detector.detect_classes(image, labels)
    return detector.detect(image)


ColorClassifier = Callable[[NDArray[np.uint8], Detection], str | None]
"""Names the color of one detected object of an image."""


@runtime_checkable
class ColorModel(Protocol):
    """A ColorClassifier with a model of its own: its version is part of the score's, and its colors are those that prompts may ask for."""

    version: str
    colors: tuple[str, ...]

    def __call__(self, image: NDArray[np.uint8], detection: Detection) -> str | None:
        """Name the color of a detected object."""
        ...


def own_color(_image: NDArray[np.uint8], detection: Detection) -> str | None:
    """Return the color that the detector itself decided on."""
    return detection.color
