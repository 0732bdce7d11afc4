"""A scale of the loss that keeps the gradients of a float16 base inside float16's range (arXiv 1710.03740, section 3.2)."""

from collections.abc import Iterable, Mapping

import torch

from common.logs import get_logger

HIGHEST = 2.0**24
GROWTH_INTERVAL = 500  # optimizer steps without an overflow until the scale doubles

_log = get_logger("learner.loss_scale")


class LossScale:
    """A power of two that losses are multiplied by before the backward, and gradients divided by after it; exact, but for what underflows.

    A loss is a mean over a latent's elements, the steps and a batch: at SD3.5's sizes its gradient by an element of the velocity is 1e-10 to
    1e-8, and float16 ends at 6e-8. The scale begins at its highest, 2^24. A gradient that overflows halves it, and its minibatch is run
    again: no step is lost. After 500 steps without an overflow it doubles, up to where it began. A base of another dtype needs none.
    """

    def __init__(self, *, enabled: bool) -> None:
        """enabled: the base is float16; otherwise the scale stays 1."""
        self._enabled = enabled
        self.value = HIGHEST if enabled else 1.0
        self._steps = 0  # since it last changed

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.value == 1.0:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.value)

    def shrink(self) -> bool:
        """Halve the scale after an overflow; False when it is 1, so that the overflow has another cause."""
        self._steps = 0
        if self.value == 1.0:
            return False
        self.value /= 2.0
        _log.info("a gradient overflowed float16: loss scale %g, the minibatch is run again", self.value)
        return True

    def step_taken(self) -> None:
        """Count an optimizer step without overflow, and double the scale when it is time."""
        self._steps += 1
        if self._enabled and self.value < HIGHEST and self._steps >= GROWTH_INTERVAL:
            self.value, self._steps = self.value * 2.0, 0

    def read_state(self) -> dict[str, float]:
        """What a resumed run goes on with."""
        return {"value": self.value, "steps": float(self._steps), "enabled": float(self._enabled)}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on with a saved state; one of another dtype's run says nothing about this one."""
        if bool(state["enabled"]) is self._enabled:
            self.value, self._steps = state["value"], int(state["steps"])
