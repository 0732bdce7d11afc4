"""Contact sheets: many small images as one PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Images = NDArray[np.uint8]  # [N, H, W, 3]
PAPER, INK = (255, 255, 255), (30, 35, 48)


def contact_sheet(images: Images, *, columns: int, side: int | None = None, gap: int = 4, captions: Sequence[str] = ()) -> Image.Image:
    """Return images row by row on white.

    Args:
        images: [N, H, W, 3] uint8 RGB.
        columns: images a row.
        side: width of an image on the sheet in pixels; None = as it is. Enlarging keeps pixels square, reducing filters.
        gap: pixels between images.
        captions: one line below each image, cut where it is too long; empty = none.

    Raises:
        ValueError: not a batch of RGB images, no column, or another number of captions than images.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images) or columns < 1:
        raise ValueError(f"contact_sheet: came images {images.shape} and {columns} columns; give [N >= 1, H, W, 3] and at least 1 column")
    if captions and len(captions) != len(images):
        raise ValueError(f"contact_sheet: {len(captions)} captions for {len(images)} images; give one each, or none")
    count, height, width, _ = images.shape
    scaled = (width, height) if side is None else (side, max(round(side * height / width), 1))
    line = 14 if captions else 0
    rows = -(-count // columns)
    step = (scaled[0] + gap, scaled[1] + line + gap)
    sheet = Image.new("RGB", (columns * step[0] - gap, rows * step[1] - gap), PAPER)
    for position, pixels in enumerate(images):
        corner = (position % columns * step[0], position // columns * step[1])
        sheet.paste(_resize(Image.fromarray(np.ascontiguousarray(pixels)), scaled), corner)
        if captions:
            _write(sheet, captions[position], (corner[0], corner[1] + scaled[1] + 1), scaled[0])
    return sheet


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    grows = size[0] > image.size[0]
    return image.resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def _write(sheet: Image.Image, text: str, corner: tuple[int, int], width: int) -> None:
    font = ImageFont.load_default(10)
    shown = text
    while shown and font.getlength(shown) > width:
        shown = shown[:-1]
    ImageDraw.Draw(sheet).text(corner, shown, fill=INK, font=font)


def to_png(sheet: Image.Image) -> bytes:
    """Return a sheet's PNG bytes."""
    sink = io.BytesIO()
    sheet.save(sink, "PNG", optimize=True)
    return sink.getvalue()


def write_contact_sheet(
    out_path: Path, images: Images, *, columns: int, side: int | None = None, gap: int = 4, captions: Sequence[str] = ()
) -> Path:
    """Write `contact_sheet` as a PNG file and return its path."""
    out_path.parent.mkdir(parents=True, exist_ok=True)
    out_path.write_bytes(to_png(contact_sheet(images, columns=columns, side=side, gap=gap, captions=captions)))
    return out_path
