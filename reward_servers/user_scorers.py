"""Rewards from user code: `module:attribute`, a function, a batch function or a class, each plain or async.

The kind is read from the code itself: a class is a scorer; a function whose first parameter is called `images` takes a batch, any
other takes one image; a coroutine function is awaited. Async code gets a fresh event loop a micro-batch, so what belongs to a loop
(a client session) is opened inside the function.
"""

import asyncio
import hashlib
import importlib
import inspect
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, SupportsFloat

from common.errors import ConfigError, ScorerError, ScorerUnavailable
from common.protocols import Scorer
from common.types import Prompt, Score
from reward_servers.guarded import SCORER_FAILURES, reason_of
from reward_servers.scorers.base import Image, PlainScorer
from reward_servers.scorers.groupwise import GroupwiseScorer

DEFAULT_DEADLINE_S: Final = 120.0
NUM_PARALLEL: Final = 8  # coroutines at a time inside a micro-batch
BATCH_PARAMETER: Final = "images"
_CONNECTIONS: Final = (ConnectionError, TimeoutError)
_REMEDY: Final = (
    "give a function (image, prompt, metadata) -> float, a batch function (images, prompts, metadata) -> floats, or a class with name, "
    "version, applies_to, check_prompt and score (common.protocols.Scorer) or score_group (GroupScorer)"
)


class FunctionScorer(PlainScorer):
    """A user's function (image [H, W, 3] uint8, prompt text, metadata, **options) -> float as a Scorer."""

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Call `function` once an image; the version is the digest of its source and options."""
        self.name = name
        self.version = source_digest(function, options)
        self._function = function
        self._options = dict(options)

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]; what the function raises for an image is that image's null."""
        return [self._judged(index, image, prompt) for index, (image, prompt) in enumerate(zip(images, prompts, strict=True))]

    def _judged(self, index: int, image: Image, prompt: Prompt) -> Score:
        started = time.perf_counter()
        try:
            value = self._number(self._function(image, prompt.text, prompt.metadata, **self._options), prompt)
        except SCORER_FAILURES as error:
            return _null(index, error, started)
        return Score(sample_index=index, value=value, latency_s=time.perf_counter() - started)

    def _number(self, value: object, prompt: Prompt) -> float:
        if not isinstance(value, SupportsFloat):
            raise ScorerError(f"scorer {self.name} returned {value!r} for prompt {prompt.id}; it must return a number")
        return float(value)


class AsyncFunctionScorer(FunctionScorer):
    """The same for a coroutine function: NUM_PARALLEL images at a time, each with the deadline."""

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any], deadline_s: float) -> None:
        super().__init__(name, function, options)
        self._deadline_s = deadline_s

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]; a late image is a null, "deadline", and its coroutine is cancelled."""
        return asyncio.run(self._all(images, prompts))

    async def _all(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        gate = asyncio.Semaphore(NUM_PARALLEL)

        async def one(index: int) -> Score:
            async with gate:
                return await self._awaited(index, images[index], prompts[index])

        return list(await asyncio.gather(*(one(index) for index in range(len(prompts)))))

    async def _awaited(self, index: int, image: Image, prompt: Prompt) -> Score:
        started = time.perf_counter()
        try:
            answer = self._function(image, prompt.text, prompt.metadata, **self._options)
            value = self._number(await within(answer, self._deadline_s, self.name), prompt)
        except SCORER_FAILURES as error:
            return _null(index, error, started)
        return Score(sample_index=index, value=value, latency_s=time.perf_counter() - started)


class BatchFunctionScorer(FunctionScorer):
    """A user's batch function (images [B, H, W, 3] uint8, prompt texts, metadata, **options) -> B numbers as a Scorer."""

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]; an item that is no number is its image's null. Raises what the function raises."""
        values = self._values(images, prompts)
        if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
            raise ScorerError(f"scorer {self.name} returned {type(values).__name__}; a batch function must return one number an image")
        if len(values) != len(prompts):
            return [
                Score(sample_index=index, value=None, error=f"{len(values)} numbers came for {len(prompts)} images")
                for index in range(len(values))
            ]
        return [self._item(index, value, prompt) for index, (value, prompt) in enumerate(zip(values, prompts, strict=True))]

    def _values(self, images: Image, prompts: Sequence[Prompt]) -> Any:
        try:
            return self._function(images, [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts], **self._options)
        except _CONNECTIONS as error:
            raise ScorerUnavailable(reason_of(error)) from error

    def _item(self, index: int, value: object, prompt: Prompt) -> Score:
        try:
            return Score(sample_index=index, value=self._number(value, prompt))
        except SCORER_FAILURES as error:
            return Score(sample_index=index, value=None, error=reason_of(error))


class AsyncBatchScorer(BatchFunctionScorer):
    """The same for a coroutine function: it gets as many deadlines as images."""

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any], deadline_s: float) -> None:
        super().__init__(name, function, options)
        self._function = in_loop(function, deadline_s, name)


