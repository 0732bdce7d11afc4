"""Which denoising steps are stochastic: one choice for every group of a round, computed anywhere from the same numbers."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.errors import ConfigError
from common.seeding import derive_seed
from rollout_workers.config import WindowConfig

if TYPE_CHECKING:
    from common.flow.kernels import TransitionKernel


class WindowPlan(Protocol):
    """A pure function of (run seed, round), so that every worker and every restart agree; per-request windows collapse training."""

    @property
    def reach(self) -> frozenset[int]:
        """Every step that some round's window may hold."""
        ...

    @property
    def size(self) -> int:
        """W: the most steps that a round's window holds."""
        ...

    def steps(self, window_round: int) -> tuple[int, ...]:
        """Return the stochastic steps of a round (group number // P), increasing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedWindow:
    """The same steps in every round: none, all, drop_last, first."""

    indices: tuple[int, ...]

    @property
    def reach(self) -> frozenset[int]:
        """The steps themselves."""
        return frozenset(self.indices)

    @property
    def size(self) -> int:
        """All of them."""
        return len(self.indices)

    def steps(self, window_round: int) -> tuple[int, ...]:
        """Return the steps, whatever the round."""
        return self.indices


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWindow:
    """`size` consecutive steps, their start drawn evenly for each round (Flow-GRPO-Fast), or for each `interval` of rounds (MixGRPO)."""

    run_seed: int
    size: int
    start: int  # first step that a window may hold
    stop: int  # one past the last
    interval: int = 1  # rounds that share a draw

    @property
    def reach(self) -> frozenset[int]:
        """All steps in [start, stop)."""
        return frozenset(range(self.start, self.stop))

    def steps(self, window_round: int) -> tuple[int, ...]:
        """Return the steps of a round."""
        drawn = derive_seed(self.run_seed, "window", window_round // self.interval)
        first = self.start + drawn % (self.stop - self.start - self.size + 1)
        return tuple(range(first, first + self.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """`size` consecutive steps that move from noise to image, some rounds at each position (MixGRPO, arXiv 2507.21802).

    Deviation from Tencent-Hunyuan/MixGRPO: a window always holds `size` steps of its range. There it runs over the end of the range
    and shrinks, in the last position to nothing.
    """

    size: int
    positions: tuple[int, ...]  # first steps, in the order they are visited
    rounds: tuple[int, ...]  # how long it stays at each
    roll_back: bool  # after the last position comes the first; else it stays

    @property
    def reach(self) -> frozenset[int]:
        """The steps of every position that is visited."""
        return frozenset(step for first in self.positions for step in range(first, first + self.size))

    def steps(self, window_round: int) -> tuple[int, ...]:
        """Return the steps of a round."""
        left = window_round % sum(self.rounds) if self.roll_back else window_round
        first = self.positions[-1]
        for position, count in zip(self.positions, self.rounds, strict=True):
            if left < count:
                first = position
                break
            left -= count
        return tuple(range(first, first + self.size))


def make_window_plan(config: WindowConfig, num_steps: int, run_seed: int) -> WindowPlan:
    """Return the plan of a config.

    Args:
        config: kind, and the keys that the kind uses.
        num_steps: T.
        run_seed: the run's seed.

    Raises:
        ConfigError: a window that does not fit into T steps.
    """
    if config.kind in ("random", "sliding"):
        return _moving_window(config, num_steps, run_seed)
    if config.kind == "first" and config.size > num_steps:
        raise ConfigError(f"rollout.window: the first {config.size} of {num_steps} steps came; lower window.size")
    if config.kind == "drop_last" and num_steps == 1:
        raise ConfigError("rollout.window: drop_last of 1 step leaves none; set window.kind = all or raise rollout.num_steps")
    count = {"none": 0, "all": num_steps, "drop_last": num_steps - 1, "first": config.size}[config.kind]
    return FixedWindow(indices=tuple(range(count)))


def _moving_window(config: WindowConfig, num_steps: int, run_seed: int) -> WindowPlan:
    """A window inside [start, stop)."""
    stop = num_steps if config.stop is None else config.stop
    if stop > num_steps or config.start + config.size > stop:
        raise ConfigError(
            f"rollout.window: {config.size} steps in [{config.start}, {stop}) of {num_steps} came; a {config.kind} window must fit; "
            "lower window.size or window.start, or raise window.stop or rollout.num_steps"
        )
    if config.kind == "random":
        return RandomWindow(run_seed=run_seed, size=config.size, start=config.start, stop=stop)
    if config.strategy == "random":
        return RandomWindow(run_seed=run_seed, size=config.size, start=config.start, stop=stop, interval=config.interval)
    positions = _positions(config, stop - config.size)
    rounds = tuple(_rounds_at(position, config, stop - config.size) for position in positions)
    return SlidingWindow(size=config.size, positions=positions, rounds=rounds, roll_back=config.roll_back)


def _positions(config: WindowConfig, last: int) -> tuple[int, ...]:
    """From start by strides; a stride over the range's end stops at the last position that fits, or rolls back before it."""
    if config.stride == 0:
        return (config.start,)
    positions = tuple(range(config.start, last + 1, config.stride))
    return positions if config.roll_back or positions[-1] == last else (*positions, last)


def _rounds_at(position: int, config: WindowConfig, last: int) -> int:
    """How many rounds a window stays at a position (MixGRPO's schedules), at least 1."""
    if config.strategy == "decay":
        final = max(1, config.interval // 4) if config.last_interval is None else config.last_interval
        passed, whole = position - config.start, max(1, last - config.start)
        return (config.interval * (whole - passed) + final * passed) // whole
    if config.strategy == "exp_decay":
        return max(1, math.ceil(config.interval * math.exp(-config.decay_rate * max(0, position - config.decay_from))))
    return config.interval


def check_window(plan: WindowPlan, kernel: "TransitionKernel", num_steps: int) -> None:
    """Refuse a window over steps of which the kernel has no log-prob.

    Raises:
        ConfigError: a window with a deterministic kernel, or one that may hold the last step of a kernel that masks it.
    """
    if plan.reach and not kernel.has_log_prob:
        raise ConfigError(
            "rollout.window: stochastic steps came with a kernel that has no log-prob; "
            "set rollout.window.kind = none, or rollout.kernel = flow_sde with noise_level > 0"
        )
    if num_steps - 1 in plan.reach and not kernel.has_last_log_prob:
        raise ConfigError(
            f"rollout.window: it may hold step {num_steps - 1}, the last, which is a point under this kernel; "
            "set rollout.window.kind = drop_last, or window.stop to one less than rollout.num_steps"
        )
