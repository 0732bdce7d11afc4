"""Soft masks of every shape at every size and quarter-pixel offset: what blobs are compared with."""

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from reward_servers.shapes.vocabulary import SHAPES, shape_outline

WINDOW: Final = 36
"""Side in pixels of the square that holds a template; its center is at WINDOW / 2."""
SIZES: Final = np.arange(6.0, 16.01, 0.5)
"""Half-extents in pixels. What is smaller than the smallest is no object of this world (MIN_SIZE), but debris."""
SUBPIXELS: Final = 4
"""Offsets a pixel and axis: templates stand at 0, .25, .5 and .75."""
CONTRAST: Final = 2.0
"""Coverage, of templates and of blobs, is stretched around .5 by this factor: it undoes the blur of edges."""
_SUPERSAMPLING: Final = 4

FloatImage = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateBank:
    """All templates, and what is needed to choose among them.

    Attributes:
        masks: [shapes, sizes, SUBPIXELS (y), SUBPIXELS (x), WINDOW * WINDOW] coverage in [0, 1].
        areas: sums of the masks over their last axis.
        unit_area: [shapes] area of a shape of size 1.
        unit_perimeter: [shapes] length of the outline of a shape of size 1.
        centroid: [shapes, 2] (x, y) of its centroid in units of its size.
    """

    masks: NDArray[np.float32]
    areas: NDArray[np.float32]
    unit_area: NDArray[np.float64]
    unit_perimeter: NDArray[np.float64]
    centroid: NDArray[np.float64]


def stretched(coverage: FloatImage) -> FloatImage:
    """Return coverage with its contrast raised around .5, in [0, 1]."""
    raised: FloatImage = np.clip((coverage - np.float32(0.5)) * np.float32(CONTRAST) + np.float32(0.5), 0, 1)
    return raised


def _mask(name: str, size: float, offset_y: float, offset_x: float) -> FloatImage:
    side = WINDOW * _SUPERSAMPLING
    canvas = Image.new("L", (side, side), 0)
    corners = (shape_outline(name) * size + (WINDOW / 2 + offset_x, WINDOW / 2 + offset_y)) * _SUPERSAMPLING
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32)
    return stretched(pixels.reshape(-1) / np.float32(255))


def _moments(outline: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return area and centroid of a polygon by the shoelace formula."""
    x, y = outline[:, 0], outline[:, 1]
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    cross = x * next_y - next_x * y
    area = cross.sum() / 2
    return abs(area), ((x + next_x) * cross).sum() / (6 * area), ((y + next_y) * cross).sum() / (6 * area)


def _perimeter(outline: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(outline - np.roll(outline, -1, axis=0), axis=1).sum())


@cache
def template_bank() -> TemplateBank:
    """Draw every template once a process (about 50 ms)."""
    steps = np.arange(SUBPIXELS) / SUBPIXELS
    masks = np.stack([np.stack([[[_mask(name, size, oy, ox) for ox in steps] for oy in steps] for size in SIZES]) for name in SHAPES])
    moments = np.array([_moments(shape_outline(name)) for name in SHAPES])
    perimeters = np.array([_perimeter(shape_outline(name)) for name in SHAPES])
    return TemplateBank(masks=masks, areas=masks.sum(axis=-1), unit_area=moments[:, 0], unit_perimeter=perimeters, centroid=moments[:, 1:])
