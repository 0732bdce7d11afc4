"""docs/metrics.md: the table of every metric, from common/metric_catalog.py. `python -m deploy.monitoring.metric_page` writes it."""

from pathlib import Path
from typing import Final

from common.logs import configure_logging, get_logger
from common.metric_catalog import CATALOG, Metric

PAGE: Final = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
MAX_SERIES: Final = 2000  # with 64 workers, 24 reward servers of 3 rewards, 8 sensors and 6 evaluation tasks; a test counts them
_AREAS: Final = {
    "learning": "Learning",
    "pipeline": "Pipeline",
    "rewards": "Rewards",
    "fleet": "Fleet",
    "images": "Images",
    "evaluation": "Evaluation",
    "store": "Run directory",
}
_UNITS: Final = ("seconds", "bytes", "ratio", "updates", "groups", "images", "steps", "calls")
_HEAD: Final = """# Metrics

One `/metrics` shows a whole run: the Coordinator's, in Prometheus' text format. It is off until it has a port:

```bash
flowfleet train tiny-geneval --set cluster.metrics_port=9464
curl -s http://127.0.0.1:9464/metrics
```

`cluster.metrics_host` is 127.0.0.1, so that only the Coordinator's machine can read it; another address, or 0.0.0.0, shows it to whoever
reaches that address, without a password. A port that is taken stops the start with its remedy. `--local` serves the same page. When Ray
starts a Coordinator again, it listens on the same port again; if that fails then, the run goes on without, and its log says so.

Conventions:

- Prefix `flowfleet_`; base units; a ratio lies in [0, 1] unless it is a policy ratio; counters end in `_total`.
- Every series has the label `run`; the labels named below come besides. They are few and bounded: under {max_series:,} series with 64 workers,
  three rewards with eight servers each, eight sensors and six evaluation tasks. A slot that left, or was silent for long, takes its series along.
- A counter begins at 0 with each Coordinator, as `rate()` and `increase()` expect; totals of the whole run are in the files. A gauge of the
  newest update is read from its metrics file, so it is there again at once after a restart.
- What does not exist is absent, never 0: an objective without a ratio has no `flowfleet_policy_ratio_mean`, a loss that was not finite no
  `flowfleet_loss`.
- Prometheus tells the time, not the update. Curves by update come from the run's files (`flowfleet report`), which are the record.

This page is generated from `common/metric_catalog.py` by `python -m deploy.monitoring.metric_page`.
"""


def metric_page() -> str:
    """Return the page."""
    parts = [_HEAD.format(max_series=MAX_SERIES)]
    for area, title in _AREAS.items():
        rows = [_row(metric) for metric in CATALOG if metric.area == area]
        head = "| name | kind | labels | unit | meaning |\n|---|---|---|---|---|"
        parts.append("\n".join([f"## {title}", "", head, *rows, ""]))
    return "\n".join(parts)


def unit_of(metric: Metric) -> str:
    """The unit that a metric's name ends in, "" for a plain number or a count of what its name says."""
    last = metric.name.removesuffix("_total").rpartition("_")[2]
    return last if last in _UNITS else ""


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    buckets = f" Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}." if metric.buckets else ""
    return f"| `{metric.name}` | {metric.kind} | {labels} | {unit_of(metric)} | {metric.text.replace('|', chr(92) + '|')}{buckets} |"


def main() -> None:
    """Write the page."""
    configure_logging()
    PAGE.write_text(metric_page(), encoding="utf-8")
    get_logger("docs").info("wrote %s", PAGE)


if __name__ == "__main__":
    main()
