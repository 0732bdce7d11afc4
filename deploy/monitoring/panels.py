"""Small helpers over grafana-foundation-sdk: one call makes one panel, with the same manners everywhere.

A panel has a title, a text (one or two sentences: what it shows, when to worry), a unit and its queries. Widths are of 24 columns, heights
in Grafana's rows. Colors: green is well, orange is to be looked at, red is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, text, timeseries, xychart
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import text as text_models
from grafana_foundation_sdk.models import xychart as xychart_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat, QueryEditorMode

PanelBuilder: TypeAlias = Builder[dashboard.Panel]
SOURCE: Final = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, ORANGE, RED, BLUE, GRAY = "green", "orange", "red", "blue", "text"
PLAIN, SHARE, SECONDS, BYTES, SCIENTIFIC, COUNT = "none", "percentunit", "s", "bytes", "sci", "short"
IMAGES_PER_S, GROUPS_PER_S, SLOTS, UPDATES = "suffix:images/s", "suffix:groups/s", "suffix:slots", "suffix:updates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One question to Prometheus."""

    expr: str
    legend: str  # Grafana's template: {{label}}
    is_instant: bool = False
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What every panel has."""

    title: str
    text: str
    unit: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """From this value on, this color; None: from below."""

    value: float | None
    color: str


def frame(title: str, unit: str, text: str, *, width: int = 8, height: int = 8) -> Frame:
    """A Frame in one line."""
    return Frame(title=title, text=text, unit=unit, width=width, height=height)


def ask(expr: str, legend: str = "") -> Query:
    """A query over the time that is shown."""
    return Query(expr=expr, legend=legend)


def now(expr: str, legend: str = "") -> Query:
    """A query for the newest value only: of a run that is no longer scraped it shows nothing."""
    return Query(expr=expr, legend=legend, is_instant=True)


def above(*limits: tuple[float, str], well: str = GREEN) -> list[Step]:
    """Steps that turn to a color from a value on."""
    return [Step(value=None, color=well), *(Step(value=value, color=color) for value, color in limits)]


def lines(
    shown: Frame,
    *queries: Query,
    steps: Sequence[Step] = (),
    dashed: str = "",
    strong: str = "",
    low: float | None = None,
    high: float | None = None,
    style: Literal["line", "bars", "stacked"] = "line",
) -> PanelBuilder:
    """Lines over time.

    Args:
        shown: title, text, unit, size.
        queries: one or several.
        steps: drawn as dashed threshold lines.
        dashed: regular expression of legends that are limits: dashed, red, never stacked.
        strong: of legends that are drawn thick, with their points.
        low: least value of the axis; None: as the values have it.
        high: its largest.
        style: lines, bars, or filled and stacked.
    """
    panel = _framed(timeseries.Panel(), shown, queries)
    panel.line_width(1).fill_opacity(0).show_points(common.VisibilityMode.NEVER).span_nulls(60_000).tooltip(
        common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    ).legend(
        common_builders.VizLegendOptions().show_legend(True).display_mode(common.LegendDisplayMode.TABLE)
        .placement(common.LegendPlacement.BOTTOM).calcs(["lastNotNull"])
    )  # fmt: skip
    if style == "bars":
        panel.draw_style(common.GraphDrawStyle.BARS).fill_opacity(60)
    if style == "stacked":
        panel.fill_opacity(40).stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if steps:
        panel.thresholds(_thresholds(steps)).thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        )
    if strong:
        panel.override_by_regexp(f"/{strong}/", _properties({"custom.lineWidth": 3, "custom.showPoints": "always", "custom.pointSize": 6}))
    if dashed:
        panel.override_by_regexp(f"/{dashed}/", _properties(_LIMIT))
    _bound(panel, low, high)
    return panel


_LIMIT: Final[Mapping[str, object]] = {
    "custom.lineStyle": {"fill": "dash", "dash": [8, 6]}, "custom.fillOpacity": 0, "custom.stacking": {"mode": "none", "group": "A"},
    "custom.drawStyle": "line", "color": {"mode": "fixed", "fixedColor": RED},
}  # fmt: skip


def number(
    shown: Frame,
    *queries: Query,
    steps: Sequence[Step] = (),
    texts: Mapping[str, tuple[str, str]] | None = None,
    shows_name: bool = False,
) -> PanelBuilder:
    """Large numbers: the newest values.

    Args:
        shown: title, text, unit, size.
        queries: of `now`.
        steps: colors by value.
        texts: value -> (words, color) that stand for it.
        shows_name: the legend instead of the number.
    """
    panel = _framed(stat.Panel(), shown, queries)
    panel.graph_mode(common.BigValueGraphMode.NONE).color_mode(common.BigValueColorMode.VALUE).reduce_options(
        common_builders.ReduceDataOptions().calcs(["lastNotNull"])
    ).text_mode(common.BigValueTextMode.NAME if shows_name else common.BigValueTextMode.AUTO)
    panel.thresholds(_thresholds(steps or above(well=GRAY)))
    if texts:
        panel.mappings([_mapping(texts)])
    return panel


def timeline(shown: Frame, *queries: Query, texts: Mapping[str, tuple[str, str]]) -> PanelBuilder:
    """States over time, one band a series; texts: value -> (words, color)."""
    panel = _framed(statetimeline.Panel(), shown, queries)
    panel.mappings([_mapping(texts)]).show_value(common.VisibilityMode.NEVER).merge_values(True).fill_opacity(70).line_width(0)
    return panel.thresholds(_thresholds(above(well=GRAY)))


def heat(shown: Frame, query: Query) -> PanelBuilder:
    """The buckets of a histogram over time; the query gives one series a bucket, by `le`."""
    shaped = Query(expr=query.expr, legend="{{le}}", form=PromQueryFormat.HEATMAP)
    panel = _framed(heatmap.Panel(), shown, (shaped,))
    panel.calculate(False).cell_gap(1).y_axis(heatmap.YAxisConfig().unit(shown.unit)).show_legend()
    color = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
    return panel.color(color.scale(heatmap_models.HeatmapColorScale.EXPONENTIAL).exponent(0.5).reverse(False))


def scatter(shown: Frame, x: Query, *queries: Query) -> PanelBuilder:
    """Points of the queries' values against those of `x` at the same moment, joined on time."""
    panel = _framed(xychart.Panel(), shown, (x, *queries))
    panel.with_transformation(dashboard.DataTransformerConfig(id_val="joinByField", options={"byField": "Time", "mode": "outer"}))
    matcher = xychart.MatcherConfig().id("byName").options(x.legend)
    chosen = xychart.XYSeriesConfig().x(xychart.XychartXYSeriesConfigX().matcher(matcher))
    panel.mapping(xychart_models.SeriesMapping.AUTO).series([chosen]).show(xychart_models.XYShowMode.POINTS)
    panel.override_by_name(x.legend, _properties({"unit": PLAIN, "custom.axisLabel": x.legend}))
    return panel.legend(common_builders.VizLegendOptions().show_legend(True).display_mode(common.LegendDisplayMode.LIST)
                        .placement(common.LegendPlacement.BOTTOM).calcs([]))  # fmt: skip


