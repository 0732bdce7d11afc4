"""Other reward weights over a run's manifests: by hand, and from the run directory alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.errors import UserError
from common.store import paths
from common.store.manifests import Claim, encode_record, write_manifest
from common.store.run_store import RunStore
from common.types import Manifest, ManifestGroup
from deploy.cli import app
from deploy.report.page import render_report
from deploy.report.reweighting import Training, parse_weights, read_reweighting, reweigh
from learner.config import AdvantageConfig
from tests.report_runs import put_json
from tests.sensor_runs import record, write_record

ADVANTAGE = AdvantageConfig()
TRAINED_ON_A = {1: Training(weights={"a": 1.0}, advantage=ADVANTAGE)}


def group(number: int, kept: tuple[bool, ...] | None = None, **scores: list[float | None]) -> ManifestGroup:
    size = len(next(iter(scores.values())))
    return ManifestGroup(
        number=number, path=f"g{number}", media_path=f"m{number}", version=0, num_bytes=1, prompt_id="p",
        scores={name: tuple(values) for name, values in scores.items()}, kept=kept or (True,) * size,
    )  # fmt: skip


def manifest(*groups: ManifestGroup, update: int = 1, incarnation: int = 1) -> Manifest:
    return Manifest(update=update, incarnation=incarnation, config_digest="", max_staleness=1, groups=groups, drops=())


def test_the_same_weights_change_nothing() -> None:
    (found,) = reweigh([manifest(group(0, a=[0.0, 1.0, 3.0], b=[5.0, 1.0, 0.0]))], TRAINED_ON_A, {"a": 1.0}).updates
    assert (found.correlation, found.flipped, found.num_samples) == (pytest.approx(1.0), 0.0, 3)
    assert found.reward == pytest.approx(4 / 3)


def test_the_opposite_reward_turns_every_sign() -> None:
    result = reweigh([manifest(group(0, a=[0.0, 1.0], b=[1.0, 0.0]))], TRAINED_ON_A, {"b": 2.0})
    (found,) = result.updates
    assert (found.correlation, found.flipped, found.reward) == (pytest.approx(-1.0), 1.0, pytest.approx(1.0))
    assert result.sentence == (
        "Under b=2 the advantages correlate -1.00 with those that trained (mean over updates); 100% of 2 samples change sign."
    )


def test_correlation_and_flips_by_hand() -> None:
    """a = (0, 1, 2): A = (-1, 0, 1) c. b = (0, 2, 1): A = (-1, 1, 0) c. Their correlation is (1 + 0 + 0) / 2 = .5; no product is below 0."""
    (found,) = reweigh([manifest(group(0, a=[0.0, 1.0, 2.0], b=[0.0, 2.0, 1.0]))], TRAINED_ON_A, {"b": 1.0}).updates
    assert found.correlation == pytest.approx(0.5, abs=1e-6)
    assert found.flipped == 0.0
    # b = (2, 0, 1): A = (1, -1, 0) c: correlation -.5, the first of three samples turns
    (turned,) = reweigh([manifest(group(0, a=[0.0, 1.0, 2.0], b=[2.0, 0.0, 1.0]))], TRAINED_ON_A, {"b": 1.0}).updates
    assert (turned.correlation, turned.flipped) == (pytest.approx(-0.5, abs=1e-6), pytest.approx(1 / 3))


def test_samples_that_a_chosen_reward_did_not_score_are_left_out() -> None:
    """b is watched and skipped the second sample; a weight of 0 leaves a reward and its nulls out altogether."""
    one = manifest(group(0, a=[0.0, 9.0, 1.0], b=[1.0, None, 0.0]))
    (found,) = reweigh([one], TRAINED_ON_A, {"b": 1.0}).updates
    assert (found.num_samples, found.reward) == (2, pytest.approx(0.5))
    (unasked,) = reweigh([one], TRAINED_ON_A, {"a": 1.0, "b": 0.0}).updates
    assert (unasked.num_samples, unasked.correlation) == (3, pytest.approx(1.0))


def test_groups_that_no_chosen_reward_judges_lower_the_correlation_and_stay_out_of_the_mean() -> None:
    both = manifest(group(0, a=[0.0, 1.0], b=[0.0, 1.0]), group(1, a=[0.0, 1.0]))
    (found,) = reweigh([both], TRAINED_ON_A, {"b": 1.0}).updates
    # A before (-1, 1, -1, 1), after (-1, 1, 0, 0): covariance 1/2, standard deviations 1 and sqrt(1/2)
    assert (found.correlation, found.reward, found.num_samples) == (pytest.approx(0.5**0.5, abs=1e-3), pytest.approx(0.5), 4)


def test_what_cannot_be_computed_is_none() -> None:
    flat = reweigh([manifest(group(0, a=[1.0, 1.0], b=[2.0, 2.0]))], TRAINED_ON_A, {"b": 1.0})
    assert (flat.updates[0].correlation, flat.updates[0].flipped, flat.updates[0].num_samples) == (None, None, 0)
    assert flat.updates[0].reward == 2.0
    assert "no sample can be compared" in flat.sentence


def test_each_start_is_held_against_its_own_weights_and_estimator() -> None:
    groups = group(0, a=[0.0, 1.0], b=[100.0, 0.0])
    trainings = {
        1: Training(weights={"a": 1.0, "b": 1.0}, advantage=ADVANTAGE),
        2: Training(weights={"a": 1.0}, advantage=AdvantageConfig(normalize="per_reward")),
    }
    found = reweigh([manifest(groups), manifest(groups, update=2, incarnation=2)], trainings, {"a": 1.0}).updates
    assert [each.correlation for each in found] == [pytest.approx(-1.0), pytest.approx(1.0)]  # summed raw, b decided


def test_unknown_names_and_weights_without_a_number_are_refused() -> None:
    one = [manifest(group(0, geneval_strict=[0.0, 1.0], ocr_flowgrpo=[0.0, 1.0]))]
    with pytest.raises(UserError, match=r"no reward 'geneval_strikt' judged this run; the nearest is 'geneval_strict'"):
        reweigh(one, TRAINED_ON_A, {"geneval_strikt": 1.0})
    with pytest.raises(UserError, match="every weight is 0"):
        reweigh(one, TRAINED_ON_A, {"ocr_flowgrpo": 0.0})
    with pytest.raises(UserError, match="no manifest with scores"):
        reweigh([], {}, {"a": 1.0})
    for text in ("", "a", "a=", "a=x", "a=nan", "=1", "a=1,a=2", "a=1,"):
        with pytest.raises(UserError, match="is no NAME=NUMBER"):
            parse_weights(text)
    assert parse_weights("geneval_strict=1, ocr_flowgrpo=0.5,m:f=-2") == {"geneval_strict": 1.0, "ocr_flowgrpo": 0.5, "m:f": -2.0}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A finished run as its files tell it: two updates, no group file and no model."""
    store = RunStore(str(tmp_path / "run"))
    reward = [{"name": "a", "weight": 0.5}, {"name": "b", "use": "watch"}]
    config = {"run": {"name": "small"}, "reward": reward, "learner": {"advantage": {"kind": "group_std", "clip": 5.0, "eps": 1e-4}}}
    claim = Claim(incarnation=1, writer_id="w", started_at="", config_digest="5e1f", config=config)
    store.create_exclusive(paths.config_path(1), encode_record(claim), writer_id="w")
    generator = np.random.default_rng(0)
    for update in (1, 2):
        groups = [group(4 * update + n, a=generator.random(6).tolist(), b=generator.random(6).tolist()) for n in range(4)]
        write_manifest(store, manifest(*groups, update=update))
        write_record(store, record(update, {"a": 0.5, "b": 0.5}, {}))
    return store


