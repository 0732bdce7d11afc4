"""`flowfleet bundle RUN`: one small zip for a bug report. Texts only, each redacted; the same state gives the same bytes."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from common.errors import UserError
from common.store.claim import newest_incarnation
from common.store.manifests import read_claim, read_status
from common.store.run_store import RunStore
from deploy.bundle.machine import RAY_FOLDER, log_parts, machine_parts
from deploy.bundle.parts import Gathered, Part, RunParts, prompt_texts, shortened
from deploy.config import shipped_path
from deploy.doctor.checks import FAILURES, Row, as_json, show
from deploy.redact import Redactor, known_names, known_secrets, token_files

MAX_BYTES: Final = 5_000_000
_SPARE: Final = 200_000  # for README, MANIFEST and the zip's own tables
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_ORDER: Final = ("doctor.", "machine.", "run/status", "run/config", "run/environment", "run/listing", "run/audit", "run/drops", "run/eval",
                 "run/metrics", "run/manifests", "run/control", "ray/", "pip-freeze")  # fmt: skip
"""What is kept first where not everything fits."""
README: Final = """A flowfleet bundle: what a bug report needs of one run, as text. Nothing in it is code; it may be read with any zip tool.

doctor.txt, doctor.json      what `flowfleet doctor` says of the machine that made this bundle
machine.json                 versions, commit (+changes: the tree differed), kernel, processor, GPUs, limits, a list of harmless variables
pip-freeze.txt               installed packages
run/config.i*.json           the resolved configuration of each start; run/environment.i*.json what it ran with
run/status.json              where the run stands: state, groups, fleet, last decisions, alerts
run/metrics/, run/manifests/ the newest records; run/drops.json which groups left the sum, and why; run/control/ requests
run/eval/                    evaluation tables; {rows}
run/audit.json               what the files prove (flowfleet audit); run/listing.json how many files and bytes lie where
ray/                         the ends of Ray's logs of the run's newest start, where they lie on this machine
MANIFEST.json                every file with its size and sha256, what was left out, what could not be read

Never in it: images, trajectories, weights, environment variables beyond that list. Secrets were removed by known values, names and shapes
and read [REDACTED]; {names} {prompts} No rule finds every secret: look through it before you publish it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleOptions:
    """What goes in."""

    with_prompts: bool = False
    with_names: bool = False  # keep home directory, user and host names
    audit_s: float = 60.0  # 0: no audit
    max_bytes: int = MAX_BYTES
    ray_folder: Path = RAY_FOLDER


def make_bundle(url: str, rows: Sequence[Row], options: BundleOptions, environ: Mapping[str, str]) -> bytes:
    """Return the zip of a run: whatever can be read of it, however broken it is.

    Args:
        url: of the run directory, on any store; nothing is written there.
        rows: the doctor's.
        options: what goes in.
        environ: of this process: its secrets are searched for in every text.

    Raises:
        UserError: nothing at all lies at the url, or it cannot be opened.
    """
    store, gathered = RunStore(url), Gathered()
    if not store.sizes():
        raise UserError(f"bundle: nothing lies at {url}; name the --run-dir of a `flowfleet train`")
    config = _config(store, gathered)
    prompts = [] if options.with_prompts else _prompts(store, config, gathered)
    secrets = known_secrets(environ, [*token_files(environ), *_named_token_files(config)])
    redactor = Redactor(secrets, prompts=prompts, names=[] if options.with_names else known_names())
    gathered.attempt("doctor", lambda: _doctor(rows, redactor))
    gathered.attempt("machine", lambda: machine_parts(environ))
    RunParts(store, gathered, with_prompts=options.with_prompts).gather(options.audit_s)
    gathered.attempt("ray logs", lambda: _logs(store, gathered, options))
    return packed(gathered, redactor, options)


def _doctor(rows: Sequence[Row], redactor: Redactor) -> list[Part]:
    """The rows as JSON and as a table, redacted before the table breaks them into lines."""
    clean = [Row(status=row.status, what=row.what, found=redactor.text(row.found), rule=redactor.text(row.rule), remedy=redactor.text(row.remedy),
                 details=tuple(redactor.text(line) for line in row.details)) for row in rows]  # fmt: skip
    return [Part(path="doctor.json", text=as_json(clean), is_json=True), Part(path="doctor.txt", text=shown(clean))]


