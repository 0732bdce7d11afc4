"""The doctor's look at what a recipe needs: its model, its rewards (each on its known image), every line of its prompts."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from common.errors import DataError
from common.policy.index import check_model, weight_files
from common.policy.model_files import check_files, count_tensors
from common.prompts import read_prompts
from common.protocols import Scorer
from common.types import Prompt
from deploy.config import RunConfig, shipped_path
from deploy.doctor.checks import Bench, Check, Row
from deploy.doctor.model import cached_revisions, hub_cache, look_at_checkpoints, revision_of
from deploy.gates import TaggedScorer
from deploy.plan import disk_gate
from deploy.redact import Redactor, secret_keys
from deploy.reward_card import known_cards
from reward_servers.cards import RewardCard
from reward_servers.config import RewardConfig
from reward_servers.environments import configured_scorer, release_scorers
from reward_servers.registry import check_known_score, make_scorer

REWARD_S: Final = 180.0  # until a scorer is loaded and has judged its known image
OPTIONAL_S: Final = 60.0  # the same for a reward that the recipe does not use
MODEL_S: Final = 60.0
PROMPTS_S: Final = 60.0
RUNS: Final = "can be made here, and scores its known image as expected"
OPTIONAL: Final = "may be missing: no recipe that was named uses it"


def look_at_model(config: RunConfig) -> Sequence[Row]:
    """Every part that model_index.json names is there and whole (headers are read, weights are not)."""
    bench = Bench(what="model", rule="a whole diffusers pipeline directory, as model.path names it")
    root = shipped_path(config.model.path)
    parts = check_model(config.model.model_copy(update={"path": str(root)}))
    check_files(root, parts)
    count = sum(count_tensors(file) for file in weight_files(root))
    revision = revision_of(root)
    return [bench.ok(f"{root}: {len(parts)} parts, {count} tensors" + (f", revision {revision}" if revision else ", a local directory"))]


def look_at_secrets(config: RunConfig) -> Sequence[Row]:
    """No key of the config holds a secret: it is written into the run directory, reports and bundles."""
    bench = Bench(what="secrets", rule="no key of the recipe holds one: a run's files can be read by others")
    found = secret_keys(config.model_dump(mode="json"), Redactor())
    if found:
        return [
            bench.fail(
                f"{', '.join(found)} look like secrets",
                "put each into a file of mode 600 and name that (token_file), or into the environment",
            )
        ]
    return [bench.ok("none")]


def look_at_store_cap(config: RunConfig) -> Sequence[Row]:
    """The disk cap holds what recovery needs."""
    bench = Bench(what="store cap", rule="store.max_bytes holds (state interval + S + 2) updates")
    reason = disk_gate(config)
    return (
        [bench.ok(f"{config.store.max_bytes / 1e9:g} GB")]
        if reason is None
        else [bench.fail(reason, "raise store.max_bytes, or lower group_size")]
    )


def look_at_reward(reward: RewardConfig, made: dict[str, Scorer]) -> Sequence[Row]:
    """Make a scorer where its `env` says and let it judge its known image; it goes into `made` for the look at the prompts."""
    bench = Bench(what=f"reward {reward.name}", rule=RUNS)
    scorer = configured_scorer(reward)
    try:
        proved = check_known_score(scorer)
    finally:
        release_scorers([scorer])
    made[reward.name] = TaggedScorer(scorer, reward)
    return [
        bench.ok(
            f"runs here, version {scorer.version}: " + ("its known image scored as expected" if proved else "it offers no known image")
        )
    ]


def look_at_optional(card: RewardCard) -> Sequence[Row]:
    """A reward that the recipe does not use: it may be missing. One with a checkpoint is not loaded for nothing."""
    bench = Bench(what=f"reward {card.name}", rule=OPTIONAL)
    if card.needs == "model":
        return [_checkpoint(bench, card)]
    if card.needs == "server":
        return [
            bench.warn(
                "it asks a server, which only a recipe names", "give a recipe its options (flowfleet reward show), then ask doctor again"
            )
        ]
    try:
        scorer = make_scorer(card.name, {})
    except (ImportError, ValueError) as error:
        return [
            bench.warn(
                f"cannot run here: {error}", f"pip install 'flowfleet[{card.extra}]'" if card.extra else "give it its options in a recipe"
            )
        ]
    proved = check_known_score(scorer)
    return [bench.ok("runs here: " + ("its known image scored as expected" if proved else "it offers no known image"))]


def _checkpoint(bench: Bench, card: RewardCard) -> Row:
    if not Path(card.model).is_dir() and not cached_revisions(card.model, hub_cache()):
        remedy = "download it where there is a network, or give the reward a local path in its options"
        return bench.warn(f"its model {card.model} is not on this machine", remedy)
    return bench.ok(f"its model {card.model} is in the cache; put it into a recipe to test it")


def look_at_prompts(which: str, path: Path, config: RunConfig, made: Mapping[str, Scorer]) -> Sequence[Row]:
    """Hold every prompt against every reward that judges it; every offending line is a detail."""
    bench = Bench(what=f"prompts.{which}", rule="each prompt carries what the rewards that judge it need")
    prompts = read_prompts(path)
    details: list[str] = []
    bad: list[int] = []
    for number, prompt in zip(line_numbers(path), prompts, strict=True):
        complaints = [text for scorer in made.values() if (text := complaint(scorer, prompt))]
        if complaints:
            bad.append(number)
            details += [f"{path}: line {number}: {text}" for text in complaints]
    unasked = [reward.name for reward in config.reward if reward.name not in made]
    if bad:
        told = f"{len(bad)} of {len(prompts)} prompts lack it: lines {spans(bad)}"
        return [bench.fail(told, "mend those lines (listed below), or narrow the reward's tags", tuple(details))]
    if unasked:
        return [
            bench.warn(f"{len(prompts)} prompts; not held against {', '.join(unasked)}, which cannot run here", "mend that reward first")
        ]
    return [bench.ok(f"{len(prompts)} prompts, all carry it ({path})")]


def complaint(scorer: Scorer, prompt: Prompt) -> str:
    """What a prompt lacks for a scorer, "" when nothing."""
    try:
        if scorer.applies_to(prompt):
            scorer.check_prompt(prompt)
    except DataError as error:
        return f"{scorer.name}: {error}"
    return ""


def line_numbers(path: Path) -> list[int]:
    """The lines of a prompt file that hold a prompt, as `read_prompts` counts them."""
    return [number for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1) if line.strip()]


def spans(numbers: Sequence[int]) -> str:
    """Line numbers, runs joined: 3, 7-9, 12."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def recipe_checks(config: RunConfig, cards: Sequence[RewardCard] | None = None) -> list[Check]:
    """The checks of a recipe, its rewards before its prompts; then the rewards that it does not use (`cards`; None: every built-in one)."""
    made: dict[str, Scorer] = {}
    broken_model = "set model.path; the shipped one is models/tiny-sd3"
    needed = [
        Check(
            what="model", rule="a whole pipeline directory", remedy=broken_model, look=partial(look_at_model, config), deadline_s=MODEL_S
        ),
        Check(what="store cap", rule="holds what recovery needs", remedy="raise it", look=partial(look_at_store_cap, config)),
        Check(what="secrets", rule="none in the recipe", remedy="take them out", look=partial(look_at_secrets, config)),
    ]
    needed += [
        Check(what=f"model of {reward.name}", rule="on this machine", remedy="mend its options", look=partial(look_at_checkpoints, reward))
        for reward in config.reward
    ]
    rewards = [
        Check(what=f"reward {reward.name}", rule=RUNS, remedy="install what it names, give its options, or leave it out of the recipe",
              look=partial(look_at_reward, reward, made), deadline_s=REWARD_S)
        for reward in config.reward
    ]  # fmt: skip
    prompts = [
        Check(what=f"prompts.{which}", rule="a jsonl or txt file that can be read", remedy="mend the line that is named",
              look=partial(look_at_prompts, which, shipped_path(path), config, made), deadline_s=PROMPTS_S)
        for which, path in (("train", config.prompts.train), ("test", config.prompts.test))
    ]  # fmt: skip
    used = {reward.name for reward in config.reward}
    others = [card for card in (known_cards() if cards is None else cards) if card.name not in used]
    return [*needed, *rewards, *prompts, *optional_checks(others)]


def optional_checks(cards: Sequence[RewardCard]) -> list[Check]:
    """The rewards that nobody asked for."""
    return [
        Check(what=f"reward {card.name}", rule=OPTIONAL, remedy="leave it out of recipes on this machine",
              look=partial(look_at_optional, card), deadline_s=OPTIONAL_S, is_needed=False)
        for card in cards
    ]  # fmt: skip
