"""What a version was made from, as its run and the files that it names tell: base model, prompts, rewards. Nothing is guessed."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from common.errors import CorruptFile, DataError, StoreError
from common.prompts import read_prompts
from common.store import paths
from common.store.manifests import read_manifest
from common.store.run_store import RunStore
from common.store.scores import read_scores
from deploy.config import RunConfig, shipped_path
from deploy.report.records import EvaluationRecord
from reward_servers.cards import RewardCard
from reward_servers.config import RewardConfig
from reward_servers.registry import list_scorers

_SNAPSHOT: Final = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{7,40})/?$")  # the Hub's cache
_METADATA: Final = re.compile(r"\A---\r?\n(?P<yaml>.*?)\r?\n---", re.DOTALL)
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """The base model."""

    path: str  # as the run's configuration has it
    hub_id: str  # owner/name; "" where the path tells none
    revision: str  # "" where the path tells none
    license: str  # as the base's own README.md says it; "" where it does not, or is not there
    license_name: str
    license_link: str

    @property
    def name(self) -> str:
        """What metadata call it: the Hub's name, or the directory's."""
        if self.hub_id:
            return self.hub_id
        return self.path if _HUB_ID.fullmatch(self.path) else Path(self.path).name or self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFacts:
    """One prompt file."""

    path: str
    count: int | None  # prompts in the file; None where it does not read
    sha256: str  # of the file as it is now; "" where it does not read


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFacts:
    """One reward: what the run asked of it, and what its card says."""

    config: RewardConfig
    card: RewardCard | None  # None: user code
    versions: tuple[str, ...]  # of the scorer, as the score files that are still there tell


def base_facts(path: str) -> BaseFacts:
    """Return what is known of a base model from its path and, where it is there, its own README.md's metadata."""
    found = _SNAPSHOT.search(path)
    told = _metadata(shipped_path(path) / "README.md")
    return BaseFacts(
        path=path, hub_id=f"{found['owner']}/{found['name']}" if found else "", revision=found["revision"] if found else "",
        license=str(told.get("license") or ""), license_name=str(told.get("license_name") or ""), license_link=str(told.get("license_link") or ""),
    )  # fmt: skip


def _metadata(readme: Path) -> Mapping[str, Any]:
    """The YAML block at the top of a README.md; empty where there is none that reads."""
    try:
        found = _METADATA.search(readme.read_text(encoding="utf-8", errors="replace"))
        told = yaml.safe_load(found["yaml"]) if found else {}
    except (OSError, yaml.YAMLError):
        return {}
    return told if isinstance(told, dict) else {}


def prompt_facts(path: str) -> PromptFacts:
    """Return a prompt file's count and digest, as the file is now: a file that went, or broke since the run, has none."""
    file = shipped_path(path)
    try:
        return PromptFacts(path=path, count=len(read_prompts(file)), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    except (DataError, OSError):
        return PromptFacts(path=path, count=None, sha256="")


def trained_prompts(store: RunStore, version: int) -> tuple[int, int]:
    """Return how many different prompts, and how many groups, the manifests of updates 1 to `version` hold. Raises CorruptFile."""
    identities: set[str] = set()
    num_groups = 0
    for path in store.list(paths.MANIFESTS):
        update = paths.parse_manifest(path)
        if update is not None and update <= version:
            groups = read_manifest(store, update).groups
            identities |= {group.prompt_id for group in groups}
            num_groups += len(groups)
    return len(identities), num_groups


def reward_facts(store: RunStore, config: RunConfig, evaluations: Sequence[EvaluationRecord]) -> list[RewardFacts]:
    """Return the run's rewards with the scorer versions of the newest training scores and of the evaluations that the card shows."""
    cards = {card.name: card for card in list_scorers()}
    newest: dict[str, tuple[int, str]] = {}
    for path in store.list(paths.SCORES):
        name = paths.parse_score(path)
        if name is not None:
            newest[name.reward] = max(newest.get(name.reward, (-1, "")), (name.number, path))
    files = {reward: {path} for reward, (_, path) in newest.items()}
    for record in evaluations:
        for path in store.list(record.directory):
            sheet = paths.parse_sheet_score(path)
            if sheet is not None:
                files.setdefault(sheet.reward, set()).add(path)
    return [
        RewardFacts(config=reward, card=cards.get(reward.name), versions=_versions(store, sorted(files.get(reward.name, ()))))
        for reward in config.reward
    ]


def _versions(store: RunStore, files: Sequence[str]) -> tuple[str, ...]:
    """The scorer versions that score files name; one that retention took away meanwhile is left out."""
    found: set[str] = set()
    for path in files:
        try:
            found.add(read_scores(store, path).scorer_version)
        except CorruptFile:
            raise
        except StoreError:
            continue
    return tuple(sorted(found - {""}))
