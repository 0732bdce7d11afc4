"""UnifiedReward: a vision-language reward model that writes a score from 1 to 5."""

import hashlib
import re
from collections.abc import Sequence
from typing import Final

from common.errors import ScorerError, ScorerUnavailable
from common.types import Prompt, Score
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.base import Image, PlainScorer
from reward_servers.wire.chat import DATA_RULE, ChatChoice, ChatClient, Question
from reward_servers.wire.transport import CallerSettings

DEFAULT_INSTRUCTION: Final = (
    "Below stands the description from which the image was made. Judge how well the image agrees with it (objects, attributes, counts, relations) "
    "and how good the image itself is (clarity, detail, color, beauty). End with a line 'Final Score: x', where x is a number from 1 to 5."
)
LOWEST: Final = 1.0
HIGHEST: Final = 5.0
_FINAL: Final = re.compile(r"Final Score:\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class UnifiedReward(PlainScorer):
    """The number after the last "Final Score:" of the model's reply, temperature 0; outside 1..5 or missing is null.

    Deviations from the published use: the instruction's wording is our own unless the option `instruction` gives the checkpoint's; the
    prompt stands between our delimiters; a system text says what is data; no score is null where the published code takes 0.

    Args:
        client: asks the model.
        model: its name, part of the version as is the instruction.
        instruction: what stands before the prompt.
        max_tokens: of the reply.
    """

    name = "unified_reward"

    def __init__(self, client: ChatClient, *, model: str, instruction: str, max_tokens: int) -> None:
        self._client = client
        self._question = Question(before=instruction, after="", reply={"max_tokens": max_tokens})
        digest = hashlib.sha256(f"{DATA_RULE}\n{instruction}\n{max_tokens}".encode()).hexdigest()[:8]
        self.version = f"1-{model}-{digest}"

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3], several requests at a time."""
        choices = self._client.ask(images, prompts, self._question)
        return [self._score(index, choice) for index, choice in enumerate(choices)]

    def _score(self, index: int, choice: ChatChoice | ScorerError) -> Score:
        try:
            if isinstance(choice, ScorerError):
                raise choice
            return Score(sample_index=index, value=final_score(choice.text))
        except ScorerError as error:
            return Score(sample_index=index, value=None, error=str(error), may_pass=isinstance(error, ScorerUnavailable))


def final_score(text: str) -> float:
    """Return the number after the last "Final Score:". Raises ScorerError when there is none in 1..5."""
    found = _FINAL.findall(text)
    if not found:
        raise ScorerError(f"unified_reward: the reply names no 'Final Score: x'; it ends with {text[-80:]!r}")
    value = float(found[-1])
    if not LOWEST <= value <= HIGHEST:
        raise ScorerError(f"unified_reward: the reply's score is {value:g}; it must lie in {LOWEST:g}..{HIGHEST:g}")
    return value


def make_unified_reward(
    *, url: str, model: str = "UnifiedReward", instruction: str = DEFAULT_INSTRUCTION, token_file: str = "", timeout_s: float = 120.0,
    retries: int = 3, num_parallel: int = 8, max_tokens: int = 1024,
) -> UnifiedReward:  # fmt: skip
    """Make the judge; url is the API's base address, e.g. http://127.0.0.1:8000/v1. Raises ConfigError for a bad option."""
    caller = CallerSettings(
        token_file=token_file, timeout_s=timeout_s, retries=retries, num_parallel=num_parallel, max_answer_bytes=1 << 20
    )
    return UnifiedReward(ChatClient(url=url, model=model, caller=caller), model=model, instruction=instruction, max_tokens=max_tokens)


CARD: Final = RewardCard(
    name="unified_reward",
    needs="server",
    description="UnifiedReward's pointwise score of agreement and quality; options url, model, instruction",
    range="1..5",
    source="UnifiedReward (arXiv:2503.05236); instruction wording our own unless given, see the class",
    licence="definition MIT; the model's own",
    model="CodeGoat24/UnifiedReward-* behind an OpenAI-compatible API, option model",
    revision="as served",
    preprocessing="PNG data URL; the prompt between delimiters; temperature 0; the last 'Final Score: x' of the reply",
    verified="not verified with real weights",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_unified_reward)
