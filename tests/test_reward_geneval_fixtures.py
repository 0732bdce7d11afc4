"""GenEval's rule at its borders, task by task, on hand-made boxes; and what GenEval asks of detectors and color models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geneval_models import make_clip, make_mask2former, make_owlv2
from numpy.typing import NDArray

from common.errors import ConfigError, DataError, ScorerError
from common.types import Prompt
from reward_servers.detection import Detection
from reward_servers.scorers.base import HasKnownCase
from reward_servers.scorers.geneval import RULES, DetectedGenEval, GenEval
from reward_servers.scorers.geneval_entries import ENTRIES, make_geneval
from reward_servers.scorers.geneval_rules import TASKS
from tests.geneval_detectors import FixedDetector

BLANK = np.zeros((1, 64, 64, 3), dtype=np.uint8)
Box = tuple[float, float, float, float]


class AskedDetector(FixedDetector):
    """An open vocabulary that remembers what it was asked for."""

    def __init__(self, detections: Sequence[Detection]) -> None:
        super().__init__(detections)
        self.asked: list[tuple[str, ...]] = []

    def detect_classes(self, image: NDArray[np.uint8], labels: Sequence[str]) -> list[Detection]:
        """Return the fixed objects of the classes."""
        self.asked.append(tuple(labels))
        return [item for item in self._detections if item.label in labels]


class CountingColors:
    """A color model that sees every left half as red, and counts its calls."""

    version = "counting-1"
    colors: tuple[str, ...] = ("red", "blue")

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: NDArray[np.uint8], detection: Detection) -> str | None:
        """Name the color by the box's place."""
        self.calls += 1
        return "red" if detection.box[0] < 32 else "blue"


def thing(label: str, confidence: float = 0.95, *, color: str | None = None, box: Box = (0, 0, 10, 10)) -> Detection:
    return Detection(label=label, box=box, confidence=confidence, color=color)


