"""The dashboards: committed as generated, asking only for what the catalog has, complete, and laid out without overlaps."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from common.metric_catalog import CATALOG
from deploy.live import waiting_sentence
from deploy.monitoring import expressions
from deploy.monitoring.board import REPORT_URL, TAG
from deploy.monitoring.build import DASHBOARDS, encoded, write
from deploy.monitoring.pipeline import LONG, VERDICTS, verdict
from tests.promql_names import asked_by, labels_of, metric_of, parsed, problems, substituted

SLUGS = ("fleet", "images", "learning", "pipeline", "rewards")
BUILT_IN = re.compile(r"__\w+")
VARIABLE = re.compile(r"\$\{?(\w+)")
NOT_SHOWN: dict[str, str] = {}  # catalog metric -> why no panel shows it
boards = {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Every panel but the headings."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def targets() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(dashboard, panel title, target) of all."""
    for slug, board in boards.items():
        for panel in panels(board):
            yield from ((slug, panel["title"], target) for target in panel.get("targets", ()))


EVERY = [pytest.param(target, id=f"{slug}-{title}-{target['refId']}") for slug, title, target in targets()]


def test_the_committed_dashboards_are_what_the_code_generates() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in DASHBOARDS.glob("*.json")}
    assert committed == encoded(), "run `make monitoring` and commit what it writes"
    assert sorted(boards) == sorted(SLUGS)


def test_a_dashboard_is_the_same_text_at_every_call(tmp_path: Any) -> None:
    write(tmp_path)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == encoded()


@pytest.mark.parametrize("target", EVERY)
def test_every_expression_asks_only_for_what_the_catalog_has(target: dict[str, Any]) -> None:
    assert not list(problems(target["expr"]))


@pytest.mark.parametrize("target", EVERY)
def test_every_legend_names_labels_that_its_series_have(target: dict[str, Any]) -> None:
    legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    has = {label for asked in asked_by(target["expr"]) for label in labels_of(asked.name)}
    assert legend <= has


def test_every_metric_of_the_catalog_is_shown_or_its_absence_has_a_reason() -> None:
    shown = {
        metric.name for _, _, target in targets() for asked in asked_by(target["expr"]) if (metric := metric_of(asked.name)) is not None
    }
    assert {metric.name for metric in CATALOG} - shown == NOT_SHOWN.keys()


