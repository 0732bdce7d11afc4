"""Scoring that survives its scorer: what fails becomes a null with its reason, never a number, and spoils no neighbor."""

import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from reprlib import repr as short_repr
from typing import Any, Final, SupportsFloat

import numpy as np

from common.errors import DataError, ScorerError, ScorerHung, ScorerUnavailable
from common.protocols import GroupScorer, Scorer
from common.types import NOT_APPLICABLE, Prompt, Score, Wait
from reward_servers.calls import DirectCalls, ScorerCalls
from reward_servers.scorers.base import Image
from reward_servers.scorers.groupwise import groups_of

__all__ = ["NOT_APPLICABLE", "SCORER_FAILURES", "GuardRules", "reason_of", "score_guarded", "scoring_rounds"]

SCORER_FAILURES: Final = (
    ScorerError, DataError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError, OSError,
)  # fmt: skip
"""What a scorer, the user's own too, may raise for one image; anything else is a bug of the process and ends it."""
FIRST_PAUSE_S: Final = 0.5  # mean pause before the first retry; it doubles
LONGEST_PAUSE_S: Final = 10.0
_MOMENT_S: Final = 1e-3  # pauses shorter than this are over


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardRules:
    """How a scorer is called.

    Attributes:
        micro_batch: images a call; a groupwise scorer gets whole groups instead.
        retries: rounds after the first, on the images whose failure may pass.
        calls: runs each call.
        clock: seconds, for durations only.
    """

    micro_batch: int
    retries: int = 0
    calls: ScorerCalls = field(default_factory=DirectCalls)
    clock: Callable[[], float] = time.monotonic


def score_guarded(scorer: Scorer, images: Image, prompts: Sequence[Prompt], micro_batch: int) -> tuple[Score, ...]:
    """Score images in micro-batches, each tried once; see scoring_rounds."""
    rounds = scoring_rounds(scorer, images, prompts, GuardRules(micro_batch=micro_batch))
    while True:
        try:
            next(rounds)
        except StopIteration as done:
            scores: tuple[Score, ...] = done.value
            return scores


def scoring_rounds(scorer: Scorer, images: Image, prompts: Sequence[Prompt], rules: GuardRules) -> Generator[Wait, None, tuple[Score, ...]]:
    """Score images; those whose failure may pass are tried again after jittered pauses.

    Args:
        scorer: the reward; a GroupScorer sees the images of one prompt at once.
        images: [K, H, W, 3] uint8 RGB.
        prompts: K prompts; one that the scorer does not apply to gets a null with the reason NOT_APPLICABLE.
        rules: how it is called.

    Yields:
        The pauses.

    Returns:
        K scores, sample_index 0 to K-1 in order; every value is None or finite in float32. After a call that hung (`rules.calls.hung`)
        the rest is null with that reason.
    """
    scores = {
        index: Score(sample_index=index, value=None, error=NOT_APPLICABLE)
        for index, prompt in enumerate(prompts) if not scorer.applies_to(prompt)
    }  # fmt: skip
    applicable = [index for index in range(len(prompts)) if index not in scores]
    waiting = set(applicable)
    for attempt in range(rules.retries + 1):
        if attempt:
            yield from _pause(scorer.name, attempt, [scores[index] for index in sorted(waiting)], rules.clock)
        for chosen in _batches(scorer, prompts, applicable, waiting, micro_batch=rules.micro_batch):
            batch = _score_batch(scorer, images[chosen], [prompts[index] for index in chosen], rules.calls)
            scores |= {index: replace(score, sample_index=index) for index, score in zip(chosen, batch, strict=True)}
        waiting = {index for index in applicable if scores[index].value is None and scores[index].may_pass}
        if not waiting or rules.calls.hung:
            break
    return tuple(scores[index] for index in range(len(prompts)))


def _batches(
    scorer: Scorer, prompts: Sequence[Prompt], applicable: Sequence[int], waiting: set[int], *, micro_batch: int
) -> list[list[int]]:
    """What is scored in one call each: whole groups with an image that waits, or micro-batches of the waiting images."""
    if isinstance(scorer, GroupScorer):
        return [group for group in groups_of(prompts, applicable) if waiting.intersection(group)]
    order = sorted(waiting)
    return [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]


