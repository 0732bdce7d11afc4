"""Sensors: bands by hand, alerts only when a reward rises outside them, a planted hack caught early, honest runs left alone."""

import functools
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from common.sensors import PERSISTENCE, START, WINDOW, Band, Reading, Reference, judge, make_bands, positions
from common.store import paths
from common.store.ledger_entries import RewardSpec
from common.store.manifests import read_status, write_manifest
from common.store.run_store import RunStore
from common.store.sensor_watch import SensorWatch, reading_of
from common.types import Manifest, ManifestGroup, Prompt
from deploy.live import format_line
from deploy.report.page import render_report
from learner.advantages import GroupStd
from learner.metrics import metrics_record
from rollout_workers.media import image_statistics
from tests.report_runs import put_json
from tests.sensor_runs import (
    GROUPS,
    SAMPLES,
    Images,
    darkened,
    likes_dark,
    mean_statistics,
    record,
    reference_directory,
    scenes,
    write_record,
    write_reference,
)
from tests.store_fixtures import Clock, make_coordinator, make_settings

TRAIN = ("dark",)
REWARDS = (RewardSpec(name="dark"), RewardSpec(name="judge", use="watch"))


def readings(values: list[float], rewards: list[float] | None = None, *, sensor: str = "brightness_mean", groups: int = 8) -> list[Reading]:
    """One reading an update; the train reward rises by .01 an update unless given."""
    trained = rewards or [0.1 + 0.01 * update for update in range(len(values))]
    return [
        Reading(
            update=index + 1, num_groups=groups,
            rewards={"dark": trained[index], **({"judge": value} if sensor == "reward.judge" else {})},
            statistics={} if sensor == "reward.judge" else {sensor: value},
        )
        for index, value in enumerate(values)
    ]  # fmt: skip


def reference(values: list[float], sensor: str = "brightness_mean", num_prompts: int = 40) -> Reference:
    return Reference(num_prompts=num_prompts, values={sensor: np.array(values, dtype=np.float32)})


def test_the_band_is_the_formula_around_base_and_start() -> None:
    """Base .4 and .6: mean .5, sd .1; m = 5 x 8 = 40 and N = 40: h = .4 sqrt(.05) + .05; the start is (.5 + .56 + .56) / 3 = .54."""
    band = make_bands(reference([0.4, 0.6]), readings([0.5, 0.56, 0.56]), ())["brightness_mean"]
    half = 0.4 * math.sqrt(0.05) + 0.05
    assert (band.low, band.high) == (pytest.approx(0.5 - half), pytest.approx(0.54 + half))
    assert band.position(band.high) == pytest.approx(1.0)
    assert band.position(band.low) == pytest.approx(-1.0)
    assert band.holds(0.5) and not band.holds(0.54 + 1.01 * half)


def test_a_base_whose_images_are_all_alike_has_a_band_of_the_least_move() -> None:
    band = make_bands(reference([0.5, 0.5, 0.5]), readings([0.5] * 3), ())["brightness_mean"]
    assert (band.low, band.high) == (pytest.approx(0.48), pytest.approx(0.52))


def test_images_of_one_prompt_count_once() -> None:
    few, many = (make_bands(reference([0.4, 0.6] * 40, num_prompts=n), readings([0.5] * 3), ())["brightness_mean"] for n in (10, 80))
    assert few.high - few.low == pytest.approx(2 * (0.4 * math.sqrt(1 / 40 + 1 / 10) + 0.05))
    assert many.high < few.high


def test_there_is_no_band_before_the_start_is_known_or_without_what_makes_one() -> None:
    assert make_bands(reference([0.4, 0.6]), readings([0.5] * (START - 1)), ()) == {}
    assert make_bands(None, readings([0.5] * 3), ()) == {}
    assert make_bands(reference([0.4]), readings([0.5] * 3), ()) == {}
    assert make_bands(reference([0.4, 0.6], "reward.judge"), readings([0.5] * 3, sensor="reward.judge"), ()) == {}  # it is not watched


