"""GenEval-style prompts of the project's own: what a text says and what its metadata ask are one thing, for every prompt."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.prompts import read_prompts
from common.types import Prompt
from deploy.geneval_prompts import geneval_line, make_prompts, one, plural, split_prompts, with_article, without_texts_of
from reward_servers.detectors.vocabulary import COCO_CLASSES, COLORS
from reward_servers.scorers.geneval import check_metadata

# every class whose plural is not its name and an s, written by hand
PLURALS = {
    "person": "people", "bus": "buses", "bench": "benches", "sheep": "sheep", "wine glass": "wine glasses", "knife": "knives",
    "sandwich": "sandwiches", "broccoli": "heads of broccoli", "couch": "couches", "computer mouse": "computer mice",
    "scissors": "pairs of scissors", "skis": "pairs of skis", "toothbrush": "toothbrushes",
}  # fmt: skip
AN = ("airplane", "umbrella", "elephant", "apple", "orange", "oven")
UNITS = {"skis": "a pair of {}skis", "scissors": "a pair of {}scissors", "broccoli": "a head of {}broccoli"}
NUMBERS = {"two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(3, 200)


def noun(name: str, color: str = "") -> str:
    """Return an object with its article, by the tables above."""
    if name in UNITS:
        return UNITS[name].format(f"{color} " if color else "")
    words = f"{color} {name}" if color else name
    return f"an {words}" if words.split()[0] in AN else f"a {words}"


SINGLES = {
    noun(name, color): {"class": name, "count": 1, **({"color": color} if color else {})}
    for name in COCO_CLASSES
    for color in ("", *COLORS)
}


def said(text: str) -> dict[str, Any]:
    """Read a text's metadata back from its words alone; the singulars, plurals and relations are searched, not computed."""
    body = text.removeprefix("a photo of ")
    if body in SINGLES:
        return {"tag": "colors" if "color" in SINGLES[body] else "single_object", "include": [SINGLES[body]]}
    number, _, rest = body.partition(" ")
    if number in NUMBERS:
        (name,) = [name for name in COCO_CLASSES if PLURALS.get(name, f"{name}s") == rest]
        count = NUMBERS[number]
        return {"tag": "counting", "include": [{"class": name, "count": count}], "exclude": [{"class": name, "count": count + 1}]}
    (parts,) = [
        (match[1], match[2], match[3])
        for match in re.finditer(r"^(.+?) (and|left of|right of|above|below) (.+)$", body)
        if match[1] in SINGLES and match[3] in SINGLES
    ]
    first, joint, second = SINGLES[parts[0]], parts[1], SINGLES[parts[2]]
    if joint != "and":
        return {"tag": "position", "include": [second, {**first, "position": [joint, 0]}]}
    return {"tag": "color_attr" if "color" in first else "two_object", "include": [first, second]}


def test_text_and_metadata_agree_for_every_prompt(prompts: list[Prompt]) -> None:
    assert len(prompts) == 80 + 5 * 200
    for prompt in prompts:
        assert said(prompt.text) == prompt.metadata, prompt.text
        check_metadata(prompt.metadata)


def test_every_class_comes_right_in_every_form() -> None:
    for name in COCO_CLASSES:
        assert plural(name) == PLURALS.get(name, f"{name}s")
        for color in ("", *COLORS):
            assert one(name, color) == noun(name, color)


def test_articles_go_by_sound_for_classes_of_the_users_own() -> None:
    given = {"unicorn": "a", "hourglass": "an", "eucalyptus": "a", "ice cream": "an", "used car": "a", "one-way sign": "a", "ukulele": "an"}
    for name, article in given.items():
        assert with_article(name) == f"{article} {name}"
    assert [plural(name) for name in ("city", "toy", "box", "cherry tree")] == ["cities", "toys", "boxes", "cherry trees"]


def test_no_text_and_no_id_comes_twice_and_every_task_has_its_number(prompts: list[Prompt]) -> None:
    assert len({prompt.text for prompt in prompts}) == len(prompts) == len({prompt.id for prompt in prompts})
    counts = Counter(prompt.tag for prompt in prompts)
    expected = {"single_object": 80, "two_object": 200, "counting": 200, "colors": 200, "position": 200, "color_attr": 200}
    assert list(counts.items()) == list(expected.items())  # in GenEval's order


