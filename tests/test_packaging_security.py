"""deploy/kuberay, rendered: pod security, tokens, network policies, and that what is named exists."""

import re
import tomllib

import pytest

from deploy.config import PROJECT
from tests.dockerfiles import SECRET_NAME, instructions, last
from tests.kuberay.manifests import cluster_spec, container, groups, named, overlays, pod, render, setup_objects, values

RUN_METRICS, RAY_METRICS, DASHBOARD = 9464, 8080, 8265
every_overlay = pytest.mark.parametrize("overlay", overlays())


@every_overlay
def test_every_pod_keeps_the_restricted_standard_and_a_read_only_root(overlay: str) -> None:
    text = (PROJECT / "deploy" / "docker" / "Dockerfile.cpu").read_text(encoding="utf-8")
    user, group_id = (int(part) for part in last(instructions(text), "USER").split(":"))
    spec = cluster_spec(render(overlay))
    contexts = [container(group)["securityContext"] for group in groups(spec).values()]
    for context in [*contexts, spec["autoscalerOptions"]["securityContext"]]:
        assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
    for group in groups(spec).values():
        whole = pod(group)["securityContext"]
        assert (whole["runAsNonRoot"], whole["runAsUser"], whole["runAsGroup"], whole["fsGroup"]) == (True, user, group_id, group_id)
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"]: volume for volume in pod(group)["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(group)["volumeMounts"]}
        assert {"/tmp", "/home/flowfleet"} < set(mounts), "what Ray and the libraries write to"
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"], "a pod that may use more than it asked for is the first to be killed"
        assert not set(pod(group)) & {"hostNetwork", "hostPID", "hostIPC"} and not named(group, "hostPath") + named(group, "privileged")


@every_overlay
def test_tokens_are_demanded_by_ray_and_held_by_the_head_alone(overlay: str) -> None:
    objects = render(overlay)
    assert cluster_spec(objects)["authOptions"] == {"mode": "token", "secretName": "flowfleet-ray-token"}
    accounts = {item["metadata"]["name"]: item for item in objects if item["kind"] == "ServiceAccount"}
    for name, group in groups(cluster_spec(objects)).items():
        account = accounts[pod(group)["serviceAccountName"]]
        assert account["automountServiceAccountToken"] is (name == "head"), "the autoscaler asks Kubernetes for pods, nobody else does"
        assert pod(group).get("automountServiceAccountToken", True) is (name == "head")


@every_overlay
def test_no_secret_stands_in_an_overlay(overlay: str) -> None:
    for item in render(overlay):
        assert item["kind"] != "Secret"
        for variable in (entry for entries in named(item, "env") for entry in entries):
            assert not (SECRET_NAME.search(variable["name"]) and "value" in variable)
        for path, value in values(item):
            assert not re.search(r"AKIA[0-9A-Z]{16}|hf_\w{20}|BEGIN [A-Z ]*PRIVATE KEY", str(value)), path


def test_the_example_secrets_hold_placeholders_only() -> None:
    secrets = [item for item in setup_objects() if item["kind"] == "Secret"]
    assert {value for item in secrets for value in item["stringData"].values()} == {"REPLACE_ME"}
    assert not named(secrets, "data")


@every_overlay
def test_nothing_comes_in_or_goes_out_but_what_is_named(overlay: str) -> None:
    policies = {item["metadata"]["name"]: item["spec"] for item in render(overlay) if item["kind"] == "NetworkPolicy"}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    from_outside: dict[int, dict[str, str]] = {}
    for spec in policies.values():
        for rule in spec.get("ingress", []):
            for peer in rule["from"]:
                if "namespaceSelector" in peer:
                    from_outside |= {port["port"]: peer["namespaceSelector"]["matchLabels"] for port in rule["ports"]}
                else:
                    assert peer == {"podSelector": {"matchLabels": {"flowfleet/cluster": "main"}}}
    metrics = {"flowfleet/metrics-access": "true"}
    assert from_outside == {DASHBOARD: {"flowfleet/dashboard-access": "true"}, RUN_METRICS: metrics, RAY_METRICS: metrics}
    out = {name: {port["port"] for rule in spec.get("egress", []) for port in rule.get("ports", [])} for name, spec in policies.items()}
    assert out["flowfleet-inside"] == {53} and out["flowfleet-head-to-api"] == {443, 6443}
    assert out.get("flowfleet-to-object-store", {443}) == {443} and ("flowfleet-to-object-store" in out) is overlay.startswith("s3")