def test_diversity_is_held_against_its_own_start_and_may_rise() -> None:
    band = make_bands(reference([9.0, 9.1], "diversity"), readings([0.3, 0.3, 0.3], sensor="diversity"), ())["diversity"]
    assert (band.low, band.high) == (pytest.approx(0.2), math.inf)  # two thirds; the evaluation's 9 mixes prompts and is not asked
    assert band.position(0.2) == pytest.approx(-1.0)
    assert band.holds(7.0)


BAND = {"brightness_mean": Band(sensor="brightness_mean", low=0.4, center=0.5, high=0.6)}


def test_an_alert_comes_after_three_smoothed_values_outside_and_names_its_numbers() -> None:
    """Ten at .5, then .3: means over 5 are .46, .42, .38, .34, .30: the third below .4 is the one of update 15."""
    (alert,) = judge(readings([0.5] * 10 + [0.3] * 8), BAND, TRAIN)
    assert PERSISTENCE == 3 and WINDOW == 5
    assert (alert.sensor, alert.update, alert.value) == ("brightness_mean", 15, pytest.approx(0.3))
    # dark: its start is (.10 + .11 + .12) / 3, its last five are .20 .. .24
    assert alert.sentence == (
        "sensor brightness_mean is 0.3 at update 15, below 0.4 (the base model's band: 0.4 to 0.6), while dark rose 0.11 -> 0.22: "
        "the reward may be hacked, look at the samples"
    )


def test_outside_for_two_updates_only_or_without_a_risen_reward_is_no_alert() -> None:
    assert judge(readings([0.5] * 10 + [0.2] * 2 + [0.6] * 6), BAND, TRAIN) == []
    falling = [0.5 - 0.01 * update for update in range(18)]
    assert judge(readings([0.5] * 10 + [0.3] * 8, falling), BAND, TRAIN) == []
    assert judge(readings([0.5] * 10 + [0.3] * 8), BAND, ("another",)) == []


def test_one_excursion_is_one_alert_and_a_second_one_is_another() -> None:
    """Back up the means over 5 are .58 (update 41), .66, .74, .82: the third above .6 is update 44's."""
    values = [0.5] * 10 + [0.3] * 20 + [0.5] * 10 + [0.9] * 10
    assert [(alert.update, alert.value > 0.5) for alert in judge(readings(values), BAND, TRAIN)] == [(15, False), (44, True)]


def test_a_watch_reward_alerts_when_it_falls_and_not_when_it_rises() -> None:
    base = reference([0.0, 1.0] * 20, "reward.judge")
    # sd .5: h = 2 sqrt(.05) + .25 = .697, so below .6 - .697 nothing real lies; a narrower scorer:
    narrow = reference([0.55, 0.65] * 20, "reward.judge")  # sd .05: low = .6 - (.2 sqrt(.05) + .025) = .530
    for rewards, wanted in (([0.6] * 10 + [0.4] * 8, ["reward.judge"]), ([0.6] * 10 + [0.9] * 8, [])):
        found = readings(rewards, sensor="reward.judge")
        bands = make_bands(narrow, found, ("judge",))
        assert [alert.sensor for alert in judge(found, bands, TRAIN)] == wanted
        assert bands["reward.judge"].low == pytest.approx(0.6 - 0.2 * math.sqrt(0.05) - 0.025)
    assert judge(readings([0.6] * 10 + [0.4] * 8, sensor="reward.judge"), make_bands(base, found, ("judge",)), TRAIN) == []


def test_values_that_were_not_measured_are_left_out() -> None:
    gaps = [r if r.update % 2 else Reading(update=r.update, num_groups=8, rewards=r.rewards, statistics={}) for r in readings([0.3] * 12)]
    assert [alert.update for alert in judge(gaps, BAND, TRAIN)] == [WINDOW + PERSISTENCE - 1]
    assert positions(gaps, BAND) == {"brightness_mean": pytest.approx(-2.0)}
    assert positions([], BAND) == {}


