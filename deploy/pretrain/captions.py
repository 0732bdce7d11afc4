"""What can truly be said about a scene, in GenEval's plain manner."""

from dataclasses import dataclass
from typing import Final

from deploy.pretrain.scenes import Lettering, Scene, Shape
from reward_servers.shapes.vocabulary import COUNT_WORDS, PLURALS

FRAMES: Final = ("", "a photo of ", "a picture of ")
"""Ways to begin a prompt where the task has few contents of its own."""

TEXT_TEMPLATE: Final = 'a {surface} that says "{word}"'
COLORED_TEXT_TEMPLATE: Final = 'a {surface} that says "{word}" in {color}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """One true sentence about a scene.

    Attributes:
        text: the sentence.
        weight: its relative chance to be the caption of a training sample.
    """

    text: str
    weight: float


def with_article(words: str) -> str:
    """Return the words after "a" or "an"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _framed(text: str, weight: float) -> list[Caption]:
    return [Caption(text=frame + text, weight=weight / len(FRAMES)) for frame in FRAMES]


def _relations(first: Shape, second: Shape) -> list[str]:
    x, y = first.x - second.x, first.y - second.y
    if abs(x) > abs(y):
        return ["left of" if x < 0 else "right of"]
    return ["above" if y < 0 else "below"]


def _single_captions(shape: Shape) -> list[Caption]:
    plain = _framed(with_article(shape.name), 0.2) + _framed(f"one {shape.name}", 0.1)
    return plain + _framed(with_article(f"{shape.color} {shape.name}"), 0.7)


def _pair_captions(first: Shape, second: Shape) -> list[Caption]:
    captions = []
    for a, b in ((first, second), (second, first)):
        captions += _framed(f"{with_article(a.name)} and {with_article(b.name)}", 0.15)[:2]
        attributed = f"{with_article(f'{a.color} {a.name}')} and {with_article(f'{b.color} {b.name}')}"
        captions.append(Caption(text=attributed, weight=0.2))
        for relation in _relations(a, b):
            captions.append(Caption(text=f"{with_article(a.name)} {relation} {with_article(b.name)}", weight=0.2))
    return captions


def _text_captions(lettering: Lettering) -> list[Caption]:
    words = {"surface": lettering.surface, "word": lettering.word, "color": lettering.color}
    return [
        Caption(text=TEXT_TEMPLATE.format(**words), weight=0.5),
        Caption(text=COLORED_TEXT_TEMPLATE.format(**words), weight=0.5),
    ]


def captions_of(scene: Scene) -> list[Caption]:
    """Return the sentences of the prompt manner that hold for a scene.

    Args:
        scene: the picture.

    Returns:
        At least one caption.
    """
    if scene.lettering is not None:
        return _text_captions(scene.lettering)
    if scene.task == "counting":
        count = len(scene.shapes)
        return _framed(f"{COUNT_WORDS[count]} {PLURALS[scene.shapes[0].name]}", 1.0)
    if scene.task == "pair":
        return _pair_captions(*scene.shapes)
    return _single_captions(scene.shapes[0])
