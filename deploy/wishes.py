"""What is wanted of the fleet: sizes from the config and from requests, and waits as the autoscaler reads them. Pure."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from common.store.control import ROLLOUT, ControlRequest, requested_sizes, reward_pool
from deploy.autoscale import Waits
from deploy.config import RunConfig


def configured_sizes(config: RunConfig) -> dict[str, int]:
    """Pool -> processes, as the config says."""
    return {ROLLOUT: config.rollout.num_workers} | {reward_pool(reward.name): reward.num_servers for reward in config.reward}


def take_requests(
    requests: Mapping[int, ControlRequest], sizes: Mapping[str, int], *, is_start: bool
) -> Iterator[tuple[Mapping[str, int], str, bool]]:
    """Turn requests into (new sizes, a sentence, whether it is a stop); at the start all scale requests make one change.

    Args:
        requests: number -> request, in order.
        sizes: those in force.
        is_start: these are all requests that the run directory holds, not new ones.
    """
    if is_start:
        wanted = requested_sizes(sizes, requests.values())
        changed = {pool: size for pool, size in wanted.items() if size != sizes[pool]}
        if changed:
            yield changed, f"sizes of earlier requests hold: {_words(sizes, changed)}", False
    for number, request in requests.items():
        if request.kind == "stop":
            yield {}, f"control/{number:04d}.json asked for a stop; the same command goes on", True
        elif not is_start:
            changed = {pool: size for pool, size in request.sizes.items() if pool in sizes}
            yield changed, f"control/{number:04d}.json: {_words(sizes, changed)}", False


def _words(sizes: Mapping[str, int], changed: Mapping[str, int]) -> str:
    return ", ".join(f"{pool} {sizes[pool]} -> {size}" for pool, size in sorted(changed.items())) or "no pool of this run"


def waits_of(summary: Mapping[str, Any]) -> Waits:
    """The Coordinator's summary as the autoscaler reads it. A role that was not heard waits 0."""
    roles: Mapping[str, float] = summary["waiting"]
    slots: Mapping[str, float] = summary["slot_waits"]
    backlog = {reward_pool(name): count for name, count in summary["backlog"].items()}
    rewards = {
        pool: fmean(shares) for pool in backlog if (shares := [share for slot, share in slots.items() if slot.rpartition(".")[0] == pool])
    }
    return Waits(learner=roles.get("learner", 0.0), rollout=roles.get("rollout", 0.0), rewards=rewards, backlog=backlog)