class ClassScorer(PlainScorer):
    """A user's class whose `score` is a coroutine function, as a Scorer."""

    def __init__(self, scorer: Any, deadline_s: float) -> None:
        self.name, self.version = scorer.name, scorer.version
        self._scorer, self._deadline_s = scorer, deadline_s

    def applies_to(self, prompt: Prompt) -> bool:
        """Ask the class."""
        return bool(self._scorer.applies_to(prompt))

    def check_prompt(self, prompt: Prompt) -> None:
        """Ask the class. Raises DataError."""
        self._scorer.check_prompt(prompt)

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3] in an event loop; B deadlines long."""
        return list(in_loop(self._scorer.score, self._deadline_s, self.name)(images, prompts))


class GroupClassScorer(GroupwiseScorer):
    """A user's class that has `score_group` alone, or as a coroutine function, as a GroupScorer."""

    def __init__(self, scorer: Any, deadline_s: float) -> None:
        self.name, self.version = scorer.name, scorer.version
        self._scorer = scorer
        self._judge = in_loop(scorer.score_group, deadline_s, self.name) if is_async(scorer.score_group) else scorer.score_group

    def applies_to(self, prompt: Prompt) -> bool:
        """Ask the class."""
        return bool(self._scorer.applies_to(prompt))

    def check_prompt(self, prompt: Prompt) -> None:
        """Ask the class. Raises DataError."""
        self._scorer.check_prompt(prompt)

    def score_group(self, images: Image, prompt: Prompt) -> list[Score]:
        """Score the images [K, H, W, 3] of one prompt."""
        return list(self._judge(images, prompt))


def load_user_scorer(name: str, options: Mapping[str, Any], *, deadline_s: float = DEFAULT_DEADLINE_S) -> Scorer:
    """Make a scorer from `module:attribute`; modules are also looked for in the working directory.

    Args:
        name: module:attribute.
        options: keyword arguments of the function or class.
        deadline_s: an image's, for async code.

    Raises:
        ConfigError: nothing of that name can be imported, or it is neither a function nor a class that implements Scorer.
    """
    module_name, _, attribute = name.partition(":")
    target = _member(_module(module_name, name), attribute, name)
    if inspect.isclass(target):
        return _from_class(name, target, options, deadline_s)
    if not callable(target):
        raise ConfigError(f"reward {name}: {attribute} is a {type(target).__name__}; {_REMEDY}")
    signature = inspect.signature(target)
    try:
        signature.bind(None, "", {}, **options)
    except TypeError as error:
        raise ConfigError(f"reward {name}: the function cannot take an image, a prompt, metadata and its options: {error}") from error
    if next(iter(signature.parameters), "") == BATCH_PARAMETER:
        return AsyncBatchScorer(name, target, options, deadline_s) if is_async(target) else BatchFunctionScorer(name, target, options)
    return AsyncFunctionScorer(name, target, options, deadline_s) if is_async(target) else FunctionScorer(name, target, options)


def is_async(target: Callable[..., Any]) -> bool:
    """Whether calling it gives something to await: a coroutine function, or an object with an async __call__."""
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__)


def in_loop(function: Callable[..., Any], deadline_s: float, name: str) -> Callable[..., Any]:
    """Return a plain function that runs a coroutine function in an event loop of its own.

    Its first argument is a batch [B, ...], which gives it B deadlines. Raises ScorerError when they are over.
    """

    def call(images: Image, *arguments: Any, **options: Any) -> Any:
        async def run() -> Any:
            return await within(function(images, *arguments, **options), deadline_s * len(images), name)

        return asyncio.run(run())

    return call


async def within(answer: Awaitable[Any], deadline_s: float, name: str) -> Any:
    """Await an answer for at most deadline_s, then cancel it. Raises ScorerError when it was late."""
    limit = asyncio.timeout(deadline_s)
    try:
        async with limit:
            return await answer
    except TimeoutError:
        if limit.expired():
            raise ScorerError(f"deadline: scorer {name} did not answer within {deadline_s:g} s") from None
        raise


def _null(index: int, error: BaseException, started: float) -> Score:
    return Score(
        sample_index=index, value=None, error=reason_of(error), latency_s=time.perf_counter() - started,
        may_pass=isinstance(error, (ScorerUnavailable, *_CONNECTIONS)),
    )  # fmt: skip


def source_digest(target: Callable[..., object], options: Mapping[str, Any]) -> str:
    """Return a version that changes with a function's source or its options."""
    written = target if inspect.isroutine(target) or inspect.isclass(target) else type(target)  # an object's class holds its code
    try:
        source = inspect.getsource(written)
    except (OSError, TypeError):  # no source: built in, or made at runtime
        source = repr(written.__module__) + repr(written.__name__)
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


def _from_class(name: str, target: type[Any], options: Mapping[str, Any], deadline_s: float) -> Scorer:
    offered = dir(target)
    judges = [method for method in ("score", "score_group") if method in offered]
    missing = [method for method in ("applies_to", "check_prompt", *([] if judges else ["score"])) if method not in offered]
    if missing:
        raise ConfigError(f"reward {name}: the class lacks {', '.join(missing)}; {_REMEDY}")
    try:
        scorer: Any = target(**options)
    except TypeError as error:
        raise ConfigError(f"reward {name}: the class cannot be made with options {sorted(options)}: {error}") from error
    lacking = [key for key in ("name", "version") if not hasattr(scorer, key)]
    if lacking:
        raise ConfigError(f"reward {name}: the scorer lacks {', '.join(lacking)}; {_REMEDY}")
    if "score_group" in judges and (judges == ["score_group"] or is_async(scorer.score_group)):
        return GroupClassScorer(scorer, deadline_s)
    if "score_group" not in judges and is_async(scorer.score):
        return ClassScorer(scorer, deadline_s)
    plain: Scorer = scorer
    return plain
