"""How long a fake engine takes: engines that sleep where real ones compute, for work on the control plane."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSpec:
    """Seconds a unit of work: a rollout group or evaluation sheet, an update, the scoring of one group's images."""

    least_s: float
    most_s: float  # of the slowest slot; equal to least_s: all slots are alike

    def seconds_of(self, slot: str) -> float:
        """Return what a unit takes at a slot: rollout.0 is the quickest, rollout.1 the slowest, further ones lie evenly between (in ratio)."""
        index = slot.rpartition(".")[2]
        if not index.isdigit() or self.least_s == self.most_s:
            return self.least_s
        share = 1.0 if index == "1" else _radical_inverse(max(0, int(index) - 1))
        return self.least_s * math.pow(self.most_s / self.least_s, share)


def _radical_inverse(number: int) -> float:
    """Return van der Corput's sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8 ...; any number of its first terms is spread evenly over [0, 1)."""
    result, place = 0.0, 0.5
    while number:
        number, bit = divmod(number, 2)
        result += bit * place
        place /= 2
    return result
