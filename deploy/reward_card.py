"""`flowfleet reward show NAME`: a reward's card as a table."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from rich.table import Table
from rich.text import Text

from common.errors import ConfigError
from reward_servers.cards import RewardCard
from reward_servers.registry import list_scorers

_LABELS: Final = {"description": "measures", "range": "raw scores", "source": "defined by", "extra": "pip extra"}


def render_card(card: RewardCard) -> Table:
    """Return the card as a table, a line a field; text is shown as it stands, never read as markup."""
    table = Table(title=Text(card.name, style="bold"), show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in asdict(card).items():
        if name != "name":
            table.add_row(_LABELS.get(name, name), Text(str(value) or "none"))
    return table


def known_cards() -> tuple[RewardCard, ...]:
    """Return the card of every built-in reward, in the order of the docs."""
    return list_scorers()


def find_card(name: str, cards: Sequence[RewardCard]) -> RewardCard:
    """Return the card of a name. Raises ConfigError, naming the nearest."""
    found = {card.name: card for card in cards}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.3)
        hint = f"the nearest name is {near[0]!r}" if near else f"names are {', '.join(found)}"
        raise ConfigError(f"reward show: {name!r} is no built-in reward; {hint}; user code has no card")
    return found[name]
