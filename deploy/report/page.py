"""report.html: one self-contained file that opens offline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deploy.report.compare import NUM_RESAMPLES, TableRow, run_table
from deploy.report.curves import Panel, draw_fleet, draw_training, throughput
from deploy.report.image_curves import SensorRecord, draw_sensors, numbers_of, read_sensors
from deploy.report.reader import read_history
from deploy.report.records import EvaluationRecord, RunFiles, RunHistory
from deploy.report.reweighting import Reweighting, draw_reweighting
from deploy.report.samples import MediaShelf, sample_grid, train_extremes
from deploy.report.verdict import duration, figure, sentences, waiting_share

_DIGEST = 12  # shown characters of a digest
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One big number."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLine:
    """A table row with where its interval lies on the drawn axis, in percent of its width."""

    row: TableRow
    is_first: bool  # of its reward
    zero: float
    low: float
    width: float
    middle: float


def write_report(store: RunFiles, out_path: Path, reweighting: Reweighting | None = None) -> Path:
    """Draw a run's report; parts without files yet are left out.

    Args:
        store: the run directory.
        out_path: the html file, written over if it exists.
        reweighting: what other reward weights would have said, where somebody asked.

    Raises:
        CorruptFile: a file of the run breaks its form; the message names it.
    """
    html = render_report(store, reweighting)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    out_path.write_text(html, encoding="utf-8")
    return out_path


def render_report(store: RunFiles, reweighting: Reweighting | None = None) -> str:
    """Return the page's html."""
    history, shelf = read_history(store), MediaShelf(store)
    rows = run_table(history)
    sensors = read_sensors(history, shelf)
    curves = _present(draw_sensors(sensors))
    best, worst = train_extremes(history, shelf)
    return make_environment().get_template("report.html.j2").render(
        history=history,
        title=history.name,
        facts=run_facts(history),
        sentences=sentences(history, rows, sensors),
        alerts=sensors.alerts,
        alert_curves=curves if sensors.alerts else [],
        reweighting=reweighting,
        reweighted=draw_reweighting(reweighting) if reweighting else [],
        tiles=_tiles(history, rows),
        lines=table_lines(rows),
        protocol=protocol_line(history.newest or history.base),
        num_resamples=NUM_RESAMPLES,
        training=[*draw_training(history), *([] if sensors.alerts else curves)],
        fleet=draw_fleet(history),
        grid=sample_grid(history, shelf),
        best=best,
        worst=worst,
        config_text=json.dumps(history.config, indent=2, ensure_ascii=False),
        environment_text=json.dumps(history.environment, indent=2, ensure_ascii=False),
        numbers=script_json(_numbers(history, rows, sensors)),
    )  # fmt: skip


def make_environment() -> Environment:
    """The templates, escaping everything that a run says."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["score"] = score
    environment.filters["figure"] = figure
    environment.filters["level"] = level
    return environment


def score(value: float | None) -> str:
    """A badge's text: two decimals, or two significant digits when it is small."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def level(value: float | None) -> str:
    """A score's badge: only scores in [0, 1] are called good or bad."""
    if value is None:
        return "none"
    if not 0 <= value <= 1:
        return "plain"
    return "high" if value >= 0.75 else "low" if value <= 0.25 else "middle"


