"""What the learner's heartbeat says of an update in progress."""

from common.heartbeat import MICRO_BATCHES
from tests.test_learner_update import batch_of, learner_of


def test_every_micro_batch_of_an_update_shows_in_the_learners_beat() -> None:
    learner = learner_of(micro_batch=4, optimizer_steps=2)
    manifest, groups = batch_of(learner.policy)  # type: ignore[arg-type]
    num_samples = sum(len(group.trajectories) for group in groups)
    learner.update(manifest, groups)
    assert learner.gauges.snapshot()[MICRO_BATCHES] >= 2 * num_samples / 4  # at least once for the anchors, once to train
