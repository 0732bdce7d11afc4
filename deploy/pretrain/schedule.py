"""Learning rates as functions of the step."""

import math


def warm_cosine(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Return the factor of a linear warm-up followed by a cosine to 0.

    Args:
        step: from 1 to num_steps.
        num_steps: the last step.
        warmup_steps: length of the warm-up.
    """
    warm = min(1.0, step / max(1, warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))


def warm_stable_decay(step: int, *, num_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Return the factor of a linear warm-up, a plateau at 1 and a linear fall to 0 over the last share of the steps.

    Args:
        step: from 1 to num_steps.
        num_steps: the last step.
        warmup_steps: length of the warm-up.
        decay_share: share of the steps that falls.
    """
    warm = min(1.0, step / max(1, warmup_steps))
    remaining = (num_steps - step + 1) / max(1.0, decay_share * num_steps)
    return min(warm, 1.0, max(0.0, remaining))
