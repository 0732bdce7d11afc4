"""Rewards from user code: functions, batch functions, classes and groupwise classes, plain and async."""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError
from common.protocols import GroupScorer, Scorer
from common.types import NOT_APPLICABLE, Prompt
from reward_servers.guarded import score_guarded
from reward_servers.user_scorers import NUM_PARALLEL, load_user_scorer

PROMPTS = [Prompt(id=str(i), text=f"prompt {i}", metadata={"level": i}) for i in range(12)]
IMAGES = np.stack([np.full((8, 8, 3), 10 * i, dtype=np.uint8) for i in range(12)])
SAME = [Prompt(id="p", text="a star")] * 12

USER_CODE = """
import asyncio
import numpy as np
from common.types import Score

running, most = [0], [0]

def one(image, prompt, metadata, scale=1.0):
    return image.mean() * scale + metadata["level"]

async def one_async(image, prompt, metadata, scale=1.0):
    running[0] += 1
    most[0] = max(most[0], running[0])
    await asyncio.sleep(0.01)
    running[0] -= 1
    return image.mean() * scale + metadata["level"]

def many(images, prompts, metadata, scale=1.0):
    assert images.ndim == 4 and len(images) == len(prompts) == len(metadata)
    assert all(isinstance(text, str) for text in prompts)
    return images.mean(axis=(1, 2, 3)) * scale + np.array([item["level"] for item in metadata])

async def many_async(images, prompts, metadata, scale=1.0):
    await asyncio.sleep(0.01)
    return list(many(images, prompts, metadata, scale))

class Whole:
    name, version = "whole", "7"
    def __init__(self, scale=1.0):
        self.scale = scale
    def applies_to(self, prompt):
        return prompt.id != "3"
    def check_prompt(self, prompt):
        pass
    def score(self, images, prompts):
        values = many(images, [p.text for p in prompts], [p.metadata for p in prompts], self.scale)
        return [Score(sample_index=i, value=float(value)) for i, value in enumerate(values)]

class WholeAsync(Whole):
    async def score(self, images, prompts):
        await asyncio.sleep(0.01)
        return Whole.score(self, images, prompts)

class GroupOnly:
    name, version = "group", "1"
    def applies_to(self, prompt):
        return True
    def check_prompt(self, prompt):
        pass
    def score_group(self, images, prompt):
        best = images.mean(axis=(1, 2, 3)).argmax()
        return [Score(sample_index=i, value=float(i == best)) for i in range(len(images))]

class GroupAsync(GroupOnly):
    async def score_group(self, images, prompt):
        await asyncio.sleep(0.01)
        return GroupOnly.score_group(self, images, prompt)

class Called:
    async def __call__(self, image, prompt, metadata):
        return 1.5

called = Called()

def bad(image):
    kind = int(image.mean()) // 10
    if kind == 1:
        raise KeyError("no such level")
    if kind == 2:
        raise ConnectionError("refused")
    return None if kind == 3 else float("nan") if kind == 4 else 0.5

def some_fail(image, prompt, metadata):
    return bad(image)

async def some_fail_async(image, prompt, metadata):
    await asyncio.sleep(0.001)
    if int(image.mean()) == 50:
        await asyncio.sleep(60)
    return bad(image)

def items_fail(images, prompts, metadata):
    return [None, "many", float("inf")] + [0.5] * (len(images) - 3)

def short(images, prompts, metadata):
    return [0.5] * (len(images) - 1)

def text(images, prompts, metadata):
    return "0.5"

async def sleeps(images, prompts, metadata):
    await asyncio.sleep(60)

def unreachable(images, prompts, metadata):
    raise ConnectionError("refused")

def wrong(images, prompts):
    return []
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scorer]:
    """Load a member of the user's module."""
    module = f"code_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(USER_CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def make(attribute: str, options: Mapping[str, Any] | None = None, deadline_s: float = 60.0) -> Scorer:
        return load_user_scorer(f"{module}:{attribute}", options or {}, deadline_s=deadline_s)

    return make


