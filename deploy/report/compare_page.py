"""compare.html: base, A and B on the same prompts and seeds, sorted by where B loses most against A; one file that opens offline."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.report.bootstrap import METHOD
from deploy.report.page import TableLine, make_environment, script_json, script_text, table_lines
from deploy.report.pairs import PairLine, differences, keyed_rows, pair_lines, shared_rewards
from deploy.report.records import EvaluationRecord, EvaluationRow
from deploy.report.samples import MediaShelf, Shot
from deploy.report.verdict import Sentence, figure

MAX_CARDS = 600  # prompts shown; above, the ends of the order


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One column: an evaluation with its images."""

    letter: str  # base, A or B
    name: str  # what was judged
    origin: str  # where its images come from, one sentence
    record: EvaluationRecord
    shelf: MediaShelf


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    """What the page says besides the numbers."""

    title: str
    facts: tuple[tuple[str, str], ...]
    protocol: str  # one line
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One prompt and seed."""

    prompt: str
    tag: str
    image: int  # which image of the prompt, from 1
    place: int  # in the prompt file's order
    shots: tuple[Shot, ...]  # one a side
    differences: tuple[tuple[str, float | None], ...]  # B - A by reward

    @property
    def outcome(self) -> str:
        """loss | tie | win | none, by the first reward."""
        first = self.differences[0][1] if self.differences else None
        if first is None:
            return "none"
        return "win" if first > 0 else "loss" if first < 0 else "tie"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTable:
    """One table: `second` against `first`."""

    first: Side
    second: Side
    lines: tuple[tuple[TableLine, PairLine], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the page shows."""

    sides: tuple[Side, ...]  # base, A, B; two of them when A is the base
    main: PairTable  # B against A
    others: tuple[PairTable, ...]  # A and B against the base
    rewards: tuple[str, ...]

    @property
    def pair(self) -> tuple[Side, Side]:
        """A and B."""
        return self.main.first, self.main.second


def make_comparison(base: Side | None, first: Side, second: Side) -> Comparison:
    """Hold B (`second`) against A (`first`), and each against the base (None: one of the two is the base).

    Raises:
        ValueError: no reward stands in all evaluations.
    """
    sides = (first, second) if base is None else (base, first, second)
    rewards = shared_rewards([side.record for side in sides])
    if not rewards:
        raise ValueError("compare_page: the evaluations share no reward; evaluate all of them by one recipe")
    others = () if base is None else tuple(_table(base, side, rewards) for side in (first, second))
    return Comparison(sides=sides, main=_table(first, second, rewards), others=others, rewards=tuple(rewards))


def _table(first: Side, second: Side, rewards: Sequence[str]) -> PairTable:
    pairs = [line for name in rewards for line in pair_lines(name, first.record, second.record)]
    placed = table_lines([pair.row for pair in pairs])
    return PairTable(first=first, second=second, lines=tuple(zip(placed, pairs, strict=True)))


def sorted_cards(comparison: Comparison) -> list[Card]:
    """One card an image: where B loses most against A by the first reward first, ties by the next reward, then in prompt order."""
    first, second = comparison.pair
    others = {side.letter: keyed_rows(side.record) for side in comparison.sides}
    made: list[tuple[tuple[float, ...], Card]] = []
    for place, (key, row) in enumerate(keyed_rows(first.record).items()):
        changes = differences(row, others[second.letter].get(key), comparison.rewards)
        shots = tuple(_shot(side, others[side.letter].get(key), comparison.rewards) for side in comparison.sides)
        card = Card(prompt=row.text, tag=row.tag, image=key[2] + 1, place=place, shots=shots, differences=tuple(changes.items()))
        made.append((tuple(float("inf") if value is None else value for value in changes.values()), card))
    return [card for _, card in sorted(made, key=lambda item: item[0])]


def _shot(side: Side, row: EvaluationRow | None, rewards: Sequence[str]) -> Shot:
    if row is None:
        return Shot(uri="", scores=())
    return Shot(uri=side.shelf.uri(row.sheet, row.row), scores=tuple((name, row.scores[name]) for name in rewards if name in row.scores))


def _shown(cards: Sequence[Card]) -> list[Card]:
    """Both ends of the order when there are too many."""
    if len(cards) <= MAX_CARDS:
        return list(cards)
    return [*cards[: MAX_CARDS // 2], *cards[-MAX_CARDS // 2 :]]


def verdicts(comparison: Comparison) -> list[Sentence]:
    """One sentence a reward: by how much B is above or below A, and how often."""
    return [_verdict(pair) for _, pair in comparison.main.lines if pair.row.is_mean]


def _verdict(pair: PairLine) -> Sentence:
    row, rate = pair.row, pair.win_rate
    change = f"{figure(row.before)} → {figure(row.after)} ({figure(row.difference, signed=True)}, 95% interval {_span(row.low, row.high, signed=True)})"
    often = f"B scores higher on {pair.wins} images, equal on {pair.ties}, lower on {pair.losses}: win rate {rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"
    if row.verdict == "unclear":
        return Sentence(tone="plain", text=f"{row.reward}: no clear difference, A → B {change}: the interval includes 0. {often}.")
    word = "above" if row.verdict == "rose" else "below"
    return Sentence(tone="good" if row.verdict == "rose" else "bad", text=f"{row.reward}: B is {word} A, {change}. {often}.")


def _span(low: float, high: float, *, signed: bool) -> str:
    return f"{figure(low, signed=signed)} to {figure(high, signed=signed)}"


def render_comparison(comparison: Comparison, facts: PageFacts) -> str:
    """Return the page's html; everything that came from a file is escaped."""
    cards = sorted_cards(comparison)
    shown = _shown(cards)
    return make_environment().get_template("compare.html.j2").render(
        title=facts.title, facts=facts.facts, protocol=facts.protocol, warnings=facts.warnings, comparison=comparison,
        sentences=verdicts(comparison), cards=shown, num_cards=len(cards), tags=list(dict.fromkeys(card.tag for card in cards)),
        counts={name: sum(card.outcome == name for card in shown) for name in ("loss", "tie", "win")},
        method=METHOD, script=script_text("compare.js"), numbers=script_json(_numbers(comparison, facts)),
    )  # fmt: skip


def _numbers(comparison: Comparison, facts: PageFacts) -> dict[str, object]:
    tables = [comparison.main, *comparison.others]
    return {
        "protocol": facts.protocol, "sides": {side.letter: {"name": side.name, "origin": side.origin} for side in comparison.sides},
        "interval_method": METHOD,
        "tables": [
            {"first": table.first.letter, "second": table.second.letter, "lines": [asdict(pair) for _, pair in table.lines]} for table in tables
        ],
    }  # fmt: skip


def write_comparison(out_path: Path, comparison: Comparison, facts: PageFacts) -> Path:
    """Write the page over `out_path` and return it. Raises CorruptFile when a media file breaks its form."""
    html = render_comparison(comparison, facts)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    out_path.write_text(html, encoding="utf-8")
    return out_path
