"""Which prompt a number draws: pure, complete, and balanced where asked."""

from collections import Counter

import pytest

from common.errors import DataError
from common.store.prompts_order import BalancedOrder, PromptOrder
from common.types import Prompt

PROMPTS = [Prompt(id=f"{tag}{index}", text="x", metadata={"tag": tag}) for tag, count in (("a", 5), ("b", 2)) for index in range(count)]


def test_every_epoch_visits_every_prompt_once_in_its_own_order() -> None:
    order = PromptOrder(PROMPTS, 7)
    epochs = [[order(number).id for number in range(start, start + 7)] for start in (0, 7)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(prompt.id for prompt in PROMPTS)] * 2
    assert epochs[0] != epochs[1]


def test_numbers_may_be_asked_in_any_order() -> None:
    forward, backward = PromptOrder(PROMPTS, 7), PromptOrder(PROMPTS, 7)
    assert [forward(n).id for n in range(40)] == [backward(n).id for n in reversed(range(40))][::-1]


def test_a_balanced_order_takes_the_tags_in_turn_and_each_tags_prompts_evenly() -> None:
    order = BalancedOrder(PROMPTS, 7)
    drawn = [order(number) for number in range(20)]
    assert [prompt.tag for prompt in drawn] == ["a", "b"] * 10
    assert Counter(prompt.id for prompt in drawn) == {"a0": 2, "a1": 2, "a2": 2, "a3": 2, "a4": 2, "b0": 5, "b1": 5}


def test_weights_say_how_often_a_cycle_draws_a_tag() -> None:
    order = BalancedOrder(PROMPTS, 7, {"a": 3, "b": 1})
    drawn = [order(number).tag for number in range(8)]
    assert Counter(drawn[:4]) == Counter(drawn[4:]) == {"a": 3, "b": 1}
    assert {order(number).id for number in range(7) if order(number).tag == "a"} == {f"a{index}" for index in range(5)}
    assert {BalancedOrder(PROMPTS, 7, {"b": 0})(number).tag for number in range(9)} == {"a"}
    with pytest.raises(DataError, match="tag_weights names"):
        BalancedOrder(PROMPTS, 7, {"c": 1})


def test_no_prompts_are_refused() -> None:
    for kind in (PromptOrder, BalancedOrder):
        with pytest.raises(DataError, match="at least one"):
            kind([], 7)
