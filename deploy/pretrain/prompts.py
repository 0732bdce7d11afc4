"""The project's own prompt sets: compositional prompts with GenEval's metadata, and visual text."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from deploy.pretrain.captions import COLORED_TEXT_TEMPLATE, FRAMES, TEXT_TEMPLATE, with_article
from deploy.pretrain.words import LETTER_COLORS, SURFACES, WORDS
from reward_servers.shapes.vocabulary import COUNT_WORDS, PLURALS, RELATIONS, SHAPES, TASK_COLORS

Metadata = dict[str, Any]
Prompt = tuple[str, Metadata]

TEST_PROMPTS: Final[dict[str, int]] = {
    "single_object": 18,
    "two_object": 40,
    "counting": 27,
    "colors": 40,
    "position": 40,
    "color_attr": 40,
}
"""Held-out prompts a task; where a task has few contents, half of them."""
MAX_TRAIN_PROMPTS: Final = 120
TEXT_TEST_PROMPTS: Final = 120
TEXT_TRAIN_PROMPTS: Final = 400


def _include(name: str, **more: Any) -> Metadata:
    return {"class": name, "count": 1, **more}


def _single_object() -> Iterator[Prompt]:
    for frame, shape, article in itertools.product(FRAMES, SHAPES, ("a", "one")):
        yield f"{frame}{article} {shape}", {"tag": "single_object", "include": [_include(shape)], "exclude": []}


def _two_object() -> Iterator[Prompt]:
    for frame, (a, b) in itertools.product(FRAMES[:2], itertools.permutations(SHAPES, 2)):
        metadata = {"tag": "two_object", "include": [_include(a), _include(b)], "exclude": []}
        yield f"{frame}{with_article(a)} and {with_article(b)}", metadata


def _counting() -> Iterator[Prompt]:
    for frame, shape, count in itertools.product(FRAMES, SHAPES, (2, 3, 4)):
        include = [{"class": shape, "count": count}]
        exclude = [{"class": shape, "count": count + 1}]
        metadata = {"tag": "counting", "include": include, "exclude": exclude}
        yield f"{frame}{COUNT_WORDS[count]} {PLURALS[shape]}", metadata


def _colors() -> Iterator[Prompt]:
    for frame, shape, color in itertools.product(FRAMES, SHAPES, TASK_COLORS):
        metadata = {"tag": "colors", "include": [_include(shape, color=color)], "exclude": []}
        yield f"{frame}{with_article(f'{color} {shape}')}", metadata


def _position() -> Iterator[Prompt]:
    for (a, b), relation in itertools.product(itertools.permutations(SHAPES, 2), RELATIONS):
        placed = _include(a, position=[relation, 0])
        metadata = {"tag": "position", "include": [_include(b), placed], "exclude": []}
        yield f"{with_article(a)} {relation} {with_article(b)}", metadata


def _color_attr() -> Iterator[Prompt]:
    for (a, b), (ink, other) in itertools.product(itertools.permutations(SHAPES, 2), itertools.permutations(TASK_COLORS, 2)):
        metadata = {"tag": "color_attr", "include": [_include(a, color=ink), _include(b, color=other)], "exclude": []}
        yield f"{with_article(f'{ink} {a}')} and {with_article(f'{other} {b}')}", metadata


TASKS: Final = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def _text() -> Iterator[Prompt]:
    for surface, word, color in itertools.product(SURFACES, WORDS, (None, *LETTER_COLORS)):
        template = TEXT_TEMPLATE if color is None else COLORED_TEXT_TEMPLATE
        yield template.format(surface=surface, word=word, color=color), {"tag": "text"}


def _shuffled(prompts: Iterator[Prompt]) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt[0].encode()).hexdigest())


def compositional_prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Return (train, test): GenEval's six tasks on colored shapes; no text is in both."""
    train: list[Prompt] = []
    test: list[Prompt] = []
    for task, make in TASKS.items():
        prompts = _shuffled(make())
        held_out = TEST_PROMPTS[task]
        test += prompts[:held_out]
        train += prompts[held_out : held_out + MAX_TRAIN_PROMPTS]
    return train, test


def text_prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Return (train, test): words on signs; no (surface, word, color) is in both."""
    prompts = _shuffled(_text())
    return prompts[TEXT_TEST_PROMPTS : TEXT_TEST_PROMPTS + TEXT_TRAIN_PROMPTS], prompts[:TEXT_TEST_PROMPTS]


def _write(path: Path, prompts: list[Prompt], prefix: str) -> None:
    lines = [
        json.dumps({"id": f"{prefix}-{number:04d}", "text": text, "metadata": metadata}) for number, (text, metadata) in enumerate(prompts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_prompts(folder: Path) -> None:
    """Write `tiny-geneval` and `tiny-ocr`, each with train.jsonl and test.jsonl; every call writes the same bytes.

    Args:
        folder: where the two sets go.
    """
    for name, (train, test) in {"tiny-geneval": compositional_prompts(), "tiny-ocr": text_prompts()}.items():
        _write(folder / name / "train.jsonl", train, f"{name}-train")
        _write(folder / name / "test.jsonl", test, f"{name}-test")
