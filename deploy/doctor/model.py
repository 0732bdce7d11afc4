"""The doctor's look at checkpoints: which ones a recipe loads, and whether each is on this machine at its revision. Nothing is downloaded."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.doctor.checks import Bench, Row
from reward_servers.config import HTTP_ENVIRONMENT, RewardConfig
from reward_servers.detectors import clip_colors, mask2former, open_vocabulary
from reward_servers.scorers import aesthetic, clip_score, image_reward, pickscore

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DETECTORS: Final = {"mask2former": mask2former.MODEL, "owlv2": open_vocabulary.OWLV2, "grounding_dino": open_vocabulary.GROUNDING_DINO}


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One option of a reward that names a checkpoint."""

    option: str
    default: str = ""  # an id; "" = it must be named
    revision: str = ""  # the option with its revision; "" = it has none: main


_NEEDS: Final[Mapping[str, tuple[Need, ...]]] = {
    pickscore.NAME: (
        Need(option="model", default=pickscore.MODEL, revision="revision"),
        Need(option="processor", default=pickscore.PROCESSOR),
    ),
    clip_score.NAME: (Need(option="model", default=clip_score.MODEL, revision="revision"),),
    aesthetic.NAME: (Need(option="model", default=aesthetic.MODEL, revision="revision"), Need(option="head")),
    image_reward.NAME: (Need(option="model"), Need(option="tokenizer", default=image_reward.TOKENIZER)),
    "hps_v2.1": (Need(option="weights"),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is to be here."""

    what: str  # the option that names it
    place: str  # id on the hub, or path
    revision: str  # "" = main


def checkpoints_of(reward: RewardConfig) -> list[Checkpoint]:
    """The checkpoints that a reward of a recipe loads, by its options and their defaults."""
    options: Mapping[str, Any] = reward.options
    needs = _geneval_needs(reward.name, options) if reward.name.startswith("geneval") else _NEEDS.get(reward.name, ())
    if reward.name.startswith("ocr") and options.get("backend") == "paddleocr":
        needs = (Need(option="models"),)
    if reward.name == pickscore.NAME and options.get("model", pickscore.MODEL) != pickscore.MODEL and "processor" not in options:
        needs = needs[:1]  # another model brings its own
    return [
        Checkpoint(
            what=need.option, place=str(options.get(need.option) or need.default), revision=str(options.get(need.revision, "")) if need.revision else ""
        )
        for need in needs
    ]  # fmt: skip


def _geneval_needs(name: str, options: Mapping[str, Any]) -> tuple[Need, ...]:
    detector = "mask2former" if name.startswith("geneval_hf") else str(options.get("detector", "shapes"))
    if detector not in _DETECTORS:
        return ()
    return (
        Need(option="model", default=_DETECTORS[detector], revision="revision"),
        Need(option="clip_model", default=clip_colors.MODEL, revision="clip_revision"),
    )


def look_at_checkpoints(reward: RewardConfig, cache: Path | None = None) -> Sequence[Row]:
    """One row a checkpoint of a reward; a reward that loads none has none."""
    if reward.env == HTTP_ENVIRONMENT:
        return []  # its server's own
    return [checkpoint_row(reward.name, checkpoint, hub_cache() if cache is None else cache) for checkpoint in checkpoints_of(reward)]


def checkpoint_row(reward: str, checkpoint: Checkpoint, cache: Path) -> Row:
    """A local path that exists, or a snapshot in the cache at its revision."""
    bench = Bench(what=f"model of {reward}: {checkpoint.what}", rule="on this machine at its revision; the doctor downloads nothing")
    place, revision = checkpoint.place, checkpoint.revision or "main"
    if not place:
        return bench.fail(
            f"option {checkpoint.what} is not set, and there is no default", f"flowfleet reward show {reward} says what it names"
        )
    if Path(place).exists():
        return bench.ok(f"{place}: local, its digest is part of the scorer's version")
    if place.startswith(("/", ".", "~")) or place.count("/") != 1:
        return bench.fail(f"{place} does not exist", f"mend option {checkpoint.what} of [[reward]] {reward}")
    folder = snapshot(place, revision, cache)
    if folder is None:
        held = ", ".join(cached_revisions(place, cache)) or "nothing of it"
        remedy = f"where there is a network: hf download {place} --revision {revision}; or name a local directory"
        return bench.fail(f"{place} at {revision} is not in {cache}, which holds {held}", remedy)
    broken = missing_files(folder)
    if broken:
        return bench.fail(f"{folder}: {', '.join(broken[:3])} lead nowhere", f"hf download {place} --revision {revision} again")
    if not COMMIT.fullmatch(revision):
        told = f"{place} at {revision}, which is {folder.name} today"
        if checkpoint.what in ("processor", "tokenizer"):
            return bench.ok(told)  # it takes no revision
        return bench.warn(told, f"{revision} moves: pin it in the reward's options with that commit")
    return bench.ok(f"{place} at {revision}")


def hub_cache() -> Path:
    """Where Hugging Face models lie on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(model_id: str, cache: Path) -> Path:
    return cache / f"models--{model_id.replace('/', '--')}"


def cached_revisions(model_id: str, cache: Path) -> list[str]:
    """The commits of a model that the cache holds."""
    snapshots = _folder(model_id, cache) / "snapshots"
    return sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []


def snapshot(model_id: str, revision: str, cache: Path) -> Path | None:
    """The folder of a model's files at a revision (commit, branch or tag) in the cache, None when it is not there."""
    reference = _folder(model_id, cache) / "refs" / revision
    commit = reference.read_text(encoding="ascii").strip() if reference.is_file() else revision
    found = _folder(model_id, cache) / "snapshots" / commit
    return found if found.is_dir() and any(found.iterdir()) else None


def missing_files(folder: Path) -> list[str]:
    """Links of a snapshot whose content is gone: a cache that was cleaned or copied without its blobs."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() and not path.exists())


def revision_of(directory: Path) -> str:
    """The commit of a directory that is a snapshot of the cache, "" of any other."""
    resolved = directory.absolute()
    return resolved.name if resolved.parent.name == "snapshots" and COMMIT.fullmatch(resolved.name) else ""