def test_an_honest_run_raises_no_alert() -> None:
    """40 runs of 150 updates whose images are draws of the base's own, with a reward that always rises: a false alarm needs a 4 s.e. miss."""
    generator = np.random.default_rng(0)
    values = image_statistics(base_images())
    base = Reference(num_prompts=96, values=values)
    for _ in range(40):
        batches = generator.integers(0, 96, (150, GROUPS * SAMPLES))
        means = {name: column[batches].mean(axis=1) for name, column in values.items()}
        run = [
            Reading(update=u + 1, num_groups=GROUPS, rewards={"dark": float(u)}, statistics={name: float(m[u]) for name, m in means.items()})
            for u in range(150)
        ]  # fmt: skip
        assert judge(run, make_bands(base, run, ()), TRAIN) == []


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run"))


GROUP = ManifestGroup(number=0, path="", media_path="", version=0, num_bytes=1, prompt_id="p", scores={}, kept=(True,))
PROMPTS = tuple(Prompt(id=f"p{index}", text=f"scene {index}") for index in range(96))
SETTINGS = make_settings(rewards=REWARDS, eval_prompts=PROMPTS, num_updates=60)


@functools.cache
def base_images() -> Images:
    return scenes(0, 96)


@functools.cache
def hacked(update: int) -> tuple[float, dict[str, float]]:
    """One update of a run that a scorer of dark flat images drags along; after 60 updates all is nearly black: reward and statistics."""
    images = darkened(scenes(1000 * update, GROUPS * SAMPLES), 0.95 * (update - 1) / 60)
    return likes_dark(images), mean_statistics(image_statistics(images))


def write_base(store: RunStore) -> None:
    images = base_images()
    write_reference(store, reference_directory(SETTINGS), images, {"dark": [likes_dark(images)] * 96, "judge": [0.5] * 96})


def write_hacked(store: RunStore, update: int, *, incarnation: int = 1) -> float:
    """Commit an update's metrics record; return the reward."""
    reward, statistics = hacked(update)
    write_record(store, record(update, {"dark": reward, "judge": 0.5}, statistics, incarnation=incarnation))
    return reward


