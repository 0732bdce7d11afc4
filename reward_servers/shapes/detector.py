"""Finds the colored shapes of the `shapes` world by classical vision: background, blobs of one color, best template.

A blob is measured by soft coverage (how far each pixel has gone from the background's color to the object's), not by a
binary contour: an autoencoder's halos move contours, but hardly coverage.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.errors import ScorerError
from reward_servers.detection import Detection
from reward_servers.shapes.fitting import Fit, fit_shape
from reward_servers.shapes.templates import SIZES, WINDOW, stretched, template_bank
from reward_servers.shapes.vocabulary import DISTRACTOR_COLORS, IMAGE_SIZE, SHAPES, TASK_COLORS, shape_outline

FloatImage = NDArray[np.float32]
Mask = NDArray[np.bool_]

FOREGROUND_DISTANCE: Final = 48.0
"""RGB distance from the background from which a pixel may belong to an object."""
FLAT_STEP: Final = 45.0
"""RGB distance to every neighbor up to which a pixel shows a surface, not an edge."""
MIN_AREA: Final = 32
"""Pixels; less is a speck."""
MIN_CORE: Final = 6
"""Flat pixels; less shows no color."""
COLOR_RADIUS: Final = 32.0
"""RGB distance to a task color up to which an object may have it."""
RESIDUAL_LIMIT: Final = 60.0
"""RGB distance from the line background - object color up to which a pixel is a mixture of the two."""
SECOND_COLOR_SHARE: Final = 0.12
"""Share of a blob's flat pixels from which another color counts as an object (or a flaw) of its own."""
SAME_COLOR: Final = 45.0
"""RGB distance below which two cores are one color."""
SURE_DISPLACEMENT: Final = 0.30
LOST_DISPLACEMENT: Final = 0.60
"""Mean distance in pixels between a blob's outline and its template's that maps to confidence 1 and to 0."""
SURE_MARGIN: Final = 0.05
"""Lead in agreement over the next shape from which the shape is not in doubt."""
MIN_CONFIDENCE: Final = 0.05
"""Less is not reported."""

