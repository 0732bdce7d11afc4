"""Requests to a running job: numbered files under control/, created exclusively, read by the driver that runs the run.

A scale request names the pools it changes and holds until a later one names them again, across resumes too. A stop request
is for the incarnation that it names and for no other.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from common.errors import AlreadyExists, StoreError
from common.store import paths
from common.store.manifests import decode_record, encode_record
from common.store.run_store import RunStore

ROLLOUT = "rollout"
_MAX_RACES = 100


def reward_pool(name: str) -> str:
    """The pool of a reward's servers."""
    return f"reward.{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRequest:
    """The content of control/<n>.json."""

    kind: Literal["scale", "stop"]
    incarnation: int  # the newest one when it was asked for
    asked_at: str  # wall clock, for people only
    writer_id: str
    sizes: Mapping[str, int] = field(default_factory=dict)  # scale: pool (rollout, reward.NAME) -> processes wanted


def new_writer_id() -> str:
    """A random id, so that two equal requests are two requests."""
    return secrets.token_hex(8)


def write_request(store: RunStore, request: ControlRequest) -> int:
    """Commit a request under the next free number, which is returned. Raises StoreError."""
    for _ in range(_MAX_RACES):
        number = max(_numbers(store), default=0) + 1
        try:
            store.create_exclusive(paths.control_path(number), encode_record(request), writer_id=request.writer_id)
        except AlreadyExists:
            continue
        return number
    raise StoreError(f"control: {store.url}: lost {_MAX_RACES} races for a number; something writes requests in a loop; stop it")


def read_requests(store: RunStore, after: int = 0) -> dict[int, ControlRequest]:
    """Return the requests above a number, in order. Raises CorruptFile, StoreError."""
    return {
        number: decode_record(ControlRequest, paths.control_path(number), store.read(paths.control_path(number)))
        for number in sorted(_numbers(store))
        if number > after
    }


def _numbers(store: RunStore) -> list[int]:
    return [number for path in store.list(paths.CONTROL) if (number := paths.parse_control(path)) is not None]


def requested_sizes(configured: Mapping[str, int], requests: Iterable[ControlRequest]) -> dict[str, int]:
    """The wanted sizes: the newest request that names a pool wins over the config; pools that the config lacks are left out."""
    sizes = dict(configured)
    for request in requests:
        sizes |= {pool: size for pool, size in request.sizes.items() if pool in sizes and request.kind == "scale"}
    return sizes


class ControlReader:
    """Reads each request once, in order.

    Args:
        store: the run directory.
        incarnation: whose driver reads: stop requests for others are passed over.
    """

    def __init__(self, store: RunStore, incarnation: int) -> None:
        self._store, self._incarnation = store, incarnation
        self._seen = 0

    def poll(self) -> dict[int, ControlRequest]:
        """Return what came since the last poll. Raises CorruptFile, StoreError."""
        found = read_requests(self._store, self._seen)
        self._seen = max(found, default=self._seen)
        return {number: each for number, each in found.items() if each.kind != "stop" or each.incarnation == self._incarnation}
