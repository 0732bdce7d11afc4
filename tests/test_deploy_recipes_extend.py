"""Recipes that extend others: what a file leaves out stands in the recipe that it names."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError
from deploy.cli import app
from deploy.config import RECIPES, load_config, read_recipe, recipe_names
from deploy.extends import merge_tables

TALL = {"COLUMNS": "250"}


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_what_a_file_leaves_out_comes_from_the_recipe_it_extends(tmp_path: Path) -> None:
    mine = written(tmp_path, 'extends = "tiny-geneval"\n[run]\nname = "mine"\n[learner]\nlearning_rate = 1e-4\n')
    config, base = load_config(mine, []), load_config("tiny-geneval", [])
    assert (config.run.name, config.run.seed, config.learner.learning_rate) == ("mine", base.run.seed, 1e-4)
    assert config.learner.model_copy(update={"learning_rate": base.learner.learning_rate}) == base.learner
    assert (config.model, config.prompts, config.rollout, config.reward) == (base.model, base.prompts, base.rollout, base.reward)
    assert load_config(mine, ["learner.learning_rate=2e-4"]).learner.learning_rate == 2e-4


def test_tables_merge_key_by_key_at_any_depth() -> None:
    base = {"a": {"b": {"c": 1, "d": 2}, "e": [1, 2]}, "f": 3}
    own = {"a": {"b": {"d": 4, "g": 5}}, "h": {"i": 6}}
    assert merge_tables(base, own) == {"a": {"b": {"c": 1, "d": 4, "g": 5}, "e": [1, 2]}, "f": 3, "h": {"i": 6}}
    assert base == {"a": {"b": {"c": 1, "d": 2}, "e": [1, 2]}, "f": 3}  # untouched


def test_the_reward_list_is_replaced_whole() -> None:
    base = {"reward": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]}
    assert merge_tables(base, {"reward": [{"name": "c"}]}) == {"reward": [{"name": "c"}]}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"name": "grpo", "clip_range": 1e-3}, {"name": "grpo", "clip_range": 1e-3}),  # another one: none of nft's keys stay
        ({"name": "nft", "beta": 0.1}, {"name": "nft", "beta": 0.1, "kl_beta": 1.0}),
        ({"beta": 0.1}, {"name": "nft", "beta": 0.1, "kl_beta": 1.0}),
    ],
)
def test_the_objective_is_replaced_whole_when_its_name_differs(own: dict[str, object], expected: dict[str, object]) -> None:
    base = {"learner": {"objective": {"name": "nft", "beta": 1.0, "kl_beta": 1.0}, "micro_batch": 32}}
    assert merge_tables(base, {"learner": {"objective": own}}) == {"learner": {"objective": expected, "micro_batch": 32}}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"kind": "random", "stop": 3}, {"kind": "random", "stop": 3}),
        ({"kind": "first", "size": 3}, {"kind": "first", "size": 3}),
        ({"size": 3}, {"kind": "first", "size": 3}),
        ({"kind": "drop_last"}, {"kind": "drop_last"}),
    ],
)
def test_the_window_is_replaced_whole_when_its_kind_differs(own: dict[str, object], expected: dict[str, object]) -> None:
    base = {"rollout": {"window": {"kind": "first", "size": 2}, "num_steps": 6}}
    assert merge_tables(base, {"rollout": {"window": own}}) == {"rollout": {"window": expected, "num_steps": 6}}


def test_recipes_extend_over_several_levels_and_the_nearest_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ground.toml").write_text('[run]\nname = "ground"\nabout = "g"\nseed = 1\n')
    (tmp_path / "middle.toml").write_text('extends = "ground"\n[run]\nname = "middle"\nseed = 2\n')
    (tmp_path / "top.toml").write_text('extends = "middle"\n[run]\nname = "top"\n')
    monkeypatch.setattr("deploy.config.RECIPES", tmp_path)
    assert read_recipe("top") == {"run": {"name": "top", "about": "g", "seed": 2}}


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"one": "two", "two": "three", "three": "two"}, "two extends three extends two, a circle"),
        ({"one": "one"}, "one extends one, a circle"),
    ],
)
def test_a_circle_is_an_error_that_shows_it(files: dict[str, str], circle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, base in files.items():
        (tmp_path / f"{name}.toml").write_text(f'extends = "{base}"\n')
    monkeypatch.setattr("deploy.config.RECIPES", tmp_path)
    with pytest.raises(ConfigError, match=circle):
        read_recipe("one")


def test_what_cannot_be_extended_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe 'tiny-genevall' is not shipped; choose one of"):
        load_config(written(tmp_path, 'extends = "tiny-genevall"\n'), [])
    for value in ('"other.toml"', "3", '["tiny-geneval"]'):
        with pytest.raises(ConfigError, match="it names a shipped recipe"):
            load_config(written(tmp_path, f"extends = {value}\n"), [])


def test_an_unknown_key_of_an_extending_file_is_named_with_that_file(tmp_path: Path) -> None:
    mine = written(tmp_path, 'extends = "tiny-geneval"\n[learner]\nlearnig_rate = 1e-4\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: unknown key 'learner.learnig_rate'; the nearest key is 'learning_rate'"):
        load_config(mine, [])


def test_a_copy_of_an_extending_recipe_extends_and_means_the_same(tmp_path: Path) -> None:
    """Decision: cp keeps `extends`, so the copy stays short and keeps its comments."""
    target = tmp_path / "copy.toml"
    done = CliRunner().invoke(app, ["recipes", "cp", "tiny-geneval-fast", str(target)], env=TALL)
    assert done.exit_code == 0, done.output
    assert target.read_text(encoding="utf-8") == (RECIPES / "tiny-geneval-fast.toml").read_text(encoding="utf-8")
    assert load_config(str(target), []) == load_config("tiny-geneval-fast", [])


def test_every_recipe_is_listed_and_shown() -> None:
    listed = CliRunner().invoke(app, ["recipes", "ls"], env=TALL)
    assert listed.exit_code == 0, listed.output
    for name in recipe_names():
        assert name in listed.output
        assert load_config(name, []).run.about[:40] in listed.output
    shown = CliRunner().invoke(app, ["recipes", "show", "tiny-geneval-fast"], env=TALL)
    assert 'extends = "tiny-geneval-grpo' in shown.output
