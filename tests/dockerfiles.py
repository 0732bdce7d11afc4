"""A Dockerfile as instructions, and what the project asks of one."""

import fnmatch
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|PRIVATE_KEY|ACCESS_KEY)(_|$)", re.IGNORECASE)
PINNED = re.compile(r"^[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?$")
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Name and arguments of each instruction, continuation lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name.upper(), rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in joined.splitlines())]


def last(found: Sequence[Instruction], name: str) -> str:
    """The arguments of the last instruction of that name."""
    return [rest for word, rest in found if word == name][-1]


def variables(found: Sequence[Instruction]) -> dict[str, str]:
    """Every ARG and ENV with its value."""
    pairs = [part for word, rest in found if word in ("ARG", "ENV") for part in shlex.split(rest)]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def travels(path: str, ignore: str) -> bool:
    """Whether .dockerignore lets a path of the checkout travel to the builder: the last line that matches it or a parent decides."""
    parts = Path(path).parts
    prefixes = ["/".join(parts[: number + 1]) for number in range(len(parts))]
    sent = True
    for line in (line.strip() for line in ignore.splitlines()):
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        anywhere = "**/" in line
        names = [Path(prefix).name for prefix in prefixes] if anywhere else [p for p in prefixes if p.count("/") == pattern.count("/")]
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


def problems(text: str, root: Path) -> list[str]:
    """What the project's rules find wrong with a Dockerfile."""
    found = instructions(text)
    return [*_sources(found, root), *_bases(found), *_rights(found), *_installs(found)]


def _bases(found: Sequence[Instruction]) -> list[str]:
    defaults, stages, wrong = variables(found), set[str](), []
    for word, rest in found:
        if word != "FROM":
            continue
        image, _, stage = rest.partition(" AS ")
        name = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), image)
        if name not in stages and not PINNED.match(name):
            wrong.append(f"FROM {name}: no fixed version")
        stages.add(stage)
    return wrong if len(stages) > 1 else [*wrong, "one stage: the builder's tools travel along"]


def _sources(found: Sequence[Instruction], root: Path) -> list[str]:
    wrong = ["ADD: use COPY, and pip for what comes from elsewhere" for word, _ in found if word == "ADD"]
    ignore = (root / ".dockerignore").read_text(encoding="utf-8")
    for rest in (rest for word, rest in found if word == "COPY" and "--from=" not in rest):
        for source in rest.split()[:-1]:
            if not (root / source).exists():
                wrong.append(f"COPY {source}: not in the checkout")
            elif not travels(source, ignore):
                wrong.append(f"COPY {source}: .dockerignore holds it back")
    return wrong


def _rights(found: Sequence[Instruction]) -> list[str]:
    users = [rest for word, rest in found if word == "USER"]
    wrong = [] if users and re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]) else [f"USER {users[-1:]}: a number, and not root's"]
    return wrong + [f"{name}: a secret does not belong into an image" for name in variables(found) if SECRET_NAME.search(name)]


def _installs(found: Sequence[Instruction]) -> list[str]:
    wrong = []
    for command in (part.strip() for word, rest in found if word == "RUN" for part in rest.split("&&")):
        if re.search(r"\b(curl|wget)\b.*(https?:|\|)", command):
            wrong.append(f"{command}: a download that nothing checks")
        if "pip install" in command and "constraints.txt" not in command:
            wrong.append(f"{command}: without constraints.txt")
        if "apt-get install" in command and "--no-install-recommends" not in command:
            wrong.append(f"{command}: with what Debian recommends")
    return wrong
