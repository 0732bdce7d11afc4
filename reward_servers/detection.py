"""What a detector tells the GenEval rules: labeled boxes, and nothing of how they were found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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


ColorClassifier = Callable[[NDArray[np.uint8], Detection], str | None]
"""Names the color of one detected object of an image."""


def own_color(_image: NDArray[np.uint8], detection: Detection) -> str | None:
    """Return the color that the detector itself decided on."""
    return detection.color