def test_a_run_directory_alone_is_enough(store: RunStore) -> None:
    same = read_reweighting(store, {"a": 2.0})  # one reward of any weight is the same order and, standardized, the same advantage
    # the weight changes only eps beside the spread: 1e-4 / .1 at most
    assert [each.correlation for each in same.updates] == [pytest.approx(1.0, abs=1e-5)] * 2
    other = read_reweighting(store, {"b": 1.0})
    assert [each.update for each in other.updates] == [1, 2]
    assert all(each.correlation is not None and abs(each.correlation) < 0.8 and each.flipped is not None for each in other.updates)
    assert [each.num_samples for each in other.updates] == [24, 24]


def test_the_report_shows_it_when_asked_and_only_then(store: RunStore) -> None:
    html = render_report(store, read_reweighting(store, {"b": 1.0}))
    assert "Other reward weights" in html and "Under b=1 the advantages correlate" in html and "Flipped signs" in html
    assert "Other reward weights" not in render_report(store)


def test_the_command_writes_the_report_and_names_what_it_does_not_know(store: RunStore) -> None:
    put_json(store, paths.environment_path(1), {"commit": "c"})
    run = str(store.local_root)
    done = CliRunner().invoke(app, ["report", run, "--reward-weights", "a=1,b=0.5"])
    assert done.exit_code == 0, done.output
    assert "Under a=1, b=0.5 the advantages correlate" in done.output
    assert "Other reward weights" in Path(run, "reports", "report.html").read_text()
    refused = CliRunner().invoke(app, ["report", run, "--reward-weights", "bb=1"])
    assert isinstance(refused.exception, UserError) or "the nearest is 'b'" in refused.output
    assert json.loads(store.read(paths.environment_path(1))) == {"commit": "c"}
