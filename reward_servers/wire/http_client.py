"""A reward that another server computes: the client of the open protocol (docs/reward-protocol.md)."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from pydantic import ValidationError

from common.errors import ConfigError
from common.types import Prompt, Score
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.base import Image, PlainScorer
from reward_servers.wire.messages import (
    REWARDS_PATH,
    SCORE_PATH,
    ItemResult,
    RewardsAnswer,
    ScoreAnswer,
    ScoreItem,
    ScoreRequest,
    WirePrompt,
    explained,
    plain_text,
)
from reward_servers.wire.pixels import PixelFormat, check_images, encode_image
from reward_servers.wire.service import finite_details
from reward_servers.wire.transport import Caller, CallerSettings, Refused, endpoint

PIXEL_FORMATS: Final[tuple[PixelFormat, ...]] = ("png", "webp")
BROKEN_ANSWER: Final = "the answer is broken"


class HttpScorer(PlainScorer):
    """Asks a server of the open protocol; its answers are checked, and what is wrong with them is never a number.

    The server is asked once at the start for the reward's version and its limits; what another version says is refused from then on,
    since a score file has one. That may pass (a server that is rolled back), so that it never ends this process: the next one would ask anew.

    Args:
        url: base address of the server.
        reward: its name there; this scorer's name is http:<reward>.
        caller: token, deadline, retries.
        pixel_format: how images travel.

    Raises:
        ConfigError: wrong option, wrong token, or a reward that the server does not have.
        ScorerUnavailable: the server cannot be reached.
    """

    def __init__(self, *, url: str, reward: str, caller: CallerSettings, pixel_format: PixelFormat = "png") -> None:
        if pixel_format not in PIXEL_FORMATS:
            raise ConfigError(f"reward option pixel_format is {pixel_format!r}; it must be one of {', '.join(PIXEL_FORMATS)}")
        self.name = f"http:{reward}"
        self._reward, self._pixel_format = reward, pixel_format
        self._caller, self._url = Caller(caller), endpoint(url, SCORE_PATH)
        self._server_version, self._max_items = self._discovered(endpoint(url, REWARDS_PATH))
        self.version = f"http-{self._server_version}"

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3], at most the server's max_items a request.

        Returns:
            B scores; null where the server says so or its number is not finite.

        Raises:
            ScorerUnavailable: no answer in time; asking image by image would not mend that.
            ScorerError: the images are none, or the server refused or broke a request; other images may fare better.
        """
        check_images(images)
        scores: list[Score] = []
        for start in range(0, len(images), self._max_items):
            part = slice(start, start + self._max_items)
            results = self._asked(images[part], prompts[part])
            scores += [self._score(start + offset, result) for offset, result in enumerate(results)]
        return scores

    def _asked(self, images: Image, prompts: Sequence[Prompt]) -> list[ItemResult]:
        items = tuple(
            ScoreItem(
                id=str(index), image=encode_image(image, self._pixel_format),
                prompt=WirePrompt(id=prompt.id, text=prompt.text, metadata=dict(prompt.metadata)),
            )
            for index, (image, prompt) in enumerate(zip(images, prompts, strict=True))
        )  # fmt: skip
        body = ScoreRequest(reward=self._reward, items=items).model_dump_json().encode()
        try:
            answer = ScoreAnswer.model_validate_json(self._caller.post(self._url, body))
        except ValidationError as error:
            raise Refused(f"{self._url}: {BROKEN_ANSWER}: {explained(error)}") from None
        return self._in_order(answer.results, len(items))

    def _in_order(self, results: Sequence[ItemResult], number: int) -> list[ItemResult]:
        by_id = {result.id: result for result in results}
        wanted = [str(index) for index in range(number)]
        if len(results) != number or set(by_id) != set(wanted):
            missing, unknown = sorted(set(wanted) - set(by_id)), sorted(set(by_id) - set(wanted))
            raise Refused(
                f"{self._url}: {BROKEN_ANSWER}: {len(results)} results for {number} items, missing {missing[:3]}, "
                f"unknown {[name[:40] for name in unknown[:3]]}; every id must come exactly once"
            )
        return [by_id[identity] for identity in wanted]

    def _score(self, index: int, result: ItemResult) -> Score:
        if result.scorer_version != self._server_version:
            came = result.scorer_version[:80]
            error = f"the server now scores with version {came!r}, it began with {self._server_version!r}; start again to accept it"
            return Score(sample_index=index, value=None, error=error, may_pass=True)
        error = _problem(result)
        if error:
            return Score(sample_index=index, value=None, error=error)
        return Score(sample_index=index, value=result.score, details=finite_details(result.details))

    def _discovered(self, url: str) -> tuple[str, int]:
        """Return the served reward's version and how many items a request may have."""
        try:
            answer = RewardsAnswer.model_validate_json(self._caller.get(url))
        except Refused as error:
            if error.status >= 500:
                raise
            raise ConfigError(f"reward {self.name}: {error}; check url and token_file") from error
        except ValidationError as error:
            raise ConfigError(f"reward {self.name}: {url} does not speak the protocol: {explained(error)}; check url") from None
        versions = {served.name: served.version for served in answer.rewards}
        if self._reward not in versions:
            names = ", ".join(sorted(name[:80] for name in versions)) or "none"
            raise ConfigError(f"reward {self.name}: {url} serves {names}; set the option reward to one of them")
        return versions[self._reward], answer.limits.max_items


def _problem(result: ItemResult) -> str:
    """Say why a result holds no score; "" when it does."""
    if result.error or result.score is None:
        return plain_text(result.error) or "the server gave no reason"
    with np.errstate(over="ignore"):
        is_finite = math.isfinite(result.score) and bool(np.isfinite(np.float32(result.score)))
    return "" if is_finite else f"not finite: {result.score}"


def make_http(
    *, url: str, reward: str, token_file: str = "", timeout_s: float = 60.0, retries: int = 3, pixel_format: PixelFormat = "png"
) -> HttpScorer:
    """Make the client of a served reward (options of `[[reward]] name = "http"`)."""
    caller = CallerSettings(token_file=token_file, timeout_s=timeout_s, retries=retries)
    return HttpScorer(url=url, reward=reward, caller=caller, pixel_format=pixel_format)


CARD: Final = RewardCard(
    name="http",
    needs="server",
    description="any reward behind the open protocol; options url, reward, token_file, timeout_s, retries, pixel_format",
    range="the served reward's",
    source="flowfleet, docs/reward-protocol.md",
    licence="none needed for the client; the served reward's own",
    preprocessing="images travel as 8-bit PNG or lossless WebP, unchanged",
    verified="protocol tested with injected faults",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_http)
