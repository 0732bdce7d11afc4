"""Alert rules: committed as generated, asking only for what the catalog has, each tested firing and not firing, quiet on healthy runs."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml

from common.metric_catalog import BY_NAME as METRICS
from common.metric_catalog import Metric
from deploy.config import PROJECT
from deploy.monitoring.alert import PAGE, Alert
from deploy.monitoring.alerts import ALERTS, RULES, encode_rules, with_table
from tests.alert_cases import DIRECTORY, encode, files
from tests.alert_healthy import healthy_tests, recorded_tests
from tests.alert_operation_cases import OPERATION_CASES
from tests.alert_training_cases import TRAINING_CASES

CASES = (*TRAINING_CASES, *OPERATION_CASES)
PROMTOOL = PROJECT / "build" / "prometheus" / "usr" / "bin" / "promtool"
OWN_LABELS = {"job", "instance"}  # that Prometheus gives every series
RANGE_FUNCTIONS = {"rate", "increase"}
by_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


def metric_of(name: str) -> tuple[Metric | None, frozenset[str]]:
    """A catalog metric by the name of one of its series, and the labels that the series has."""
    base, _, part = name.rpartition("_")
    found = METRICS.get(name) or (METRICS.get(base) if part in ("bucket", "sum", "count") else None)
    if found is None or (found.kind == "histogram") != (found.name != name):
        return None, frozenset()
    return found, frozenset({"run", *found.labels, *OWN_LABELS, *(("le",) if part == "bucket" and found.kind == "histogram" else ())})


def selectors(expression: promql_parser.Expr) -> list[promql_parser.VectorSelector]:
    """Every selector of an expression."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(expression, pre_visit=visit)
    return found


def made_labels(expression: promql_parser.Expr) -> set[str]:
    """Labels that label_replace makes."""
    found: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.Call) and node.func.name == "label_replace":
            found.add(node.args[1].val)

    promql_parser.walk(expression, pre_visit=visit)
    return found


def problems(text: str) -> Iterator[str]:
    """What an expression asks for that the catalog does not have, and aggregations that mix runs."""
    expression = promql_parser.parse(text)
    known = made_labels(expression)
    for selector in selectors(expression):
        if selector.name == "up":
            known |= OWN_LABELS
            continue
        found, labels = metric_of(selector.name)
        if found is None:
            yield f"{selector.name} is no series of the catalog"
        known |= labels
        yield from (f"{selector.name} has no label {m.name}" for m in selector.matchers.matchers if m.name not in labels)
    nodes: list[promql_parser.Expr] = []
    promql_parser.walk(expression, pre_visit=nodes.append)
    for node in nodes:
        labels = grouping(node)
        yield from (f"no metric of it has the label {label}" for label in labels if label not in known)
        if isinstance(node, promql_parser.AggregateExpr) and not {"run", "instance"} & set(labels):
            yield f"{node} mixes runs"
        if isinstance(node, promql_parser.Call) and node.func.name in RANGE_FUNCTIONS:
            gauges = [selector.name for selector in selectors(node) if not selector.name.endswith(("_total", "_bucket"))]
            yield from (f"{node.func.name} of {name}, which can fall" for name in gauges)


def grouping(node: promql_parser.Expr) -> list[str]:
    """The labels that an aggregation keeps, or that two sides are matched on."""
    if isinstance(node, promql_parser.AggregateExpr):
        return list(node.modifier.labels) if node.modifier else []
    if isinstance(node, promql_parser.BinaryExpr) and node.modifier and node.modifier.matching:
        return list(node.modifier.matching.labels)
    return []


@by_alert
def test_an_expression_parses_asks_only_for_the_catalog_and_keeps_runs_apart(alert: Alert) -> None:
    assert list(problems(alert.expr)) == []


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("max by (run) (flowfleet_idle_second) > 1", "no series of the catalog"),
        ('max by (run) (flowfleet_idle_ratio{slot="a"}) > 1', "has no label slot"),
        ("max by (run, reward) (flowfleet_idle_ratio) > 1", "the label reward"),
        ("max (flowfleet_idle_ratio) > 1", "mixes runs"),
        ("sum by (run) (rate(flowfleet_update[5m])) > 1", "can fall"),
        ("max by (run) (flowfleet_group_staleness_updates) > 1", "no series of the catalog"),
    ],
)
def test_the_check_of_expressions_finds_planted_faults(expression: str, said: str) -> None:
    assert any(said in problem for problem in problems(expression))


