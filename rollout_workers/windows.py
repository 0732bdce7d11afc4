"""Which denoising steps are stochastic: one choice for every group of a round, computed anywhere from the same numbers."""

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
    """`size` consecutive steps, their start drawn evenly for each round (Flow-GRPO-Fast)."""

    run_seed: int
    size: int
    start: int  # first step that a window may hold
    stop: int  # one past the last

    @property
    def reach(self) -> frozenset[int]:
        """All steps in [start, stop)."""
        return frozenset(range(self.start, self.stop))

    def steps(self, window_round: int) -> tuple[int, ...]:
        """Return the steps of a round."""
        first = self.start + derive_seed(self.run_seed, "window", window_round) % (self.stop - self.start - self.size + 1)
        return tuple(range(first, first + self.size))


def make_window_plan(config: WindowConfig, num_steps: int, run_seed: int) -> WindowPlan:
    """Return the plan of a config.

    Args:
        config: kind, and size, start, stop where the kind uses them.
        num_steps: T.
        run_seed: the run's seed.

    Raises:
        ConfigError: a window that does not fit into T steps.
    """
    if config.kind == "random":
        stop = num_steps if config.stop is None else config.stop
        if stop > num_steps or config.start + config.size > stop:
            raise ConfigError(
                f"rollout.window: {config.size} steps in [{config.start}, {stop}) of {num_steps} came; a random window must fit; "
                "lower window.size or window.start, or raise window.stop or rollout.num_steps"
            )
        return RandomWindow(run_seed=run_seed, size=config.size, start=config.start, stop=stop)
    if config.kind == "first" and config.size > num_steps:
        raise ConfigError(f"rollout.window: the first {config.size} of {num_steps} steps came; lower window.size")
    if config.kind == "drop_last" and num_steps == 1:
        raise ConfigError("rollout.window: drop_last of 1 step leaves none; set window.kind = all or raise rollout.num_steps")
    count = {"none": 0, "all": num_steps, "drop_last": num_steps - 1, "first": config.size}[config.kind]
    return FixedWindow(indices=tuple(range(count)))


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
