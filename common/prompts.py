"""Prompt files: jsonl (one object a line, GenEval's own lines too) or txt (one prompt a line), and their check against scorers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common.errors import DataError
from common.protocols import Scorer
from common.types import Prompt

MAX_NAMED: Final = 10
"""Offending lines that one message names."""

_REMEDY: Final = 'write {"id": ..., "text": ..., "metadata": {...}}, or a line of GenEval\'s metadata file'
_GENEVAL_KEYS: Final = frozenset({"tag", "include", "exclude", "prompt"})
_OWN_KEYS: Final = frozenset({"id", "text", "metadata"})


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a prompt file.

    Args:
        path: `.jsonl`: an object {"id", "text", "metadata"} a line (id: the line number where absent), or GenEval's own lines
            {"tag", "include", "exclude", "prompt"}, whose metadata is the line without its prompt; `.txt`: a prompt a line,
            its id the line number. Empty lines are skipped.

    Returns:
        The prompts in file order, at least one.

    Raises:
        DataError: the file cannot be read, a line breaks the rules, or an id stands twice; the message names file and line.
    """
    return tuple(prompt for _, prompt in _numbered_prompts(path))


def check_prompts(prompts: Sequence[Prompt], scorers: Sequence[Scorer], source: Path | str) -> None:
    """Make sure that every prompt carries what the scorers that judge it need.

    Args:
        prompts: prompts of the file, all or some.
        scorers: each is asked about the prompts that it applies to.
        source: the file that the prompts came from, for line numbers (without it, ids are named).

    Raises:
        DataError: names up to MAX_NAMED offending lines, each with its scorer and rule, and how many there are.
    """
    complaints = []
    for prompt in prompts:
        for scorer in scorers:
            try:
                if scorer.applies_to(prompt):
                    scorer.check_prompt(prompt)
            except DataError as error:
                complaints.append((prompt.id, f"{scorer.name}: {error}"))
    if complaints:
        places = _places(Path(source))
        named = "; ".join(f"{places.get(identity, f'prompt {identity!r}')}: {text}" for identity, text in complaints[:MAX_NAMED])
        more = f"; and {len(complaints) - MAX_NAMED} more" if len(complaints) > MAX_NAMED else ""
        num_bad = len({identity for identity, _ in complaints})
        raise DataError(f"prompts: {source}: {num_bad} of {len(prompts)} prompts lack what their rewards need: {named}{more}")


def _places(source: Path) -> dict[str, str]:
    """Return "line n" by prompt id; empty when the prompts did not come from a file that can be read."""
    try:
        return {prompt.id: f"line {number}" for number, prompt in _numbered_prompts(source)}
    except DataError:
        return {}


def _numbered_prompts(path: Path) -> list[tuple[int, Prompt]]:
    if path.suffix not in (".jsonl", ".txt"):
        raise DataError(f"prompts: {path} has the suffix {path.suffix!r}; a prompt file is .jsonl or .txt")
    numbered: list[tuple[int, Prompt]] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        prompt = _json_prompt(f"{path}:{number}", number, line) if path.suffix == ".jsonl" else Prompt(id=str(number), text=line)
        if prompt.id in seen:
            raise DataError(f"prompts: {path}:{number}: the id {prompt.id!r} already stands in line {seen[prompt.id]}; ids are unique")
        seen[prompt.id] = number
        numbered.append((number, prompt))
    if not numbered:
        raise DataError(f"prompts: {path} holds no prompt; write one a line")
    return numbered


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"prompts: {path} cannot be read ({error.strerror}); name an existing .jsonl or .txt file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"prompts: {path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _json_prompt(where: str, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"prompts: {where}: not JSON ({error.msg} at column {error.colno}); {_REMEDY}") from error
    if not isinstance(row, Mapping):
        raise DataError(f"prompts: {where}: a {type(row).__name__} came, a line is a JSON object; {_REMEDY}")
    if "prompt" in row and "text" not in row:
        return _geneval_prompt(where, number, row)
    unknown = sorted(set(row) - _OWN_KEYS)
    if unknown:
        raise DataError(f'prompts: {where}: unknown key {unknown[0]!r}; put the scorers\' own keys under "metadata"; {_REMEDY}')
    identity, text, metadata = row.get("id", number), row.get("text"), row.get("metadata", {})
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise DataError(f'prompts: {where}: "id" is {identity!r}, it must be a non-empty string or an integer')
    if not isinstance(metadata, Mapping):
        raise DataError(f'prompts: {where}: "metadata" is {metadata!r}, it must be an object')
    return Prompt(id=str(identity), text=_checked_text(where, "text", text), metadata=metadata)


def _geneval_prompt(where: str, number: int, row: Mapping[str, Any]) -> Prompt:
    unknown = sorted(set(row) - _GENEVAL_KEYS)
    if unknown:
        raise DataError(f"prompts: {where}: unknown key {unknown[0]!r} in a GenEval line; its keys are {', '.join(sorted(_GENEVAL_KEYS))}")
    metadata = {key: value for key, value in row.items() if key != "prompt"}
    return Prompt(id=str(number), text=_checked_text(where, "prompt", row["prompt"]), metadata=metadata)


def _checked_text(where: str, key: str, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'prompts: {where}: "{key}" is {text!r}, it must be a non-empty string; {_REMEDY}')
    return text
