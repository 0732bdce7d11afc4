"""Renders deploy/kuberay and checks what comes out; README.md says against what."""

import itertools
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from referencing import Registry, Resource

from deploy.config import RunConfig, load_config
from deploy.placement import NodeFacts

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
KUBERNETES = "1.32"
OWN_SCHEMA = ("ray.io/v1", "monitoring.coreos.com/v1")
Object = dict[str, Any]


def overlays() -> list[str]:
    """The names of the shipped overlays."""
    return sorted(path.parent.name for path in (KUBERAY / "overlays").glob("*/kustomization.yaml"))


@cache
def rendered(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder; no cluster is asked."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not on this machine: the manifests cannot be rendered")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecations
    return done.stdout


def render(overlay: str) -> list[Object]:
    """An overlay's objects, each call its own copies."""
    return list(yaml.safe_load_all(rendered(KUBERAY / "overlays" / overlay)))


def setup_objects() -> list[Object]:
    """What is applied once, by hand."""
    return [item for path in sorted((KUBERAY / "setup").glob("*.yaml")) for item in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


@cache
def _registry() -> tuple[Mapping[str, Any], Registry[Any]]:
    own = json.loads((Path(__file__).parent / "schema.json").read_text(encoding="utf-8"))
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    core = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    registry: Registry[Any] = Registry().with_resources([(item["$id"], Resource.from_contents(item)) for item in (own, core)])
    return own, registry


def check(item: Object) -> None:
    """Check one object strictly. Raises jsonschema.ValidationError."""
    if item["apiVersion"] not in OWN_SCHEMA:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
        return
    own, registry = _registry()
    schema = {"$ref": f"{own['$id']}#/$defs/{item['kind']}"}
    jsonschema.Draft202012Validator(schema, registry=registry).validate(item)


def cluster_spec(objects: list[Object]) -> Object:
    """The one Ray cluster of an overlay, whichever object holds it."""
    found: list[Object] = [item["spec"] for item in objects if item["kind"] == "RayCluster"]
    found += [item["spec"]["rayClusterSpec"] for item in objects if item["kind"] == "RayJob"]
    assert len(found) == 1, "an overlay has one Ray cluster"
    return found[0]


def groups(spec: Object) -> dict[str, Object]:
    """head, learner, rollout, reward -> group."""
    return {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


def pod(group: Object) -> Object:
    """A group's pod spec."""
    spec: Object = group["template"]["spec"]
    return spec


def container(group: Object) -> Object:
    """A group's Ray container, which KubeRay takes to be the first."""
    first: Object = pod(group)["containers"][0]
    return first


def values(item: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of an object with its path."""
    if isinstance(item, Mapping):
        for key, value in item.items():
            yield from values(value, f"{path}/{key}")
    elif isinstance(item, list):
        for number, value in enumerate(item):
            yield from values(value, f"{path}/{number}")
    else:
        yield path, item


def named(item: Any, key: str) -> list[Any]:
    """Every value under a key, at any depth."""
    if isinstance(item, Mapping):
        return [value for name, value in item.items() if name == key] + [found for value in item.values() for found in named(value, key)]
    if isinstance(item, list):
        return [found for value in item for found in named(value, key)]
    return []


def job(objects: list[Object]) -> Object:
    """The spec of an overlay's RayJob."""
    spec: Object = next(item["spec"] for item in objects if item["kind"] == "RayJob")
    return spec


def arguments_of(spec: Object) -> list[str]:
    """Of `flowfleet`, in a RayJob's entrypoint."""
    program, *arguments = shlex.split(spec["entrypoint"])
    assert program == "flowfleet"
    return arguments


def config_of(spec: Object) -> RunConfig:
    """What the entrypoint's recipe and sets resolve to."""
    arguments = arguments_of(spec)
    sets = [value for option, value in itertools.pairwise(arguments) if option == "--set"]
    return load_config(arguments[1], sets)


def node_types(spec: Object) -> dict[str, Any]:
    """The groups as Ray's own autoscaler reads them."""
    read = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "flowfleet", "namespace": "flowfleet"}, "spec": spec})
    return {name.removesuffix("group"): kind for name, kind in read["available_node_types"].items()}


def first_nodes(spec: Object) -> list[NodeFacts]:
    """The nodes that a run finds when it starts: every group's smallest size."""
    return [
        NodeFacts(node_id=f"{name}-{number}", resources=kind["resources"])
        for name, kind in node_types(spec).items() for number in range(1 if name == "head" else kind["min_workers"])
    ]  # fmt: skip
