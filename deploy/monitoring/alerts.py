"""All alerts, and what is written from them: deploy/prometheus/rules/flowfleet.yml and the table of docs/observability.md.

python -m deploy.monitoring.alerts     # writes both; a test holds them equal to this code
"""

import itertools
from collections.abc import Iterator
from typing import Any, Final

import yaml

from deploy.config import PROJECT
from deploy.monitoring.alert import PAGE, Alert
from deploy.monitoring.alerts_fleet import FLEET, STORE, TARGET
from deploy.monitoring.alerts_learning import LEARNING
from deploy.monitoring.alerts_pipeline import PIPELINE, REWARDS

ALERTS: Final[tuple[Alert, ...]] = (*LEARNING, *PIPELINE, *REWARDS, *FLEET, *STORE, *TARGET)
RULES: Final = PROJECT / "deploy" / "prometheus" / "rules" / "flowfleet.yml"
INTERVAL: Final = "15s"  # of evaluation: an alert without `for` comes at most so long after its cause was scraped
BEGIN, END = "<!-- alerts: written by python -m deploy.monitoring.alerts -->", "<!-- end of alerts -->"
_HEADER = "# Written by `python -m deploy.monitoring.alerts`; change the alerts there.\n"


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines as blocks that a person can read."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def encode_yaml(content: Any) -> str:
    """Return plain data as YAML, its keys in their order, its texts on one line each or as blocks."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)
    return text


def rule_of(alert: Alert) -> dict[str, Any]:
    """An alert as Prometheus reads it."""
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.hold,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "description": alert.description, "docs": alert.anchor},
    }


def encode_rules() -> str:
    """Return the rule file, one rule group an area."""
    groups = [
        {"name": f"flowfleet.{area}", "interval": INTERVAL, "rules": [rule_of(alert) for alert in found]}
        for area, found in itertools.groupby(ALERTS, key=lambda alert: alert.area)
    ]
    return _HEADER + encode_yaml({"groups": groups})


def encode_table() -> str:
    """Return the alerts as Markdown tables, one an area; every name is an anchor."""
    return "\n".join(_table())


def _table() -> Iterator[str]:
    for area, found in itertools.groupby(ALERTS, key=lambda alert: alert.area):
        yield f"\n### {area.capitalize()}\n\n| alert | fires when | what it means | what to do |\n| --- | --- | --- | --- |"
        for alert in found:
            name = f'<a id="{alert.name.lower()}"></a>`{alert.name}` ({alert.severity})'
            held = "at once" if alert.hold == "0s" else f"for {alert.hold}"
            cells = (name, f"{alert.when}; {held} ({alert.hold_reason})", alert.means, alert.remedy)
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def with_table(page: str) -> str:
    """Return the page with the table between its marks. Raises ValueError when a mark is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"alerts: {PAGE} lacks the marks {BEGIN} ... {END}; put them where the table is to stand")
    return f"{before}{BEGIN}\n{encode_table()}\n{END}{after}"


def main() -> None:
    """Write the rules and the page's table."""
    RULES.parent.mkdir(parents=True, exist_ok=True)
    RULES.write_text(encode_rules())
    page = PROJECT / PAGE
    page.write_text(with_table(page.read_text()))


if __name__ == "__main__":
    main()
