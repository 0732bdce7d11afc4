"""Configuration: recipes resolve, mistakes are named with their remedy, plans add up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config import config_digest
from common.errors import ConfigError
from common.store.groups import encode_group
from deploy.config import load_config, recipe_names
from deploy.plan import CLIP_TOKENS, WEBP_BYTES_PER_PIXEL, describe, disk_gate, make_plan
from tests.store_fixtures import make_group


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_resolves_and_plans(name: str) -> None:
    config = load_config(name, [])
    assert config.run.name == name
    assert config.run.about
    assert make_plan(config).images == config.learner.groups_per_update * config.rollout.group_size
    assert disk_gate(config) is None


def test_an_unknown_key_is_named_with_its_file_and_the_nearest_key() -> None:
    with pytest.raises(ConfigError, match=r"tiny-geneval.toml: unknown key 'learner.learnig_rate'; the nearest key is 'learning_rate'"):
        load_config("tiny-geneval", ["learner.learnig_rate=1e-3"])


def test_an_unknown_key_inside_the_objective_is_named() -> None:
    with pytest.raises(ConfigError, match="kl_bta"):
        load_config("tiny-geneval", ["learner.objective.kl_bta=0"])


def test_set_reaches_list_items_and_keeps_types() -> None:
    config = load_config("tiny-geneval", ["reward.1.weight=2", 'run.name="other"', "schedule.max_staleness=2"])
    assert config.reward[1].weight == 2.0
    assert config.run.name == "other"
    assert config.schedule.max_staleness == 2


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["learner.groups_per_update=7"], "not a multiple"),
        (["rollout.snapshot=live"], "behavior"),
        (["evaluation.rewards=[\"clip_score\"]"], "clip_score"),
        (["reward.0.use=watch", "reward.1.use=watch"], "no reward trains"),
        (["reward.1.name=geneval_strict"], "stands twice"),
        (["learner.objective.kl_beta=0.0"], "guides a KL whose weight is 0"),
        (["learner.objective.timesteps_per_sample=7"], "timesteps_per_sample=7 exceeds"),
        (["learner.objective={name=\"grpo\"}", "rollout.snapshot=live"], "makes none"),
        (["reward.9.weight=1"], "no item of a list"),
        (["nonsense"], "not key=value"),
        (["rollout.group_size=1"], "rollout.group_size"),
    ],
)  # fmt: skip
def test_sections_that_do_not_fit_are_refused_with_the_reason(sets: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("tiny-geneval", sets)


def test_the_last_step_of_cps_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="cps kernel has no noise at the last step"):
        load_config("tiny-geneval-grpo", ["rollout.kernel=cps", "rollout.window.kind=all"])


def test_a_missing_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="tiny-demo"):
        load_config("tiny-genevall", [])


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "mine.toml"
    broken.write_text("[run\n")
    with pytest.raises(ConfigError, match=r"mine.toml is not TOML"):
        load_config(str(broken), [])


def test_the_papers_recipe_has_the_papers_balance() -> None:
    """W=9 with guidance and KL, anchors recomputed: 9 x (3 + 1 + 2 + 2) forwards learn what 10 x 2 sampled: 3.6 (architecture, section 10)."""
    config = load_config("sd35m-ocr", [])
    assert make_plan(config).learner_per_rollout == pytest.approx(3.6)
    assert not any("more of them help little" in line for line in describe(config, local=False))
    assert any("more of them help little" in line for line in describe(load_config("sd35m-ocr", ["learner.num_ranks=1"]), local=False))


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if not name.startswith("tiny")])
def test_the_recipes_for_gpus_keep_learners_and_rollouts_in_balance_on_at_most_eight(recipe: str) -> None:
    config = load_config(recipe, [])
    assert config.rollout.num_workers + config.learner.num_ranks <= 8
    assert make_plan(config).learner_per_rollout * config.rollout.num_workers / config.learner.num_ranks <= 1.5


def test_gradient_checkpointing_costs_a_forward_more_for_each_trained_one() -> None:
    kept, remade = (
        make_plan(load_config("tiny-geneval", [f"model.gradient_checkpointing={on}"])).learning_forwards for on in ("false", "true")
    )
    probes = load_config("tiny-geneval", []).learner.objective.timesteps_per_sample
    assert remade - kept == pytest.approx(probes)


@pytest.mark.parametrize(("recipe", "extra_tokens"), [("sd35m-ocr", 0), ("sd35m-geneval-nft", 0), ("flux1-pickscore", CLIP_TOKENS)])
def test_the_planned_bytes_are_those_of_a_group_file_of_that_size(recipe: str, extra_tokens: int) -> None:
    """The oracle is the file itself, with real shapes; images lie in another file. FLUX has no CLIP tokens, which the plan counts all the same."""
    config = load_config(recipe, [])
    guided, window = config.rollout.guidance_scale > 1, make_plan(config).window
    group = make_group(num_samples=config.rollout.group_size, num_steps=window, with_negative=guided)
    text = np.zeros((CLIP_TOKENS - extra_tokens + config.model.max_sequence_length, 4096), np.float32)
    features = replace(group.features, prompt_embeds=text, negative_embeds=text if guided else None)
    latent = np.zeros((16, config.model.height // 8, config.model.width // 8), np.float32)
    rows = [
        replace(
            row, latents=np.stack([latent] * len(row.latents)) if window else np.zeros((0, *latent.shape), np.float32), final_latents=latent
        )
        for row in group.trajectories
    ]
    file_bytes = len(encode_group(replace(group, features=features, trajectories=tuple(rows)), (config.model.height, config.model.width)))
    images = config.rollout.group_size * int(config.model.height * config.model.width * WEBP_BYTES_PER_PIXEL)
    counted_too_much = extra_tokens * 4096 * 4
    assert make_plan(config).group_bytes - images - counted_too_much == pytest.approx(file_bytes, rel=0.01)


def test_a_disk_cap_below_what_recovery_needs_is_refused() -> None:
    config = load_config("tiny-geneval", ["store.max_bytes=1000000"])
    assert "store.max_bytes=1000000 cannot hold" in str(disk_gate(config))


def test_the_digest_changes_with_any_value_and_only_then() -> None:
    one, same, other = (load_config("tiny-geneval", sets) for sets in ([], [], ["run.seed=2"]))
    assert config_digest(one) == config_digest(same) != config_digest(other)
