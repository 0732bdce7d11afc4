"""What a PromQL expression asks for, and what is wrong with it by common/metric_catalog.py: read from its syntax tree."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import promql_parser

from common.metric_catalog import BY_NAME, Metric

DURATIONS = {"$__rate_interval": "1m", "$window": "5m", "$__range": "1h"}
OF_PROMETHEUS = {"ALERTS": {"alertname", "alertstate", "run"}}  # series that Prometheus makes itself, with the labels that are asked
SUFFIXES = ("_bucket", "_sum", "_count")
RISING = ("rate", "increase")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One selector of an expression."""

    name: str
    labels: frozenset[str]  # that it matches
    function: str  # that takes it as a range vector; "" where none does


def substituted(expression: str, values: Mapping[str, str]) -> str:
    """The expression with Grafana's variables replaced, longest names first."""
    for name in sorted(values, key=len, reverse=True):
        expression = expression.replace(name, values[name])
    return expression


def parsed(expression: str) -> promql_parser.Expr:
    """The syntax tree. Raises ValueError for what is no PromQL."""
    return promql_parser.parse(substituted(expression, DURATIONS))


def asked_by(expression: str) -> list[Asked]:
    """Every selector of the expression."""
    calls: list[str] = []
    found: list[Asked] = []
    ranges: list[Any] = []  # a range vector's selector is walked too

    def enter(node: Any) -> None:
        if isinstance(node, promql_parser.Call):
            calls.append(node.func.name)
        if isinstance(node, promql_parser.MatrixSelector):
            ranges.append(node)
            found.append(_asked(node.vector_selector, calls[-1] if calls else ""))
        elif isinstance(node, promql_parser.VectorSelector) and not ranges:
            found.append(_asked(node, ""))

    def leave(node: Any) -> None:
        if isinstance(node, promql_parser.Call):
            calls.pop()
        if isinstance(node, promql_parser.MatrixSelector):
            ranges.pop()

    promql_parser.walk(parsed(expression), enter, leave)
    return found


def _asked(selector: Any, function: str) -> Asked:
    return Asked(name=selector.name, labels=frozenset(matcher.name for matcher in selector.matchers.matchers), function=function)


def metric_of(name: str) -> Metric | None:
    """The catalog metric of a series name; a histogram has three series."""
    for suffix in SUFFIXES:
        base = BY_NAME.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if base is not None and base.kind == "histogram":
            return base
    found = BY_NAME.get(name)
    return None if found is not None and found.kind == "histogram" else found


def labels_of(name: str) -> set[str]:
    """The labels that a series may have."""
    if name in OF_PROMETHEUS:
        return OF_PROMETHEUS[name]
    metric = metric_of(name)
    return set() if metric is None else {*metric.labels, "run", *(["le"] if name.endswith("_bucket") else [])}


def grouped_labels(expression: str) -> set[str]:
    """Labels that `by`, `without`, `on` and `ignoring` name."""
    words = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", expression)
    return {label.strip() for inside in words for label in inside.split(",") if label.strip()}


def problems(expression: str) -> Iterator[str]:
    """What the catalog does not allow: unknown series, unknown labels, a counter that is not under rate or increase."""
    known: set[str] = set()
    for asked in asked_by(expression):
        known |= labels_of(asked.name)
        metric = metric_of(asked.name)
        if metric is None and asked.name not in OF_PROMETHEUS:
            yield f"{asked.name} is not in the catalog"
            continue
        if unknown := asked.labels - labels_of(asked.name):
            yield f"{asked.name} has no label {', '.join(sorted(unknown))}"
        if "run" not in asked.labels:
            yield f"{asked.name} is asked of every run at once"
        rises = metric is not None and metric.kind in ("counter", "histogram")
        if rises and asked.function not in RISING:
            yield f"{asked.name} rises for ever and is shown without rate or increase"
        if not rises and asked.function in RISING:
            yield f"{asked.name} is a gauge under {asked.function}"
    if unknown := grouped_labels(expression) - known:
        yield f"groups by {', '.join(sorted(unknown))}, which none of its series has"
