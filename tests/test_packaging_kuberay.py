"""deploy/kuberay, rendered and checked offline: schemas, who runs where, the command, the times of a drain."""

import copy
from collections.abc import Callable

import jsonschema
import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner

from deploy.commands.training import train
from deploy.compose import server_gpus
from deploy.drain import parse_arguments
from deploy.placement import ROLES, Needs, problems, seat
from tests.kuberay.manifests import (
    Object,
    arguments_of,
    check,
    cluster_spec,
    config_of,
    container,
    first_nodes,
    groups,
    job,
    named,
    node_types,
    overlays,
    pod,
    render,
    setup_objects,
)

OVERLAYS = overlays()
JOBS = [name for name in OVERLAYS if name.endswith("job")]
RUN_METRICS, RAY_METRICS, DASHBOARD = 9464, 8080, 8265
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
every_job = pytest.mark.parametrize("overlay", JOBS)


# ---- schemas


def test_the_shipped_overlays_are_these() -> None:
    assert OVERLAYS == ["pvc", "pvc-job", "s3", "s3-gpu-job"]


@every_overlay
def test_every_object_of_an_overlay_is_valid_field_by_field(overlay: str) -> None:
    objects = render(overlay)
    assert {"NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"} < {item["kind"] for item in objects}
    for item in objects:
        check(item)
        assert item["metadata"]["namespace"] == "flowfleet"


def test_what_is_applied_once_is_valid_and_no_overlay_takes_it_away() -> None:
    kept = setup_objects()
    assert sorted(item["kind"] for item in kept) == ["Namespace", "PersistentVolumeClaim", "PersistentVolumeClaim", "Secret", "Secret"]
    for item in kept:
        check(item)
    deleted_with_an_overlay = {item["kind"] for overlay in OVERLAYS for item in render(overlay)}
    assert not deleted_with_an_overlay & {item["kind"] for item in kept}


def rename(old: str, new: str) -> Callable[[Object], None]:
    """Misspell a field of the rollout group."""
    return lambda spec: spec["workerGroupSpecs"][1].__setitem__(new, spec["workerGroupSpecs"][1].pop(old))


@pytest.mark.parametrize(
    "plant",
    [
        rename("minReplicas", "minReplica"),
        rename("rayStartParams", "rayStartParam"),
        lambda spec: spec["headGroupSpec"].pop("rayStartParams"),
        lambda spec: spec["workerGroupSpecs"][1].update(replicas="two"),
        lambda spec: spec["workerGroupSpecs"][1].update(maxReplicas=-1),
        lambda spec: spec["workerGroupSpecs"][1]["rayStartParams"].update({"num-cpus": 1}),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["autoscalerOptions"]["resources"].update(limit={}),
        lambda spec: spec.update(enableInTreeAutoscaling="yes"),
        lambda spec: pod(spec["headGroupSpec"]).update(terminationGracePeriodSecond=600),
        lambda spec: container(spec["headGroupSpec"])["securityContext"].update(readonlyRootFilesystem=True),
        lambda spec: container(spec["headGroupSpec"])["lifecycle"]["preStop"].update(exec={"command": "drain"}),
    ],
)
def test_a_planted_mistake_in_a_cluster_is_refused(plant: Callable[[Object], None]) -> None:
    objects = render("pvc")
    for item in objects:
        if item["kind"] == "RayCluster":
            check(item)
            plant(item["spec"])
            with pytest.raises(jsonschema.ValidationError):
                check(item)


def test_a_planted_mistake_in_another_object_is_refused() -> None:
    objects = {item["kind"]: item for item in render("s3-gpu-job")}
    mistakes: dict[str, Callable[[Object], None]] = {
        "RayJob": lambda spec: spec.update(submissionMode="HttpMode"),
        "NetworkPolicy": lambda spec: spec.update(policyType=["Ingress"]),
        "PodDisruptionBudget": lambda spec: spec.update(minAvailables=1),
        "PodMonitor": lambda spec: spec["podMetricsEndpoints"][0].update(ports="metrics"),
    }
    for kind, plant in mistakes.items():
        item = copy.deepcopy(objects[kind])
        plant(item["spec"])
        with pytest.raises(jsonschema.ValidationError):
            check(item)


# ---- who runs where


@every_overlay
def test_the_head_has_no_work_to_offer(overlay: str) -> None:
    spec = cluster_spec(render(overlay))
    head = node_types(spec)["head"]
    assert {name: amount for name, amount in head["resources"].items() if name != "memory"} == {"CPU": 0, "GPU": 0}
    assert "nvidia.com/gpu" not in container(spec["headGroupSpec"])["resources"]["limits"]


@every_overlay
def test_each_role_has_a_group_of_its_own_that_only_it_may_enter(overlay: str) -> None:
    spec = cluster_spec(render(overlay))
    kinds = node_types(spec)
    assert set(kinds) == {"head", *ROLES}
    for name, kind in kinds.items():
        offered = {role for role in ROLES if role in kind["resources"]}
        assert offered == ({name} if name != "head" else set())
    for role in ROLES:
        assert dict(seat(Needs(role=role, num_cpus=1.0, num_gpus=0.0), first_nodes(spec), {}).resources) == {role: 1.0}
    assert kinds["learner"]["min_workers"] == kinds["learner"]["max_workers"] == 1
    assert all(kinds[name]["max_workers"] > kinds[name]["min_workers"] >= 1 for name in ("rollout", "reward"))


