"""report.html: one self-contained file that opens offline; and its parts, which the live page exchanges while a run goes on."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deploy.report.compare import NUM_RESAMPLES, TableRow, run_table
from deploy.report.curves import draw_fleet, draw_objective, throughput, train_rewards
from deploy.report.drawing import Panel
from deploy.report.image_curves import SensorRecord, draw_sensors, numbers_of, read_sensors
from deploy.report.reader import read_history
from deploy.report.records import EvaluationRecord, RunFiles, RunHistory
from deploy.report.reweighting import Reweighting, draw_reweighting
from deploy.report.samples import MAX_VERSIONS, ImageShelf, MediaShelf, sample_grid, train_extremes
from deploy.report.verdict import duration, figure, sentences, waiting_share

_DIGEST = 12  # shown characters of a digest
TEMPLATES = Path(__file__).parent / "templates"
PARTS = ("head", "findings", "alerts", "rewards", "samples", "table", "training", "fleet", "extremes", "reweighting", "record")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PageParts:
    """A drawn report in the pieces that the live page exchanges one by one; a piece without anything to tell is empty."""

    title: str
    parts: Mapping[str, Markup]  # name -> html, in PARTS' order
    numbers: Mapping[str, Any]  # everything drawn


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
    """Return the html of the page that is one file."""
    drawn = render_parts(read_history(store), MediaShelf(store), reweighting=reweighting)
    return make_environment().get_template("report.html.j2").render(
        title=drawn.title, parts=drawn.parts, numbers=script_json(drawn.numbers), script=script_text("samples.js", "report.js")
    )  # fmt: skip


def render_parts(
    history: RunHistory, shelf: ImageShelf, *, max_versions: int = MAX_VERSIONS, reweighting: Reweighting | None = None
) -> PageParts:
    """Draw every part of the report.

    Args:
        history: of the run.
        shelf: where images come from, and what stands in the page for one: its bytes, or a link.
        max_versions: evaluated versions under the slider.
        reweighting: what other reward weights would have said, where somebody asked.

    Raises:
        CorruptFile: a media file breaks its form; the message names it.
        StoreError: a file went away meanwhile.
    """
    rows, sensors = run_table(history), read_sensors(history, shelf)
    curves = _present(draw_sensors(sensors))
    best, worst = train_extremes(history, shelf)
    told = {
        "history": history,
        "facts": run_facts(history),
        "sentences": sentences(history, rows, sensors),
        "alerts": sensors.alerts,
        "alert_curves": curves if sensors.alerts else [],
        "reweighting": reweighting,
        "reweighted": draw_reweighting(reweighting) if reweighting else [],
        "tiles": _tiles(history, rows),
        "lines": table_lines(rows),
        "protocol": protocol_line(history.newest or history.base),
        "num_resamples": NUM_RESAMPLES,
        "rewards": train_rewards(history),
        "training": [*draw_objective(history), *([] if sensors.alerts else curves)],
        "fleet": draw_fleet(history),
        "grid": sample_grid(history, shelf, max_versions),
        "best": best,
        "worst": worst,
        "config_text": json.dumps(history.config, indent=2, ensure_ascii=False),
        "environment_text": json.dumps(history.environment, indent=2, ensure_ascii=False),
    }
    environment = make_environment()
    parts = {name: Markup(environment.get_template(f"parts/{name}.html.j2").render(told).strip()) for name in PARTS}
    return PageParts(title=history.name, parts=parts, numbers=_numbers(history, rows, sensors))


def script_text(*names: str) -> Markup:
    """The page's own scripts, from files beside the templates: nothing of a run is in them."""
    text = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)
    assert not re.search(r"</script", text, re.IGNORECASE), "a script element ends at the first closing tag"
    return Markup(text)


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
    schedule = history.config.get("schedule", {})
    planned, limit_s = schedule.get("num_updates"), schedule.get("time_limit_s")
    images, seconds = sum(record.images for record in history.updates), history.elapsed_s[-1]
    rates = [rate for rate in throughput(history) if rate is not None]
    waits = waiting_share(history)
    tiles = [
        Tile(label="updates", value=str(history.updates[-1].update), note=f"of {planned:,} planned" if planned and not limit_s else ""),
        Tile(label="running time", value=duration(seconds), note=f"limit {duration(limit_s)}" if limit_s else ""),
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
