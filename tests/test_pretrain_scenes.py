"""Scenes, captions and prompts of the synthetic world."""

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.pretrain.captions import captions_of
from deploy.pretrain.layouts import LAYOUTS, draw_scene
from deploy.pretrain.prompts import TASKS, compositional_prompts, text_prompts, write_prompts
from deploy.pretrain.scenes import Scene, Shape, render
from deploy.pretrain.text import build_tokenizer
from deploy.pretrain.words import WORDS
from reward_servers.shapes.vocabulary import MARGIN, MIN_GAP, SHAPES, TASK_COLORS, shape_outline

GRAY = (230, 230, 230)


def test_a_shape_has_its_color_inside_and_the_background_outside() -> None:
    shape = Shape(name="circle", color="blue", x=20.0, y=40.0, size=10.0)
    image = render(Scene(task="single", background=GRAY, shapes=(shape,)))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[40, 20]) == TASK_COLORS["blue"]
    assert tuple(image[40, 31]) == GRAY and tuple(image[20, 40]) == GRAY


def test_a_circle_covers_its_area() -> None:
    shape = Shape(name="circle", color="black", x=32.0, y=32.0, size=12.0)
    image = render(Scene(task="single", background=(255, 255, 255), shapes=(shape,))).astype(float)
    ink = (255 - image[..., 0]).sum() / (255 - TASK_COLORS["black"][0])
    # The outline is a 48-gon of radius 0.94 * 12; 4x supersampling rounds its border to about 1 %.
    assert ink == pytest.approx(np.pi * (0.94 * 12) ** 2, rel=0.03)


@pytest.mark.parametrize("name", SHAPES)
def test_every_outline_fits_its_stated_extent(name: str) -> None:
    assert np.abs(shape_outline(name)).max() <= 1.02


@pytest.mark.parametrize("task", sorted(LAYOUTS))
def test_objects_never_touch_and_lie_inside(task: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        shapes = draw_scene(task, random).shapes
        for i, a in enumerate(shapes):
            assert MARGIN + a.size <= min(a.x, a.y) and max(a.x, a.y) <= 64 - MARGIN - a.size
            for b in shapes[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.size + b.size + MIN_GAP


def test_captions_of_a_pair_hold_from_both_sides() -> None:
    star = Shape(name="star", color="red", x=15.0, y=30.0, size=9.0)
    heart = Shape(name="heart", color="orange", x=48.0, y=34.0, size=9.0)
    texts = {c.text for c in captions_of(Scene(task="pair", background=GRAY, shapes=(star, heart)))}
    assert {"a star left of a heart", "a heart right of a star", "a red star and an orange heart"} <= texts
    assert not any("above" in text or "below" in text for text in texts)


def test_train_and_test_prompts_share_no_text() -> None:
    for train, test in (compositional_prompts(), text_prompts()):
        texts = [text for text, _ in [*train, *test]]
        assert len(texts) == len(set(texts))
    assert {metadata["tag"] for _, metadata in compositional_prompts()[1]} == set(TASKS)


def test_counting_prompts_exclude_one_more() -> None:
    counting = [metadata for _, metadata in compositional_prompts()[0] if metadata["tag"] == "counting"]
    for metadata in counting:
        assert metadata["exclude"][0]["count"] == metadata["include"][0]["count"] + 1


def test_every_prompt_fits_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, max_tokens=36)
    for train, test in (compositional_prompts(), text_prompts()):
        assert max(len(tokenizer(text).input_ids) for text, _ in [*train, *test]) <= 36


def test_the_prompt_files_are_those_the_generators_make(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    shipped = Path(__file__).parents[1] / "deploy" / "prompts"
    for path in sorted(tmp_path.rglob("*.jsonl")):
        assert path.read_bytes() == (shipped / path.relative_to(tmp_path)).read_bytes()
        assert set(json.loads(path.read_text().splitlines()[0])) == {"id", "text", "metadata"}


def test_the_words_are_distinct_and_fit_a_sign() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 100
    assert {len(word) for word in WORDS} == {3, 4}
