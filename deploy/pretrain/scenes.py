"""Scenes of the synthetic world and their antialiased renders."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from reward_servers.shapes.vocabulary import IMAGE_SIZE, TASK_COLORS, shape_outline

Color = tuple[int, int, int]

SUPERSAMPLING: Final = 4
LETTER_ADVANCE: Final = 16
"""Pixels from letter to letter: two latent cells of an f8 autoencoder, so a letter has one latent pattern wherever it stands."""
LETTER_SIZE: Final = 22
PLATE_HALF_HEIGHT: Final = 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One colored object.

    Attributes:
        name: its class, one of SHAPES.
        color: its task color.
        x: center in pixels from the left.
        y: center in pixels from the top.
        size: half-extent in pixels.
    """

    name: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lettering:
    """One word on a surface.

    Attributes:
        word: what it says, upper case.
        color: the letters' task color.
        surface: one of SURFACES.
        y: the letters' middle in pixels from the top.
        shade: the surface's RGB.
    """

    word: str
    color: str
    surface: str
    y: float
    shade: Color


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything a picture shows.

    Attributes:
        task: the layout it was drawn for: single, pair, counting or text.
        background: flat RGB behind everything.
        shapes: objects, which never overlap.
        lettering: the word, in text scenes.
    """

    task: str
    background: Color
    shapes: tuple[Shape, ...] = ()
    lettering: Lettering | None = None


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), LETTER_SIZE * SUPERSAMPLING)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape) -> None:
    corners = (shape_outline(shape.name) * shape.size + (shape.x, shape.y)) * SUPERSAMPLING
    draw.polygon([(float(x), float(y)) for x, y in corners], fill=TASK_COLORS[shape.color])


def _draw_surface(draw: ImageDraw.ImageDraw, lettering: Lettering, half_width: float) -> None:
    scale, middle = SUPERSAMPLING, IMAGE_SIZE / 2
    ink = TASK_COLORS[lettering.color]
    top, bottom = lettering.y - PLATE_HALF_HEIGHT, lettering.y + PLATE_HALF_HEIGHT
    box = [(middle - half_width) * scale, top * scale, (middle + half_width) * scale, bottom * scale]
    match lettering.surface:
        case "sign":
            draw.rounded_rectangle(box, radius=4 * scale, fill=lettering.shade)
        case "card":
            draw.rectangle([0, box[1], IMAGE_SIZE * scale, box[3]], fill=lettering.shade)
        case "flag":
            draw.rectangle([0, box[1] - 2 * scale, IMAGE_SIZE * scale, box[1]], fill=ink)
            draw.rectangle([0, box[3], IMAGE_SIZE * scale, box[3] + 2 * scale], fill=ink)


def _draw_lettering(draw: ImageDraw.ImageDraw, lettering: Lettering) -> None:
    width = LETTER_ADVANCE * len(lettering.word)
    _draw_surface(draw, lettering, min(IMAGE_SIZE / 2, width / 2 + 2))
    left = (IMAGE_SIZE - width) / 2
    for index, letter in enumerate(lettering.word):
        x = (left + LETTER_ADVANCE * (index + 0.5)) * SUPERSAMPLING
        draw.text((x, lettering.y * SUPERSAMPLING), letter, font=_font(), fill=TASK_COLORS[lettering.color], anchor="mm")


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: what to draw.

    Returns:
        [64, 64, 3] RGB image.
    """
    side = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        _draw_shape(draw, shape)
    if scene.lettering is not None:
        _draw_lettering(draw, scene.lettering)
    return np.asarray(canvas.reduce(SUPERSAMPLING))
