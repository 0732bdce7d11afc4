"""DeQA-Score: image quality as the expectation over five quality words, from a server in an environment of its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from common.types import Prompt, Score
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.base import Image, PlainScorer
from reward_servers.wire.http_client import HttpScorer, make_http
from reward_servers.wire.pixels import PixelFormat

LEVELS: Final[Mapping[str, float]] = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
_TOLERANCE: Final = 0.01
"""Half precision on the server moves the expectation by less."""


class Deqa(PlainScorer):
    """A server's DeQA score, checked: within 1..5, and, where the server details the five words' probabilities, their expectation."""

    name = "deqa"

    def __init__(self, client: HttpScorer) -> None:
        """Ask through `client`."""
        self._client = client
        self.version = f"1-{client.version}"

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]; the prompts are not looked at."""
        return [_checked(score) for score in self._client.score(images, prompts)]


def expectation(chances: Mapping[str, float]) -> float:
    """Return sum(level * p) / sum(p) over the five quality words (DeQA-Score, You et al. 2025). NaN when no word has any probability."""
    total = sum(chances[word] for word in LEVELS)
    return sum(level * chances[word] for word, level in LEVELS.items()) / total if total > 0 else math.nan


def _checked(score: Score) -> Score:
    if score.value is None:
        return score
    if not LEVELS["bad"] <= score.value <= LEVELS["excellent"]:
        return replace(score, value=None, error=f"deqa: the score {score.value:g} came; it must lie in 1..5")
    if set(LEVELS) <= set(score.details):
        expected = expectation(score.details)
        if not abs(expected - score.value) <= _TOLERANCE:
            return replace(score, value=None, error=f"deqa: the score {score.value:g} came; its words' probabilities give {expected:.4g}")
    return score


def make_deqa(
    *, url: str, reward: str = "deqa", token_file: str = "", timeout_s: float = 60.0, retries: int = 3, pixel_format: PixelFormat = "png"
) -> Deqa:
    """Make the client of a DeQA server that speaks the open protocol (docs/reward-protocol.md)."""
    return Deqa(make_http(url=url, reward=reward, token_file=token_file, timeout_s=timeout_s, retries=retries, pixel_format=pixel_format))


CARD: Final = RewardCard(
    name="deqa",
    needs="server",
    description="DeQA-Score of image quality, from a server of the open protocol; options url, reward, token_file",
    range="1..5",
    source="DeQA-Score (arXiv:2501.11561)",
    licence="the model's own",
    model="zhiyuanyou/DeQA-Score-Mix3 on the server",
    revision="as served; part of the version",
    preprocessing="the server's; images travel as 8-bit PNG or lossless WebP",
    verified="not verified with real weights",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_deqa)
