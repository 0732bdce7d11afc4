"""Which samples of a group train: its best and worst, its best alone, or both ends of its order. Pure NumPy on one group."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.types import FloatArray

Mask = NDArray[np.bool_]


class Selection(Protocol):
    """Some of a group's samples."""

    def choose(self, advantages: FloatArray, mask: Mask) -> tuple[FloatArray, Mask]:
        """Return the advantages that train and who trains.

        Args:
            advantages: [K] what ranks the samples.
            mask: [K] who may be chosen; at least one, and they do not all rank alike.

        Returns:
            [K] advantages and [K] mask, within the given one; where it is False the advantages do not count.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The best sample gets +1, the worst -1 (online DPO, Diffusion-DPO): of equal ones the lowest index is best, the highest worst."""

    def choose(self, advantages: FloatArray, mask: Mask) -> tuple[FloatArray, Mask]:
        """See Selection."""
        order = rank(advantages, mask)
        signs = np.zeros_like(advantages)
        signs[order[0]], signs[order[-1]] = 1.0, -1.0
        return signs, signs != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best sample alone, with advantage 1 (RAFT and online SFT): of equal ones the lowest index."""

    def choose(self, advantages: FloatArray, mask: Mask) -> tuple[FloatArray, Mask]:
        """See Selection."""
        ones = np.zeros_like(advantages)
        ones[rank(advantages, mask)[0]] = 1.0
        return ones, ones != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The n/2 highest and the n/2 lowest with the advantages they have in the whole group (DanceGRPO's best-of-n, arXiv 2505.07818);
    all of a group that has no more than n."""  # fmt: skip

    count: int  # n, even

    def choose(self, advantages: FloatArray, mask: Mask) -> tuple[FloatArray, Mask]:
        """See Selection."""
        order, half = rank(advantages, mask), self.count // 2
        chosen = np.zeros_like(mask)
        chosen[order if len(order) <= self.count else np.concatenate([order[:half], order[-half:]])] = True
        return advantages, chosen


def rank(advantages: FloatArray, mask: Mask) -> NDArray[np.intp]:
    """Return the indices of the unmasked samples from best to worst, equal ones by index."""
    eligible = np.flatnonzero(mask)
    return eligible[np.argsort(-advantages[eligible], kind="stable")]
