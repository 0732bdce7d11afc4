"""Markdown that says what a text says: nothing that comes from a run is read as markup, wherever a card is shown."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

NOT_RECORDED: Final = "not recorded"
_ENTITIES: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# of GitHub's and the Hub's Markdown: emphasis, links, tables, math, emoji, mentions; between letters a _ is no emphasis
_SPECIAL: Final = re.compile(
    r"[\\`*\[\]#|~$@!&<>]|:(?=\S)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
)  # of GitHub's and the Hub's Markdown: emphasis, links, tables, math, emoji, mentions
_STARTS: Final = re.compile(r"^(?:[-+=](?=\s|$|[-=])|\d+[.)](?=\s|$))")  # what would begin a list, a rule or a heading
_BLANKS: Final = re.compile(r"[\s\x00-\x1f\x7f]+")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def plain(text: object) -> str:
    """Return a text that shows itself: one line, every special character escaped; it may stand in a table."""
    line = _BLANKS.sub(" ", str(text)).strip()
    escaped = _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), line)
    escaped = re.sub(r"(?i)\bwww\.", lambda found: found[0][:-1] + "\\.", escaped)
    start = _STARTS.match(escaped)
    return escaped if start is None else escaped[: start.end() - 1] + "\\" + escaped[start.end() - 1 :]


def code(text: object) -> str:
    """Return a code span of a text, for a path, a digest or a command; it may stand in a table."""
    line = _BLANKS.sub(" ", str(text)).strip().replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def block(text: str, language: str = "") -> str:
    """Return a fenced code block; no line of the text can end it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(found) for found in re.findall("`+", text)), default=0)


def known(value: object) -> str:
    """Return a value as plain text; what is None or empty was not recorded."""
    return NOT_RECORDED if value is None or value == "" else plain(value)


def slug(text: str) -> str:
    """Return a file name's stem: small letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "panel"


def to_toml(tables: Mapping[str, Any]) -> str:
    """Return a resolved configuration as TOML, which `flowfleet train FILE.toml` reads; keys without a value are left out."""
    return "\n".join(_toml_lines(tables, "")).lstrip("\n") + "\n"


def _toml_lines(tables: Mapping[str, Any], prefix: str) -> list[str]:
    lines, nested = [], []
    for key, value in tables.items():
        name = key if _BARE_KEY.fullmatch(key) else json.dumps(key, ensure_ascii=False)
        if isinstance(value, Mapping):
            nested += ["", f"[{prefix}{name}]", *_toml_lines(value, f"{prefix}{name}.")]
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            for item in value:
                nested += ["", f"[[{prefix}{name}]]", *_toml_lines(item, f"{prefix}{name}.")]
        elif value is not None:
            lines.append(f"{name} = {_toml_value(value)}")
    return [*lines, *nested]


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