def note(shown: Frame, content: str) -> PanelBuilder:
    """Markdown."""
    return text.Panel().title(shown.title).description(shown.text).span(shown.width).height(shown.height).mode(
        text_models.TextMode.MARKDOWN
    ).content(content)  # fmt: skip


def repeated(panel: Any, variable: str, per_row: int) -> PanelBuilder:
    """The panel once for each value of a variable; it stands alone in its section."""
    repeating: PanelBuilder = panel.repeat(variable).repeat_direction("h").max_per_row(per_row)
    return repeating


def _framed(panel: Any, shown: Frame, queries: Sequence[Query]) -> Any:
    panel.title(shown.title).description(shown.text).unit(shown.unit).span(shown.width).height(shown.height).datasource(SOURCE)
    for index, query in enumerate(queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).format(query.form).ref_id(chr(ord("A") + index))
        target.editor_mode(QueryEditorMode.CODE).datasource(SOURCE)
        panel.with_target(target.instant() if query.is_instant else target.range())
    return panel


def _bound(panel: Any, low: float | None, high: float | None) -> None:
    if low is not None:
        panel.min(low)
    if high is not None:
        panel.max(high)


def _thresholds(steps: Sequence[Step]) -> boards.ThresholdsConfig:
    found = [dashboard.Threshold(value=step.value, color=step.color) for step in steps]
    return boards.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(found)


def _mapping(texts: Mapping[str, tuple[str, str]]) -> dashboard.ValueMap:
    results = {
        value: dashboard.ValueMappingResult(text=words, color=color, index=index)
        for index, (value, (words, color)) in enumerate(texts.items())
    }
    return dashboard.ValueMap(options=results)


def _properties(values: Mapping[str, object]) -> list[dashboard.DynamicConfigValue]:
    return [dashboard.DynamicConfigValue(id_val=name, value=value) for name, value in values.items()]
