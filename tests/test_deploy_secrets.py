"""A config that holds a secret is refused before the run directory holds it too."""

import secrets

import pytest

from common.errors import ConfigError
from deploy.config import load_config, recipe_names
from deploy.gates import check_config, check_fake_config, refuse_secrets


@pytest.mark.parametrize("check", [check_config, check_fake_config], ids=["train", "fake"])
def test_a_key_in_a_rewards_options_is_refused_by_its_name_and_not_repeated(check: object) -> None:
    planted = secrets.token_hex(16)
    config = load_config("tiny-geneval", [f'reward.0.options={{"api_key" = "{planted}"}}'])
    assert callable(check)
    with pytest.raises(ConfigError, match=r"reward\.0\.options\.api_key looks like a secret") as caught:
        check(config)
    assert planted not in str(caught.value) and "token_file" in str(caught.value)


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_shipped_recipe_looks_as_if_it_held_one(recipe: str) -> None:
    refuse_secrets(load_config(recipe, []))
