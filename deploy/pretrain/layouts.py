"""Random scenes: where objects stand, and how big they are."""

from collections.abc import Callable
from typing import Final

import numpy as np

from deploy.pretrain.scenes import Color, Lettering, Scene, Shape
from deploy.pretrain.words import LETTER_COLORS, SURFACES, WORDS
from reward_servers.shapes.vocabulary import (
    BACKGROUND_HIGH,
    BACKGROUND_LOW,
    BACKGROUND_TINT,
    IMAGE_SIZE,
    MARGIN,
    MIN_GAP,
    SHAPES,
    TASK_COLORS,
)

COLORS: Final = tuple(TASK_COLORS)
COUNTS: Final = (2, 3, 4)
QUADRANTS: Final = ((17.0, 17.0), (47.0, 17.0), (17.0, 47.0), (47.0, 47.0))
TEXT_ROWS: Final = (16.0, 32.0, 48.0)
"""Middles of a word in pixels: whole latent cells apart, so the rows share their latent patterns."""


def _shade(random: np.random.Generator, low: int = BACKGROUND_LOW, high: int = BACKGROUND_HIGH) -> Color:
    gray = int(random.integers(low, high + 1))
    tint = random.integers(-BACKGROUND_TINT, BACKGROUND_TINT + 1, size=3)
    red, green, blue = (int(np.clip(gray + t, 0, 255)) for t in tint)
    return red, green, blue


def _apart(first: Shape, second: Shape) -> bool:
    reach = first.size + second.size + MIN_GAP
    return abs(first.x - second.x) >= reach or abs(first.y - second.y) >= reach


def _inside(shape: Shape) -> bool:
    low, high = MARGIN + shape.size, IMAGE_SIZE - MARGIN - shape.size
    return low <= shape.x <= high and low <= shape.y <= high


def _valid(shapes: tuple[Shape, ...]) -> bool:
    pairs = ((a, b) for i, a in enumerate(shapes) for b in shapes[:i])
    return all(map(_inside, shapes)) and all(_apart(a, b) for a, b in pairs)


def _single(random: np.random.Generator) -> Scene:
    x, y = 32 + random.uniform(-12, 12, size=2)
    shape = Shape(name=str(random.choice(SHAPES)), color=str(random.choice(COLORS)), x=x, y=y, size=random.uniform(9.5, 13))
    return Scene(task="single", background=_shade(random), shapes=(shape,))


def _pair(random: np.random.Generator) -> Scene:
    names = random.choice(SHAPES, size=2, replace=False)
    colors = random.choice(COLORS, size=2, replace=False)
    along = np.array([16.0, 48.0]) + random.uniform(-3, 3, size=2)
    across = 32 + random.uniform(-8, 8) + random.uniform(-5, 5, size=2)
    sizes = random.uniform(8.5, 11.5, size=2)
    xs, ys = (along, across) if random.random() < 0.5 else (across, along)
    shapes = tuple(Shape(name=str(names[i]), color=str(colors[i]), x=float(xs[i]), y=float(ys[i]), size=float(sizes[i])) for i in range(2))
    return Scene(task="pair", background=_shade(random), shapes=shapes)


def _counting(random: np.random.Generator) -> Scene:
    name, color = str(random.choice(SHAPES)), str(random.choice(COLORS))
    count = int(random.choice(COUNTS))
    size = random.uniform(8.0, 10.0)
    places = random.choice(len(QUADRANTS), size=count, replace=False)
    shapes = []
    for place in places:
        x, y = np.array(QUADRANTS[place]) + random.uniform(-3.5, 3.5, size=2)
        shapes.append(Shape(name=name, color=color, x=float(x), y=float(y), size=size * random.uniform(0.95, 1.05)))
    return Scene(task="counting", background=_shade(random), shapes=tuple(shapes))


def _text(random: np.random.Generator) -> Scene:
    lettering = Lettering(
        word=str(random.choice(WORDS)),
        color=str(random.choice(LETTER_COLORS)),
        surface=str(random.choice(SURFACES)),
        y=float(random.choice(TEXT_ROWS)),
        shade=_shade(random, low=244, high=252),
    )
    return Scene(task="text", background=_shade(random, low=190, high=225), lettering=lettering)


LAYOUTS: Final[dict[str, Callable[[np.random.Generator], Scene]]] = {
    "single": _single,
    "pair": _pair,
    "counting": _counting,
    "text": _text,
}


def draw_scene(task: str, random: np.random.Generator) -> Scene:
    """Draw a random scene of one layout, all its objects apart and inside the picture.

    Args:
        task: a key of LAYOUTS.
        random: source of every choice.

    Returns:
        The scene.
    """
    while True:
        scene = LAYOUTS[task](random)
        if _valid(scene.shapes):
            return scene


def draw_mixed_scene(shares: dict[str, float], random: np.random.Generator) -> Scene:
    """Draw a random scene of a random layout.

    Args:
        shares: layout -> relative weight.
        random: source of every choice.

    Returns:
        The scene.
    """
    weights = np.array([shares[task] for task in LAYOUTS])
    task = list(LAYOUTS)[int(random.choice(len(LAYOUTS), p=weights / weights.sum()))]
    return draw_scene(task, random)
