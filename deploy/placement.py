"""Who runs where on a cluster: pure functions of the nodes' resources. deploy/ray_actors.py turns a Seat into Ray's options.

The learner starts first and is fixed; rollout workers are spread; rewards that need no GPU go to nodes without one. A custom
resource called `learner`, `rollout` or `reward` that some node offers is asked for, one unit a process: so a cluster says
which nodes take which role, and how many of it. On a cluster that grows, a role that was pinned so once stays pinned while the run
goes on: when the last such node is taken away, its processes wait for the next one instead of moving in with another role.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["learner", "rollout", "reward"]
ROLES: tuple[Role, ...] = ("learner", "rollout", "reward")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """A node that is alive."""

    node_id: str
    resources: Mapping[str, float]  # in total: CPU, GPU, custom ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one process of a role reserves."""

    role: Role
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where one process goes, in Ray's terms."""

    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float]  # custom ones
    spread: bool = False
    node_id: str | None = None  # preferred, not demanded: a lost node must not strand the role


def role_of(pool: str) -> Role:
    """learner, rollout or reward, of a pool's or slot's name."""
    head = pool.partition(".")[0]
    if head == "learner":
        return "learner"
    return "rollout" if head == "rollout" else "reward"


def offered_roles(nodes: Sequence[NodeFacts]) -> frozenset[Role]:
    """The roles whose resource some node offers: those are pinned."""
    return frozenset(role for role in ROLES if _offered(role, nodes) > 0)


def pinned_roles(nodes: Sequence[NodeFacts], before: frozenset[Role], *, grows: bool) -> frozenset[Role]:
    """The roles that go only where their resource is: those offered now. On a cluster that grows, all of them as soon as one was offered in
    this run: the nodes of the others may not have come yet, or come back. Where none is added, a role whose last node is gone moves in with others."""
    offered = offered_roles(nodes)
    return frozenset(ROLES) if grows and (offered | before) else offered


def seat(needs: Needs, nodes: Sequence[NodeFacts], taken: Mapping[str, int], pinned: frozenset[Role] = frozenset()) -> Seat:
    """Choose a seat.

    Args:
        needs: of the process.
        nodes: those alive.
        taken: node id -> reward servers that were sent there: the next one goes to the emptiest.
        pinned: of pinned_roles.
    """
    resources: dict[str, float] = {needs.role: 1.0} if needs.role in offered_roles(nodes) | pinned else {}
    node_id = _reward_node(needs, nodes, taken) if needs.role == "reward" and needs.num_gpus == 0 else None
    return Seat(
        num_cpus=needs.num_cpus, num_gpus=needs.num_gpus, resources=resources, spread=needs.role == "rollout", node_id=node_id
    )  # fmt: skip


def _offered(role: Role, nodes: Sequence[NodeFacts]) -> float:
    return sum(node.resources.get(role, 0.0) for node in nodes)


def _reward_node(needs: Needs, nodes: Sequence[NodeFacts], taken: Mapping[str, int]) -> str | None:
    has_gpus = any(node.resources.get("GPU", 0.0) > 0 for node in nodes)
    offered = _offered(needs.role, nodes) > 0
    fitting = [
        node.node_id for node in nodes
        if node.resources.get("GPU", 0.0) == 0 and node.resources.get("CPU", 0.0) >= needs.num_cpus
        and (not offered or node.resources.get(needs.role, 0.0) >= 1)
    ]  # fmt: skip
    if not has_gpus or not fitting:
        return None  # nothing to keep free, or nowhere else to go
    return min(sorted(fitting), key=lambda node_id: taken.get(node_id, 0))


def problems(needs: Needs, count: int, nodes: Sequence[NodeFacts], *, grows: bool = False) -> list[str]:
    """Why `count` processes of a role cannot all run here, each with its remedy; empty when they may.

    Args:
        grows: the cluster adds nodes for what waits, so that what its nodes hold now says nothing.
    """
    found = []
    if needs.num_gpus > 1 and needs.num_gpus != int(needs.num_gpus):
        found.append(f"cluster.{needs.role}_gpus={needs.num_gpus:g}: more than one GPU is a whole number; round it")
    if grows:
        return found
    offered = _offered(needs.role, nodes)
    if 0 < offered < count:
        found.append(
            f"{count} {needs.role} processes are wanted, and the cluster's nodes offer {offered:g} of the resource `{needs.role}`; offer more "
            "of it (`ray start --resources`), or want fewer; where the cluster adds nodes by itself, say so with cluster.grows=true"
        )
    if count and not any(_fits(needs, node, offered > 0) for node in nodes):
        own = " (a reward's own num_gpus)" if needs.role == "reward" else ""
        found.append(
            f"no node can hold a {needs.role} process ({needs.num_cpus:g} CPUs, {needs.num_gpus:g} GPUs"
            f"{f', 1 {needs.role}' if offered else ''}); join a larger node, or lower {needs.role}.num_threads or cluster.{needs.role}_gpus"
            f"{own}"
        )
    return found


def _fits(needs: Needs, node: NodeFacts, must_offer: bool) -> bool:
    wanted = {"CPU": needs.num_cpus, "GPU": needs.num_gpus, needs.role: 1.0 if must_offer else 0.0}
    return all(node.resources.get(name, 0.0) >= amount for name, amount in wanted.items())
