"""Every reward by its name: what it is, and how one is made. Heavy engines are imported by the scorer that needs them."""

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from common.errors import ConfigError, GateError
from common.protocols import Scorer
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.guarded import score_guarded
from reward_servers.scorers import (
    aesthetic,
    clip_score,
    deqa,
    diversity,
    geneval_entries,
    hps,
    image_reward,
    jpeg,
    ocr_entries,
    pickscore,
    unified_reward,
    vlm_yes_no,
)
from reward_servers.scorers.base import HasKnownCase
from reward_servers.user_scorers import load_user_scorer
from reward_servers.wire import http_client

_ENTRIES: Final[tuple[RewardEntry, ...]] = (
    *ocr_entries.ENTRIES,
    *geneval_entries.ENTRIES,
    *(module.ENTRY for module in (pickscore, hps, clip_score, aesthetic, image_reward, unified_reward, vlm_yes_no, deqa, http_client)),
    *jpeg.ENTRIES,
    diversity.ENTRY,
)
_BY_NAME: Final = {entry.card.name: entry for entry in _ENTRIES}


def list_scorers() -> tuple[RewardCard, ...]:
    """Return the card of every built-in reward, in the order of the docs."""
    return tuple(entry.card for entry in _ENTRIES)


def make_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """Make a reward.

    Args:
        name: of list_scorers, or `module:attribute` for user code.
        options: the scorer's own keyword arguments.

    Raises:
        ConfigError: unknown name (the nearest one is named), unknown or bad option, user code that is no scorer, missing extra.
    """
    if ":" in name:
        return load_user_scorer(name, options)
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.3)
        hint = f"the nearest name is {near[0]!r}" if near else f"names are {', '.join(_BY_NAME)}"
        raise ConfigError(f"reward {name!r} is unknown; {hint}; user code is named module:attribute")
    entry = _BY_NAME[name]
    known = [key for key in inspect.signature(entry.make).parameters if key not in ("args", "kwargs")]
    for key in options:
        if key not in known:
            raise ConfigError(f"reward {name}: unknown option {key!r}; it takes {', '.join(known) or 'none'}")
    return entry.make(**options)


def check_known_score(scorer: Scorer) -> bool:
    """Let a scorer prove itself on its known case (a start gate).

    Returns:
        Whether the scorer offers a known case; user code need not.

    Raises:
        GateError: named "scorer": no score came, or another than expected.
    """
    if not isinstance(scorer, HasKnownCase):
        return False
    case = scorer.known_case()
    (score,) = score_guarded(scorer, case.image[np.newaxis], [case.prompt], micro_batch=1)
    if score.value is None:
        raise GateError("scorer", f"{scorer.name} could not score its known image: {score.error}; mend its installation")
    if not math.isclose(score.value, case.expected, rel_tol=0, abs_tol=case.tolerance):
        raise GateError(
            "scorer",
            f"{scorer.name} scored its known image {score.value:.4f}, expected {case.expected:.4f} within {case.tolerance:g}; "
            "its model or a library differs from the tested one (constraints.txt)",
        )
    return True
