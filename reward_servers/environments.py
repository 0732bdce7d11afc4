"""Makes the scorer of a configured reward, in the environment that its config names."""

from collections.abc import Iterable

from common.protocols import Scorer
from reward_servers.config import HTTP_ENVIRONMENT, SAME_ENVIRONMENT, RewardConfig
from reward_servers.registry import make_scorer
from reward_servers.user_scorers import load_user_scorer
from reward_servers.wire.child import ChildScorer, ChildSettings
from reward_servers.wire.http_client import make_http


def configured_scorer(reward: RewardConfig) -> Scorer:
    """Make a reward where its `env` says: in this process, behind a server of the open protocol, or in a child process of another Python.

    Raises:
        ConfigError: an unknown name, option or interpreter.
        ScorerError: its server or child process is not ready in time.
    """
    if reward.env == HTTP_ENVIRONMENT:
        return make_http(**{"reward": reward.name, **reward.options})
    if reward.env != SAME_ENVIRONMENT:
        timeout_s = reward.deadline_s * reward.micro_batch
        settings = ChildSettings(
            python=reward.env, reward=reward.name, options=reward.options, timeout_s=timeout_s, micro_batch=reward.micro_batch
        )
        return ChildScorer(settings)
    if ":" in reward.name:
        return load_user_scorer(reward.name, reward.options, deadline_s=reward.deadline_s)
    return make_scorer(reward.name, reward.options)


def release_scorers(scorers: Iterable[Scorer]) -> None:
    """End what scorers hold beyond this process's memory: child processes."""
    for scorer in scorers:
        if isinstance(scorer, ChildScorer):
            scorer.close()
