"""A dashboard: sections of panels, the variables that all five share, links between them, and its JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

from deploy.monitoring.expressions import gauge, metric
from deploy.monitoring.panels import SOURCE, PanelBuilder

TAG: Final = "flowfleet"
REPORT_URL: Final = "http://127.0.0.1:8266/"  # of `flowfleet report --serve`
WINDOWS: Final = ("1m", "5m", "15m", "1h")
DEFAULT_WINDOW: Final = "5m"
Variable: TypeAlias = Builder[dashboard.VariableModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Panels under one heading."""

    title: str
    panels: tuple[PanelBuilder, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard before it is JSON."""

    slug: str  # of the file and the uid
    title: str
    text: str
    sections: tuple[Section, ...]
    variables: tuple[Variable, ...] = ()  # besides the shared ones

    def encode(self) -> str:
        """Return the JSON that Grafana provisions, ending in a newline; the same text at every call."""
        built = boards.Dashboard(f"flowfleet / {self.title}").uid(f"flowfleet-{self.slug}").description(self.text)
        built.tags([TAG]).timezone("browser").editable().time("now-1h", "now").refresh("10s").tooltip(
            dashboard.DashboardCursorSync.CROSSHAIR
        )
        built.variables([*shared_variables(), *self.variables]).links(_links())
        number = 0
        for section in self.sections:
            number += 1
            built.with_row(boards.Row(section.title).id(number))
            for panel in section.panels:
                number += 1
                built.with_panel(_numbered(panel, number))
        return json.dumps(json.loads(JSONEncoder().encode(built.build())), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def shared_variables() -> Sequence[Variable]:
    """Data source, run, the window of rates, and where the run's report is served."""
    return (
        boards.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        labels_of("run", "Run", f"label_values({metric('updates_planned', 'gauge').name}, run)"),
        boards.CustomVariable("window").label("Window of rates").values(",".join(WINDOWS)).current(_chosen(DEFAULT_WINDOW)),
        boards.TextBoxVariable("report").label("Report").default_value(REPORT_URL),
    )


def sensor_variable() -> Variable:
    """The sensors of $run; all of them unless some are chosen."""
    found = labels_of("sensor", "Sensor", f"label_values({gauge('sensor_value')}, sensor)")
    return found.multi(True).include_all(True).current(_chosen("All", "$__all"))


def labels_of(name: str, label: str, query: str) -> Any:
    """A variable whose values Prometheus tells."""
    shaped = {"query": query, "qryType": 1, "refId": "PrometheusVariableQueryEditor-VariableQuery"}
    variable = boards.QueryVariable(name).label(label).datasource(SOURCE).query(shaped)
    return variable.refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(dashboard.VariableSort.ALPHABETICAL_ASC)


def _chosen(words: str, value: str = "") -> dashboard.VariableOption:
    return dashboard.VariableOption(selected=True, text=words, value=value or words)


def _links() -> list[Builder[dashboard.DashboardLink]]:
    siblings = boards.DashboardLink("flowfleet").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG]).include_vars(True).keep_time(True)
    report = boards.DashboardLink("Report from the run's files").type(dashboard.DashboardLinkType.LINK).url("${report}").target_blank(True)
    return [siblings, report.icon("external link").tooltip("flowfleet report RUN --serve; the Report variable says where")]


def _numbered(panel: Any, number: int) -> PanelBuilder:
    numbered: PanelBuilder = panel.id(number)
    return numbered
