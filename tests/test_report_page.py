"""report.html from real files: right numbers, nothing from outside, whatever the run holds so far."""

import json
import re
from pathlib import Path

import pytest
import report_runs

from common.errors import CorruptFile
from common.store import paths
from common.store.media import write_media
from common.store.run_store import RunStore
from deploy.report.compare import MEAN, run_table
from deploy.report.curves import throughput
from deploy.report.drawing import smooth
from deploy.report.page import render_report, write_report
from deploy.report.reader import read_history
from deploy.report.samples import MediaShelf, sample_grid, train_extremes
from deploy.report.verdict import figure, waiting_share


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


def small_run(store: RunStore) -> None:
    """Two updates, a base evaluation and one after: colors .5 -> 1, counting .25 -> .5 over four prompts each."""
    report_runs.start(store)
    for update in (1, 2):
        report_runs.put_json(store, paths.metrics_path(update, 1), report_runs.metrics(update, 2))
    report_runs.evaluation(store, 0, {"colors": [1.0, 0.0, 1.0, 0.0], "counting": [1.0, 0.0, 0.0, 0.0]})
    report_runs.evaluation(store, 2, {"colors": [1.0, 1.0, 1.0, 1.0], "counting": [1.0, 1.0, 0.0, 0.0]})


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of small_run, drawn once."""
    store = RunStore(str(tmp_path_factory.mktemp("small") / "run"))
    small_run(store)
    return render_report(store)


def test_the_table_holds_the_hand_computed_means_and_differences(store: RunStore) -> None:
    small_run(store)
    rows = {row.task: row for row in run_table(read_history(store))}
    assert list(rows) == [MEAN, "colors", "counting"]
    found = {task: (row.n, row.before, row.after, row.difference) for task, row in rows.items()}
    assert found == {MEAN: (8, 0.375, 0.75, 0.375), "colors": (4, 0.5, 1.0, 0.5), "counting": (4, 0.25, 0.5, 0.25)}


def test_the_interval_of_a_difference_is_the_binomial_one(store: RunStore) -> None:
    """colors: 2 of 4 prompts gain 1, so a resample's mean is Binomial(4, 1/2) / 4: its 2.5 and 97.5 percentiles are 0 and 1
    (P(0) = 1/16 > .025); with 10,000 draws that cannot come out otherwise."""
    small_run(store)
    colors = next(row for row in run_table(read_history(store)) if row.task == "colors")
    assert (colors.low, colors.high, colors.verdict) == (0.0, 1.0, "unclear")


def test_a_prompt_that_was_not_scored_leaves_both_sides_of_the_table(store: RunStore) -> None:
    report_runs.evaluation(store, 0, {"colors": [0.0, 0.0, 1.0]})
    report_runs.evaluation(store, 5, {"colors": [1.0, None, 1.0]})
    (row,) = run_table(read_history(store))
    assert (row.n, row.before, row.after) == (2, 0.5, 1.0)


def test_a_reward_with_one_task_has_one_line_that_sums_it_up(store: RunStore) -> None:
    report_runs.evaluation(store, 0, {"": [0.0, 1.0]})
    report_runs.evaluation(store, 5, {"": [1.0, 1.0]})
    (row,) = run_table(read_history(store))
    assert (row.task, row.is_mean, row.difference) == ("", True, 0.5)


def test_of_two_leases_of_a_sheet_the_one_that_was_judged_is_shown(store: RunStore) -> None:
    """The other sorts first and holds other images."""
    directory = report_runs.evaluation(store, 0, {"colors": [1.0]})
    rival = report_runs.media_of([report_runs.draw(77, right=False)])
    write_media(store, paths.sheet_path(directory, 0, "aa00"), rival, {"number": 0})
    (row,) = read_history(store).evaluations[0].rows
    assert row.sheet == paths.sheet_path(directory, 0, "aa11")


def test_the_page_prints_the_table_and_the_protocol(small_page: str) -> None:
    for expected in (
        "0.375",
        "0.750",
        "+0.375",
        "+0.500",
        "num steps 12, guidance scale 1.0",
        "a processor, 2 cores, 8 GiB",
        "5e1f5e1f5e1f",
        "8c1d2e3f4a5b",
    ):
        assert expected in small_page


def test_a_hostile_prompt_is_shown_as_text_everywhere(store: RunStore) -> None:
    evil = "<script>alert(1)</script>"
    report_runs.start(store, name=f"run {evil}")
    report_runs.evaluation(store, 0, {"colors": [0.0]}, text=evil)
    report_runs.evaluation(store, 1, {"colors": [1.0]}, text=evil)
    report_runs.put_json(store, paths.metrics_path(1, 1), report_runs.metrics(1, 1) | {"drops": {evil: 1}})
    report_runs.training_samples(store, 1, groups=1, size=2, prompt=evil)
    html = render_report(store)
    assert evil not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert len(re.findall(r"<script\b", html)) == 2  # the numbers and the page's own code
    assert len(re.findall(r"</script>", html)) == 2


def test_the_page_takes_nothing_from_outside(small_page: str) -> None:
    assert "http://" not in small_page
    assert "https://" not in small_page
    assert not re.search(r"@import|<link[^>]+stylesheet|<iframe", small_page)
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", small_page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in small_page


def test_the_numbers_inside_the_page_are_the_files(small_page: str) -> None:
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', small_page, re.DOTALL)
    assert found is not None
    numbers = json.loads(found[1])
    assert [row["difference"] for row in numbers["table"]] == [0.375, 0.5, 0.25]
    assert numbers["updates"][1]["images"] == 192


def test_a_run_without_any_file_gives_a_page_that_says_so(store: RunStore, tmp_path: Path) -> None:
    path = write_report(store, tmp_path / "reports" / "report.html")
    assert "Nothing has happened yet" in path.read_text(encoding="utf-8")


def test_a_run_that_has_only_its_base_evaluation_gives_a_page(store: RunStore) -> None:
    report_runs.evaluation(store, 0, {"colors": [1.0, 0.0]})
    html = render_report(store)
    assert "No before/after verdict yet: the second frozen evaluation is not on file" in html
    assert "Before and after" not in html


def test_a_run_without_evaluations_shows_its_curves(store: RunStore) -> None:
    report_runs.put_json(store, paths.metrics_path(1, 1), report_runs.metrics(1, 2))
    html = render_report(store)
    assert "Train rewards" in html
    assert "Samples over time" not in html


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("metrics/update_000001.i0001.json", b'{"update": 1'),
        ("metrics/update_000001.i0001.json", b'{"update": 1}'),
        ("metrics/update_000001.i0001.json", b"[]"),
        ("eval/v000000.ema.ab/result.json", b'{"version": "x", "snapshot": "ema", "protocol": {}, "rewards": {}, "rows": []}'),
        ("history/update_000001.parquet", b"no parquet"),
        ("config.i0001.json", b"\xff\xfe"),
    ],
)
def test_a_corrupted_file_is_named(store: RunStore, path: str, content: bytes) -> None:
    store.create_exclusive(path, content, writer_id="test")
    with pytest.raises(CorruptFile, match=re.escape(path)):
        read_history(store)


def test_a_corrupted_media_file_is_named(store: RunStore) -> None:
    directory = report_runs.evaluation(store, 0, {"colors": [1.0]})
    sheet = paths.sheet_path(directory, 0, "aa11")
    store.replace(sheet, store.read(sheet)[:-40])
    with pytest.raises(CorruptFile, match=re.escape(sheet)):
        render_report(store)


def test_of_two_records_of_an_update_the_later_incarnation_counts(store: RunStore) -> None:
    report_runs.put_json(store, paths.metrics_path(1, 1), report_runs.metrics(1, 2))
    report_runs.put_json(store, paths.metrics_path(1, 2), report_runs.metrics(1, 2, incarnation=2) | {"images": 7})
    (record,) = read_history(store).updates
    assert (record.incarnation, record.images) == (2, 7)


def test_the_pause_before_a_resume_does_not_count_as_running_time(store: RunStore) -> None:
    """Update 1 took 5 s by its own seconds; 2 ended 6 s later; 3, resumed an hour later, took 4 s: 5, 11, 15."""
    for update, incarnation, ended, spent in ((1, 1, 100.0, 5.0), (2, 1, 106.0, 5.5), (3, 2, 3706.0, 4.0)):
        seconds = {"wait": 1.0, "learn": spent - 1.0}
        record = report_runs.metrics(update, 3, incarnation) | {"time_unix": ended, "seconds": seconds}
        report_runs.put_json(store, paths.metrics_path(update, incarnation), record)
    history = read_history(store)
    assert history.elapsed_s == (5.0, 11.0, 15.0)
    assert throughput(history) == [192 / 5, 192 / 6, 192 / 4]
    assert waiting_share(history) == pytest.approx(1.0 / 5.5)  # updates 1 and 3 begin an incarnation


def test_only_one_protocol_is_followed_and_the_others_are_counted(store: RunStore) -> None:
    small_run(store)
    other = paths.eval_directory(2, "ema", "ffff0000")
    content = json.loads(store.read(paths.result_path(paths.eval_directory(2, "ema", "0123abcd"))))
    report_runs.put_json(store, paths.result_path(other), content)
    history = read_history(store)
    assert [record.version for record in history.evaluations] == [0, 2]
    assert history.num_other_evaluations == 1


def test_the_grid_shows_the_same_prompt_in_every_column_with_its_scores(store: RunStore) -> None:
    small_run(store)
    grid = sample_grid(read_history(store), MediaShelf(store))
    assert grid is not None
    assert grid.versions == (0, 2)
    row = next(row for row in grid.rows if row.prompt == "a colors of shapes number 1")
    assert [shot.scores for shot in row.shots] == [(("geneval_strict", 0.0),), (("geneval_strict", 1.0),)]
    assert row.shots[0].uri != row.shots[1].uri  # a wrong and a right drawing of the same seed
    assert {row.tag for row in grid.rows} == {"colors", "counting"}


def test_best_and_worst_samples_come_from_unlike_groups_and_their_own_rows(store: RunStore) -> None:
    report_runs.training_samples(store, 1, groups=3, size=4)
    history, shelf = read_history(store), MediaShelf(store)
    best, worst = train_extremes(history, shelf)
    assert len({item.sample.group for item in best}) == 3
    assert best[0].sample.weighted_reward == 1.0
    assert worst[0].sample.weighted_reward == 0.0
    for item in (best[0], worst[0]):
        path = paths.media_path(item.sample.group, "bb22")
        assert item.shot.uri == shelf.uri(path, item.sample.sample_index)


def test_samples_of_retired_groups_are_left_out(store: RunStore) -> None:
    report_runs.training_samples(store, 1, groups=2, size=2)
    store.remove(paths.media_path(0, "bb22"))
    best, _ = train_extremes(read_history(store), MediaShelf(store))
    assert [item.sample.group for item in best] == [1]


def test_a_whole_run_gives_a_page_of_a_few_megabytes_with_every_panel(store: RunStore, tmp_path: Path) -> None:
    report_runs.whole_run(store, 12, every=6, prompts_a_task=3, resumed_at=8)
    path = write_report(store, tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 8_000_000
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    for title in (
        "Train rewards", "Frozen evaluation: geneval_strict", "Frozen evaluation: geneval_strict, by time", "KL", "Clip fraction", "Ratio",
        "Flat groups", "Image statistics", "Learner&#39;s seconds", "Images per second", "Staleness", "Dropped groups",
    ):  # fmt: skip
        assert title in titles
    assert "Frozen geneval_strict rose" in html


@pytest.mark.parametrize(
    ("value", "text", "signed"), [(0.625, "0.625", "+0.625"), (-0.0076319, "-0.00763", "-0.00763"), (0.0, "0.000", "+0.000")]
)
def test_small_numbers_keep_their_digits(value: float, text: str, signed: str) -> None:
    assert (figure(value), figure(value, signed=True)) == (text, signed)


def test_smoothing_leaves_few_points_alone_and_averages_many() -> None:
    """20 points: a window of 3, of 2 at the ends."""
    assert smooth([1.0, None, 3.0]).tolist()[::2] == [1.0, 3.0]
    line = smooth([float(i * i) for i in range(20)])
    assert (line[0], line[1], line[19]) == (0.5, pytest.approx(5 / 3), (18**2 + 19**2) / 2)