def test_a_seed_gives_its_prompts_again_and_another_one_gives_others(prompts: list[Prompt]) -> None:
    assert make_prompts(3, 200) == prompts
    others = {prompt.text for prompt in make_prompts(4, 200)}
    shared = [prompt for prompt in prompts if prompt.text in others]
    assert len(shared) < 0.5 * len(prompts)


def test_a_smaller_set_is_the_start_of_a_larger_one(prompts: list[Prompt]) -> None:
    small = make_prompts(3, 5)
    assert small == [prompt for prompt in prompts if int(prompt.id.rsplit("-", 1)[1]) < 5]


def test_the_metadata_have_genevals_keys_and_values_in_its_order(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        keys = ["tag", "include", "exclude"] if prompt.tag == "counting" else ["tag", "include"]
        assert list(prompt.metadata) == keys
        more = {"colors": ["color"], "color_attr": ["color"], "position": ["position"]}.get(prompt.tag, [])
        assert list(prompt.metadata["include"][-1]) == ["class", "count", *more]


def test_nobody_is_painted_and_nothing_has_its_own_name_as_its_color_and_two_painted_things_differ(prompts: list[Prompt]) -> None:
    everything = make_prompts(0, 10_000)
    colored = [prompt for prompt in everything if prompt.tag in ("colors", "color_attr")]
    items = [item for prompt in colored for item in prompt.metadata["include"]]
    assert {item["class"] for item in items} == set(COCO_CLASSES) - {"person"}
    assert all(item["class"] != item["color"] for item in items)
    pairs = [prompt.metadata["include"] for prompt in colored if prompt.tag == "color_attr"]
    assert all(first["class"] != second["class"] and first["color"] != second["color"] for first, second in pairs)
    counts = Counter(prompt.tag for prompt in everything)
    assert counts["colors"] == 79 * 10 - 1 and counts["counting"] == 240 and counts["two_object"] == 80 * 79


def test_train_and_test_share_no_question_whatever_the_seeds(prompts: list[Prompt]) -> None:
    train, test = split_prompts(prompts)
    assert sorted((*train, *test), key=lambda item: item.id) == sorted(prompts, key=lambda item: item.id)
    assert 0.15 < len(test) / len(prompts) < 0.25  # 1,080 draws of .2: a deviation is .012
    _, other_test = split_prompts(make_prompts(4, 200))
    assert {item.text for item in train}.isdisjoint(item.text for item in other_test)

    def asked(side: list[Prompt]) -> set[str]:
        things = ("position", "two_object", "color_attr")
        keys = (
            [item.tag, sorted(f"{x['class']}/{x.get('color')}" for x in item.metadata["include"])] for item in side if item.tag in things
        )
        return {json.dumps(key) for key in keys}

    everything, nothing_shared = split_prompts(make_prompts(0, 6000))
    assert asked(everything).isdisjoint(asked(nothing_shared))


def test_a_benchmarks_texts_can_be_held_out(prompts: list[Prompt]) -> None:
    benchmark = [Prompt(id="1", text="A photo of a cup"), Prompt(id="2", text="a photo of a cupboard")]
    kept = without_texts_of(prompts, benchmark)
    assert [prompt.text for prompt in prompts if prompt not in kept] == ["a photo of a cup"]


def test_both_forms_of_a_line_are_read_back_as_they_were(tmp_path: Path, prompts: list[Prompt]) -> None:
    few = prompts[::40]
    own, geneval = tmp_path / "own.jsonl", tmp_path / "geneval.jsonl"
    own.write_text("\n".join(json.dumps({"id": p.id, "text": p.text, "metadata": p.metadata}) for p in few), encoding="utf-8")
    geneval.write_text("\n".join(map(geneval_line, few)), encoding="utf-8")
    assert list(read_prompts(own)) == few
    assert [(p.text, p.metadata) for p in read_prompts(geneval)] == [(p.text, p.metadata) for p in few]


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"per_task": 0}, "at least 1"),
        ({"classes": ["cup"]}, "classes"),
        ({"classes": ["cup", "cup"]}, "classes"),
        ({"classes": ["cup", " "]}, "classes"),
        ({"colors": ["red"]}, "colors"),
    ],
)
def test_words_that_make_no_prompts_are_config_errors(given: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        make_prompts(**{"seed": 0, "per_task": 1, **given})
    with pytest.raises(ConfigError, match="test_share"):
        split_prompts([], 1.0)
