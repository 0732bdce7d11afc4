"""A reward behind the open protocol, without HTTP: a decoded request in, an answer out."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from common.protocols import Scorer
from common.types import Prompt, Score
from reward_servers.guarded import score_guarded
from reward_servers.scorers.base import Image
from reward_servers.wire.messages import (
    ItemResult,
    RequestRefused,
    RewardsAnswer,
    ScoreAnswer,
    ScoreItem,
    ScoreRequest,
    ServedReward,
    WireLimits,
    plain_text,
)
from reward_servers.wire.pixels import decode_image


class RewardService:
    """Answers score requests with one scorer, one request at a time.

    Args:
        scorer: the reward; requests name it by its name.
        limits: what one request may hold.
        micro_batch: images a scorer call.
    """

    def __init__(self, scorer: Scorer, limits: WireLimits, *, micro_batch: int = 16) -> None:
        self._scorer, self._limits, self._micro_batch = scorer, limits, micro_batch
        self.name = scorer.name

    def rewards(self) -> RewardsAnswer:
        """Return what is served, and its limits."""
        served = ServedReward(name=self.name, version=plain_text(self._scorer.version))
        return RewardsAnswer(rewards=(served,), limits=self._limits)

    def answer(self, request: ScoreRequest) -> ScoreAnswer:
        """Score a request's items; every id comes back once, in the request's order, null where the scorer failed.

        Raises:
            RequestRefused: another reward (404), an image that is none (422), too many items or pixels (413); nothing was scored then.
        """
        if request.reward != self.name:
            raise RequestRefused(404, "unknown_reward", f"reward {request.reward[:80]!r} is not served here; this server has {self.name!r}")
        if len(request.items) > self._limits.max_items:
            message = f"{len(request.items)} items came; {self._limits.max_items} a request at most; send several requests"
            raise RequestRefused(413, "too_large", message)
        images = self._images(request.items)
        prompts = [Prompt(id=item.prompt.id, text=item.prompt.text, metadata=item.prompt.metadata) for item in request.items]
        scores = self._scores(images, prompts)
        return ScoreAnswer(results=tuple(self._result(item.id, scores[index]) for index, item in enumerate(request.items)))

    def _images(self, items: Sequence[ScoreItem]) -> list[Image]:
        left, images = self._limits.max_total_pixels, []
        for item in items:
            image = decode_image(item.image, min(left, self._limits.max_pixels), f"item {item.id[:80]!r}")
            left -= image.shape[0] * image.shape[1]
            images.append(image)
        return images

    def _scores(self, images: Sequence[Image], prompts: Sequence[Prompt]) -> dict[int, Score]:
        """Score images of any sizes by position: those of one size together."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(index)
        scores: dict[int, Score] = {}
        for chosen in by_shape.values():
            batch = np.stack([images[index] for index in chosen])
            scored = score_guarded(self._scorer, batch, [prompts[index] for index in chosen], self._micro_batch)
            scores |= dict(zip(chosen, scored, strict=True))
        return scores

    def _result(self, identity: str, score: Score) -> ItemResult:
        return ItemResult(
            id=identity, score=score.value, error="" if score.value is not None else plain_text(score.error),
            details=finite_details(score.details), scorer_version=plain_text(self._scorer.version),
        )  # fmt: skip


def finite_details(details: Mapping[str, float]) -> dict[str, float]:
    """Return the details that JSON can carry: finite ones, their names cut as any text."""
    return {plain_text(name): float(value) for name, value in details.items() if math.isfinite(value)}