def scores(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> list[float | None]:
    """Return (strict, dense, dense_flowgrpo)."""
    prompt = Prompt(id="0", text="t", metadata=metadata)
    names = ("geneval_strict", "geneval_dense", "geneval_dense_flowgrpo")
    return [DetectedGenEval(name, FixedDetector(detections)).score(BLANK, [prompt])[0].value for name in names]


def asks(tag: str, *include: Mapping[str, Any], exclude: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def wanted(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


def above(value: float) -> float:
    """Return the next number that a float64 can hold."""
    return float(np.nextafter(value, 1))


# --- thresholds, exclude, cap ---


@pytest.mark.parametrize("tag", TASKS)
def test_a_box_counts_above_its_tasks_border_and_not_on_it(tag: str) -> None:
    border = 0.9 if tag == "counting" else 0.3
    metadata = asks(tag, wanted("cup"))
    assert scores(metadata, [thing("cup", border)]) == [0, 0, 0]
    assert scores(metadata, [thing("cup", above(border))]) == [1, 1, 1]
    assert scores(metadata, [thing("cup", 0.5)])[0] == (0 if tag == "counting" else 1)


@pytest.mark.parametrize("tag", TASKS)
def test_an_excluded_class_fails_the_strict_rule_from_its_count_on_and_no_other(tag: str) -> None:
    metadata = asks(tag, wanted("cup"), exclude=[wanted("dog", 2)])
    assert scores(metadata, [thing("cup"), thing("dog")]) == [1, 1, 1]
    assert scores(metadata, [thing("cup"), thing("dog"), thing("dog")]) == [0, 1, 1]  # dense rewards read include alone
    border = 0.9 if tag == "counting" else 0.3
    assert scores(metadata, [thing("cup"), thing("dog"), thing("dog", border)])[0] == 1  # a box that does not count excludes nothing


def test_every_exclude_entry_is_asked() -> None:
    metadata = asks("single_object", wanted("cup"), exclude=[wanted("dog", 1), wanted("cat", 1)])
    assert scores(metadata, [thing("cup")])[0] == 1
    assert scores(metadata, [thing("cup"), thing("cat")])[0] == 0


def test_sixteen_boxes_are_kept_of_each_class_by_itself() -> None:
    cups, dogs = [thing("cup") for _ in range(20)], [thing("dog") for _ in range(16)]
    assert scores(asks("counting", wanted("cup", 16), wanted("dog", 16)), [*cups, *dogs]) == [1, 1, 1]
    assert scores(asks("counting", wanted("cup", 16), exclude=[wanted("cup", 17)]), cups)[0] == 1  # no more than 16 are ever found
    assert scores(asks("counting", wanted("cup", 15), exclude=[wanted("cup", 16)]), cups)[0] == 0
    assert scores(asks("counting", wanted("cup", 17)), cups)[0] == 0


def test_a_box_beyond_the_sixteenth_lends_no_color() -> None:
    blue = [thing("cup", 0.8, color="blue") for _ in range(16)]
    assert scores(asks("colors", wanted("cup", 1, color="red")), [*blue, thing("cup", 0.7, color="red")])[0] == 0
    assert scores(asks("colors", wanted("cup", 1, color="red")), [*blue, thing("cup", 0.9, color="red")])[0] == 1


# --- color ---


@pytest.mark.parametrize(
    ("colors", "strict", "dense"),
    [
        (("red", "red"), 1, 1),
        (("red", "blue"), 0, 0.75),  # (1 + (1 - 1/2)) / 2
        (("blue", "red"), 0, 0.75),
        (("red", None), 0, 0.75),
        (("blue", "blue"), 0, 0.5),  # (1 + 0) / 2
    ],
)
def test_all_kept_boxes_must_have_the_color(colors: tuple[str | None, ...], strict: float, dense: float) -> None:
    metadata = asks("colors", wanted("cup", 2, color="red"))
    found = [thing("cup", 0.9 - 0.1 * index, color=color) for index, color in enumerate(colors)]
    assert scores(metadata, found) == [strict, dense, dense]


def test_a_surplus_box_of_another_color_does_not_count_strictly_when_it_is_the_less_sure_one() -> None:
    metadata = asks("color_attr", wanted("cup", color="red"), wanted("dog", color="blue"))
    cups = [thing("cup", 0.9, color="red"), thing("cup", 0.8, color="blue")]
    # dense: the cup's count is off by 1 of 1, and its color was asked: 0, 0; the dog 1, 1
    assert scores(metadata, [*cups, thing("dog", color="blue")]) == [1, 0.5, 0.5]


# --- position ---


def placed(x: float, y: float, side: float) -> tuple[Detection, Detection]:
    """Return a cup around the origin and a dog at (x, y), both squares of a side."""
    half = side / 2
    boxes = ((-half, -half, half, half), (x - half, y - half, x + half, y + half))
    return thing("cup", box=boxes[0]), thing("dog", box=boxes[1])


DIRECTIONS = {"left of": (-10, 0), "right of": (10, 0), "above": (0, -10), "below": (0, 10)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def position(relation: str) -> dict[str, Any]:
    return asks("position", wanted("cup"), wanted("dog", position=[relation, 0]))


@pytest.mark.parametrize("relation", DIRECTIONS)
def test_a_relation_holds_above_one_half_and_not_on_it_in_all_four_directions(relation: str) -> None:
    x, y = DIRECTIONS[relation]
    wrong = [0, pytest.approx(2 / 3), 0.75]
    # (10 - .1 * (side + side)) / 10: .5 at a side of 25, .52 at 24, .48 at 26
    assert scores(position(relation), placed(x, y, 25)) == wrong
    assert scores(position(relation), placed(x, y, 24)) == [1, 1, 1]
    assert scores(position(relation), placed(x, y, 26)) == wrong
    assert scores(position(relation), placed(x, y, 25 - 1e-9)) == [1, 1, 1]


@pytest.mark.parametrize("relation", DIRECTIONS)
def test_two_right_objects_in_a_wrong_place_give_two_thirds_and_bug_compatible_three_quarters(relation: str) -> None:
    x, y = DIRECTIONS[OPPOSITE[relation]]
    # dense: (1 + 1 + 0) / 3; flowgrpo: (1 + 1 + 0 + 1) / 4
    assert scores(position(relation), placed(x, y, 4)) == [0, pytest.approx(0.667, abs=4e-4), 0.75]


@pytest.mark.parametrize("relation", DIRECTIONS)
def test_on_the_diagonal_the_norm_is_of_both_axes(relation: str) -> None:
    x, y = (offset or 10 for offset in DIRECTIONS[relation])  # 10 along the asked axis in its direction, and 10 along the other
    # (10 - .2 * side) / sqrt(200) > .5 as long as side < 14.64
    assert scores(position(relation), placed(x, y, 14.6))[0] == 1
    assert scores(position(relation), placed(x, y, 14.7))[0] == 0


def test_the_axes_shrink_by_their_own_extents() -> None:
    # a wide and flat pair: widths 60 + 20 take 8 of 10 along x, heights 2 + 2 take .4 of 10 along y
    cup, dog = thing("cup", box=(-30, -1, 30, 1)), thing("dog", box=(0, 9, 20, 11))
    assert scores(position("below"), [cup, dog])[0] == 1  # 9.6 / 14.14 = .68
    assert scores(position("right of"), [cup, dog])[0] == 0  # 2 / 14.14 = .14


def test_a_position_is_asked_of_the_kept_boxes_alone() -> None:
    right = thing("dog", 0.9, box=(35, -5, 45, 5))
    wrong = thing("dog", 0.8, box=(-45, -5, -35, 5))
    cup = thing("cup", box=(-5, -5, 5, 5))
    assert scores(position("right of"), [cup, right, wrong])[0] == 1
    assert scores(position("left of"), [cup, right, wrong])[0] == 0


def test_a_relation_to_an_object_of_the_wrong_color_fails() -> None:
    metadata = asks("position", wanted("cup", color="red"), wanted("dog", position=["right of", 0]))
    cup, dog = thing("cup", color="blue", box=(-5, -5, 5, 5)), thing("dog", box=(35, -5, 45, 5))
    # the cup is not met, so the dog has nothing to be right of: 1, 0, 1 and one 0 in both variants
    assert scores(metadata, [cup, dog]) == [0, 0.5, 0.5]


# --- what is asked of detectors and color models ---


def test_an_open_vocabulary_is_asked_for_the_classes_of_the_prompt_alone_once_each() -> None:
    detector = AskedDetector([thing("cup"), thing("dog"), thing("cat")])
    metadata = asks("counting", wanted("cup"), wanted("dog"), exclude=[wanted("cup", 2), wanted("bird", 1)])
    (score,) = DetectedGenEval("geneval_dense", detector).score(BLANK, [Prompt(id="0", text="t", metadata=metadata)])
    assert detector.asked == [("cup", "dog", "bird")]
    assert (score.value, score.details["strict"]) == (1.0, 1.0)


def test_a_color_model_is_asked_once_a_box_and_its_version_and_colors_are_the_scores() -> None:
    colors = CountingColors()
    scorer = DetectedGenEval("geneval_dense", FixedDetector([thing("cup"), thing("cup", box=(40, 0, 50, 10))]), colors)
    metadata = asks("colors", wanted("cup", 2, color="red"))
    (score,) = scorer.score(BLANK, [Prompt(id="0", text="t", metadata=metadata)])
    assert score.value == pytest.approx(0.75)  # (1 + (1 - 1/2)) / 2
    assert colors.calls == 2
    assert scorer.version == "1-fixed-0-counting-1"
    with pytest.raises(DataError, match="color 'green' is nothing that the detector can find; it knows red, blue"):
        scorer.check_prompt(Prompt(id="0", text="t", metadata=asks("colors", wanted("cup", color="green"))))


def test_a_color_model_that_fails_gives_a_null_and_no_number() -> None:
    def broken(image: NDArray[np.uint8], detection: Detection) -> str | None:
        raise ScorerError("no color today")

    prompt = Prompt(id="0", text="t", metadata=asks("colors", wanted("cup", color="red")))
    (score,) = DetectedGenEval("geneval_dense", FixedDetector([thing("cup")]), broken).score(BLANK, [prompt])
    assert (score.value, score.error) == (None, "no color today")


# --- making one ---


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root: Path = tmp_path_factory.mktemp("geneval")
    made = {"mask2former": make_mask2former(root / "m"), "owlv2": make_owlv2(root / "o"), "clip": make_clip(root / "c")}
    return {name: str(path) for name, path in made.items()}


def test_a_score_of_photographs_has_a_name_of_its_own_and_is_the_same_in_any_batch(checkpoints: dict[str, str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    metadata = asks("colors", wanted("dog", color="red"), exclude=[wanted("héron", 1)])
    prompts = [Prompt(id=str(i), text="t" * (1 + 9_999 * i), metadata=metadata) for i in range(3)]
    scorer = make_geneval(
        "geneval_dense", detector="owlv2", model=checkpoints["owlv2"], clip_model=checkpoints["clip"], found_score=0.1, counted_score=0.9
    )
    assert scorer.name == "geneval_owlv2_dense"
    assert not isinstance(scorer, HasKnownCase)
    together = [score.value for score in scorer.score(images, prompts)]
    assert None not in together
    assert [scorer.score(images[i : i + 1], prompts[i : i + 1])[0].value for i in range(3)] == together
    assert [score.value for score in scorer.score(images[::-1], prompts[::-1])] == together[::-1]
    other = make_geneval(
        "geneval_dense", detector="owlv2", model=checkpoints["owlv2"], clip_model=checkpoints["clip"], found_score=0.2, counted_score=0.9
    )
    assert other.version != scorer.version


def test_the_hf_entries_judge_by_mask2former_and_clip(checkpoints: dict[str, str]) -> None:
    entry = next(entry for entry in ENTRIES if entry.card.name == "geneval_hf_strict")
    scorer = entry.make(model=checkpoints["mask2former"], clip_model=checkpoints["clip"])
    assert scorer.name == "geneval_hf_strict"
    scorer.check_prompt(Prompt(id="0", text="t", metadata=asks("colors", wanted("tv remote", color="pink"))))
    with pytest.raises(DataError, match="class 'square'"):
        scorer.check_prompt(Prompt(id="0", text="t", metadata=asks("colors", wanted("square"))))
    with pytest.raises(DataError, match="color 'gray'"):
        scorer.check_prompt(Prompt(id="0", text="t", metadata=asks("colors", wanted("dog", color="gray"))))
    (score,) = scorer.score(BLANK, [Prompt(id="0", text="t", metadata=asks("single_object", wanted("dog")))])
    assert score.value in (0.0, 1.0)
    assert entry.card.verified == "not verified with real weights"


def test_every_rule_has_an_entry_of_each_kind_under_its_own_name() -> None:
    assert [entry.card.name for entry in ENTRIES] == [
        "geneval_strict", "geneval_dense", "geneval_dense_flowgrpo",
        "geneval_hf_strict", "geneval_hf_dense", "geneval_hf_dense_flowgrpo",
    ]  # fmt: skip
    for entry in ENTRIES[:3]:
        scorer = entry.make()
        assert isinstance(scorer, GenEval) and scorer.name == entry.card.name and scorer.name in RULES
        assert isinstance(scorer, HasKnownCase)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"detector": "eyes"}, "one of shapes, mask2former, owlv2, grounding_dino"),
        ({"detector": "shapes", "model": "x"}, "option model is nothing that the detector shapes takes"),
        ({"detector": "mask2former", "found_score": 0.2}, "option found_score is nothing that the detector mask2former takes"),
        ({"detector": "owlv2", "model": "/nowhere/at/all"}, "cannot be loaded"),
    ],
)
def test_options_that_do_not_fit_are_config_errors(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        make_geneval("geneval_strict", **options)
