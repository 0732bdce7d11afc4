"""A scorer that sleeps: the score of an image is its mean brightness, so it follows from group number and sample."""

import time
from collections.abc import Callable, Sequence

from common.types import Prompt, Score
from reward_servers.scorers.base import Image, PlainScorer

FAKE_MICRO_BATCH = 1 << 16  # one call, and so one pause, a group


class FakeScorer(PlainScorer):
    """Spends `seconds` a call and gives every image a number in [0, 1]; needs nothing of a prompt."""

    version = "fake-1"

    def __init__(self, name: str, *, seconds: float, pause: Callable[[float], None] = time.sleep) -> None:
        """name: of the reward that it stands for. pause: spends the seconds."""
        self.name = name
        self._seconds, self._pause = seconds, pause

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """B images -> B scores, after the pause."""
        self._pause(self._seconds)
        return [Score(sample_index=index, value=float(image.mean()) / 255.0) for index, image in enumerate(images)]
