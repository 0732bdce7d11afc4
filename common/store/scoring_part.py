"""The Coordinator as the reward servers see it: scoring leases out, score files in."""

import secrets

from common.logs import get_logger
from common.store import paths
from common.store.ending import EndKind
from common.store.ledger_scoring import GrantedScoring
from common.store.run_state import POLL_S, RunState
from common.types import LeaseKind, ScoringLease, Stop, Wait

_log = get_logger("coordinator")


class ScoringPart:
    """ScoringDesk but for the beat."""

    def __init__(self, state: RunState) -> None:
        self._state, self._ledger, self._board = state, state.ledger, state.board

    def ask_scoring(self, slot: str, reward: str, limit: int) -> tuple[ScoringLease, ...] | Wait | Stop:
        """Lease up to `limit` committed groups or sheets to score with `reward`; 0: only hear whether the run ends."""
        state = self._state
        state.expire()
        with state.lock:
            now = state.clock()
            state.conclude()
            if state.end.outcome.is_over:
                return Stop(reason=state.end.outcome.reason)
            dismissal = state.fleet.dismissal(slot)
            if dismissal is not None:
                return dismissal
            state.pools.asked(slot, reward, now)
            granted = self._ledger.lease_scores(reward, limit, slot=slot, now=now, new_id=_scoring_id)
            granted += self._board.lease_scores(reward, limit - len(granted), slot=slot, now=now, new_id=_scoring_id)
            state.pulse.asked("reward", slot, now, 0.0 if granted else POLL_S)
            leases = tuple(self._lease(each) for each in granted)
            return leases or Wait(seconds=POLL_S, reason="rollout workers: no images to score")

    def _lease(self, granted: GrantedScoring) -> ScoringLease:
        key = granted.key
        if key.directory:
            kind, media = LeaseKind.EVAL, paths.sheet_path(key.directory, key.number, key.lease_id)
        else:
            kind, media = LeaseKind.TRAIN, paths.media_path(key.number, key.lease_id)
        return ScoringLease(
            lease_id=granted.lease_id, kind=kind, number=key.number, reward=key.reward, group_lease_id=key.lease_id, media_path=media,
            prompts=self._state.prompts_of(key), directory=key.directory, scorer_version=self._state.scorer_versions.of(key.reward),
        )  # fmt: skip

    def commit_scores(self, lease_id: str, path: str) -> None:
        """Announce a committed score file. Raises CorruptFile when it breaks its schema or does not hold K scores."""
        self._state.score_committed(path)
        with self._state.lock:
            held = self._ledger.scoring.leases.get(lease_id) or self._board.scoring.leases.get(lease_id)
            self._state.fleet.worked(held.slot if held is not None else None)
            self._end(lease_id)
        self._state.moved()
        self._state.settle()

    def fail_scoring(self, lease_id: str, error: str) -> None:
        """Give a scoring lease back as failed: counts as an attempt."""
        _log.warning("scoring lease %s failed: %s", lease_id, error)
        with self._state.lock:
            if self._note_failure(lease_id, error):
                self._state.metrics.count("leases_failed_total", 1, "reward")
            self._ledger.scoring.fail(lease_id, error)
            self._board.scoring.fail(lease_id, error)
        self._state.settle()

    def return_scoring(self, lease_id: str, reason: str) -> None:
        """Give a scoring lease back unharmed: free. An empty reason: nothing failed, its server only had no time for it."""
        _log.info("scoring lease %s came back: %s", lease_id, reason or "its server had no time for it")
        with self._state.lock:
            if reason:
                self._note_failure(lease_id, reason)
            self._end(lease_id)

    def stop_scoring(self, lease_id: str, error: str) -> None:
        """End the run: a reward could not score, and its config (or a scorer that hangs in the only process) wants that."""
        with self._state.lock:
            reward = self._note_failure(lease_id, error)
            self._end(lease_id)
            self._state.end.finish(EndKind.GUARD, f"reward {reward or 'of a lease that had ended'}: {error}", gate="reward")

    def _end(self, lease_id: str) -> None:
        self._ledger.scoring.leases.end(lease_id)
        self._board.scoring.leases.end(lease_id)

    def _note_failure(self, lease_id: str, error: str) -> str:
        """Keep a reward's last error; return the reward, "" when the lease had ended."""
        held = self._ledger.scoring.leases.get(lease_id) or self._board.scoring.leases.get(lease_id)
        if held is not None:
            self._state.pools.failed(held.key.reward, error)
        return held.key.reward if held is not None else ""


def _scoring_id() -> str:
    return f"s-{secrets.token_hex(6)}"