def shown(rows: Sequence[Row]) -> str:
    """The doctor's table as text."""
    sink = io.StringIO()
    show(rows, Console(file=sink, width=200, color_system=None, force_terminal=False))
    return sink.getvalue()


def _logs(store: RunStore, gathered: Gathered, options: BundleOptions) -> list[Part]:
    parts, left_out = log_parts(read_status(store), options.ray_folder)
    gathered.left_out += left_out
    return parts


def _config(store: RunStore, gathered: Gathered) -> Mapping[str, Any]:
    """The newest start's configuration as plain tables, empty where it cannot be read."""
    try:
        return read_claim(store, newest_incarnation(store)).config
    except FAILURES as error:
        gathered.problems.append(f"config: {type(error).__name__}: {error}")
        return {}


def _prompts(store: RunStore, config: Mapping[str, Any], gathered: Gathered) -> list[str]:
    files = config.get("prompts", {})
    names = [str(shipped_path(str(files[which]))) for which in ("train", "test") if isinstance(files, dict) and which in files]
    try:
        return prompt_texts(store, names)
    except FAILURES as error:
        gathered.problems.append(f"prompts: {type(error).__name__}: {error}; prompt texts could not be searched for")
        return []


def _named_token_files(config: Mapping[str, Any]) -> list[Path]:
    """Token files that the run's rewards name."""
    rewards = config.get("reward", [])
    options = [reward.get("options", {}) for reward in rewards if isinstance(reward, dict)] if isinstance(rewards, list) else []
    return [Path(str(option["token_file"])) for option in options if isinstance(option, dict) and option.get("token_file")]


def packed(gathered: Gathered, redactor: Redactor, options: BundleOptions) -> bytes:
    """Redact, choose what fits, and zip."""
    clean = [_redacted(part, redactor) for part in sorted(gathered.parts, key=_rank)]
    room, kept = options.max_bytes - _SPARE, []
    left_out = list(gathered.left_out)
    for part in clean:
        size = len(zlib.compress(part.text.encode())) + 200
        if size > room:
            left_out.append(f"{part.path}: no room within {options.max_bytes} bytes")
            continue
        room -= size
        kept.append(part)
    rows = "with every prompt and its scores (--with-prompts)" if options.with_prompts else "without their rows, which hold prompts"
    names = "names of user and host stand as they are." if options.with_names else "home directory, user and host read ~, USER and HOST."
    prompts = "Prompt texts are in it." if options.with_prompts else "Known prompt texts read [PROMPT]; only ids stay."
    kept.append(Part(path="README.txt", text=README.format(rows=rows, names=names, prompts=prompts)))
    files = {part.path: {"bytes": len(part.text.encode()), "sha256": hashlib.sha256(part.text.encode()).hexdigest()} for part in kept}
    manifest = {"schema": "bundle/1", "files": files, "left_out": [redactor.text(line) for line in left_out],
                "problems": [redactor.text(line) for line in gathered.problems]}  # fmt: skip
    kept.append(Part(path="MANIFEST.json", text=json.dumps(manifest, indent=1, sort_keys=True) + "\n"))
    return zipped(kept)


def _redacted(part: Part, redactor: Redactor) -> Part:
    text = redactor.document(part.text) if part.is_json else redactor.text(part.text)
    return replace(part, path=redactor.text(part.path), text=shortened(text))


def _rank(part: Part) -> tuple[int, str]:
    return next((place for place, start in enumerate(_ORDER) if part.path.startswith(start)), len(_ORDER)), part.path


def zipped(parts: Sequence[Part]) -> bytes:
    """A zip of texts: sorted, with one fixed time, so the same texts give the same bytes."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for part in sorted(parts, key=lambda part: part.path):
            entry = zipfile.ZipInfo(part.path, date_time=_EPOCH)
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o600 << 16
            archive.writestr(entry, part.text.encode())
    return sink.getvalue()
