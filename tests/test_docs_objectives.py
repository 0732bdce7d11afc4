"""The page on objectives is right: every objective has its paragraph, recipes and metrics that it names exist, links lead somewhere."""

import re
from pathlib import Path

import pytest

from deploy.config import load_config, recipe_names
from learner.objectives.registry import OBJECTIVES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/*/README.md"))]
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("learner", "common", "rollout_workers")
    for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip


def section(title: str) -> str:
    """What stands under a heading, to the next of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{2,3}} |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no heading {title!r}"
    return found[2]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_has_its_sentences_formula_storage_use_and_recipe(name: str) -> None:
    title = next((line for line in re.findall(r"^### (.*)$", PAGE, re.MULTILINE) if line.split()[0] == name), None)
    assert title is not None
    text = section(title)
    assert re.search(r"^    .*(loss|log rho)", text, re.MULTILINE)
    assert re.search(r"Stores the", text) and re.search(r"Right ", text) and re.search(r"\b[Mm]easured\b", text)
    assert any(load_config(recipe, []).learner.objective.name == name for recipe in recipe_names() if f"`{recipe}`" in text)


def test_the_page_names_every_shipped_recipe_and_no_other() -> None:
    named = set(re.findall(r"`((?:tiny|sd35m|flux1)-[a-z0-9-]+)`", PAGE))
    assert named == set(recipe_names())


def test_what_is_printed_for_flux_is_taken_by_the_configuration() -> None:
    commands = re.sub(r"\\\n\s*", "", section("FLUX.1"))
    found = re.findall(r"^    flowfleet (?:doctor|train) (\S+) (--set .*)$", commands, re.MULTILINE)
    assert len(found) == 2
    for recipe, sets in found:
        load_config(recipe, re.findall(r"--set (\S+)", sets))


def test_the_metrics_of_the_failure_table_exist() -> None:
    rows = [line.split("|") for line in section("Known failures, and what shows them").splitlines() if line.startswith("| ")][2:]
    names = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row[2])}
    assert len(names) > 15
    assert {name for name in names if f'"{name}"' not in SOURCES and not re.search(rf"\b{name}\b", SOURCES)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_of_the_docs_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