def test_the_rules_are_committed_as_they_are_generated() -> None:
    assert RULES.read_text() == encode_rules(), "run python -m deploy.monitoring.alerts"


def test_the_unit_tests_are_committed_as_they_are_generated() -> None:
    for path, content in files().items():
        assert path.read_text() == content, "run python -m tests.alert_cases"
    assert set(DIRECTORY.iterdir()) == set(files())


def test_the_page_holds_the_table_as_it_is_generated_and_an_anchor_for_every_alert() -> None:
    page = (PROJECT / PAGE).read_text()
    assert page == with_table(page), "run python -m deploy.monitoring.alerts"
    for alert in ALERTS:
        assert f'<a id="{alert.anchor.partition("#")[2]}"></a>' in page


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        with_table("# Observability\n")


@by_alert
def test_every_alert_has_a_case_that_fires_and_one_that_does_not(alert: Alert) -> None:
    cases = [case for case in CASES if case.alert == alert.name]
    assert {bool(case.fires) for case in cases} == {True, False}


def test_names_are_unique_and_prefixed_and_every_alert_says_what_to_do() -> None:
    names = [alert.name for alert in ALERTS]
    assert len(set(names)) == len(names)
    for alert in ALERTS:
        assert re.fullmatch(r"Flowfleet([A-Z][a-z]+)+", alert.name)
        assert re.fullmatch(r"\d+[smh]", alert.hold) and alert.hold_reason
        assert "`" in alert.remedy or "set " in alert.remedy.lower() or "learner." in alert.remedy, f"{alert.name}: no command and no key"
        assert "{{" not in alert.description, "a description is the same for every run"


def test_rules_are_plain_yaml_that_states_for_and_severity() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert [rule["alert"] for rule in rules] == [alert.name for alert in ALERTS]
    assert all(rule["labels"]["severity"] in ("critical", "warning", "info") and rule["for"] for rule in rules)
    by_name = {rule["alert"]: rule for rule in rules}
    assert by_name["FlowfleetLearnerWaits"]["for"] == "0s", "architecture, section 12: the learner waiting without groups alerts at once"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Debian's promtool."""
    assert PROMTOOL.exists(), "`make lane-monitoring` fetches it"
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.prometheus
def test_promtool_accepts_the_rules() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0 and f"{len(ALERTS)} rules found" in done.stdout, done.stdout + done.stderr


@pytest.mark.prometheus
@pytest.mark.parametrize("path", sorted(files()), ids=lambda path: path.stem)
def test_promtool_finds_every_alert_firing_and_not_firing(path: Path) -> None:
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_a_rule_that_never_fires_fails_its_unit_test(tmp_path: Path) -> None:
    broken = encode_rules().replace("skipped_steps_total[15m])) > 0", "skipped_steps_total[15m])) > 99")
    (tmp_path / "rules.yml").write_text(broken)
    tests = (DIRECTORY / "learning.yml").read_text().replace(f"../{RULES.name}", str(tmp_path / "rules.yml"))
    parsed = yaml.safe_load(tests)
    kept = [test for test in parsed["tests"] if test["name"].startswith("FlowfleetNonFinite")]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({**parsed, "tests": kept}))
    done = promtool("test", "rules", tmp_path / "tests.yml")
    assert done.returncode == 1 and "FlowfleetNonFinite: a skipped step fires at once" in done.stdout + done.stderr


@pytest.mark.prometheus
def test_no_alert_fires_on_healthy_runs_whether_an_update_takes_seconds_or_twenty_minutes(tmp_path: Path) -> None:
    path = tmp_path / "healthy.yml"
    path.write_text(encode(healthy_tests(), str(RULES), "45s"))
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_no_recorded_curve_is_a_collapse_or_a_falling_evaluation_and_each_is_one_when_noise_follows(tmp_path: Path) -> None:
    path = tmp_path / "recorded.yml"
    path.write_text(encode(recorded_tests(), str(RULES), "45s"))
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
