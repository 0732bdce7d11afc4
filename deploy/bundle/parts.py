"""What a bundle takes from a run directory: the newest few of each record, never images, trajectories or weights. Whatever fails is noted."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

from common.errors import StoreError
from common.store import paths
from common.store.audit import AuditReport, audit
from common.store.run_store import RunStore
from deploy.doctor.checks import FAILURES

NUM_STARTS, NUM_METRICS, NUM_MANIFESTS, NUM_CONTROLS, NUM_DROPS, NUM_EVALS = 5, 20, 3, 10, 100, 8
MAX_PART: Final = 512 << 10  # bytes of one file's text; longer ones lose their middle
MAX_READ: Final = 8 << 20  # bytes of a file that is opened at all
NUM_VIOLATIONS: Final = 200
CUT: Final = "\n[... {} characters left out ...]\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One text of a bundle, before redaction."""

    path: str  # inside the zip
    text: str
    is_json: bool = False


@dataclass(slots=True)
class Gathered:
    """What was found, what was left out, and what could not be read."""

    parts: list[Part] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, what: str, take: Callable[[], Iterable[Part]]) -> None:
        """Add what `take` gives; what it raises is a problem of this bundle, not its end."""
        try:
            self.parts.extend(take())
        except FAILURES as error:
            self.problems.append(f"{what}: {type(error).__name__}: {error}")


class RunParts:
    """The parts of one run.

    Args:
        store: the run directory; nothing is written there.
        gathered: takes the parts.
        with_prompts: keep the rows of evaluations, which hold every prompt's text.
    """

    def __init__(self, store: RunStore, gathered: Gathered, *, with_prompts: bool) -> None:
        self._store, self._gathered, self._with_prompts = store, gathered, with_prompts
        self._sizes: dict[str, int] = {}

    def gather(self, audit_s: float) -> None:
        """Take everything. audit_s: how long the audit may take; 0 leaves it out."""
        take = self._gathered.attempt
        take("listing", self._listing)
        if paths.STATUS in self._sizes:
            take("status.json", partial(self._file, paths.STATUS))
        for what, parse, most in (
            ("config", paths.parse_config, NUM_STARTS), ("environment", _environment, NUM_STARTS), ("metrics", paths.parse_metrics, NUM_METRICS),
            ("manifests", paths.parse_manifest, NUM_MANIFESTS), ("control", paths.parse_control, NUM_CONTROLS),
        ):  # fmt: skip
            for path in self._newest(what, parse, most):
                take(path, partial(self._file, path))
        take("drops", self._drops)
        for path in self._newest("evaluations", _result, NUM_EVALS):
            take(path, partial(self._result, path))
        take("audit", lambda: self._audit(audit_s))

    def _listing(self) -> list[Part]:
        self._sizes = self._store.sizes()
        counts: Counter[str] = Counter()
        num_bytes: Counter[str] = Counter()
        for path, size in self._sizes.items():
            top = path.partition("/")[0]
            counts[top] += 1
            num_bytes[top] += size
        table = {top: {"files": counts[top], "bytes": num_bytes[top]} for top in sorted(counts)}
        return [Part(path="run/listing.json", text=json.dumps({"url": self._store.url, "folders": table}), is_json=True)]

    def _newest(self, what: str, parse: Callable[[str], Any], most: int) -> list[str]:
        found = sorted((path for path in self._sizes if parse(path) is not None), key=lambda path: (parse(path), path))
        if len(found) > most:
            self._gathered.left_out.append(f"run/{what}: the newest {most} of {len(found)}")
        return found[-most:]

    def _read(self, path: str) -> str:
        if self._sizes[path] > MAX_READ:
            raise StoreError(f"bundle: {path} has {self._sizes[path]} bytes; such files are not opened ({MAX_READ} at most)")
        return self._store.read(path).decode("utf-8", errors="replace")

    def _file(self, path: str) -> list[Part]:
        return [Part(path=f"run/{path}", text=self._read(path), is_json=path.endswith(".json"))]

    def _result(self, path: str) -> list[Part]:
        """An evaluation's table; its rows, prompt by prompt, only where prompts were asked for."""
        result = json.loads(self._read(path))
        if not self._with_prompts:
            result = {key: value for key, value in result.items() if key not in ("rows", "sheets")}
        return [Part(path=f"run/{path}", text=json.dumps(result), is_json=True)]

    def _drops(self) -> list[Part]:
        """How many of each reason among the newest drops, and those themselves."""
        found = self._newest("drops", paths.parse_drop, NUM_DROPS)
        reasons: Counter[str] = Counter()
        drops = []
        for path in found:
            drop = json.loads(self._read(path))
            reasons[str(drop["reason"])] += 1
            drops.append(drop)
        return [Part(path="run/drops.json", text=json.dumps({"reasons": dict(reasons), "newest": drops}), is_json=True)]

    def _audit(self, audit_s: float) -> list[Part]:
        if not audit_s:
            self._gathered.left_out.append("run/audit.json: not asked for")
            return []
        reports: list[AuditReport] = []
        errors: list[BaseException] = []

        def look() -> None:
            try:
                reports.append(audit(self._store))
            except FAILURES as error:
                errors.append(error)

        thread = threading.Thread(target=look, daemon=True, name="bundle-audit")
        thread.start()
        thread.join(audit_s)
        if errors:
            raise errors[0]
        if not reports:
            self._gathered.left_out.append(f"run/audit.json: not done within {audit_s:g} s; run `flowfleet audit`")
            return []
        report = asdict(reports[0])
        report["violations"] = report["violations"][:NUM_VIOLATIONS]
        return [Part(path="run/audit.json", text=json.dumps({"is_clean": reports[0].is_clean, **report}), is_json=True)]


def _environment(path: str) -> int | None:
    return paths.parse_config(path.replace("environment.", "config.", 1)) if path.startswith("environment.") else None


def _result(path: str) -> tuple[int, str] | None:
    name = paths.parse_eval(path)
    return (name.version, path) if name is not None and path.endswith("/result.json") else None


def prompt_texts(store: RunStore, files: Iterable[str]) -> list[str]:
    """The prompts of a run's newest evaluation and of prompt files here: to be removed wherever they stand."""
    found: list[str] = []
    results = sorted((key, path) for path in store.list(paths.EVAL) if (key := _result(path)) is not None)
    if results:
        found += [str(row["text"]) for row in json.loads(store.read(results[-1][1]))["rows"]]
    for name in files:
        try:
            with open(name, encoding="utf-8", errors="replace") as stream:
                found += [text for line in stream if (text := _text_of(line))]
        except OSError:
            continue
    return list(dict.fromkeys(found))


def _text_of(line: str) -> str:
    """The prompt of a line of a prompt file: jsonl (text, or GenEval's prompt) or plain."""
    try:
        parsed = json.loads(line)
    except ValueError:
        return line.strip()
    return str(parsed.get("text") or parsed.get("prompt") or "") if isinstance(parsed, dict) else line.strip()


def shortened(text: str, most: int = MAX_PART) -> str:
    """A text without its middle when it is longer than `most` characters: how it began and how it ended tell most."""
    if len(text) <= most:
        return text
    head = most // 4
    return text[:head] + CUT.format(len(text) - most) + text[len(text) - (most - head) :]
