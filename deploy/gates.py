"""Start gates: what must hold before compute is burnt. The learner's own gates (parity, KL, ratio) stand in learner/gates.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import GateError
from common.policy.index import read_index
from common.prompts import check_prompts, read_prompts
from common.protocols import Scorer
from common.store.run_store import RunStore
from common.types import Prompt
from deploy.config import RunConfig, shipped_path
from deploy.plan import disk_gate
from reward_servers.fake import FakeScorer
from reward_servers.registry import check_known_score, make_scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSets:
    """The run's prompts, checked against its rewards."""

    train: tuple[Prompt, ...]
    test: tuple[Prompt, ...]


def load_prompts(config: RunConfig, scorers: Sequence[Scorer]) -> PromptSets:
    """Read both prompt files and check them. Raises DataError with line numbers."""
    train_path, test_path = shipped_path(config.prompts.train), shipped_path(config.prompts.test)
    train, test = read_prompts(train_path), read_prompts(test_path)
    check_prompts(train, scorers, train_path)
    check_prompts(test, scorers, test_path)
    return PromptSets(train=train, test=test)


def make_scorers(config: RunConfig) -> list[Scorer]:
    """One scorer a configured reward. Raises ConfigError for an unknown name or option."""
    return [make_scorer(reward.name, reward.options) for reward in config.reward]


def check_config(config: RunConfig) -> PromptSets:
    """Everything that can be checked without a model or a store.

    Raises:
        ConfigError, DataError, ModelError: the user's mistakes.
        GateError: disk (the cap cannot hold what recovery needs), scorer (a known image got another score).
    """
    reason = disk_gate(config)
    if reason is not None:
        raise GateError("disk", reason)
    read_index(shipped_path(config.model.path))
    scorers = make_scorers(config)
    prompts = load_prompts(config, scorers)
    for scorer in scorers:
        check_known_score(scorer)
    return prompts


def check_fake_config(config: RunConfig) -> PromptSets:
    """What still matters to engines that sleep: the disk cap and the prompt files. Raises GateError, DataError."""
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
