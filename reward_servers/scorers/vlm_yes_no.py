"""A yes-no question to a vision-language model: how sure is it that the image shows what the prompt says?"""

import hashlib
import math
from collections.abc import Sequence
from typing import Final

from common.errors import ConfigError, ScorerError, ScorerUnavailable
from common.types import Prompt, Score
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.base import Image, PlainScorer
from reward_servers.wire.chat import DATA_RULE, AnswerToken, ChatChoice, ChatClient, Question
from reward_servers.wire.transport import CallerSettings

DEFAULT_QUESTION: Final = "Does the image show everything that the description says, and nothing that contradicts it?"
ANSWER_RULE: Final = "Answer with one word, Yes or No."
NUM_TOP: Final = 20
"""Log-probabilities a token, the most that the API gives."""
_WORD_STARTS: Final = " \t\n▁Ġ"
"""How tokenizers write a leading space."""


class VlmYesNo(PlainScorer):
    """P(yes) / (P(yes) + P(no)) of the first answer token, temperature 0 (as VQAScore, arXiv:2404.01291, asks; the wording is our own).

    Tokens that differ in case or in a leading space are one word, their probabilities added. Both words together must have at least
    min_mass: a model that means to say something else gave no answer, which is null. Details: yes, no, as probabilities.

    Args:
        client: asks the model.
        model: its name, part of the version as is the question.
        question: what is asked.
        min_mass: the least P(yes) + P(no).
    """

    name = "vlm_yes_no"

    def __init__(self, client: ChatClient, *, model: str, question: str, min_mass: float) -> None:
        self._client, self._min_mass = client, min_mass
        reply = {"max_tokens": 1, "logprobs": True, "top_logprobs": NUM_TOP}
        self._question = Question(before="", after=f"{question}\n{ANSWER_RULE}", reply=reply)
        digest = hashlib.sha256(f"{DATA_RULE}\n{self._question.after}\n{min_mass!r}".encode()).hexdigest()[:8]
        self.version = f"1-{model}-{digest}"

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3], several requests at a time."""
        choices = self._client.ask(images, prompts, self._question)
        return [self._score(index, choice) for index, choice in enumerate(choices)]

    def _score(self, index: int, choice: ChatChoice | ScorerError) -> Score:
        try:
            if isinstance(choice, ScorerError):
                raise choice
            if not choice.tokens:
                raise ScorerError("vlm_yes_no: the answer carries no log-probabilities; serve the model with logprobs")
            yes, no = word_chances(choice.tokens[0])
            if yes + no < self._min_mass:
                raise ScorerError(
                    f"vlm_yes_no: P(yes) + P(no) is {yes + no:.2g}, below {self._min_mass:g}; the model answered {choice.text[:40]!r}"
                )
        except ScorerError as error:
            return Score(sample_index=index, value=None, error=str(error), may_pass=isinstance(error, ScorerUnavailable))
        return Score(sample_index=index, value=yes / (yes + no), details={"yes": yes, "no": no})


def word_chances(token: AnswerToken) -> tuple[float, float]:
    """Return P(yes) and P(no), each over its spellings. Raises ScorerError when the log-probabilities are none."""
    chances = {"yes": 0.0, "no": 0.0}
    total = 0.0
    for one in token.top_logprobs:
        if math.isnan(one.logprob) or one.logprob > 1e-3:
            raise ScorerError(f"vlm_yes_no: the log-probability {one.logprob} came; it is at most 0")
        chance = math.exp(min(one.logprob, 0.0))
        total += chance
        word = one.token.lstrip(_WORD_STARTS).rstrip().lower()
        if word in chances:
            chances[word] += chance
    if total > 1.01:
        raise ScorerError(f"vlm_yes_no: the answer's probabilities add to {total:.3f}; they are at most 1")
    return chances["yes"], chances["no"]


def make_vlm_yes_no(
    *, url: str, model: str, question: str = DEFAULT_QUESTION, token_file: str = "", timeout_s: float = 60.0, retries: int = 3,
    num_parallel: int = 8, min_mass: float = 0.01,
) -> VlmYesNo:  # fmt: skip
    """Make the judge; url is the API's base address, e.g. http://127.0.0.1:8000/v1. Raises ConfigError for a bad option."""
    if not 0 < min_mass <= 1:
        raise ConfigError(f"reward option min_mass is {min_mass!r}; it must be above 0 and at most 1")
    caller = CallerSettings(
        token_file=token_file, timeout_s=timeout_s, retries=retries, num_parallel=num_parallel, max_answer_bytes=1 << 20
    )
    return VlmYesNo(ChatClient(url=url, model=model, caller=caller), model=model, question=question, min_mass=min_mass)


CARD: Final = RewardCard(
    name="vlm_yes_no",
    needs="server",
    description="a vision-language model's P(yes) / (P(yes) + P(no)) to a question about image and prompt; options url, model, question",
    range="0..1",
    source="the measure of VQAScore (arXiv:2404.01291) with a question of our own, over an OpenAI-compatible API",
    licence="definition none needed; the model's own",
    model="any with image input and log-probabilities, option model",
    preprocessing="PNG data URL; the prompt between delimiters; one token, temperature 0; case and leading-space variants added",
    verified="not verified with real weights",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_vlm_yes_no)
