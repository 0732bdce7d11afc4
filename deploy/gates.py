"""Start gates: what must hold before compute is burnt. The learner's own gates (parity, KL, ratio) stand in learner/gates.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, GateError
from common.policy.index import check_model
from common.prompts import check_prompts, read_prompts
from common.protocols import Scorer
from common.store.run_store import RunStore
from common.types import Prompt, Score
from deploy.config import RunConfig, shipped_path
from deploy.plan import disk_gate
from deploy.redact import Redactor, secret_keys
from reward_servers.config import RewardConfig
from reward_servers.environments import configured_scorer, release_scorers
from reward_servers.fake import FakeScorer
from reward_servers.registry import check_known_score


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSets:
    """The run's prompts, checked against its rewards."""

    train: tuple[Prompt, ...]
    test: tuple[Prompt, ...]


class TaggedScorer:
    """A scorer beside the tags of its [[reward]]: asked only about the prompts that it will judge in the run."""

    def __init__(self, scorer: Scorer, reward: RewardConfig) -> None:
        self.name, self.version = scorer.name, scorer.version
        self._scorer, self._tags = scorer, reward.tags

    def applies_to(self, prompt: Prompt) -> bool:
        """See Scorer; a tag that the reward does not name is not judged."""
        return (not self._tags or prompt.tag in self._tags) and self._scorer.applies_to(prompt)

    def check_prompt(self, prompt: Prompt) -> None:
        """See Scorer."""
        self._scorer.check_prompt(prompt)

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """See Scorer."""
        return self._scorer.score(images, prompts)


def load_prompts(config: RunConfig, scorers: Sequence[Scorer]) -> PromptSets:
    """Read both prompt files and check them against one scorer a reward. Raises DataError with line numbers."""
    judges = [TaggedScorer(scorer, reward) for scorer, reward in zip(scorers, config.reward, strict=True)]
    train_path, test_path = shipped_path(config.prompts.train), shipped_path(config.prompts.test)
    train, test = read_prompts(train_path), read_prompts(test_path)
    check_prompts(train, judges, train_path)
    check_prompts(test, judges, test_path)
    return PromptSets(train=train, test=test)


def make_scorers(config: RunConfig) -> list[Scorer]:
    """One scorer a configured reward. Raises ConfigError for an unknown name or option."""
    return [configured_scorer(reward) for reward in config.reward]


def check_config(config: RunConfig) -> PromptSets:
    """Everything that can be checked without a model or a store.

    Raises:
        ConfigError, DataError, ModelError: the user's mistakes.
        GateError: disk (the cap cannot hold what recovery needs), scorer (a known image got another score).
    """
    refuse_secrets(config)
    reason = disk_gate(config)
    if reason is not None:
        raise GateError("disk", reason)
    check_model(config.model.model_copy(update={"path": str(shipped_path(config.model.path))}))
    scorers = make_scorers(config)
    try:
        prompts = load_prompts(config, scorers)
        for scorer in scorers:
            check_known_score(scorer)
    finally:
        release_scorers(scorers)
    return prompts


def refuse_secrets(config: RunConfig) -> None:
    """Refuse a config whose values look like secrets: each start writes it to the run directory. Raises ConfigError, without the values."""
    found = secret_keys(config.model_dump(mode="json"), Redactor())
    if found:
        raise ConfigError(
            f"config: {', '.join(found)} looks like a secret, and the config is written to the run directory, where others read it; put it "
            "into a file of mode 600 and name that (token_file), or into the environment"
        )


def check_fake_config(config: RunConfig) -> PromptSets:
    """What still matters to engines that sleep: no secrets, the disk cap, the prompt files. Raises ConfigError, GateError, DataError."""
    refuse_secrets(config)
    reason = disk_gate(config)
    if reason is not None:
        raise GateError("disk", reason)
    return load_prompts(config, [FakeScorer(reward.name, seconds=0.0) for reward in config.reward])


def check_store(store: RunStore) -> None:
    """The run directory refuses a second create and shows files to a second process; half-written files of dead writers are swept.

    What every node of a cluster sees is checked by `deploy.store_probe`, once Ray is connected.

    Raises:
        GateError: named "store", saying which promise the store breaks.
        StoreError: the store is away.
    """
    store.probe()
    store.sweep()
