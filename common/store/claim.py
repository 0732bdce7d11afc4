"""Who runs a run: incarnations are claimed by exclusive create, and a later claim fences the earlier ones."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

from common.errors import AlreadyExists, Fenced, StoreError
from common.store import paths
from common.store.manifests import Claim, Status, encode_record, read_status
from common.store.run_store import RunStore
from common.types import Wait

FRESH_S = 60.0
_POLL_S = 2.0
_MAX_CLAIMS = 100


def newest_incarnation(store: RunStore) -> int:
    """The highest incarnation that was claimed, 0 before the first start."""
    return max((number for path in store.list() if (number := paths.parse_config(path)) is not None), default=0)


def claim_run(
    store: RunStore, config: Mapping[str, Any], *, config_digest: str, environment: bytes | None = None, takeover: bool = False,
    clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
) -> Generator[Wait, None, Claim]:  # fmt: skip
    """Claim the next incarnation; its config.i<N>.json (and environment.i<N>.json) then exist.

    Beside a fresh status.json of a running job this waits up to 60 s, yielding what it waits for, and goes on when the file
    is not refreshed meanwhile. A status whose process is known to be gone from this host is not waited for.

    Yields:
        Wait: sleep that long, then go on.

    Returns:
        The claim.

    Raises:
        Fenced: the other job is alive and `takeover` is false.
        StoreError: the store refused.
    """
    if not takeover:
        yield from _wait_for_silence(store, clock, wall)
    writer_id = secrets.token_hex(8)
    for _ in range(_MAX_CLAIMS):
        claim = Claim(
            incarnation=newest_incarnation(store) + 1, writer_id=writer_id, config_digest=config_digest, config=dict(config),
            started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall())),
        )  # fmt: skip
        try:
            store.create_exclusive(paths.config_path(claim.incarnation), encode_record(claim), writer_id=writer_id)
        except AlreadyExists:
            continue
        if environment is not None:
            store.create_exclusive(paths.environment_path(claim.incarnation), environment, writer_id=writer_id)
        return claim
    raise StoreError(f"claim: {store.url}: lost {_MAX_CLAIMS} races for an incarnation; something starts jobs in a loop; stop it")


def _wait_for_silence(store: RunStore, clock: Callable[[], float], wall: Callable[[], float]) -> Generator[Wait, None, None]:
    first = read_status(store)
    if first is None or not _looks_alive(first, wall()):
        return
    start = clock()
    while clock() - start < FRESH_S and _looks_alive(first, wall()):
        yield Wait(seconds=_POLL_S, reason=f"{store.url} was in use {wall() - first.written_at:.0f} s ago; waiting up to {FRESH_S:.0f} s")
        status = read_status(store)
        if status is None or status.state != "running":
            return
        if (status.incarnation, status.sequence) != (first.incarnation, first.sequence):
            raise Fenced(
                f"claim: {store.url} is run by another job (incarnation {status.incarnation}, process {status.process_id} on "
                f"{status.host}); one job drives a run; stop it, choose another --run-dir, or pass --takeover"
            )


def _looks_alive(status: Status, now: float) -> bool:
    if status.state != "running" or now - status.written_at > FRESH_S:
        return False
    return not (status.host == socket.gethostname() and _is_gone(status.process_id))


def _is_gone(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def check_fence(store: RunStore, incarnation: int) -> None:
    """Raise Fenced when a later incarnation was claimed."""
    if store.exists(paths.config_path(incarnation + 1)):
        raise Fenced(f"coordinator: incarnation {incarnation} of {store.url} was taken over by a later start; this job leaves")
