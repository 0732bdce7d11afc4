"""What the synthetic world of `tiny-sd3` consists of: colors, shapes, sizes and backgrounds.

The renderer (`deploy.pretrain`) draws from this file and the `shapes` detector reads by it, so the two cannot disagree.
An outline is a polygon in units of the object's size; `size` is the half-extent in pixels: the object of size 10 fits in
a box of at most 20 x 20 pixels around its center. The y axis points down, as in images.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE: Final = 64

TASK_COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (216, 32, 38),
    "orange": (246, 140, 24),
    "yellow": (242, 214, 30),
    "green": (34, 158, 62),
    "blue": (36, 84, 220),
    "purple": (136, 44, 172),
    "black": (22, 22, 24),
}
"""The colors that prompts name, as RGB."""

DISTRACTOR_COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "vermilion": (232, 86, 30),
    "amber": (245, 180, 28),
    "lime": (150, 200, 44),
    "teal": (30, 130, 140),
    "cyan": (70, 196, 220),
    "navy": (24, 36, 110),
    "magenta": (206, 40, 140),
    "pink": (244, 140, 176),
    "brown": (122, 76, 40),
    "maroon": (112, 20, 28),
    "gray": (128, 128, 128),
    "lilac": (176, 128, 210),
    "forest": (20, 84, 40),
}
"""Neighbors of the task colors that no prompt names: what is nearest to one of these has no task color."""

SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "heart")
"""The classes that prompts name. The plural is the name with "s", but "crosses"."""

PLURALS: Final[dict[str, str]] = {name: "crosses" if name == "cross" else f"{name}s" for name in SHAPES}
COUNT_WORDS: Final[dict[int, str]] = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS: Final = ("left of", "right of", "above", "below")

MIN_SIZE: Final = 7.5
MAX_SIZE: Final = 13.0
MIN_GAP: Final = 6.0
"""Least distance in pixels between the boxes of two objects."""
MARGIN: Final = 2.0
"""Least distance in pixels between an object's box and the picture's border."""

BACKGROUND_LOW: Final = 216
BACKGROUND_HIGH: Final = 250
"""Range of a background's mean gray level; a shade is one flat color."""
BACKGROUND_TINT: Final = 6
"""Most by which a channel of a background leaves its gray level."""


def _circle() -> NDArray[np.float64]:
    angles = np.linspace(0.0, 2 * np.pi, 48, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * 0.94


def _star() -> NDArray[np.float64]:
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.06, 0.44)
    points = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
    points[:, 1] += 0.08
    return points


def _cross() -> NDArray[np.float64]:
    arm = 0.32
    quarter = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
    return np.concatenate([quarter @ turn.T for turn in turns])


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0.0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 16.0


_OUTLINES: Final[dict[str, NDArray[np.float64]]] = {
    "circle": _circle(),
    "square": np.array([[-0.84, -0.84], [0.84, -0.84], [0.84, 0.84], [-0.84, 0.84]]),
    "triangle": np.array([[0.0, -0.94], [1.0, 0.84], [-1.0, 0.84]]),
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}


def shape_outline(name: str) -> NDArray[np.float64]:
    """Return the outline of a shape in units of its size.

    Args:
        name: one of SHAPES.

    Returns:
        [n, 2] polygon corners (x, y), closed implicitly, every coordinate within [-1.02, 1.02].

    Raises:
        ValueError: the name is not in SHAPES.
    """
    if name not in _OUTLINES:
        raise ValueError(f"shape_outline: {name!r} is not a shape of this world; take one of {', '.join(SHAPES)}")
    return _OUTLINES[name].copy()
