"""The open protocol's messages (docs/reward-protocol.md): what goes over the wire, and how a bad request is refused."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import FlowfleetError

SCORE_PATH: Final = "/v1/score"
REWARDS_PATH: Final = "/v1/rewards"
HEALTH_PATH: Final = "/health"
READY_PATH: Final = "/ready"
METRICS_PATH: Final = "/metrics"
MAX_TEXT: Final = 1000
"""Characters of an error text on the wire; longer ones are cut."""


class RequestRefused(FlowfleetError):
    """A request that is not answered: HTTP status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: int = 0) -> None:
        super().__init__(plain_text(message))
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s  # 0 = asking again will not help


class _Sent(BaseModel):
    """What a client sends: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Answered(BaseModel):
    """What a server answers: wrong types are errors, keys that a later server adds are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class WirePrompt(_Sent):
    """A prompt; metadata is what the scorer needs beside the text."""

    id: str = ""
    text: str
    metadata: dict[str, Any] = Field(default_factory=dict)


class ScoreItem(_Sent):
    """One image with its prompt."""

    id: str = Field(min_length=1, max_length=200)  # unique in the request; the answer names it again
    prompt: WirePrompt
    image: str  # base64 of an 8-bit RGB PNG or of a lossless WebP


class ScoreRequest(_Sent):
    """POST /v1/score."""

    reward: str
    items: tuple[ScoreItem, ...] = Field(min_length=1)


class ItemResult(_Answered):
    """One item's score, or null with its reason."""

    id: str
    score: float | None
    error: str = ""  # empty exactly when there is a score
    details: dict[str, float] = Field(default_factory=dict)
    scorer_version: str


class ScoreAnswer(_Answered):
    """The answer to a ScoreRequest: every id exactly once."""

    results: tuple[ItemResult, ...]


class ServedReward(_Answered):
    """One reward that a server has."""

    name: str
    version: str


class WireLimits(_Answered):
    """What a server takes in one request."""

    max_items: int = Field(64, ge=1)
    max_body_bytes: int = Field(64 << 20, ge=1)
    max_pixels: int = Field(1 << 22, ge=1)  # of one image
    max_total_pixels: int = Field(1 << 25, ge=1)  # of all images


class RewardsAnswer(_Answered):
    """GET /v1/rewards."""

    rewards: tuple[ServedReward, ...]
    limits: WireLimits = WireLimits()


class RefusalText(_Answered):
    """Why a request was refused."""

    code: str
    message: str


class RefusalAnswer(_Answered):
    """The body of every answer with a status of 400 or more."""

    error: RefusalText


def decode_request(body: bytes) -> ScoreRequest:
    """Return the request that a body holds. Raises RequestRefused (400) naming the first places that break the protocol."""
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestRefused(400, "bad_body", f"the body is no score request: {explained(error)}; see docs/reward-protocol.md") from None
    ids = [item.id for item in request.items]
    twice = sorted({identity for identity in ids if ids.count(identity) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise RequestRefused(400, "bad_body", f"the id {twice[0]!r} stands on more than one item; ids are unique in a request")
    return request


def explained(error: ValidationError) -> str:
    """Return the first five problems as "place: rule", without what came (it may be an image)."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    named = [f"{'.'.join(str(part)[:60] for part in item['loc']) or 'body'}: {item['msg']}" for item in problems[:5]]
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(named) + more


def plain_text(text: str) -> str:
    """Return text that any JSON writer takes: no lone surrogates, MAX_TEXT characters at most."""
    return text[:MAX_TEXT].encode("utf-8", errors="replace").decode("utf-8")
