"""Detectors whose answers are fixed, for tests of GenEval's rules."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reward_servers.detection import Detection


class FixedDetector:
    """Finds the same objects in every image."""

    name = "fixed"
    version = "0"
    labels: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()

    def __init__(self, detections: Sequence[Detection]) -> None:
        self._detections = list(detections)

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Return the fixed objects."""
        return self._detections
