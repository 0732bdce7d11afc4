"""Recipes that extend others: `extends = "tiny-geneval"` at the top of a file, then only what differs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from common.config import read_toml
from common.errors import ConfigError

EXTENDS: Final = "extends"
REPLACED_WITH: Final[Mapping[tuple[str, ...], str]] = {("learner", "objective"): "name", ("rollout", "window"): "kind"}
"""Tables whose keys belong to one choice, and the key that chooses: another choice drops the other's keys."""


def read_extended(path: Path, find: Callable[[str], Path]) -> dict[str, Any]:
    """Return a recipe's tables, over those of the recipes that it extends.

    Args:
        path: a TOML file.
        find: a shipped recipe's name -> its file; raises ConfigError naming those there are.

    Raises:
        ConfigError: a file that cannot be read, `extends` that is no shipped recipe's name, or a circle.
    """
    chain, layers = [path.resolve()], [read_toml(path)]
    while EXTENDS in layers[-1]:
        base = _base_of(chain[-1], layers[-1].pop(EXTENDS), find)
        if base in chain:
            circle = " extends ".join(found.stem for found in (*chain[chain.index(base) :], base))
            raise ConfigError(f"config: {path}: {circle}, a circle; drop one extends")
        chain.append(base)
        layers.append(read_toml(base))
    tables = layers.pop()
    while layers:
        tables = merge_tables(tables, layers.pop())
    return tables


def _base_of(path: Path, name: object, find: Callable[[str], Path]) -> Path:
    if not isinstance(name, str) or name.endswith(".toml"):
        raise ConfigError(
            f'config: {path}: extends = {name!r}; it names a shipped recipe, for instance extends = "tiny-geneval" (flowfleet recipes ls)'
        )
    return find(name).resolve()


def merge_tables(base: Mapping[str, Any], own: Mapping[str, Any], place: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return `own` over `base`, table by table and key by key.

    Replaced whole: lists (so all [[reward]] tables together), the objective when its name differs, the window when its kind differs.
    """
    chooser = REPLACED_WITH.get(place)
    if chooser is not None and own.get(chooser, base.get(chooser)) != base.get(chooser):
        return dict(own)
    merged = dict(base)
    for key, value in own.items():
        found = merged.get(key)
        if isinstance(found, Mapping) and isinstance(value, Mapping):
            merged[key] = merge_tables(found, value, (*place, key))
        else:
            merged[key] = value
    return merged
