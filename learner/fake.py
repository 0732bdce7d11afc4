"""A learner that sleeps: the same loop, files and state around updates that nudge a tiny adapter."""

import time
from collections.abc import Callable, Mapping

import torch

from common.policy.base import Policy
from common.types import Manifest, RolloutGroup
from learner.advantages import AdvantageBatch, make_estimator
from learner.config import LearnerConfig
from learner.gates import RATIO_TOLERANCE, StartGates
from learner.metrics import Tally
from learner.ranks import check_agreement
from learner.snapshots import Moment
from learner.update import Learner, UpdateResult


class FakeLearner(Learner):
    """Spends `seconds` an update, then takes real AdamW steps along a gradient that the manifest's scores decide.

    No forward is run and no gate looks at log-probs, which fake engines do not have; advantages, snapshots, state and ranks are real.
    """

    def __init__(
        self, policy: Policy, config: LearnerConfig, *, weights: Mapping[str, float], run_seed: int, seconds: float,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """See Learner. pause: spends the seconds."""
        super().__init__(
            policy, config, config.objective.make("behavior"), make_estimator(config.advantage), weights=weights,
            run_seed=run_seed, gates=StartGates(micro_batch=config.micro_batch, ratio_tolerance=RATIO_TOLERANCE),
        )  # fmt: skip
        self._seconds, self._pause = seconds, pause

    def _update(self, manifest: Manifest, groups: tuple[RolloutGroup, ...]) -> UpdateResult:
        batch = self.estimator.estimate(manifest, self._weights)
        self._pause(self._seconds)
        tally = Tally()
        for _ in range(self._config.optimizer_steps):
            self._nudge(batch, tally)
        live = self.policy.read_adapter()
        check_agreement(self.ranks, live, manifest.update)
        self.snapshots.move(Moment.UPDATE, live)
        self.version = manifest.update
        return self._result(batch, tally, [True] * self._config.optimizer_steps)

    def _nudge(self, batch: AdvantageBatch, tally: Tally) -> None:
        """One optimizer step, the same size on every number of the adapter."""
        mean = float(batch.rewards[batch.mask].mean()) if batch.mask.any() else 0.0
        gradient = -1.0 - mean
        for parameter in self.policy.adapter_parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.optimizer.step()
        self.num_optimizer_steps += 1
        self.snapshots.move(Moment.STEP, self.policy.read_adapter())
        tally.add_number("loss", -mean)
        tally.add_number("grad_norm", abs(gradient))
