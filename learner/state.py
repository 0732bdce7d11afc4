"""LearnerState: everything that crosses updates, as safetensors + JSON; complete when complete.json, written last, exists."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError

from common.errors import AlreadyExists, CorruptFile
from common.logs import get_logger
from common.store.paths import LEARNER, learner_complete_path, learner_directory, parse_learner_complete
from learner.update import Learner

SCHEMA = 2
_LIVE, _SNAPSHOT, _OPTIMIZER = "live", "snapshot", "optimizer"

_log = get_logger("learner.state")


class RunFiles(Protocol):
    """The run directory as the learner uses it (common.store.run_store.RunStore)."""

    def create_exclusive(self, path: str, content: bytes, *, writer_id: str) -> None:
        """Commit a file; raises AlreadyExists when it holds other bytes."""
        ...

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        ...

    def list(self, prefix: str = "") -> Sequence[str]:
        """Return the committed paths under a folder."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file; a missing one is fine."""
        ...


def collect_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """Return live adapter, snapshots and optimizer moments by flat name, on CPU."""
    tensors = {f"{_LIVE}/{name}": tensor for name, tensor in learner.live.items()}
    for snapshot, state in learner.snapshots.states.items():
        tensors |= {f"{_SNAPSHOT}/{snapshot}/{name}": tensor for name, tensor in state.items()}
    for index, moments in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}/{index}/{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def collect_facts(learner: Learner) -> dict[str, Any]:
    """Return the counters and the estimator's history as JSON values."""
    return {
        "schema": SCHEMA,
        "update": learner.version,
        "num_optimizer_steps": learner.num_optimizer_steps,
        "num_nonfinite": learner.num_nonfinite,
        "loss_scale": learner.loss_scale.read_state(),
        "snapshot_counts": dict(learner.snapshots.counts),
        "estimator": learner.estimator.read_state(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenState:
    """A LearnerState as bytes: the learner may go on while it is written."""

    update: int
    content: bytes  # safetensors
    facts: Mapping[str, Any]


def freeze_state(learner: Learner) -> FrozenState:
    """Return the learner's state of this moment."""
    return FrozenState(update=learner.version, content=safetensors.torch.save(collect_tensors(learner)), facts=collect_facts(learner))


def restore(learner: Learner, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Put a saved state into a learner that was composed from the same config.

    Raises:
        CorruptFile: another schema, or snapshots that the objective does not keep. ModelError: another adapter's names.
    """
    if facts["schema"] != SCHEMA:
        raise CorruptFile(f"LearnerState: schema {facts['schema']} came, this program reads {SCHEMA}; resume with the one that wrote it")
    trees = _unflatten(tensors)
    live = trees.get((_LIVE,), {})
    with learner.policy.using(live):  # the policy checks the names
        learner.live = learner.policy.read_adapter()
    states = {path[1]: tree for path, tree in trees.items() if path[0] == _SNAPSHOT}
    learner.snapshots.load(states, facts["snapshot_counts"])
    moments = {int(path[1]): tree for path, tree in trees.items() if path[0] == _OPTIMIZER}
    learner.optimizer.load_state_dict({"state": moments, "param_groups": learner.optimizer.state_dict()["param_groups"]})
    learner.estimator.load_state(facts["estimator"])
    learner.version = facts["update"]
    learner.num_optimizer_steps = facts["num_optimizer_steps"]
    learner.num_nonfinite = facts["num_nonfinite"]
    learner.loss_scale.load_state(facts["loss_scale"])


def _unflatten(tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
    trees: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for flat, tensor in tensors.items():
        depth = 1 if flat.startswith(f"{_LIVE}/") else 2
        *path, name = flat.split("/", depth)
        trees.setdefault(tuple(path), {})[name] = tensor
    return trees


class StateArchive:
    """The LearnerStates of a run directory: the newest few are kept."""

    def __init__(self, files: RunFiles, *, states_kept: int, writer_id: str) -> None:
        self._files = files
        self._states_kept = states_kept
        self._writer_id = writer_id
        self.num_differences = 0  # replayed states whose bytes differ from those that were found

    def complete_updates(self) -> list[int]:
        """The updates with a complete state, increasing; partial folders do not count."""
        found = (parse_learner_complete(path) for path in self._files.list(LEARNER))
        return sorted(update for update in found if update is not None)

    def save(self, learner: Learner) -> None:
        """Commit the state of the learner's version."""
        self.commit(freeze_state(learner))

    def commit(self, state: FrozenState) -> None:
        """Commit a state, complete.json last, then thin; a state that exists is kept."""
        digest = hashlib.sha256(state.content).hexdigest()
        name = f"state.{digest[:16]}.safetensors"
        complete = {**state.facts, "file": name, "sha256": digest}
        try:
            self._files.create_exclusive(f"{learner_directory(state.update)}/{name}", state.content, writer_id=self._writer_id)
            self._files.create_exclusive(
                learner_complete_path(state.update), json.dumps(complete, sort_keys=True).encode(), writer_id=self._writer_id
            )
        except AlreadyExists:
            self.num_differences += 1
            _log.warning("state of update %d exists with other content; the replay keeps the file it found", state.update)
        self._thin()

    def load(self, learner: Learner, update: int) -> None:
        """Restore the state of an update.

        Raises:
            CorruptFile: the files do not hold what complete.json promises.
        """
        path = learner_complete_path(update)
        try:
            facts = json.loads(self._files.read(path))
            content = self._files.read(f"{learner_directory(update)}/{facts['file']}")
            if hashlib.sha256(content).hexdigest() != facts["sha256"]:
                raise CorruptFile(f"LearnerState: {facts['file']} does not have the digest that {path} names; {_REMEDY}")
            tensors = safetensors.torch.load(content)
        except (ValueError, KeyError, SafetensorError) as error:
            raise CorruptFile(f"LearnerState: {path} cannot be read ({error}); {_REMEDY}") from error
        restore(learner, tensors, facts)

    def _thin(self) -> None:
        """Remove states before the newest `states_kept`, the completing file first, and partial folders before them."""
        kept = self.complete_updates()[-self._states_kept :]
        for path in sorted(self._files.list(LEARNER), key=lambda path: parse_learner_complete(path) is None):
            folder = path.split("/")[1]
            if folder.removeprefix("update_").isdigit() and int(folder.removeprefix("update_")) < kept[0]:
                self._files.remove(path)


_REMEDY = "remove that update's folder under learner/ and start again: the state before it is taken and the updates since are replayed"
