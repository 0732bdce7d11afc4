"""Configuration mistakes that TOML itself accepts: infinite numbers, dates without quotes, keys below a plain value."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from deploy.config import load_config, recipe_path


@pytest.mark.parametrize(
    "key",
    ["schedule.time_limit_s", "schedule.stall_timeout_s", "cluster.drain_timeout_s", "learner.learning_rate", "learner.objective.beta", "reward.0.weight"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_number_that_is_not_finite_is_refused_with_its_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key.rpartition('.')[2]}: Input should be a finite number"):
        load_config("tiny-geneval", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("assignment", "plain"),
    [("run.name.a=1", "run.name"), ("run.name.a.b=1", "run.name"), ("reward.0.weight.x.y=1", "reward.0.weight"), ("run.seed.0=1", "run.seed")],
)  # fmt: skip
def test_a_key_below_a_plain_value_is_refused_with_that_values_key(assignment: str, plain: str) -> None:
    with pytest.raises(ConfigError, match=f"{assignment}' goes below {plain}, which is a plain value; shorten the key"):
        load_config("tiny-geneval", [assignment])


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("about = 2026-11-21", "run.about", "2026-11-21"),
        ("about = 07:30:00", "run.about", "07:30:00"),
        ("about = 2026-11-21T07:30:00", "run.about", "2026-11-21 07:30:00"),
        ("about = [1, [2026-11-21]]", "run.about.1.0", "2026-11-21"),
    ],
)
def test_a_date_or_a_time_without_quotes_is_named_with_its_file_and_key(tmp_path: Path, line: str, key: str, value: str) -> None:
    path = tmp_path / "mine.toml"
    text = recipe_path("tiny-geneval").read_text(encoding="utf-8")
    path.write_text(text.replace('about = "coloured', f'{line}\n# "coloured', 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf'mine.toml: {key} = {value} is a date or a time.*in quotes: "{value}"'):
        load_config(str(path), [])


@pytest.mark.parametrize("text", ["2026-11-21", "07:30:00", "2026-11-21T07:30:00Z"])
def test_a_date_that_is_set_is_a_string_as_bare_words_are(text: str) -> None:
    assert load_config("tiny-geneval", [f"run.name={text}", "run.seed=2"]).run.name == text
