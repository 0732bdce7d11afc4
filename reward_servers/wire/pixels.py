"""Images on the wire: 8-bit RGB as PNG or lossless WebP, so that a score does not depend on where it was made."""

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Final, Literal

import numpy as np
from PIL import Image as PillowImage

from common.errors import ScorerError
from reward_servers.scorers.base import Image
from reward_servers.wire.messages import RequestRefused

PixelFormat = Literal["png", "webp"]
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH_AT: Final = 24  # byte of the header chunk that holds the bits a channel
_UNREADABLE: Final = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError, MemoryError, struct.error, zlib.error,
    PillowImage.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises on damaged files."""
_REMEDY: Final = "send an 8-bit RGB PNG or a lossless WebP"


def check_images(images: Image) -> None:
    """Raise ScorerError unless images is [B, H, W, 3] uint8 with at least one pixel each."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ScorerError(f"images of shape {images.shape} and type {images.dtype} came; a scorer takes [B, H, W, 3] uint8 RGB")


def encode_image(image: Image, pixel_format: PixelFormat) -> str:
    """Return the base64 text of an image [H, W, 3] uint8."""
    buffer = io.BytesIO()
    picture = PillowImage.fromarray(image)
    if pixel_format == "png":
        picture.save(buffer, format="PNG", compress_level=1)
    else:
        picture.save(buffer, format="WEBP", lossless=True, quality=0, method=0)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_image(text: str, max_pixels: int, where: str) -> Image:
    """Return the image [H, W, 3] uint8 of a base64 text.

    Args:
        text: what came.
        max_pixels: height times width at most; read from the header, before any pixel is decoded.
        where: names the item in messages.

    Raises:
        RequestRefused: 422 for what is no such image, 413 for one that is too large.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestRefused(422, "bad_image", f"{where}: the image is not base64; {_REMEDY}") from None
    problem = _container_problem(content)
    if problem:
        raise RequestRefused(422, "bad_image", f"{where}: {problem}; {_REMEDY}")
    try:
        with PillowImage.open(io.BytesIO(content), formats=("PNG", "WEBP")) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise RequestRefused(413, "too_large", f"{where}: {width} x {height} pixels came; {max_pixels} pixels are left; send less")
            if picture.mode != "RGB":
                raise RequestRefused(422, "bad_image", f"{where}: the image has the mode {picture.mode!r}; {_REMEDY}")
            return np.array(picture, dtype=np.uint8)
    except _UNREADABLE as error:
        raise RequestRefused(422, "bad_image", f"{where}: the image cannot be read ({type(error).__name__}); {_REMEDY}") from None


def _container_problem(content: bytes) -> str:
    """Say what is wrong with the file around the pixels; "" = nothing."""
    if content.startswith(_PNG):
        return "" if content[_PNG_DEPTH_AT : _PNG_DEPTH_AT + 1] == b"\x08" else "the PNG has not 8 bits a channel"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        kinds = set(_webp_chunks(content))
        return "" if b"VP8L" in kinds and not kinds & {b"VP8 ", b"ANIM", b"ANMF"} else "the WebP is lossy or animated"
    return "the image is neither PNG nor WebP"


def _webp_chunks(content: bytes) -> Iterator[bytes]:
    """Yield the kinds of a WebP file's chunks (RIFF: kind, little-endian length, content padded to even)."""
    place = 12
    while place + 8 <= len(content):
        yield content[place : place + 4]
        length = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + length + length % 2