def script_json(tables: Mapping[str, Any]) -> Markup:
    """Return JSON that is safe inside a script element: no character can end it."""
    text = json.dumps(tables, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _present(panel: Panel | None) -> list[Panel]:
    return [] if panel is None else [panel]


def run_facts(history: RunHistory) -> list[tuple[str, str]]:
    """What the header says below the name."""
    environment = history.environment
    commit, mark, _ = str(environment.get("commit") or "unknown").partition("+")
    facts = [
        ("config", history.config_digest[:_DIGEST]),
        ("commit", commit[:_DIGEST] + ("+changes" if mark else "")),
        ("machine", _machine(environment)),
        ("starts", str(history.incarnations)),
    ]
    model = history.config.get("model", {}).get("path")
    return [*facts, ("model", str(model))] if model else facts


def _machine(environment: Mapping[str, Any]) -> str:
    parts = [_plain(environment[key]) for key in ("cpu", "devices", "gpus") if environment.get(key)]
    if environment.get("num_cpus"):
        parts.append(f"{environment['num_cpus']} cores")
    if environment.get("memory_bytes"):
        parts.append(f"{float(environment['memory_bytes']) / 2**30:.0f} GiB")
    return ", ".join(parts) or str(environment.get("platform") or "not on file")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def protocol_line(evaluation: EvaluationRecord | None) -> str:
    """The frozen protocol in one line, "" without an evaluation."""
    if evaluation is None:
        return ""
    known = {key: _plain(value) for key, value in evaluation.protocol.items() if value is not None and value != []}
    parts = [f"{key.replace('_', ' ')} {value[:_DIGEST] if key.endswith('digest') else value}" for key, value in known.items()]
    return f"Protocol {evaluation.digest[:_DIGEST]}: {', '.join(parts)}"


def table_lines(rows: Sequence[TableRow]) -> list[TableLine]:
    """Place every interval on one axis that holds 0."""
    if not rows:
        return []
    left, right = min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows))
    percent = 100 / ((right - left) or 1.0)
    firsts = [position == 0 or rows[position - 1].reward != row.reward for position, row in enumerate(rows)]
    return [
        TableLine(
            row=row,
            is_first=is_first,
            zero=percent * (0.0 - left),
            low=percent * (row.low - left),
            width=percent * (row.high - row.low),
            middle=percent * (row.difference - left),
        )
        for row, is_first in zip(rows, firsts, strict=True)
    ]


def _tiles(history: RunHistory, rows: Sequence[TableRow]) -> list[Tile]:
    tiles = []
    if rows:
        first = rows[0]
        tone = {"rose": "good", "fell": "bad", "unclear": ""}[first.verdict]
        value, note = f"{figure(first.before)} → {figure(first.after)}", figure(first.difference, signed=True)
        tiles.append(Tile(label=f"frozen {first.reward}", value=value, note=note, tone=tone))
    elif history.evaluations:
        name, result = next(iter(history.evaluations[-1].rewards.items()), ("", None))
        if result is not None and result.mean is not None:
            tiles.append(Tile(label=f"frozen {name}", value=figure(result.mean), note=f"version {history.evaluations[-1].version}"))
    return [*tiles, *_effort(history)] if history.updates else tiles


def _effort(history: RunHistory) -> list[Tile]:
    planned = history.config.get("schedule", {}).get("num_updates")
    images, seconds = sum(record.images for record in history.updates), history.elapsed_s[-1]
    rates = [rate for rate in throughput(history) if rate is not None]
    waits = waiting_share(history)
    tiles = [
        Tile(label="updates", value=str(history.updates[-1].update), note=f"of {planned} planned" if planned else ""),
        Tile(label="running time", value=duration(seconds)),
        Tile(label="images trained on", value=f"{images:,}"),
    ]
    if rates:
        tiles.append(Tile(label="images per second", value=f"{median(rates):.1f}", note="median of updates"))
    if waits is not None:
        tiles.append(Tile(label="learner waited", value=f"{waits:.0%}", note="of its time"))
    return tiles


def _numbers(history: RunHistory, rows: Sequence[TableRow], sensors: SensorRecord) -> dict[str, Any]:
    """Everything drawn, as plain numbers."""
    return {
        "name": history.name,
        "config_digest": history.config_digest,
        "table": [asdict(row) for row in rows],
        "updates": [asdict(record) for record in history.updates],
        "elapsed_s": list(history.elapsed_s),
        "sensors": numbers_of(sensors),
        "evaluations": [{key: value for key, value in asdict(record).items() if key != "rows"} for record in history.evaluations],
    }