@pytest.mark.parametrize("kind", ["one", "one_async", "many", "many_async", "Whole", "WholeAsync"])
def test_every_kind_scores_as_the_formula_says_in_any_batching(kind: str, load: Callable[..., Scorer]) -> None:
    scorer = load(kind, {"scale": 2.0})
    expected = [2.0 * 10 * i + i for i in range(12)]
    skipped = [3] if kind.startswith("Whole") else []
    for micro_batch in (1, 5, 12):
        scores = score_guarded(scorer, IMAGES, PROMPTS, micro_batch)
        assert [score.value for score in scores] == [None if i in skipped else value for i, value in enumerate(expected)]
        assert [score.error for score in scores if score.value is None] == [NOT_APPLICABLE] * len(skipped)
    turned = score_guarded(scorer, IMAGES[::-1], PROMPTS[::-1], 12)
    assert [score.value for score in turned] == [score.value for score in scores][::-1]
    assert scorer.version == load(kind, {"scale": 2.0}).version


def test_coroutines_run_side_by_side_and_no_more_than_eight_at_a_time(load: Callable[..., Scorer]) -> None:
    scorer = load("one_async")
    score_guarded(scorer, IMAGES, PROMPTS, 12)
    module = __import__(scorer.name.partition(":")[0])
    assert module.most == [NUM_PARALLEL]


@pytest.mark.parametrize("kind", ["GroupOnly", "GroupAsync"])
def test_a_class_with_score_group_sees_whole_groups(kind: str, load: Callable[..., Scorer]) -> None:
    scorer = load(kind)
    assert isinstance(scorer, GroupScorer)
    assert [score.value for score in score_guarded(scorer, IMAGES, SAME, micro_batch=5)] == [0.0] * 11 + [1.0]
    assert [score.value for score in score_guarded(scorer, IMAGES[:2], PROMPTS[:2], micro_batch=5)] == [1.0, 1.0]


def test_an_object_with_an_async_call_is_awaited(load: Callable[..., Scorer]) -> None:
    assert score_guarded(load("called"), IMAGES[:1], PROMPTS[:1], 1)[0].value == 1.5


@pytest.mark.parametrize("kind", ["some_fail", "some_fail_async"])
def test_what_fails_for_one_image_spares_its_neighbors_and_a_connection_may_pass(kind: str, load: Callable[..., Scorer]) -> None:
    started = time.monotonic()
    scores = score_guarded(load(kind, deadline_s=0.5), IMAGES[:7], PROMPTS[:7], 7)
    assert time.monotonic() - started < 50.0
    late = kind == "some_fail_async"
    assert [score.value for score in scores] == [0.5, None, None, None, None, None if late else 0.5, 0.5]
    assert scores[1].error == "KeyError: 'no such level'"
    assert "returned None for prompt 3" in scores[3].error
    assert scores[4].error == "not finite: nan"
    assert [score.may_pass for score in scores] == [False, False, True, False, False, False, False]
    if late:
        assert scores[5].error.startswith("deadline: ") and scores[5].error.endswith("did not answer within 0.5 s")


def test_a_batch_functions_items_fail_alone_and_a_wrong_number_fails_the_batch(load: Callable[..., Scorer]) -> None:
    scores = score_guarded(load("items_fail"), IMAGES[:4], PROMPTS[:4], 4)
    assert [score.value for score in scores] == [None, None, None, 0.5]
    assert "returned None for prompt 0" in scores[0].error and "returned 'many'" in scores[1].error
    assert scores[2].error == "not finite: inf"
    scores = score_guarded(load("short"), IMAGES[:4], PROMPTS[:4], 4)
    assert {score.error.partition(" returned ")[2] for score in scores} == {"3 scores for 4 images; it must return one an image"}
    assert "returned str; a batch function must return" in score_guarded(load("text"), IMAGES[:1], PROMPTS[:1], 1)[0].error


def test_an_async_batch_gets_as_many_deadlines_as_images_and_a_refused_connection_may_pass(load: Callable[..., Scorer]) -> None:
    (score,) = score_guarded(load("sleeps", deadline_s=0.05), IMAGES[:1], PROMPTS[:1], 1)
    assert (score.value, score.may_pass) == (None, False)
    assert score.error.endswith("did not answer within 0.05 s")
    assert all(score.may_pass for score in score_guarded(load("unreachable"), IMAGES[:2], PROMPTS[:2], 2))


def test_async_code_scores_from_a_thread_and_leaves_no_loop_behind(load: Callable[..., Scorer]) -> None:
    async def within_another_loop() -> list[float | None]:
        scores = await asyncio.to_thread(score_guarded, load("one_async"), IMAGES[:2], PROMPTS[:2], 2)
        return [score.value for score in scores]

    assert asyncio.run(within_another_loop()) == [0.0, 11.0]


def test_a_batch_function_without_metadata_is_a_config_error(load: Callable[..., Scorer]) -> None:
    with pytest.raises(ConfigError, match="cannot take"):
        load("wrong")
