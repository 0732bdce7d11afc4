"""Strict configuration: TOML in, pydantic models out, every unknown key named with its nearest neighbour."""

import datetime
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError


class StrictModel(BaseModel):
    """A config section: unknown keys are errors, numbers are finite, values are never rewritten, instances never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)


ModelT = TypeVar("ModelT", bound=StrictModel)
TIMES = (datetime.date, datetime.time)  # what TOML makes of a date or a time without quotes; a datetime is a date


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises ConfigError when it is missing, does not parse, or holds a date without quotes."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config: {path} cannot be read ({error.strerror}); name a recipe of `flowfleet recipes ls` or a TOML file"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config: {path} is not TOML: {error}; mend that line") from error
    for key, value in _times(tables, ""):
        raise ConfigError(f'config: {path}: {key} = {value} is a date or a time, which no key takes; write it in quotes: "{value}"')
    return tables


def _times(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every date and time inside a value, with its dotted key."""
    if isinstance(value, TIMES):
        yield key, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        yield from _times(each, f"{key}.{name}" if key else str(name))


def json_object(option: str, text: str) -> dict[str, Any]:
    """Parse the JSON object of a command-line option. Raises ConfigError."""
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f'{option} is not JSON ({error}); write an object, for instance \'{{"detector": "shapes"}}\'') from error
    if not isinstance(table, dict):
        raise ConfigError(f"{option} is a {type(table).__name__}; write a JSON object")
    return table


def apply_sets(tables: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return the tables with `key.path=value` assignments applied; values are TOML (bare words and dates are strings).

    List items are addressed by number: `reward.0.weight=2`.
    """
    result: dict[str, Any] = json.loads(json.dumps(tables))
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set: {assignment!r} is not key=value; write e.g. --set learner.learning_rate=1e-3")
        _assign(result, key.strip().split("."), _toml_value(text.strip()), assignment)
    return result


def _toml_value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if any(_times(value, "")) else value


def _assign(tables: dict[str, Any], path: list[str], value: Any, assignment: str) -> None:
    node: Any = tables
    for depth, part in enumerate(path):
        is_last = depth == len(path) - 1
        if isinstance(node, list):
            item = _item(node, part, assignment)
            if is_last:
                node[int(part)] = value
            node = item
        elif not isinstance(node, dict):
            raise ConfigError(f"--set: {assignment!r} goes below {'.'.join(path[:depth])}, which is a plain value; shorten the key")
        elif is_last:
            node[part] = value
        else:
            node = node.setdefault(part, {})


def _item(items: list[Any], part: str, assignment: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set: {assignment!r}: {part!r} is no item of a list of {len(items)}; use 0 to {len(items) - 1}")
    return items[int(part)]


def parse(model: type[ModelT], tables: Mapping[str, Any], source: str) -> ModelT:
    """Validate tables as `model`.

    Raises:
        ConfigError: naming every wrong key, its file, the rule, and for an unknown key the nearest valid one.
    """
    try:
        return model.model_validate(dict(tables))
    except ValidationError as error:
        raise ConfigError(f"config: {source}: " + "; ".join(explain_errors(model, error))) from None


def explain_errors(model: type[BaseModel], error: ValidationError) -> list[str]:
    """Return a line for each wrong key of a model: the rule, and for an unknown key the nearest valid one."""
    return [_explain(model, item) for item in error.errors()]


def _explain(model: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        valid = _valid_keys(model, location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.4)
        hint = f"the nearest key is {near[0]!r}" if near else "valid keys: " + ", ".join(sorted(valid))
        return f"unknown key {key!r}; {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if isinstance(item.get("input"), dict | list | tuple):
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (came: {item.get('input')!r})"


def _valid_keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The keys of the section at `location`, walking through optional, list and union annotations."""
    current: list[type[BaseModel]] = [model]
    for part in location:
        found = [m for owner in current if part in owner.model_fields for m in _models_in(owner.model_fields[part].annotation)]
        current = found or current
    return sorted({key for owner in current for key in owner.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


def config_digest(model: BaseModel) -> str:
    """Return the sha256 (hex) of a model's canonical JSON."""
    return hashlib.sha256(json.dumps(model.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
