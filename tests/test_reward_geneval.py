"""GenEval's rules on hand-made boxes; every expected score is computed by hand in the comment beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from common.types import Prompt
from reward_servers.detection import Detection, own_color
from reward_servers.scorers.geneval import GenEval, check_metadata
from reward_servers.scorers.geneval_rules import kept_detections, relations_of
from tests.geneval_detectors import FixedDetector

BLANK = np.zeros((1, 64, 64, 3), dtype=np.uint8)
NAMES = ("geneval_strict", "geneval_dense", "geneval_dense_flowgrpo")


def thing(label: str, x: float = 0, y: float = 0, *, confidence: float = 0.95, color: str | None = None, side: float = 10) -> Detection:
    """A square box of a side around a center."""
    half = side / 2
    return Detection(label=label, box=(x - half, y - half, x + half, y + half), confidence=confidence, color=color)


def scores(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> tuple[float | None, ...]:
    """Return (strict, dense, dense_flowgrpo)."""
    prompt = Prompt(id="0", text="t", metadata=metadata)
    return tuple(GenEval(name, FixedDetector(detections), own_color).score(BLANK, [prompt])[0].value for name in NAMES)


def wanted(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


SINGLE = {"tag": "single_object", "include": [wanted("cup")]}
TWO = {"tag": "two_object", "include": [wanted("cup"), wanted("dog")]}
COUNTING = {"tag": "counting", "include": [wanted("cup", 3)], "exclude": [wanted("cup", 4)]}
COLORS = {"tag": "colors", "include": [wanted("cup", color="blue")]}
POSITION = {"tag": "position", "include": [wanted("cup"), wanted("dog", position=["left of", 0])]}
ATTRIBUTES = {"tag": "color_attr", "include": [wanted("cup", color="blue"), wanted("dog", color="red")]}


def test_single_object_wants_at_least_one_and_the_dense_rewards_exactly_one() -> None:
    assert scores(SINGLE, [thing("cup")]) == (1, 1, 1)
    assert scores(SINGLE, [thing("dog")]) == (0, 0, 0)  # 1 - |1 - 0| / 1
    assert scores(SINGLE, [thing("cup"), thing("cup")]) == (1, 0, 0)  # 1 - |1 - 2| / 1
    assert scores(SINGLE, [thing("cup") for _ in range(4)]) == (1, 0, -2)  # 1 - 3 / 1, clipped in geneval_dense alone


def test_two_objects_are_both_needed() -> None:
    assert scores(TWO, [thing("cup"), thing("dog")]) == (1, 1, 1)
    assert scores(TWO, [thing("cup"), thing("cat")]) == (0, 0.5, 0.5)  # (1 + 0) / 2


def test_a_confidence_must_exceed_the_border_of_its_task() -> None:
    assert scores(SINGLE, [thing("cup", confidence=0.3)]) == (0, 0, 0)
    assert scores(SINGLE, [thing("cup", confidence=0.3001)]) == (1, 1, 1)
    cups = [thing("cup"), thing("cup")]
    assert scores(COUNTING, [*cups, thing("cup", confidence=0.9)]) == (0, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert scores(COUNTING, [*cups, thing("cup", confidence=0.9001)]) == (1, 1, 1)


def test_counting_is_exact_through_its_exclude_entry() -> None:
    assert scores(COUNTING, [thing("cup") for _ in range(3)]) == (1, 1, 1)
    # one too many: 1 - 1/3
    assert scores(COUNTING, [thing("cup") for _ in range(4)]) == (0, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert scores(COUNTING, [thing("cup") for _ in range(2)]) == (0, pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_at_most_sixteen_boxes_a_class_are_kept_the_most_confident_ones() -> None:
    many = [thing("cup", confidence=0.91 + i / 1000) for i in range(20)]
    kept = kept_detections(many, "counting")["cup"]
    assert [round(item.confidence, 3) for item in kept] == [round(0.929 - i / 1000, 3) for i in range(16)]
    seventeen = {"tag": "counting", "include": [wanted("cup", 17)]}
    assert scores(seventeen, many) == (0, pytest.approx(16 / 17), pytest.approx(16 / 17))


def test_overlapping_boxes_are_not_suppressed() -> None:
    assert len(kept_detections([thing("cup"), thing("cup")], "single_object")["cup"]) == 2


def test_a_color_is_asked_of_the_most_confident_boxes() -> None:
    red, blue = thing("cup", confidence=0.9, color="red"), thing("cup", confidence=0.8, color="blue")
    assert scores(COLORS, [blue]) == (1, 1, 1)
    assert scores(COLORS, [red]) == (0, 0.5, 0.5)  # count 1, color 0
    assert scores(COLORS, [thing("cup", color=None)]) == (0, 0.5, 0.5)
    assert scores(COLORS, [red, blue])[0] == 0
    assert scores({"tag": "colors", "include": [wanted("cup", color="red")]}, [red, blue])[0] == 1
    assert scores(COLORS, [red, blue])[1:] == (0, 0)  # count 1 - 1/1 = 0, and one 0 for the color that was asked


def test_several_objects_of_a_color_count_one_by_one() -> None:
    metadata = {"tag": "colors", "include": [wanted("cup", 2, color="blue")]}
    blue, red = thing("cup", color="blue"), thing("cup", color="red")
    assert scores(metadata, [blue, red]) == (0, 0.75, 0.75)  # (1 + (1 - 1/2)) / 2
    assert scores(metadata, [blue]) == (0, 0.25, 0.25)  # (1/2 + 0) / 2


def test_a_wrong_position_of_right_objects_gives_three_quarters_bug_compatible_and_two_thirds_counted_once() -> None:
    assert scores(POSITION, [thing("cup", 50, 50), thing("dog", 20, 50)]) == (1, 1, 1)
    # flowgrpo: (1 + 1 + 0 + 1) / 4; dense: (1 + 1 + 0) / 3
    assert scores(POSITION, [thing("cup", 20, 50), thing("dog", 50, 50)]) == (0, pytest.approx(2 / 3), 0.75)


def test_a_position_without_its_target_or_its_object_adds_one_zero() -> None:
    # the cup is missing: 0 for it, 1 for the dog, 0 for the position
    assert scores(POSITION, [thing("dog", 20, 50)]) == (0, pytest.approx(1 / 3), pytest.approx(1 / 3))
    # the dog is missing: 1, 0, 0
    assert scores(POSITION, [thing("cup", 20, 50)]) == (0, pytest.approx(1 / 3), pytest.approx(1 / 3))
    # two dogs: 1, 0 (1 - 1/1), 0; strictly the more confident dog is asked
    dogs = [thing("dog", 20, 50, confidence=0.9), thing("dog", 60, 50, confidence=0.8)]
    assert scores(POSITION, [thing("cup", 40, 50), *dogs]) == (1, pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_every_object_must_hold_the_relation_to_every_target() -> None:
    metadata = {"tag": "position", "include": [wanted("cup", 2), wanted("dog", 2, position=["left of", 0])]}
    cups = [thing("cup", 50, 50), thing("cup", 60, 50)]
    assert scores(metadata, [*cups, thing("dog", 10, 50), thing("dog", 20, 50)])[0] == 1
    assert scores(metadata, [*cups, thing("dog", 10, 50), thing("dog", 55, 50)])[0] == 0
    # flowgrpo stops at the first failed relation: 1, 1, 0, 1
    assert scores(metadata, [*cups, thing("dog", 10, 50), thing("dog", 55, 50)])[2] == 0.75


def test_relations_shrink_the_offset_by_a_tenth_of_the_extents_and_divide_by_its_norm() -> None:
    def boxes(x: float, y: float, side: float) -> frozenset[str]:
        return relations_of(thing("a", x, y, side=side).box, thing("b", side=side).box)

    assert boxes(-20, 0, 10) == {"left of"}  # (20 - .1 * 20) / 20 = .9
    assert boxes(20, 0, 10) == {"right of"}
    assert boxes(0, -20, 10) == {"above"}
    assert boxes(0, 20, 10) == {"below"}
    assert boxes(-20, -20, 10) == {"left of", "above"}  # 18 / 28.28 = .636 on both axes
    assert boxes(-10, 0, 25) == frozenset()  # (10 - .1 * 50) / 10 = .5: the border itself does not hold
    assert boxes(-10, 0, 24) == {"left of"}  # .52
    assert boxes(-1, 0, 10) == frozenset()  # shrunk to nothing
    assert boxes(0, 0, 10) == frozenset()
    assert boxes(-10, -20, 0.0) == {"above"}  # 10 / 22.36 = .447, 20 / 22.36 = .894


def test_color_attribution_wants_each_color_on_its_own_object() -> None:
    assert scores(ATTRIBUTES, [thing("cup", color="blue"), thing("dog", color="red")]) == (1, 1, 1)
    assert scores(ATTRIBUTES, [thing("cup", color="red"), thing("dog", color="blue")]) == (0, 0.5, 0.5)  # (1 + 0 + 1 + 0) / 4
    assert scores(ATTRIBUTES, [thing("cup", color="blue"), thing("dog", color="blue")]) == (0, 0.75, 0.75)  # (1 + 1 + 1 + 0) / 4


def test_strict_stands_in_the_details_of_every_variant() -> None:
    prompt = Prompt(id="0", text="t", metadata=POSITION)
    (score,) = GenEval("geneval_dense", FixedDetector([thing("cup"), thing("dog")]), own_color).score(BLANK, [prompt])
    assert score.details == {"strict": 0.0}


@pytest.mark.parametrize(
    ("metadata", "rule"),
    [
        ({}, "tag is None"),
        ({"tag": "text"}, "tag is 'text'"),
        ({"tag": "colors"}, "include is None"),
        ({"tag": "colors", "include": []}, "at least one"),
        ({"tag": "colors", "include": [{"count": 1}]}, r"include\[0\]"),
        ({"tag": "colors", "include": [wanted("cup", 0)]}, "at least 1"),
        ({"tag": "colors", "include": [wanted("cup", color=3)]}, "color"),
        ({"tag": "position", "include": [wanted("cup", position=["near", 0])]}, "left of"),
        ({"tag": "position", "include": [wanted("cup", position=["above", 0])]}, "earlier include"),
        ({"tag": "counting", "include": [wanted("cup")], "exclude": [{"class": "cup"}]}, r"exclude\[0\]"),
    ],
)
def test_metadata_that_break_genevals_rules_are_data_errors(metadata: dict[str, Any], rule: str) -> None:
    with pytest.raises(DataError, match=rule):
        check_metadata(metadata)


def test_a_class_or_color_that_the_detector_cannot_find_is_a_data_error() -> None:
    detector = FixedDetector([])
    detector.labels, detector.colors = ("cup",), ("red",)
    scorer = GenEval("geneval_strict", detector)
    with pytest.raises(DataError, match="class 'dog'"):
        scorer.check_prompt(Prompt(id="0", text="t", metadata=TWO))
    with pytest.raises(DataError, match="color 'blue'"):
        scorer.check_prompt(Prompt(id="0", text="t", metadata=COLORS))


def test_a_prompt_without_metadata_is_scored_null_and_not_zero() -> None:
    (score,) = GenEval("geneval_strict", FixedDetector([])).score(BLANK, [Prompt(id="0", text="t")])
    assert score.value is None
    assert "tag" in score.error
