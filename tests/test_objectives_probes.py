"""Probes: each kind of times against its definition, shared ones, and the draws that nft has always made."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.seeding import derive_seed
from learner.objectives.base import MicroBatch
from learner.objectives.probes import ProbeSettings, draw_probes
from learner.objectives.rwr import Rwr, RwrConfig
from learner.objectives.vgrpo import Vgrpo, VgrpoConfig
from tests.learner_policies import linear_policy
from tests.test_objectives_forward import anchors_of, batch_of, context


def with_seeds(batch: MicroBatch, count: int) -> MicroBatch:
    return replace(batch, clean=batch.clean[:1].expand(count, -1, -1, -1), probe_seeds=tuple(range(count)))


@pytest.fixture(scope="module")
def batch() -> MicroBatch:
    return batch_of(linear_policy(), Rwr(config=RwrConfig()))


@pytest.mark.parametrize(("fraction", "low"), [(1.0, 0.0), (0.5, 0.5)])
def test_stratified_probes_cover_each_stratum_once_in_random_order(batch: MicroBatch, fraction: float, low: float) -> None:
    sigma = draw_probes(with_seeds(batch, 200), 5, fraction, times="stratified").sigma
    assert (sigma > low).all() and (sigma <= 1.0).all()
    stratum = ((1.0 - sigma) / fraction * 5).floor().long()
    assert (stratum.sort(dim=0).values == torch.arange(5)[:, None]).all()
    assert len({tuple(column) for column in stratum.T.tolist()}) > 50  # of 120 orders
    inside = (1.0 - sigma) / fraction * 5 - stratum
    assert float(inside.mean()) == pytest.approx(0.5, abs=4 * 0.2887 / 1000**0.5)  # 4 standard errors of a uniform's mean


def test_uniform_and_logit_normal_times_have_their_moments(batch: MicroBatch) -> None:
    count = 2000
    uniform = draw_probes(with_seeds(batch, count), 1, 0.8, times="uniform").sigma.double()
    assert uniform.min() > 0.2 and uniform.max() <= 1.0
    assert float(uniform.mean()) == pytest.approx(0.6, abs=4 * 0.8 * 0.2887 / count**0.5)
    logits = torch.logit(draw_probes(with_seeds(batch, count), 1, times="logit_normal").sigma.double())
    assert float(logits.mean()) == pytest.approx(0.0, abs=4 / count**0.5)
    assert float(logits.std()) == pytest.approx(1.0, abs=4 / (2 * count) ** 0.5)


@pytest.mark.parametrize("times", ["grid", "stratified", "uniform", "logit_normal"])
def test_shared_probes_are_equal_within_a_group_and_differ_between_groups(batch: MicroBatch, times: Any) -> None:
    probes = draw_probes(batch, 3, shared=True, times=times)
    own = draw_probes(batch, 3, times=times)
    for group in (0, 1):
        rows = batch.group == group
        assert (probes.noise[:, rows] == probes.noise[:, rows][:, :1]).all()
        assert (probes.sigma[:, rows] == probes.sigma[:, rows][:, :1]).all()
        assert len(own.noise[:, rows].unique(dim=1)[0]) == 6
    assert not torch.equal(probes.noise[:, 0], probes.noise[:, -1])
    assert not torch.equal(probes.sigma[:, 0], probes.sigma[:, -1])
    vgrpo = Vgrpo(config=VgrpoConfig(times=times, timesteps_per_sample=3))
    torch.testing.assert_close(anchors_of(vgrpo, batch, context(linear_policy())).probes.noise, probes.noise, rtol=0, atol=0)


def test_default_probes_are_the_first_of_a_seeded_order_of_the_grid(batch: MicroBatch) -> None:
    found = draw_probes(batch, 2)
    for column, seed in enumerate(batch.probe_seeds):
        order = np.random.Generator(np.random.Philox(key=derive_seed(seed, "sigma"))).permutation(6)
        noise = np.random.Generator(np.random.Philox(key=derive_seed(seed, "noise"))).standard_normal((2, 4, 1, 1), dtype=np.float32)
        assert found.sigma[:, column].tolist() == [float(batch.grid[index]) for index in order[:2]]
        assert np.array_equal(found.noise[:, column].numpy(), noise)
    settings = ProbeSettings(name="any")
    torch.testing.assert_close(settings.draw(batch).sigma, found.sigma, rtol=0, atol=0)
