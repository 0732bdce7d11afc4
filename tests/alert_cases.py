"""Cases for promtool: series, a time, and which alerts fire then.

`python -m tests.alert_cases` writes deploy/prometheus/rules/tests/*.yml.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.monitoring.alert import Alert
from deploy.monitoring.alerts import ALERTS, RULES, encode_yaml

DIRECTORY = RULES.parent / "tests"
HEADER = "# Written by `python -m tests.alert_cases` from the typed cases in tests/alert_*.py; change them there.\n"
BY_NAME = {alert.name: alert for alert in ALERTS}
_LABEL = re.compile(r"\{\{ \$labels\.(\w+) \}\}")
_VALUE = re.compile(r"\{\{ \$value[^}]*\}\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """One alert that fires."""

    labels: Mapping[str, str]  # besides severity
    value: str = ""  # as the summary's template writes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What promtool is to find at a time."""

    alert: str
    name: str  # a sentence
    series: Mapping[str, str]  # selector -> samples in promtool's notation, one an interval
    at: str
    fires: tuple[Firing, ...] = ()
    interval: str = "1m"


def samples(values: Iterable[float], hold: int = 1) -> str:
    """Samples one by one, each repeated so many times."""
    return " ".join(f"{value:.6g}" for value in values for _ in range(hold))


def run(metric: str, **labels: str) -> str:
    """The selector of a series of the run `tiny`."""
    inside = ",".join(f'{name}="{value}"' for name, value in {"run": "tiny", **labels}.items())
    return f"flowfleet_{metric}{{{inside}}}"


def tiny(value: str = "", **labels: str) -> tuple[Firing, ...]:
    """The alert fires for the run `tiny`, once."""
    return (Firing(labels={"run": "tiny", **labels}, value=value),)


def render(template: str, firing: Firing) -> str:
    """An annotation as Prometheus expands it."""
    return _VALUE.sub(firing.value, _LABEL.sub(lambda match: firing.labels.get(match[1], ""), template))


def expected(alert: Alert, firing: Firing) -> dict[str, Any]:
    """What promtool compares with."""
    annotations = {"summary": alert.summary, "description": alert.description, "docs": alert.anchor}
    return {
        "exp_labels": {"severity": alert.severity, **firing.labels},
        "exp_annotations": {name: render(template, firing) for name, template in annotations.items()},
    }


def unit_test(case: Case) -> dict[str, Any]:
    """A case as promtool reads it."""
    alert = BY_NAME[case.alert]
    return {
        "name": f"{case.alert}: {case.name}",
        "interval": case.interval,
        "input_series": [{"series": selector, "values": values} for selector, values in case.series.items()],
        "alert_rule_test": [
            {"eval_time": case.at, "alertname": case.alert, "exp_alerts": [expected(alert, firing) for firing in case.fires]},
        ],
    }


def quiet_test(name: str, series: Mapping[str, str], times: Sequence[str], interval: str, alerts: Iterable[str]) -> dict[str, Any]:
    """None of the alerts fires at any of the times."""
    return {
        "name": name,
        "interval": interval,
        "input_series": [{"series": selector, "values": values} for selector, values in series.items()],
        "alert_rule_test": [{"eval_time": time, "alertname": alert, "exp_alerts": []} for time in times for alert in alerts],
    }


def encode(tests: Sequence[Mapping[str, Any]], rules: str, evaluation_interval: str = "1m") -> str:
    """A file for `promtool test rules`."""
    content = {"rule_files": [rules], "evaluation_interval": evaluation_interval, "tests": list(tests)}
    return HEADER + encode_yaml(content)


def files() -> dict[Path, str]:
    """Every file of unit tests and its content."""
    from tests.alert_operation_cases import OPERATION_CASES
    from tests.alert_training_cases import TRAINING_CASES

    areas: dict[str, list[dict[str, Any]]] = {}
    for case in (*TRAINING_CASES, *OPERATION_CASES):
        areas.setdefault(BY_NAME[case.alert].area, []).append(unit_test(case))
    return {DIRECTORY / f"{area}.yml": encode(tests, f"../{RULES.name}") for area, tests in areas.items()}


def main() -> None:
    """Write the files."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for path, content in files().items():
        path.write_text(content)


if __name__ == "__main__":
    main()