@every_job
def test_the_run_fits_the_nodes_that_it_finds_at_its_start(overlay: str) -> None:
    spec = job(render(overlay))
    config, nodes = config_of(spec), first_nodes(spec["rayClusterSpec"])
    servers = [
        (Needs(role="reward", num_cpus=float(reward.num_threads), num_gpus=server_gpus(config, reward)), reward.num_servers)
        for reward in config.reward
    ]
    wanted = [
        (Needs(role="learner", num_cpus=float(config.learner.num_threads), num_gpus=config.cluster.learner_gpus), config.learner.num_ranks),
        (
            Needs(role="rollout", num_cpus=float(config.rollout.num_threads), num_gpus=config.cluster.rollout_gpus),
            config.rollout.num_workers,
        ),
        *servers,
    ]
    assert [text for needs, count in wanted for text in problems(needs, count, nodes)] == []
    offered = sum(node.resources.get("reward", 0) for node in nodes)
    assert sum(count for _, count in servers) <= offered, "the servers of all rewards share the resource `reward`"
    reward_cpus = sum(node.resources["CPU"] for node in nodes if "reward" in node.resources)
    assert sum(needs.num_cpus * count for needs, count in servers) <= reward_cpus
    rollouts = node_types(spec["rayClusterSpec"])["rollout"]["max_workers"]
    assert not config.autoscale.enabled or config.autoscale.max_rollout <= rollouts


@every_overlay
def test_only_rollout_workers_may_sit_on_nodes_that_the_cloud_takes_away(overlay: str) -> None:
    by_name = groups(cluster_spec(render(overlay)))
    spot = {key for key in named(pod(by_name["rollout"])["tolerations"], "key") if "spot" in key or "scaleset" in key}
    assert "cloud.google.com/gke-spot" in spot and "kubernetes.azure.com/scalesetpriority" in spot
    for name in ("head", "learner"):
        rules = pod(by_name[name])["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert {rule["operator"] for term in rules for rule in term["matchExpressions"]} == {"NotIn"}
        assert not spot & set(named(pod(by_name[name]).get("tolerations", []), "key"))


# ---- the command


@every_job
def test_the_entrypoint_is_a_train_command_that_parses(overlay: str) -> None:
    app = Typer()
    app.command("train")(train)
    spec = job(render(overlay))
    shown = CliRunner().invoke(app, [*arguments_of(spec)[1:], "--dry-run"])
    assert shown.exit_code == 0, shown.output
    refused = CliRunner().invoke(app, [*arguments_of(spec)[1:], "--dry-runs"])
    assert refused.exit_code == 2
    assert arguments_of(spec)[arguments_of(spec).index("--address") + 1] == "auto"
    assert not {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"} & set(spec), "with them the driver would leave the head"


@every_job
def test_the_runs_metrics_are_served_where_they_are_scraped_and_guarded(overlay: str) -> None:
    objects = render(overlay)
    cluster = config_of(job(objects)).cluster
    assert (cluster.metrics_host, cluster.metrics_port, cluster.grows) == ("0.0.0.0", RUN_METRICS, True)
    ports = {port["name"]: port["containerPort"] for port in container(groups(cluster_spec(objects))["head"])["ports"]}
    assert ports["run-metrics"] == RUN_METRICS and ports["metrics"] == RAY_METRICS and ports["dashboard"] == DASHBOARD
    for item in (item for item in objects if item["kind"] == "PodMonitor"):
        role = item["spec"]["selector"]["matchLabels"].get("flowfleet/role")
        watched = ["head"] if role else ["head", *ROLES]
        for endpoint in item["spec"]["podMetricsEndpoints"]:
            for name in watched:
                assert endpoint["port"] in [port["name"] for port in container(groups(cluster_spec(objects))[name])["ports"]]


def test_the_monitors_give_the_job_names_that_the_dashboards_know() -> None:
    monitors = [item for item in render("s3-gpu-job") if item["kind"] == "PodMonitor"]
    rules = [rule for item in monitors for rule in named(item, "relabelings")[0] if rule["targetLabel"] == "job"]
    assert sorted(rule["replacement"] for rule in rules) == ["flowfleet", "ray"]


@every_job
def test_a_drain_has_the_time_it_needs_before_each_next_deadline(overlay: str) -> None:
    spec = job(render(overlay))
    stop_s = int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    waits = {}
    for name, group in groups(spec["rayClusterSpec"]).items():
        python, *rest = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert (python, rest[:2]) == ("/opt/venv/bin/python", ["-m", "deploy.drain"])
        given = parse_arguments(rest[2:])
        assert given.what == ("jobs" if name == "head" else "actors")
        assert given.wait < pod(group)["terminationGracePeriodSeconds"]
        waits[name] = given.wait
    assert config_of(spec).cluster.drain_timeout_s < stop_s < waits["head"] <= waits["learner"]
    assert spec["backoffLimit"] > 0, "a lost head is a new cluster and the same command"
