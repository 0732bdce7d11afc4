"""`flowfleet compare`: what a run evaluated already is used as it lies there, the rest is drawn; the page opens offline and hides no loss."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from common.errors import ConfigError
from common.store.media import read_media
from common.store.recovery import adapters
from common.store.run_store import RunStore
from deploy.commands.comparison import show_comparison
from deploy.compare import CompareRequest, OneEvaluation, compare
from deploy.evaluate import EvaluationRequest, evaluate
from deploy.lora.export import export_adapter
from deploy.options import run_config_of
from deploy.report.compare_page import Card, Comparison, PageFacts, Side, make_comparison, render_comparison, sorted_cards
from deploy.report.reader import read_history
from deploy.report.samples import MediaShelf
from deploy.session import run_session
from deploy.subjects import JudgeOptions, judging_config, read_subject
from tests.report_runs import evaluation, start
from tests.run_fixtures import QUIET, SMALL, local_options, small_config

HOSTILE = '</script><script>alert("x")</script> & <img src=x onerror=y>'


@pytest.fixture(scope="module")
def run_dir(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates, evaluated at 0, 1 and 2; its learning rate is so high that images change."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    sets = ("schedule.max_staleness=0", "schedule.num_updates=2", "evaluation.every=1", "learner.learning_rate=2e-2")
    run_session(small_config(tiny_sd3_dir, "tiny-geneval", *sets), local_options(folder), QUIET)
    return folder


def no_drawing(*_: Any) -> None:
    raise AssertionError("an image was made again")


def judged_as(model: Path) -> JudgeOptions:
    """By the recipe that the run was started from."""
    return JudgeOptions(recipe="tiny-geneval", sets=(*SMALL, f'model.path="{model}"'))


def test_versions_of_a_run_are_compared_from_its_own_files_without_drawing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.compare.draw_evaluation", no_drawing)
    before = sorted(path for path in run_dir.rglob("*"))
    request = CompareRequest(first=str(run_dir), second=str(run_dir), first_version=1, out=tmp_path / "page.html")
    comparison = compare(request, QUIET)
    assert [(side.letter, side.record.version) for side in comparison.sides] == [("base", 0), ("A", 1), ("B", 2)]
    stored = json.loads(next((run_dir / "eval").glob("v000002.*/result.json")).read_text())
    assert comparison.main.lines[0][1].row.after == pytest.approx(stored["rewards"]["jpeg_compressibility"]["mean"])
    assert sorted(path for path in run_dir.rglob("*")) == before  # a run is only read


def test_the_page_opens_offline_holds_every_image_and_names_the_protocol(run_dir: Path, tmp_path: Path) -> None:
    compare(CompareRequest(first=str(run_dir), second=str(run_dir), first_version=1, out=tmp_path / "page.html"), QUIET)
    page = (tmp_path / "page.html").read_text()
    assert "http://" not in page and "https://" not in page and "src=//" not in page
    assert "default-src 'none'" in page
    pictures = re.findall(r'<img class="shot[^"]*" src="data:image/webp;base64,([^"]+)"', page)
    assert len(pictures) == 8 * 3
    digest = next((run_dir / "eval").glob("v000002.*")).name.rpartition(".")[2]
    assert f"protocol {digest}: ODE, 2 steps, guidance (CFG) 1, seed 20250505 by prompt id, 8 prompts" in page
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as image:
        shown = np.asarray(image.convert("RGB"))
    sheets = [
        read_media(RunStore(str(run_dir)), str(path.relative_to(run_dir))).images
        for path in (run_dir / "eval").glob("v000000.*/*.media.arrow")
    ]
    assert any((shown == picture).all() for sheet in sheets for picture in sheet)  # lossless: the base's own pixels
    numbers = json.loads(re.search(r'id="numbers">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert [(table["first"], table["second"]) for table in numbers["tables"]] == [("A", "B"), ("base", "A"), ("base", "B")]


def test_an_exported_lora_scores_as_the_version_it_came_from_and_the_base_directory_as_version_0(
    run_dir: Path, tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    store = RunStore(str(run_dir))
    path = adapters(store)[2]
    lora = export_adapter(store.read(path), "ema", run_config_of(store).model, tmp_path / "lora", "diffusers")
    request = CompareRequest(first=str(run_dir), second=str(lora), judge=judged_as(tiny_sd3_dir), out=tmp_path / "page.html")
    comparison = compare(request, QUIET)
    assert [side.origin.partition(",")[0] for side in comparison.sides] == ["from the run's own evaluation"] * 2 + ["drawn for this page"]
    (_, line), *_ = comparison.main.lines
    assert (line.wins, line.losses, line.row.difference, line.win_rate.value) == (0, 0, 0.0, 0.5)
    again = compare(
        CompareRequest(first=str(tiny_sd3_dir), second=str(run_dir), judge=judged_as(tiny_sd3_dir), out=tmp_path / "two.html"), QUIET
    )
    assert [(side.letter, side.record.version) for side in again.sides] == [("A", 0), ("B", 2)]  # A is the base: no third column
    assert again.others == ()
    assert (tmp_path / "two.html").read_text().count('<img class="shot') == 16


def test_a_run_judged_by_other_steps_is_drawn_anew(run_dir: Path, tmp_path: Path) -> None:
    judge = JudgeOptions(sets=("evaluation.num_steps=1", "evaluation.max_prompts=2"))
    comparison = compare(CompareRequest(first=str(run_dir), second=str(run_dir), judge=judge, out=tmp_path / "page.html"), QUIET)
    assert {side.origin for side in comparison.sides} == {"drawn for this page"}
    assert comparison.main.first.record.protocol["num_steps"] == 1
    (_, line), *_ = comparison.main.lines
    assert (line.wins, line.ties, line.losses) == (0, 2, 0)  # the same weights on both sides


def test_what_cannot_be_compared_is_said(run_dir: Path, tiny_sd3_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --recipe"):
        compare(CompareRequest(first=str(tiny_sd3_dir), second=str(tiny_sd3_dir), out=tmp_path / "page.html"), QUIET)
    with pytest.raises(ConfigError, match=r"has no version 3; leave it out"):
        compare(CompareRequest(first=str(tiny_sd3_dir), second=str(run_dir), first_version=3, judge=judged_as(tiny_sd3_dir)), QUIET)
    with pytest.raises(ConfigError, match=r"keeps no weights of version 7, only of \["):
        evaluate(EvaluationRequest(target=str(run_dir), version=7), QUIET)
    subject = read_subject(str(run_dir), judging_config(str(run_dir), None), JudgeOptions(snapshot="base"))
    assert (subject.kind, subject.version) == ("base", 0)


def made_side(letter: str, scores: dict[str, list[float | None]], text: str) -> Side:
    """A side of drawn images with chosen scores."""
    store = RunStore(f"memory://compare-{letter}-{abs(hash(text)) % 10**6}")
    start(store)
    directory = evaluation(store, 0 if letter == "base" else 4, scores, text=text)
    files = OneEvaluation(files=store, directory=directory)
    (record,) = read_history(files).evaluations
    return Side(letter=letter, name=f"model {letter}", origin="drawn by hand", record=record, shelf=MediaShelf(files))


def made_comparison(text: str = "prompt {index} of {tag}") -> Comparison:
    return make_comparison(
        made_side("base", {"counting": [0.0, 0.0, 0.0, 0.0]}, text),
        made_side("A", {"counting": [1.0, 0.5, 0.0, None]}, text),
        made_side("B", {"counting": [0.75, 0.5, 1.0, 1.0]}, text),
    )


def test_cards_are_sorted_by_where_b_loses_most_and_what_has_no_score_comes_last() -> None:
    cards: list[Card] = sorted_cards(made_comparison())
    assert [card.prompt for card in cards] == [f"prompt {index} of counting" for index in (0, 1, 2, 3)]
    assert [card.differences[0][1] for card in cards] == [-0.25, 0.0, 1.0, None]
    assert [card.outcome for card in cards] == ["loss", "tie", "win", "none"]
    turned = make_comparison(None, made_comparison().pair[1], made_comparison().pair[0])
    assert [card.prompt[7] for card in sorted_cards(turned)] == ["2", "1", "0", "3"]


def test_a_hostile_prompt_is_shown_as_text() -> None:
    facts = PageFacts(title=HOSTILE, facts=((HOSTILE, HOSTILE),), protocol=HOSTILE, warnings=(HOSTILE,))
    page = render_comparison(made_comparison(HOSTILE + " {index}"), facts)
    assert page.count("<script") == 2 and page.count("</script>") == 2  # the page's own two
    assert "<img src=x" not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(&#34;x&#34;)") >= 4 * 2
    assert json.loads(re.search(r'id="numbers">(.*?)</script>', page, re.DOTALL)[1])["protocol"] == HOSTILE  # type: ignore[index]


def test_the_terminal_shows_the_difference_its_interval_and_the_win_rate() -> None:
    sink = io.StringIO()
    show_comparison(made_comparison(), Console(file=sink, width=160))
    shown = sink.getvalue()
    assert "geneval_strict: B against A" in shown
    # scored on both sides: -0.25, 0, +1: mean .25; one win, one tie, one loss
    assert "+0.250" in shown and "50.0%" in shown and "a tie is half a win" in shown