@pytest.mark.parametrize("slug", SLUGS)
def test_every_panel_says_what_it_shows_and_in_which_unit(slug: str) -> None:
    for panel in panels(boards[slug]):
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["type"] == "text" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["type"] == "text" or panel["targets"], panel["title"]
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert letters == sorted(set(letters)), panel["title"]
        assert all(target["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for target in panel.get("targets", ()))


@pytest.mark.parametrize("slug", SLUGS)
def test_no_panel_overlaps_another_or_leaves_the_grid(slug: str) -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in boards[slug]["panels"]]
    for title, place in places:
        assert place["x"] >= 0 and place["w"] > 0 and place["h"] > 0 and place["x"] + place["w"] <= 24, title
    for (one, first), (two, second) in combinations(places, 2):
        beside = first["x"] + first["w"] <= second["x"] or second["x"] + second["w"] <= first["x"]
        under = first["y"] + first["h"] <= second["y"] or second["y"] + second["h"] <= first["y"]
        assert beside or under, (one, two)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_row_of_panels_fills_the_width(slug: str) -> None:
    widths: dict[int, int] = {}
    for panel in panels(boards[slug]):
        if "repeat" not in panel:  # Grafana lays these out
            widths[panel["gridPos"]["y"]] = widths.get(panel["gridPos"]["y"], 0) + panel["gridPos"]["w"]
    assert set(widths.values()) == {24}, widths


@pytest.mark.parametrize("slug", SLUGS)
def test_every_variable_that_is_used_is_defined(slug: str) -> None:
    board = boards[slug]
    defined = {variable["name"] for variable in board["templating"]["list"]}
    used = {name for name in VARIABLE.findall(json.dumps(board)) if not BUILT_IN.fullmatch(name)}
    assert used <= defined
    assert {"datasource", "run", "report"} <= used


def test_uids_are_stable_unique_and_every_dashboard_links_to_the_others() -> None:
    assert sorted(board["uid"] for board in boards.values()) == [f"flowfleet-{slug}" for slug in SLUGS]
    for board in boards.values():
        numbers = [panel["id"] for panel in board["panels"]]
        assert len(set(numbers)) == len(numbers)
        assert board["tags"] == [TAG]
        assert (board["links"][0]["type"], board["links"][0]["tags"]) == ("dashboards", [TAG])
        assert (board["time"], board["refresh"]) == ({"from": "now-1h", "to": "now"}, "10s")


def test_the_exact_curves_are_told_where_they_are() -> None:
    (exact,) = (panel for panel in panels(boards["learning"]) if panel["type"] == "text")
    for words in ("flowfleet report RUN --serve", "${report}", "resume"):
        assert words in exact["options"]["content"]
    (report,) = (variable for variable in boards["learning"]["templating"]["list"] if variable["name"] == "report")
    assert report["query"] == REPORT_URL == "http://127.0.0.1:8266/"


def test_the_verdict_draws_the_live_lines_line() -> None:
    assert waiting_sentence({"learner": LONG}).startswith("learner waits")
    assert waiting_sentence({"learner": LONG - 1e-6, "rollout": LONG}).startswith("rollout waits")
    assert waiting_sentence({"learner": LONG - 1e-6}).startswith("balanced")
    assert set(VERDICTS) == {"0", "1", "2", "3"}
    assert list(problems(verdict())) == []


PLANTED = (
    ("flowfleet_updat{run=\"$run\"}", "is not in the catalog"),
    ("flowfleet_update", "every run at once"),
    ('flowfleet_reward_mean{run="$run",rewards="x"}', "has no label rewards"),
    ('flowfleet_groups_dropped_total{run="$run"}', "without rate or increase"),
    ('sum(flowfleet_groups_dropped_total{run="$run"})', "without rate or increase"),
    ('flowfleet_reward_latency_seconds{run="$run"}', "is not in the catalog"),
    ('rate(flowfleet_update{run="$run"}[$window])', "is a gauge under rate"),
    ('sum by (slot) (rate(flowfleet_groups_dropped_total{run="$run"}[$window]))', "groups by slot"),
)  # fmt: skip


@pytest.mark.parametrize(("expression", "words"), PLANTED)
def test_a_planted_fault_of_an_expression_is_found(expression: str, words: str) -> None:
    (problem,) = problems(expression)
    assert words in problem


def test_what_is_no_promql_is_refused() -> None:
    with pytest.raises(ValueError):
        parsed('sum(rate(flowfleet_update{run="$run"}[$window])')
    assert substituted("$run $run_x", {"$run": "a", "$run_x": "b"}) == "a b"


def test_a_name_label_kind_or_matcher_that_the_catalog_lacks_is_an_error_when_the_dashboard_is_made() -> None:
    for make in (
        lambda: expressions.gauge("updat"), lambda: expressions.gauge("groups_dropped_total"), lambda: expressions.rate("update"),
        lambda: expressions.rate("groups_dropped", "slot"), lambda: expressions.gauge("reward_mean", 'rewards="x"'),
        lambda: expressions.gauge("reward_mean", "reward=x"), lambda: expressions.quantile(0.5, "update"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="monitoring: "):
            make()


def test_what_never_happened_is_zero_and_a_run_that_is_not_scraped_is_nothing() -> None:
    """The zero is made from a series of the run itself, never from a constant."""
    expression = expressions.rises("groups_dropped", "reason")
    assert [asked.name for asked in asked_by(expression)] == ["flowfleet_groups_dropped_total", "flowfleet_updates_planned"]
    assert "vector(" not in "".join(target["expr"] for _, _, target in targets())
