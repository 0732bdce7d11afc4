"""Makes prompts in GenEval's manner: six tasks over classes and colors, each text with the metadata that judge it.

Metadata are written exactly as GenEval writes them (Ghosh et al. 2023); texts are the project's own, with right plurals and articles
where the benchmark has "two benchs" and "a scissors". Some of them are the benchmark's all the same ("a photo of a cup"): whoever
trains on such prompts and evaluates on the benchmark holds its texts out (`without_texts_of`).
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from common.errors import ConfigError
from common.seeding import derive_seed
from common.types import Prompt
from reward_servers.detectors.vocabulary import COCO_CLASSES, COLORS
from reward_servers.scorers.geneval_rules import RELATIONS, TASKS

NUMBERS: Final = {2: "two", 3: "three", 4: "four"}
"""What the counting task asks for."""
UNPAINTED: Final = frozenset({"person"})
"""Classes that are never asked for in a color, as in GenEval."""
_UNITS: Final = {"skis": "pair", "scissors": "pair", "broccoli": "head"}
"""Classes that are counted by another word."""
_IRREGULAR: Final = {"person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice", "tooth": "teeth", "foot": "feet"}
_SPOKEN_CONSONANTS: Final = ("uni", "use", "eu", "one")
_SILENT_H: Final = ("hour", "honest", "heir")
_Item = dict[str, Any]
_Drawn = tuple[str, list[_Item]]
"""A text behind "a photo of", and its include entries."""


def make_prompts(seed: int, per_task: int, classes: Sequence[str] = COCO_CLASSES, colors: Sequence[str] = COLORS) -> list[Prompt]:
    """Draw prompts of GenEval's six tasks without repetition.

    Args:
        seed: the same one gives the same prompts.
        per_task: prompts a task; a task of which fewer exist gives them all (one object: as many as there are classes).
        classes: singular nouns, as the detector names them.
        colors: adjectives, as the color model names them.

    Returns:
        The prompts, task by task in GenEval's order; ids are geneval-TASK-NUMBER.

    Raises:
        ConfigError: fewer than one prompt a task, fewer than two classes or colors, or one that stands twice or is empty.
    """
    if per_task < 1:
        raise ConfigError(f"prompts: per_task is {per_task}; it must be at least 1")
    for what, names in (("classes", classes), ("colors", colors)):
        if len(names) < 2 or len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise ConfigError(f"prompts: {what} are {list(names)[:5]}...; they must be at least two different words")
    return [prompt for tag in TASKS for prompt in _draw(tag, seed, per_task, _worlds(classes, colors)[tag])]


def split_prompts(prompts: Sequence[Prompt], test_share: float = 0.2) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into train and test by a hash of what they ask for.

    Prompts of a task that ask for the same things in another order or relation fall on the same side ("a dog left of a cat", "a cat
    above a dog"), and a prompt falls on its side whatever else was drawn: sets of any seeds are disjoint.

    Args:
        prompts: of make_prompts.
        test_share: expected share of the test side, in (0, 1).

    Returns:
        (train, test), each in the given order.

    Raises:
        ConfigError: the share is out of range.
    """
    if not 0 < test_share < 1:
        raise ConfigError(f"prompts: test_share is {test_share}; it must lie between 0 and 1")
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        sides[_unit_hash(prompt) < test_share].append(prompt)
    return sides