def _pause(name: str, attempt: int, nulls: Sequence[Score], clock: Callable[[], float]) -> Iterator[Wait]:
    pause_s = min(FIRST_PAUSE_S * 2.0 ** (attempt - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)
    until = clock() + pause_s
    while (left_s := until - clock()) > _MOMENT_S:
        yield Wait(seconds=left_s, reason=f"reward {name}: {len(nulls)} images are tried again, last: {nulls[-1].error}")


def _score_batch(scorer: Scorer, images: Image, prompts: Sequence[Prompt], calls: ScorerCalls) -> list[Score]:
    started = time.perf_counter()
    try:
        scores = calls.run(partial(_call, scorer, images, prompts), len(prompts))
        if not isinstance(scores, Sequence):
            raise _WrongAnswer(
                f"scorer {scorer.name} returned {short_repr(scores)} for {len(prompts)} images; it must return a list of Score"
            )
        if len(scores) != len(prompts):
            raise _WrongAnswer(f"scorer {scorer.name} returned {len(scores)} scores for {len(prompts)} images; it must return one an image")
    except (_WrongAnswer, ScorerHung) as error:
        return _nulls(str(error), len(prompts))
    except ScorerUnavailable as error:
        return _nulls(reason_of(error), len(prompts), may_pass=True)
    except SCORER_FAILURES as error:
        if len(prompts) == 1 or isinstance(scorer, GroupScorer):
            return _nulls(reason_of(error), len(prompts), latency_s=(time.perf_counter() - started) / len(prompts))
        singles = [_score_batch(scorer, images[index : index + 1], prompts[index : index + 1], calls) for index in range(len(prompts))]
        return [score for single in singles for score in single]
    share_s = (time.perf_counter() - started) / len(prompts)
    return [_checked(scorer.name, score, share_s) for score in scores]


def _call(scorer: Scorer, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
    return scorer.score_group(images, prompts[0]) if isinstance(scorer, GroupScorer) else scorer.score(images, prompts)


class _WrongAnswer(ScorerError):
    """A broken scorer, which a retry would not mend."""


def _nulls(error: str, number: int, *, latency_s: float = 0.0, may_pass: bool = False) -> list[Score]:
    return [Score(sample_index=index, value=None, error=error, latency_s=latency_s, may_pass=may_pass) for index in range(number)]


def _checked(name: str, answer: object, share_s: float) -> Score:
    """Return the score in plain numbers with its latency filled in; as a null when its value is no finite float32, or it is no Score."""
    try:
        score = _plain(name, answer)
    except _WrongAnswer as error:
        return Score(sample_index=0, value=None, error=str(error), latency_s=share_s)
    score = replace(score, latency_s=score.latency_s or share_s)
    if score.value is None:
        return replace(score, error=score.error or "the scorer gave no reason")
    with np.errstate(over="ignore"):
        is_finite = math.isfinite(score.value) and bool(np.isfinite(np.float32(score.value)))
    return score if is_finite else replace(score, value=None, error=f"not finite: {score.value}")


def _plain(name: str, answer: object) -> Score:
    """Return what the scorer `name` said of one image, its numbers as floats. Raises _WrongAnswer when a score file could not hold it."""
    if not isinstance(answer, Score):
        raise _WrongAnswer(f"scorer {name} returned {short_repr(answer)} for an image; it must return a Score (common.types)")
    details: Any = answer.details
    if not isinstance(details, Mapping) or not all(isinstance(key, str) for key in details):
        raise _WrongAnswer(f"scorer {name} returned the details {short_repr(details)}; they must be numbers by name, {{}} for none")
    if not isinstance(answer.error or "", str):
        raise _WrongAnswer(f"scorer {name} returned the error {short_repr(answer.error)}; it must be a text: give str(error)")
    return replace(
        answer, value=None if answer.value is None else _number(name, "value", answer.value),
        details={key: _number(name, f"details[{key!r}]", value) for key, value in details.items()},
        error=answer.error or "", latency_s=_number(name, "latency_s", answer.latency_s or 0.0),
    )  # fmt: skip


def _number(name: str, field_name: str, value: object) -> float:
    try:
        if isinstance(value, SupportsFloat):
            return float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        pass  # several numbers, too large a one, or one on a lost device
    raise _WrongAnswer(f"scorer {name} returned a Score whose {field_name} is {short_repr(value)}; it must be a number: give float(...)")


def reason_of(error: BaseException) -> str:
    """The text of a null: flowfleet's own errors speak for themselves, others are named."""
    return str(error) if isinstance(error, ScorerError | DataError) and str(error) else f"{type(error).__name__}: {error}"
