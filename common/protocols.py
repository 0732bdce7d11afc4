"""Where the siblings meet: the faces that rollout workers, reward servers and the learner see of each other's world."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from common.types import (
    LoadReceipt,
    Manifest,
    Prompt,
    Publication,
    RolloutLease,
    Score,
    ScoringLease,
    Stop,
    Wait,
)


class RolloutDesk(Protocol):
    """The Coordinator as a rollout worker sees it. Every call is idempotent; the lease id is the key."""

    def ask_rollout(self, slot: str) -> RolloutLease | Wait | Stop:
        """Lease the next group or evaluation sheet, say how long to wait, or say that the run ends."""
        ...

    def confirm_weights(self, slot: str, receipt: LoadReceipt) -> None:
        """Report a load receipt. Raises GateError("weights") when it differs from the publication."""
        ...

    def commit_rollout(self, lease_id: str, path: str, seconds: float) -> None:
        """Announce a committed group file (or evaluation sheet), by its path in the run directory."""
        ...

    def fail_rollout(self, lease_id: str, error: str) -> None:
        """Give a lease back as failed: counts as an attempt."""
        ...

    def return_rollout(self, lease_id: str, reason: str) -> None:
        """Give a lease back unharmed (drain, version gone): free."""
        ...

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Keep leases alive and hand over gauges. Called from a thread of its own every 5 s."""
        ...


class ScoringDesk(Protocol):
    """The Coordinator as a reward server sees it."""

    def ask_scoring(self, slot: str, reward: str, limit: int) -> tuple[ScoringLease, ...] | Wait | Stop:
        """Lease up to `limit` committed groups or sheets to score with `reward`."""
        ...

    def commit_scores(self, lease_id: str, path: str) -> None:
        """Announce a committed score file."""
        ...

    def fail_scoring(self, lease_id: str, error: str) -> None:
        """Give a scoring lease back as failed: counts as an attempt."""
        ...

    def return_scoring(self, lease_id: str, reason: str) -> None:
        """Give a scoring lease back unharmed (the server rests or leaves): free."""
        ...

    def stop_scoring(self, lease_id: str, error: str) -> None:
        """Give a scoring lease back and end the run with this cause: the reward's config wants it so, or nobody restarts the server."""
        ...

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Keep leases alive and hand over gauges."""
        ...


class LearnerDesk(Protocol):
    """The Coordinator as the learner sees it."""

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        """Return the manifest of `update`, cutting it when its groups are ready (or adopting the file that exists)."""
        ...

    def publish(self, publication: Publication) -> None:
        """Announce a published policy version; at or below the newest it is kept and ignored."""
        ...

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> bool:
        """Announce that history of `update` is durable, with its metrics for the live line and /metrics.

        Returns:
            Whether a LearnerState is wanted with the next update: the disk's cap is near, and only a state lets groups leave.
        """
        ...

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Show life and hand over gauges."""
        ...


class Scorer(Protocol):
    """A reward: images and prompts in, raw scores out. One class a reward, one file a class."""

    name: str
    version: str  # changes whenever the definition, the model or the preprocessing does

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether this reward judges this prompt at all (default: yes)."""
        ...

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError with the rule when the prompt lacks what this scorer needs (quotes, metadata)."""
        ...

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch.

        Args:
            images: [B, H, W, 3] uint8 RGB.
            prompts: B prompts.

        Returns:
            B scores in order (sample_index = position in the batch); a failed image has value None and its error.
        """
        ...


@runtime_checkable
class GroupScorer(Scorer, Protocol):
    """A reward that judges the images of one prompt against each other (a rank, a diversity): it sees whole groups only."""

    def score_group(self, images: NDArray[np.uint8], prompt: Prompt) -> list[Score]:
        """Score a whole group at once; it is never split into micro-batches.

        Args:
            images: [K, H, W, 3] uint8 RGB, all of the prompt.
            prompt: what they show.

        Returns:
            K scores in order, as of Scorer.score. A group too small to be judged is null, NOT_APPLICABLE.
        """
        ...
