"""Which shape, how big and where: the template that agrees best with a blob's soft coverage."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reward_servers.shapes.templates import SIZES, SUBPIXELS, WINDOW, TemplateBank, template_bank
from reward_servers.shapes.vocabulary import SHAPES

FloatImage = NDArray[np.float32]

_HALF: Final = WINDOW // 2
_STEPS: Final = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
_REFINED: Final = 2
"""Shapes whose neighborhood in size and place is searched after a first look at all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The best template of a blob.

    Attributes:
        shape: index in SHAPES.
        size: half-extent in pixels.
        x: center in pixels from the left.
        y: center in pixels from the top.
        agreement: soft intersection over union, in [0, 1].
        displacement: mean distance in pixels between the blob's outline and the template's.
        margin: by how much the agreement exceeds that of the best other shape.
    """

    shape: int
    size: float
    x: float
    y: float
    agreement: float
    displacement: float
    margin: float


def fit_shape(coverage: FloatImage, left: int, top: int) -> Fit | None:
    """Find the template nearest to a blob.

    Args:
        coverage: [h, w] soft coverage in [0, 1] of one blob.
        left: column of the image where the map's left edge lies.
        top: row of the image where the map's top edge lies.

    Returns:
        The best fit by soft intersection over union, sum(min) / sum(max); None for a blob of no shape's size.
    """
    bank = template_bank()
    area = float(coverage.sum())
    ys, xs = np.arange(coverage.shape[0]) + 0.5, np.arange(coverage.shape[1]) + 0.5
    center = np.array([coverage.sum(axis=0) @ xs, coverage.sum(axis=1) @ ys]) / area
    sizes = np.sqrt(area / bank.unit_area)
    if sizes.max() < SIZES[0] or sizes.min() > SIZES[-1]:
        return None
    padded = np.pad(coverage, WINDOW)
    starts = np.clip(np.rint((sizes - SIZES[0]) / (SIZES[1] - SIZES[0])).astype(int), 0, len(SIZES) - 1)
    places = np.rint((center - bank.centroid * sizes[:, None]) * SUBPIXELS).astype(int)  # [shapes, 2] (x, y)
    first = [_agreements(bank, padded, area, (shape, starts[shape], *places[shape])) for shape in range(len(SHAPES))]
    leaders = np.argsort([-values.max() for values, _ in first])[:_REFINED]
    refined = []
    for shape in map(int, leaders):
        start, (x, y) = int(starts[shape]), map(int, places[shape])
        refined.append(max(_best_place(bank, padded, area, (shape, start, x + dx, y + dy)) for dy, dx in _STEPS))
    (agreement, shape, size, x, y), other = sorted(refined, reverse=True)
    mismatch = 2 * (1 - agreement) / (1 + agreement) * area
    return Fit(
        shape=shape, size=size, x=x / SUBPIXELS + left, y=y / SUBPIXELS + top, agreement=agreement,
        displacement=mismatch / (bank.unit_perimeter[shape] * size), margin=agreement - other[0],
    )  # fmt: skip


def _best_place(
    bank: TemplateBank, padded: FloatImage, area: float, candidate: tuple[int, int, int, int]
) -> tuple[float, int, float, int, int]:
    """Return (agreement, shape, size, x, y) of the best size at one place."""
    values, sizes = _agreements(bank, padded, area, candidate)
    index = int(values.argmax())
    return float(values[index]), candidate[0], float(sizes[index]), candidate[2], candidate[3]


def _agreements(
    bank: TemplateBank, padded: FloatImage, area: float, candidate: tuple[int, int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the agreements with a shape's templates one size below, at and above a size index, at one place; and those sizes."""
    shape, size_index, x, y = candidate
    low, high = max(size_index - 1, 0), min(size_index + 2, len(SIZES))
    row, column = y // SUBPIXELS + WINDOW - _HALF, x // SUBPIXELS + WINDOW - _HALF
    window = padded[row : row + WINDOW, column : column + WINDOW].reshape(-1)
    masks = bank.masks[shape, low:high, y % SUBPIXELS, x % SUBPIXELS]
    common = np.minimum(masks, window).sum(axis=1)
    # area counts the whole blob, so what lies outside the window costs too
    return common / (bank.areas[shape, low:high, y % SUBPIXELS, x % SUBPIXELS] + area - common), SIZES[low:high]