# ---- what hangs together


@every_overlay
def test_every_name_that_is_referred_to_exists(overlay: str) -> None:
    objects = render(overlay)
    have = {(item["kind"], item["metadata"]["name"]): item for item in [*objects, *setup_objects()]}
    spec = cluster_spec(objects)
    for name, key in (("secretRef", "Secret"), ("secretKeyRef", "Secret"), ("configMapRef", "ConfigMap"), ("configMapKeyRef", "ConfigMap")):
        assert [found for found in named(spec, name) if (key, found["name"]) not in have] == []
    assert {("PersistentVolumeClaim", claim["claimName"]) for claim in named(spec, "persistentVolumeClaim")} <= set(have)
    assert "auth_token" in have["Secret", spec["authOptions"]["secretName"]]["stringData"]
    for group in groups(spec).values():
        volumes = {volume["name"] for volume in pod(group)["volumes"]}
        assert {mount["name"] for mount in container(group)["volumeMounts"]} == volumes
    head_volumes = {volume["name"] for volume in pod(spec["headGroupSpec"])["volumes"]}
    assert {mount["name"] for mount in spec["autoscalerOptions"]["volumeMounts"]} <= head_volumes
    labels = [set(group["template"]["metadata"]["labels"].items()) for group in groups(spec).values()]
    selectors = [chosen["matchLabels"] for item in objects for key in ("podSelector", "selector") for chosen in named(item, key) if chosen]
    assert selectors and all(any(set(chosen.items()) <= label for label in labels) for chosen in selectors)


@every_overlay
def test_budgets_count_in_a_way_that_custom_owners_allow(overlay: str) -> None:
    budgets = [item["spec"] for item in render(overlay) if item["kind"] == "PodDisruptionBudget"]
    assert [budget["minAvailable"] for budget in budgets] == [1, 1] and not named(budgets, "maxUnavailable")
    assert {budget["selector"]["matchLabels"]["flowfleet/role"] for budget in budgets} == {"head", "learner"}


@every_overlay
def test_versions_are_those_of_the_locked_set_and_images_are_pinned(overlay: str) -> None:
    locked = dict(line.split("==") for line in (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line)
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    spec = cluster_spec(render(overlay))
    assert spec["rayVersion"] == locked["ray"]
    images = {container(group)["image"] for group in groups(spec).values()}
    kind = "cuda" if "gpu" in overlay else "cpu"
    assert images == {f"registry.example.com/flowfleet:{version}-{kind}"}
    assert (PROJECT / "deploy" / "docker" / f"Dockerfile.{kind}").exists()


@every_overlay
def test_every_node_sees_the_run_directory(overlay: str) -> None:
    for group in groups(cluster_spec(render(overlay))).values():
        claims = [claim["claimName"] for claim in named(pod(group), "persistentVolumeClaim")]
        secrets = [found["name"] for found in named(container(group), "secretRef")]
        assert ("flowfleet-runs" in claims, "flowfleet-s3" in secrets) == (overlay.startswith("pvc"), overlay.startswith("s3"))


@pytest.mark.parametrize("page", ["docs/deploy.md", "deploy/kuberay/README.md", "deploy/docker/README.md", "tests/kuberay/README.md"])
def test_every_path_that_the_pages_name_exists(page: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/.])((?:deploy|docs|tests)/[\w./-]*[\w])", text)
    assert [path for path in paths if not (PROJECT / path).exists()] == []
    links = list(re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text))
    assert [link for link in links if not ((PROJECT / page).parent / link).exists()] == []