_NAMES: Final = (*TASK_COLORS, *DISTRACTOR_COLORS)
_PALETTE: Final = np.array([*TASK_COLORS.values(), *DISTRACTOR_COLORS.values()], dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Region:
    """One connected foreground region, cut out with a border of 3 pixels where the image has them."""

    difference: FloatImage  # [h, w, 3] from the background
    inside: Mask  # the region's own pixels
    free: Mask  # own pixels and background, no other region
    flat: Mask  # pixels that show a surface
    left: int
    top: int


def color_name(rgb: FloatImage) -> str | None:
    """Name a color: the nearest of task and distractor colors, if that is a task color within COLOR_RADIUS.

    Args:
        rgb: [3] in 0..255.

    Returns:
        A key of TASK_COLORS, or None.
    """
    distance = np.linalg.norm(_PALETTE - rgb, axis=1)
    nearest = int(distance.argmin())
    return _NAMES[nearest] if nearest < len(TASK_COLORS) and distance[nearest] <= COLOR_RADIUS else None


class ShapesDetector:
    """Detects circles, squares, triangles, stars, crosses and hearts of one color each."""

    name = "shapes"
    version = "1"
    labels: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(TASK_COLORS)

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Find the shapes of an image.

        Args:
            image: [64, 64, 3] uint8 RGB.

        Returns:
            One detection an object; label, box of the fitted outline, confidence from the agreement, color.

        Raises:
            ScorerError: the image is not of this world's size.
        """
        if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ScorerError(
                f"detector shapes: image of shape {image.shape}; it reads {IMAGE_SIZE}x{IMAGE_SIZE} RGB scenes of the tiny model; "
                "choose another detector for other models"
            )
        pixels = image.astype(np.float32)
        background = _background(pixels)
        found = []
        for region in _regions(pixels - background, pixels):
            cores = _core_colors(region)
            for core in cores:
                for coverage in _blobs(region, core, cores):
                    fit = fit_shape(coverage, region.left, region.top)
                    if fit is not None:
                        found.append(_detection(fit, core + background, pixels))
        return [detection for detection in found if detection.confidence >= MIN_CONFIDENCE]


def _background(pixels: FloatImage) -> FloatImage:
    """Return the median color [3] of the outermost two pixels all around."""
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    color: FloatImage = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    return color


def _flat(pixels: FloatImage) -> Mask:
    flat = np.ones(pixels.shape[:2], dtype=bool)
    down = np.square(np.diff(pixels, axis=0)).sum(axis=2) <= FLAT_STEP**2
    right = np.square(np.diff(pixels, axis=1)).sum(axis=2) <= FLAT_STEP**2
    flat[1:] &= down
    flat[:-1] &= down
    flat[:, 1:] &= right
    flat[:, :-1] &= right
    return flat


def _regions(difference: FloatImage, pixels: FloatImage) -> list[_Region]:
    labels, _ = ndimage.label(np.square(difference).sum(axis=2) > FOREGROUND_DISTANCE**2)
    flat = _flat(pixels)
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        top, left = max(rows.start - 3, 0), max(columns.start - 3, 0)
        place = (slice(top, rows.stop + 3), slice(left, columns.stop + 3))
        inside = labels[place] == number
        if np.count_nonzero(inside) >= MIN_AREA:
            free = inside | (labels[place] == 0)
            regions.append(_Region(difference=difference[place], inside=inside, free=free, flat=flat[place], left=left, top=top))
    return regions


def _core_colors(region: _Region) -> list[FloatImage]:
    """Return the colors [3] (as differences from the background) of the surfaces in a region, the largest first."""
    surface = region.difference[region.inside & region.flat]
    cores: list[FloatImage] = []
    rest = surface
    while len(rest) >= max(MIN_CORE, SECOND_COLOR_SHARE * len(surface)):
        core = _mode(rest)
        near = np.square(rest - core).sum(axis=1) <= SAME_COLOR**2
        if np.count_nonzero(near) < max(MIN_CORE, SECOND_COLOR_SHARE * len(surface)):
            break
        cores.append(np.median(rest[near], axis=0))
        rest = rest[~near]
    return cores


def _mode(colors: FloatImage) -> FloatImage:
    """Return the color that most of some pixels [n, 3] share: their median, or that of the fullest cube of 32 levels a side."""
    median: FloatImage = np.median(colors, axis=0)
    if np.mean(np.square(colors - median).sum(axis=1) <= SAME_COLOR**2) >= 0.8:
        return median
    cubes = np.floor(colors / 32).astype(np.int64) @ np.array([10_000, 100, 1])
    values, counts = np.unique(cubes, return_counts=True)
    fullest: FloatImage = np.median(colors[cubes == values[counts.argmax()]], axis=0)
    return fullest


def _blobs(region: _Region, core: FloatImage, cores: list[FloatImage]) -> list[FloatImage]:
    """Return a soft coverage map [h, w] in [0, 1] for each connected blob of one color in a region."""
    length = np.linalg.norm(core)
    along = region.difference @ (core / length**2)
    off_line = np.square(region.difference - along[..., None] * core).sum(axis=2)
    belongs = region.free & (off_line <= RESIDUAL_LIMIT**2) & ((along - 1) * length <= RESIDUAL_LIMIT)
    if len(cores) > 1:
        distances = [np.square(region.difference - other).sum(axis=2) for other in cores]
        nearest = np.argmin(distances, axis=0)
        own = next(index for index, other in enumerate(cores) if other is core)
        belongs &= ~region.flat | (nearest == own)
    coverage = np.where(belongs, stretched(along), np.float32(0))
    labels, number = ndimage.label(coverage > 0.5)
    if number == 0:
        return []
    sizes = np.bincount(labels.reshape(-1))
    return [_alone(coverage, labels, index) for index in range(1, number + 1) if sizes[index] >= MIN_AREA]


def _alone(coverage: FloatImage, labels: NDArray[np.int32], index: int) -> FloatImage:
    """Return the coverage of one labeled blob: its pixels and a border of 2, without other blobs'."""
    blob = labels == index
    near = ndimage.binary_dilation(blob, iterations=2) & (blob | (labels == 0))
    return np.where(near, coverage, np.float32(0))


def _detection(fit: Fit, core: FloatImage, pixels: FloatImage) -> Detection:
    name = SHAPES[fit.shape]
    outline = shape_outline(name) * fit.size + (fit.x, fit.y)
    left, top = outline.min(axis=0)
    right, bottom = outline.max(axis=0)
    sharpness = (LOST_DISPLACEMENT - fit.displacement) / (LOST_DISPLACEMENT - SURE_DISPLACEMENT)
    return Detection(
        label=name,
        box=(float(left), float(top), float(right), float(bottom)),
        confidence=float(np.clip(sharpness, 0, 1) * np.clip(fit.margin / SURE_MARGIN, 0, 1)),
        color=color_name(_surface_color(fit, core, pixels)),
    )


def _surface_color(fit: Fit, core: FloatImage, pixels: FloatImage) -> FloatImage:
    """Return the median color of the pixels deep inside a fitted shape, which edges do not touch; `core` where there is none."""
    mask = template_bank().masks[fit.shape, int(np.searchsorted(SIZES, fit.size)), 0, 0].reshape(WINDOW, WINDOW)
    deep = ndimage.binary_erosion(mask > 0.99)
    rows, columns = np.nonzero(deep)
    rows, columns = rows + round(fit.y) - WINDOW // 2, columns + round(fit.x) - WINDOW // 2
    kept = (rows >= 0) & (rows < pixels.shape[0]) & (columns >= 0) & (columns < pixels.shape[1])
    chosen = pixels[rows[kept], columns[kept]]
    color: FloatImage = np.median(chosen, axis=0) if len(chosen) >= MIN_CORE else core
    return color