def without_texts_of(prompts: Sequence[Prompt], benchmark: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts whose text is none of a benchmark's, whatever its case."""
    taken = {prompt.text.casefold() for prompt in benchmark}
    return [prompt for prompt in prompts if prompt.text.casefold() not in taken]


def geneval_line(prompt: Prompt) -> str:
    """Return a prompt as a line of GenEval's own metadata file (without its id, which is the line number there)."""
    return json.dumps({**prompt.metadata, "prompt": prompt.text})


def with_article(phrase: str) -> str:
    """Return a phrase with a or an, by the sound of its first word."""
    has_vowel = phrase[:1].lower() in "aeiou" and not phrase.lower().startswith(_SPOKEN_CONSONANTS)
    return f"{'an' if has_vowel or phrase.lower().startswith(_SILENT_H) else 'a'} {phrase}"


def plural(name: str) -> str:
    """Return the plural of a class: of its last word, or of the word that it is counted by."""
    if name in _UNITS:
        return f"{_UNITS[name]}s of {name}"
    *first, last = name.split(" ")
    if last in _IRREGULAR:
        changed = _IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        changed = f"{last}es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        changed = f"{last[:-1]}ies"
    else:
        changed = f"{last}s"
    return " ".join((*first, changed))


def one(name: str, color: str = "") -> str:
    """Return one object with its article and color: a red cup, an apple, a pair of black scissors."""
    colored = f"{color} {name}" if color else name
    return with_article(f"{_UNITS[name]} of {colored}" if name in _UNITS else colored)


def _worlds(classes: Sequence[str], colors: Sequence[str]) -> dict[str, tuple[int, Callable[[int], _Drawn]]]:
    """Return, by task, how many prompts exist and how the one of an index is made."""
    painted = [(name, color) for name in classes if name not in UNPAINTED for color in colors if color != name]
    num_pairs = len(classes) * (len(classes) - 1)
    counts = tuple(NUMBERS)

    def pair(index: int) -> tuple[str, str]:
        first, second = divmod(index, len(classes) - 1)
        return classes[first], classes[second + (second >= first)]

    def two_objects(index: int) -> _Drawn:
        first, second = pair(index)
        return f"{one(first)} and {one(second)}", [_item(first), _item(second)]

    def counted(index: int) -> _Drawn:
        name, count = classes[index // len(counts)], counts[index % len(counts)]
        return f"{NUMBERS[count]} {plural(name)}", [_item(name, count)]

    def placed(index: int) -> _Drawn:
        target, name = pair(index // len(RELATIONS))
        relation = RELATIONS[index % len(RELATIONS)]
        return f"{one(name)} {relation} {one(target)}", [_item(target), {**_item(name), "position": [relation, 0]}]

    def painted_pair(index: int) -> _Drawn:
        chosen = [painted[place] for place in divmod(index, len(painted))]
        entries = [{**_item(name), "color": color} for name, color in chosen]
        return " and ".join(one(name, color) for name, color in chosen), entries

    return {
        "single_object": (len(classes), lambda index: (one(classes[index]), [_item(classes[index])])),
        "two_object": (num_pairs, two_objects),
        "counting": (len(classes) * len(counts), counted),
        "colors": (len(painted), lambda index: (one(*painted[index]), [{**_item(painted[index][0]), "color": painted[index][1]}])),
        "position": (num_pairs * len(RELATIONS), placed),
        "color_attr": (len(painted) ** 2, painted_pair),
    }


def _draw(tag: str, seed: int, per_task: int, world: tuple[int, Callable[[int], _Drawn]]) -> list[Prompt]:
    size, make = world
    drawn: list[Prompt] = []
    for index in _shuffled(size, random.Random(derive_seed(seed, tag))):
        if len(drawn) == per_task:
            break
        text, include = make(index)
        if tag == "color_attr" and _is_plain(include):
            continue
        metadata: dict[str, Any] = {"tag": tag, "include": include}
        if tag == "counting":  # exactly so many: one more is refused
            metadata["exclude"] = [_item(include[0]["class"], include[0]["count"] + 1)]
        drawn.append(Prompt(id=f"geneval-{tag}-{len(drawn):04d}", text=f"a photo of {text}", metadata=metadata))
    return drawn


def _shuffled(size: int, generator: random.Random) -> Iterator[int]:
    """Yield each of range(size) once in random order, at a cost of what is taken (Fisher and Yates, on a sparse array)."""
    moved: dict[int, int] = {}
    for place in range(size):
        other = generator.randrange(place, size)
        yield moved.get(other, other)
        moved[other] = moved.get(place, place)


def _item(name: str, count: int = 1) -> _Item:
    return {"class": name, "count": count}


def _is_plain(include: list[_Item]) -> bool:
    """Whether two colored objects share their class or color, which tells too little."""
    first, second = include
    return bool(first["class"] == second["class"] or first["color"] == second["color"])


def _unit_hash(prompt: Prompt) -> float:
    """Return a number in [0, 1) that depends only on the task and on what is asked for, not on its order or relation."""
    things = sorted((item["class"], item["count"], item.get("color", "")) for item in prompt.metadata["include"])
    digest = hashlib.sha256(json.dumps([prompt.tag, things]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