def test_a_scorer_that_likes_dark_flat_images_is_caught_before_its_reward_gained_a_fifth_of_its_range(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    """On real images, made darker step by step, through the Coordinator: log, status.json, /metrics and the live line all say so."""
    desk = make_coordinator(store, SETTINGS, Clock())
    write_base(store)
    desk.tick()  # the first sheet
    rewards = []
    with caplog.at_level(logging.WARNING, logger="flowfleet"):
        for update in range(1, 61):
            rewards.append(write_hacked(store, update))
            write_manifest(store, Manifest(update=update, incarnation=1, config_digest="", max_staleness=1, groups=(GROUP,), drops=()))
            desk.finish_update(update, {"reward": rewards[-1]})
            desk.tick()
            if desk.summary()["alerts"]:
                break
    assert desk.summary()["alerts"], "never caught"
    assert rewards[-1] - rewards[0] < 0.2  # of the range 0 to 1
    assert len(rewards) >= WINDOW + PERSISTENCE - 1
    sentence = next(message.getMessage() for message in caplog.records if "alert" in message.getMessage())
    assert "while dark rose" in sentence and "the base model's band" in sentence
    desk.close("the test ends")
    status = read_status(store)
    assert status is not None and status.alerts
    assert f"alert: {status.alerts[0]}" == sentence
    sensor = desk.summary()["alerts"][0]
    exported = generate_latest(desk.metrics.registry).decode()
    assert f'flowfleet_sensor_alerts_total{{run="test",sensor="{sensor}"}} 1.0' in exported
    assert f'flowfleet_sensor_position{{run="test",sensor="{sensor}"}}' in exported
    assert f"ALERT {sensor}" in format_line(desk.summary(), 60, 1.0)


def test_the_report_has_the_alert_near_its_top_with_the_curves(store: RunStore) -> None:
    write_base(store)
    config = {"run": {"name": "hacked"}, "reward": [{"name": "dark"}, {"name": "judge", "use": "watch"}]}
    put_json(store, paths.config_path(1), {"config": config, "config_digest": "5e1f"})
    for update in range(1, 8):
        write_hacked(store, update)
    early = render_report(store)
    assert 'id="alerts"' not in early and "No sensor alerted" in early and "<h3>Image statistics</h3>" in early
    for update in range(8, 26):
        write_hacked(store, update)
    html = render_report(store)
    box = html[html.index('id="alerts"') : html.index("<h2>Training</h2>")]
    assert "sensor brightness_mean is" in box and "while dark rose" in box and "<h3>Image statistics</h3>" in box
    assert html.count("<h3>Image statistics</h3>") == 1
    assert "Sensors alerted (" in html


def make_watch(store: RunStore, *, incarnation: int = 1, finished: int = 0, directory: str | None = None) -> SensorWatch:
    expected = reference_directory(SETTINGS) if directory is None else directory
    return SensorWatch(store, directory=expected, rewards=REWARDS, incarnation=incarnation, finished=finished)


def test_after_a_restart_earlier_alerts_are_kept_and_not_told_again(store: RunStore) -> None:
    write_base(store)
    first = make_watch(store)
    told = []
    for update in range(1, 31):
        write_hacked(store, update)
        told += first.look(update)
    assert told and first.alerts == tuple(told)
    write_hacked(store, 31, incarnation=2)
    again = make_watch(store, incarnation=2, finished=30)
    later = [alert for _ in range(4) for alert in again.look(31)]
    assert {alert.update for alert in later} <= {31}
    assert {alert.sensor for alert in again.alerts} >= {alert.sensor for alert in told}


def test_the_reference_may_come_later_than_the_first_updates(store: RunStore) -> None:
    watch = make_watch(store)
    for update in range(1, 26):
        write_hacked(store, update)
        assert [alert.sensor for alert in watch.look(update)] in ([], ["diversity"])  # which needs no reference
    write_base(store)
    assert watch.look(25) == []  # one sheet a look
    assert {alert.sensor for alert in watch.look(25)} >= {"brightness_mean"}


def test_damaged_or_missing_files_are_left_out_and_said(store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    write_base(store)
    store.create_exclusive(paths.metrics_path(1, 1), b'{"update": 1}', writer_id="learner")
    watch = make_watch(store)
    with caplog.at_level(logging.WARNING):
        assert watch.look(2) == []  # update 2 has no file
    assert "is no metrics record" in caplog.text
    for update in range(3, 9):
        write_hacked(store, update)
        watch.look(update)
    assert "brightness_mean" in watch.positions


def test_a_run_without_a_base_evaluation_says_what_it_lacks(store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    watch = make_watch(store, directory="")
    with caplog.at_level(logging.INFO):
        for update in range(1, 5):
            write_hacked(store, update)
            watch.look(update)
    assert caplog.text.count("evaluation.at_start = true") == 1
    assert list(watch.positions) == ["diversity"]


def test_the_learners_record_is_what_the_sensors_read() -> None:
    group = ManifestGroup(
        number=0, path="", media_path="", version=0, num_bytes=1, prompt_id="p", scores={"dark": (0.25, 0.75), "judge": (None, None)},
        kept=(True, True),
    )  # fmt: skip
    manifest = Manifest(update=4, incarnation=1, config_digest="", max_staleness=1, groups=(group,), drops=())
    found = metrics_record(
        manifest, GroupStd(eps=1e-4).estimate(manifest, {"dark": 1.0}), incarnation=1, time_unix=0.0, seconds={}, learner={},
        image_statistics={"brightness_mean": 0.5, "edge_density": math.nan},
    )  # fmt: skip
    assert reading_of(found) == Reading(update=4, num_groups=1, rewards={"dark": 0.5}, statistics={"brightness_mean": 0.5})


def test_a_status_of_before_there_were_alerts_is_read(store: RunStore) -> None:
    desk = make_coordinator(store, SETTINGS, Clock())
    desk.close("the test ends")
    content = store.read(paths.STATUS)
    store.replace(paths.STATUS, content.replace(b' "alerts": [],\n', b""), writer_id="test")
    assert b"alerts" not in store.read(paths.STATUS)
    status = read_status(store)
    assert status is not None and status.alerts == ()
