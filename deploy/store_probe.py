"""The store as every node of the cluster sees it: a directory that only one node has is refused before any compute is burnt."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.errors import AlreadyExists, FlowfleetError, GateError
from common.store.run_store import RunStore

NODE_TIMEOUT_S = 120.0  # until every node has answered; a node's first task starts a Python process
PROBES = ".probe"
_REMEDY = "give every node the same storage: a shared file system mounted at the same path everywhere, or an s3:// run directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """What one node said."""

    node: str
    problem: str  # "" when it sees the store as the driver does
    written: str = ""  # the file that it made, for the driver to look for


def probe_path(token: str) -> str:
    """Where the driver's file of this probe lies."""
    return f"{PROBES}/{token}.driver"


def probe_content(token: str) -> bytes:
    """What the driver's file holds."""
    return f"probe {token}".encode()


def probe_store(url: str, token: str, node: str) -> NodeView:
    """Look at the driver's file from this process: it is there, whole, listed, and taken; then leave a file of its own.

    A pure function of the store: a Ray task runs it on every node, tests run it with another directory as "the other node's".

    Args:
        url: of the run directory, as this node understands it.
        token: of the probe.
        node: this node's name, for messages.
    """
    path, content = probe_path(token), probe_content(token)
    try:
        store = RunStore(url)
        place = str(store.local_root or url)
        if not store.exists(path):
            return NodeView(node=node, problem=f"does not see the driver's file {path} in its {place}")
        if store.read(path) != content:
            return NodeView(node=node, problem=f"reads other bytes in {path} of its {place} than the driver wrote")
        if path not in store.list(PROBES):
            return NodeView(node=node, problem=f"reads {path} in its {place} and does not list it: its listings are stale")
        if not _is_refused(store, path):
            return NodeView(node=node, problem=f"made {path} in its {place} a second time: creates are not exclusive between nodes")
        own = f"{PROBES}/{token}.{secrets.token_hex(4)}"
        store.create_exclusive(own, content, writer_id=node)
    except FlowfleetError as error:
        return NodeView(node=node, problem=str(error))
    return NodeView(node=node, problem="", written=own)


def _is_refused(store: RunStore, path: str) -> bool:
    try:
        store.create_exclusive(path, b"second", writer_id="probe")
    except AlreadyExists:
        return True
    return False


def check_store_from_nodes(store_url: str, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Prove that every node of a cluster shares the run directory.

    Args:
        store_url: as the actors will open it.
        nodes: of `ray.nodes()`; dead ones are left out. Ray must be connected.

    Raises:
        GateError: named "store": memory://, or the nodes that see another store, what each saw, and the remedy.
        StoreError: the driver itself cannot write there.
    """
    if store_url.startswith("memory://"):
        raise GateError("store", f"{store_url} lives in one process, and Ray's actors are many; {_REMEDY}, or pass --local")
    store, token = RunStore(store_url), secrets.token_hex(8)
    store.create_exclusive(probe_path(token), probe_content(token), writer_id="driver")
    try:
        views = ask_nodes(store_url, token, {str(node["NodeID"]): node_name(node) for node in nodes if node["Alive"]})
        judge(store, views)
    finally:
        for path in store.list(PROBES):
            if path.startswith(f"{PROBES}/{token}."):
                store.remove(path)


def judge(store: RunStore, views: Sequence[NodeView]) -> None:
    """Refuse the store when a node sees another one, or when the driver does not see a node's file. Raises GateError("store")."""
    listed = store.list(PROBES)
    problems = [f"{view.node} {view.problem}" for view in views if view.problem]
    problems += [f"{view.node} wrote {view.written}, and the driver does not see it" for view in views if view.written not in [*listed, ""]]
    if problems:
        place = store.local_root or store.url
        raise GateError(
            "store", f"{len(problems)} of {len(views)} nodes do not share {place} with the driver: {'; '.join(problems)}; {_REMEDY}"
        )


def node_name(node: Mapping[str, Any]) -> str:
    """A node of `ray.nodes()` in words."""
    return f"node {node['NodeName']} ({str(node['NodeID'])[:8]})"


def ask_nodes(store_url: str, token: str, names: Mapping[str, str]) -> list[NodeView]:
    """Run the probe once on every node. A node that dies or does not answer in time is a problem of its own.

    Args:
        store_url: of the run directory.
        token: of the probe.
        names: node id -> name.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(probe_store)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(store_url, token, name): name
        for node_id, name in names.items()
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_TIMEOUT_S)
    for ref in late:
        ray.cancel(ref, force=True)
    silent = [NodeView(node=asked[ref], problem=f"did not answer within {NODE_TIMEOUT_S:.0f} s") for ref in late]
    return [_answer(ref, asked[ref]) for ref in done] + silent


def _answer(ref: Any, name: str) -> NodeView:
    try:
        view: NodeView = ray.get(ref)
    except RayTaskError as error:
        return NodeView(node=name, problem=f"failed ({error.cause})")
    except RayError as error:
        return NodeView(node=name, problem=f"could not be asked ({type(error).__name__})")
    return view
