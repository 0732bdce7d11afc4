"""PromQL made from common/metric_catalog.py: a name, a label or a use that the catalog does not allow is an error at import.

Grafana's variables stand in the expressions: $run (one run), $window (of rates), $__range (the time shown), $__rate_interval.
"""

import re
from typing import Final, Literal

from common.metric_catalog import BY_NAME, PREFIX, Kind, Metric

WINDOW: Final = "$window"  # of a mean rate: the reader's choice, since an update takes a second or ten minutes
RANGE: Final = "$__range"
_MATCHER: Final = re.compile(r'(\w+)(=|!=|=~|!~)"[^"]*"')


def metric(name: str, kind: Kind) -> Metric:
    """Return a catalog metric by its name without the prefix.

    Raises:
        ValueError: the catalog has none of this name and kind.
    """
    found = BY_NAME.get(PREFIX + name)
    if found is None or found.kind != kind:
        what = "no such metric" if found is None else f"a {found.kind}"
        raise ValueError(f"monitoring: {name!r} is {what} in common/metric_catalog.py, and a {kind} is asked for; take a name from there")
    return found


def gauge(name: str, *matchers: str) -> str:
    """Return the selector of a gauge of $run; matchers as in PromQL: 'task="all"'. Raises ValueError."""
    return _selector(metric(name, "gauge"), name, matchers)


def rate(name: str, *by: str, matchers: tuple[str, ...] = ()) -> str:
    """Return a counter's mean increase a second over $window, summed but for the labels `by`. Raises ValueError."""
    return _over("rate", _counter(name, by, matchers), by, WINDOW)


def increase(name: str, *by: str, over: str = WINDOW) -> str:
    """Return by how much a counter rose over a time, summed but for the labels `by`. Raises ValueError."""
    return _over("increase", _counter(name, by, ()), by, over)


def rises(name: str, *by: str, over: str = WINDOW) -> str:
    """Return `increase`, or 0 where nothing was ever counted: what never happened has no series. Raises ValueError."""
    return or_zero(increase(name, *by, over=over), *by)


def buckets(name: str) -> str:
    """Return how many observations fell into each bucket of a histogram. Raises ValueError."""
    return _over("increase", _part(name, "bucket", ()), ("le",), "$__rate_interval")


def quantile(share: float, name: str, *by: str) -> str:
    """Return a quantile of a histogram's observations of $window. Raises ValueError."""
    return f"histogram_quantile({share:g}, {_over('rate', _part(name, 'bucket', by), ('le', *by), WINDOW)})"


def mean(name: str, *by: str) -> str:
    """Return the mean of a histogram's observations of $window. Raises ValueError."""
    return f"{_over('rate', _part(name, 'sum', by), by, WINDOW)} / {_over('rate', _part(name, 'count', by), by, WINDOW)}"


def zero(*labels: str) -> str:
    """Return 0 while $run is scraped, with each label set to "none"; nothing while it is not, so that a lost run never looks healthy."""
    expression = f"0 * max({gauge('updates_planned')})"
    for label in labels:
        expression = f'label_replace({expression}, "{label}", "none", "", "")'
    return expression


def or_zero(expression: str, *labels: str) -> str:
    """Return the expression, or `zero` where it is empty."""
    return f"{expression} or on () {zero(*labels)}"


def at_least(expression: str, least: float) -> str:
    """Return 1 where the expression reaches the least value, else 0."""
    return f"({expression} >= bool {least:g})"


def firing_alerts() -> str:
    """Return 1 for each alert that fires for $run, or for no run in particular; 0 for "none" where none does."""
    return or_zero('max by (alertname) (ALERTS{alertstate="firing",run=~"$run|"})', "alertname")


def _counter(name: str, by: tuple[str, ...], matchers: tuple[str, ...]) -> str:
    found = metric(f"{name}_total", "counter")
    _check_labels(found, by)
    return _selector(found, f"{name}_total", matchers)


def _part(name: str, part: Literal["bucket", "sum", "count"], by: tuple[str, ...]) -> str:
    found = metric(name, "histogram")
    _check_labels(found, by)
    return _selector(found, f"{name}_{part}", ())


def _over(function: Literal["rate", "increase"], selector: str, by: tuple[str, ...], over: str) -> str:
    grouped = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{grouped} ({function}({selector}[{over}]))"


def _selector(found: Metric, name: str, matchers: tuple[str, ...]) -> str:
    parsed = [_MATCHER.fullmatch(matcher) for matcher in matchers]
    if not all(parsed):
        raise ValueError(f"""monitoring: {matchers} of {name}: a matcher is label="value" (or !=, =~, !~); mend it""")
    _check_labels(found, tuple(match[1] for match in parsed if match is not None))
    inside = ",".join(('run="$run"', *matchers))
    return f"{PREFIX}{name}{{{inside}}}"


def _check_labels(found: Metric, labels: tuple[str, ...]) -> None:
    unknown = [label for label in labels if label not in found.labels]
    if unknown:
        raise ValueError(f"monitoring: {found.name} has no label {', '.join(unknown)}; it has run, {', '.join(found.labels)}")
