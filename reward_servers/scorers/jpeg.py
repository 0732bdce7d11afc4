"""Size of the image as a JPEG: a reward without a model, for tests and demonstrations."""

import io
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from PIL import Image as PillowImage

from common.types import Prompt, Score
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.base import Image, KnownCase, PlainScorer, score_each

QUALITY: Final = 95
COMPRESSIBILITY_SCALE: Final = 500.0
KNOWN_KB: Final = 1.181
"""Of the ramp, by libjpeg-turbo."""


def jpeg_kilobytes(image: Image) -> float:
    """Return the size of an image [H, W, 3] as a JPEG of quality 95, in kB (1000 bytes)."""
    buffer = io.BytesIO()
    PillowImage.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


def _known_image() -> Image:
    """A 64 x 64 ramp of gray: smooth, so that encoders agree on its size to a few bytes."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * np.uint8(4), (64, 64, 3))
    return np.ascontiguousarray(ramp)


class JpegIncompressibility(PlainScorer):
    """kB of the JPEG at quality 95 (DDPO, Black et al. 2023, section 5): detail is rewarded."""

    name = "jpeg_incompressibility"
    version = f"1-quality{QUALITY}"

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]."""
        return score_each(images, prompts, self._judge)

    def _judge(self, image: Image, _prompt: Prompt) -> tuple[float, Mapping[str, float]]:
        return jpeg_kilobytes(image), {}

    def known_case(self) -> KnownCase:
        """Return the ramp; encoders of different libjpeg builds differ by less than the tolerance."""
        return KnownCase(image=_known_image(), prompt=Prompt(id="known", text="a ramp"), expected=KNOWN_KB, tolerance=0.2)


class JpegCompressibility(PlainScorer):
    """Minus kB of the JPEG at quality 95, divided by 500 (as Flow-GRPO scales it): plainness is rewarded."""

    name = "jpeg_compressibility"
    version = f"1-quality{QUALITY}"

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]."""
        return score_each(images, prompts, self._judge)

    def _judge(self, image: Image, _prompt: Prompt) -> tuple[float, Mapping[str, float]]:
        return -jpeg_kilobytes(image) / COMPRESSIBILITY_SCALE, {}

    def known_case(self) -> KnownCase:
        """Return the ramp of the sibling, on this scale."""
        expected, tolerance = -KNOWN_KB / COMPRESSIBILITY_SCALE, 0.2 / COMPRESSIBILITY_SCALE
        return KnownCase(image=_known_image(), prompt=Prompt(id="known", text="a ramp"), expected=expected, tolerance=tolerance)


ENTRIES: Final = tuple(
    RewardEntry(
        card=RewardCard(
            name=name, range=score_range, source=source, licence="none needed", description=description, preprocessing="JPEG at quality 95",
            memory="121 MiB, AMD EPYC", speed="19,000 images/s of 64x64 a core, AMD EPYC", needs="nothing",
        ),
        make=make,
    )
    for name, make, score_range, source, description in (
        ("jpeg_incompressibility", JpegIncompressibility, "about 1..400", "DDPO (arXiv:2305.13301)", "kB of the JPEG at quality 95"),
        (
            "jpeg_compressibility", JpegCompressibility, "-1..0", "DDPO (arXiv:2305.13301), scaled as in Flow-GRPO",
            "minus kB of the JPEG at quality 95, over 500",
        ),
    )
)  # fmt: skip
