"""Rewards from user code: `module:attribute`, a function or a class."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat

from common.errors import ConfigError, ScorerError
from common.protocols import Scorer
from common.types import Prompt, Score
from reward_servers.scorers.base import Image, PlainScorer, score_each

_REMEDY = (
    "give a function (image, prompt, metadata) -> float, or a class with name, version, applies_to, check_prompt and score "
    "(common.protocols.Scorer)"
)


class FunctionScorer(PlainScorer):
    """A user's function (image [H, W, 3] uint8, prompt text, metadata, **options) -> float as a Scorer."""

    def __init__(self, name: str, function: Callable[..., object], options: Mapping[str, Any]) -> None:
        """Call `function` once an image; the version is the digest of its source and options."""
        self.name = name
        self.version = source_digest(function, options)
        self._function = function
        self._options = dict(options)

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]."""
        return score_each(images, prompts, self._judge)

    def _judge(self, image: Image, prompt: Prompt) -> tuple[float, Mapping[str, float]]:
        value = self._function(image, prompt.text, prompt.metadata, **self._options)
        if not isinstance(value, SupportsFloat):
            raise ScorerError(f"scorer {self.name} returned {value!r} for prompt {prompt.id}; it must return a number")
        return float(value), {}


def load_user_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """Make a scorer from `module:attribute`; modules are also looked for in the working directory.

    Raises:
        ConfigError: nothing of that name can be imported, or it is neither a function nor a class that implements Scorer.
    """
    module_name, _, attribute = name.partition(":")
    target = _member(_module(module_name, name), attribute, name)
    if inspect.isclass(target):
        return _from_class(name, target, options)
    if not callable(target):
        raise ConfigError(f"reward {name}: {attribute} is a {type(target).__name__}; {_REMEDY}")
    try:
        inspect.signature(target).bind(None, "", {}, **options)
    except TypeError as error:
        raise ConfigError(f"reward {name}: the function cannot take an image, a prompt, metadata and its options: {error}") from error
    return FunctionScorer(name, target, options)


def source_digest(target: Callable[..., object], options: Mapping[str, Any]) -> str:
    """Return a version that changes with a function's source or its options."""
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):  # no source: built in, or made at runtime
        source = repr(target.__module__) + repr(target.__name__)
    return hashlib.sha256(f"{source}{sorted(options.items())}".encode()).hexdigest()[:12]


def _module(module_name: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f"reward {name}: {module_name!r} cannot be imported ({error}); the module must lie in the working directory or be installed"
        ) from error


def _member(module: ModuleType, attribute: str, name: str) -> Any:
    members = vars(module)
    if attribute not in members:
        near = ", ".join(sorted(key for key, value in members.items() if callable(value) and not key.startswith("_"))) or "nothing"
        raise ConfigError(f"reward {name}: the module has no {attribute!r}; it offers {near}")
    return members[attribute]


def _from_class(name: str, target: type[Any], options: Mapping[str, Any]) -> Scorer:
    missing = [method for method in ("applies_to", "check_prompt", "score") if method not in dir(target)]
    if missing:
        raise ConfigError(f"reward {name}: the class lacks {', '.join(missing)}; {_REMEDY}")
    try:
        scorer: Scorer = target(**options)
    except TypeError as error:
        raise ConfigError(f"reward {name}: the class cannot be made with options {sorted(options)}: {error}") from error
    lacking = [key for key in ("name", "version") if not hasattr(scorer, key)]
    if lacking:
        raise ConfigError(f"reward {name}: the scorer lacks {', '.join(lacking)}; {_REMEDY}")
    return scorer
