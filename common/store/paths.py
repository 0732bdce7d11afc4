"""Every file name of a run directory, formatted and parsed in one place (architecture, section 3).

Paths are POSIX and relative to the run directory. A parser returns None for a name that is not of its kind, so that a
listing can be walked with it.
"""

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

GROUPS = "groups"
SCORES = "scores"
DROPS = "drops"
MANIFESTS = "manifests"
POLICY = "policy"
LEARNER = "learner"
HISTORY = "history"
METRICS = "metrics"
EVAL = "eval"
CONTROL = "control"
STATUS = "status.json"

_LEASE = r"(?P<lease>[0-9A-Za-z_-]+)"
_GROUP = re.compile(rf"groups/(?P<bucket>\d{{3,}})/g(?P<number>\d{{8,}})\.{_LEASE}\.(?P<kind>group|media)\.arrow")
_SCORE = re.compile(rf"scores/(?P<bucket>\d{{3,}})/g(?P<number>\d{{8,}})\.{_LEASE}\.(?P<reward>[^/]+)\.arrow")
_DROP = re.compile(r"drops/(?P<bucket>\d{3,})/g(?P<number>\d{8,})\.json")
_MANIFEST = re.compile(r"manifests/update_(?P<update>\d{6,})\.json")
_ADAPTER = re.compile(r"policy/i(?P<incarnation>\d{4,})/v(?P<version>\d{6,})\.safetensors")
_METRICS = re.compile(r"metrics/update_(?P<update>\d{6,})\.i(?P<incarnation>\d{4,})\.json")
_COMPLETE = re.compile(r"learner/update_(?P<update>\d{6,})/complete\.json")
_CONFIG = re.compile(r"config\.i(?P<incarnation>\d{4,})\.json")
_EVAL = re.compile(r"eval/v(?P<version>\d{6,})\.(?P<snapshot>[0-9A-Za-z_-]+)\.(?P<protocol>[0-9A-Za-z_-]+)(?:/.*)?")
_SHEET = re.compile(rf"(?P<directory>eval/[^/]+)/s(?P<number>\d{{4,}})\.{_LEASE}\.media\.arrow")
_SHEET_SCORE = re.compile(rf"(?P<directory>eval/[^/]+)/s(?P<number>\d{{4,}})\.{_LEASE}\.(?!media\.)(?P<reward>[^/]+)\.arrow")
_CONTROL = re.compile(r"control/(?P<number>\d{4,})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupName:
    """A group or sheet and the lease that made it."""

    number: int
    lease_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreName:
    """One reward's scores of one group file or sheet."""

    number: int
    lease_id: str
    reward: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalName:
    """One evaluation: which version, which snapshot of it, under which protocol (digest)."""

    version: int
    snapshot: str
    protocol: str


def _bucket(number: int) -> str:
    return f"{number // 1000:03d}"


def group_path(number: int, lease_id: str) -> str:
    """The trajectories of a group: its commit point."""
    return f"{GROUPS}/{_bucket(number)}/g{number:08d}.{lease_id}.group.arrow"


def media_path(number: int, lease_id: str) -> str:
    """The images of a group."""
    return f"{GROUPS}/{_bucket(number)}/g{number:08d}.{lease_id}.media.arrow"


def media_path_of(path: str) -> str:
    """The images beside a group file. Raises ValueError when `path` is no group file."""
    name = parse_group(path)
    if name is None:
        raise ValueError(f"paths: {path!r} is no group file; expected groups/<n//1000>/g<n>.<lease>.group.arrow")
    return media_path(name.number, name.lease_id)


def score_path(number: int, lease_id: str, reward: str) -> str:
    """One reward's scores of one group file; `lease_id` is the group's."""
    return f"{SCORES}/{_bucket(number)}/g{number:08d}.{lease_id}.{quote(reward, safe='')}.arrow"


def drop_path(number: int) -> str:
    """The reason why a number left the sum."""
    return f"{DROPS}/{_bucket(number)}/g{number:08d}.json"


def manifest_path(update: int) -> str:
    """The batch of an update."""
    return f"{MANIFESTS}/update_{update:06d}.json"


def adapter_path(incarnation: int, version: int) -> str:
    """One published policy version."""
    return f"{POLICY}/i{incarnation:04d}/v{version:06d}.safetensors"


def learner_directory(update: int) -> str:
    """Where the LearnerState after `update` lies."""
    return f"{LEARNER}/update_{update:06d}"


def learner_complete_path(update: int) -> str:
    """The file, written last, that makes a LearnerState count."""
    return f"{learner_directory(update)}/complete.json"


def history_path(update: int) -> str:
    """What happened in an update, one row a sample."""
    return f"{HISTORY}/update_{update:06d}.parquet"


def metrics_path(update: int, incarnation: int) -> str:
    """The metrics of an update, by the incarnation that ran it."""
    return f"{METRICS}/update_{update:06d}.i{incarnation:04d}.json"


def config_path(incarnation: int) -> str:
    """The resolved configuration of one start; creating it claims the incarnation."""
    return f"config.i{incarnation:04d}.json"


def environment_path(incarnation: int) -> str:
    """Versions and devices of one start."""
    return f"environment.i{incarnation:04d}.json"


def control_path(number: int) -> str:
    """A request to the running job."""
    return f"{CONTROL}/{number:04d}.json"


def eval_directory(version: int, snapshot: str, protocol: str) -> str:
    """Where one evaluation's sheets, scores and result lie."""
    return f"{EVAL}/v{version:06d}.{snapshot}.{protocol}"


def sheet_path(directory: str, number: int, lease_id: str) -> str:
    """The images of one evaluation sheet: its commit point."""
    return f"{directory}/s{number:04d}.{lease_id}.media.arrow"


def sheet_score_path(directory: str, number: int, lease_id: str, reward: str) -> str:
    """One reward's scores of one sheet; `lease_id` is the sheet's."""
    return f"{directory}/s{number:04d}.{lease_id}.{quote(reward, safe='')}.arrow"


def result_path(directory: str) -> str:
    """The verdict of one evaluation."""
    return f"{directory}/result.json"


def parse_group(path: str) -> GroupName | None:
    """Parse a group file's name."""
    return _parse_bucketed(path, "group")


def parse_media(path: str) -> GroupName | None:
    """Parse a group's media file name."""
    return _parse_bucketed(path, "media")


def _parse_bucketed(path: str, kind: str) -> GroupName | None:
    found = _GROUP.fullmatch(path)
    if found is None or found["kind"] != kind or found["bucket"] != _bucket(int(found["number"])):
        return None
    return GroupName(number=int(found["number"]), lease_id=found["lease"])


def parse_score(path: str) -> ScoreName | None:
    """Parse a score file's name."""
    found = _SCORE.fullmatch(path)
    if found is None or found["bucket"] != _bucket(int(found["number"])):
        return None
    return ScoreName(number=int(found["number"]), lease_id=found["lease"], reward=unquote(found["reward"]))


def parse_drop(path: str) -> int | None:
    """Parse a drop file's name into the group number."""
    found = _DROP.fullmatch(path)
    return int(found["number"]) if found and found["bucket"] == _bucket(int(found["number"])) else None


def parse_manifest(path: str) -> int | None:
    """Parse a manifest's name into its update."""
    found = _MANIFEST.fullmatch(path)
    return int(found["update"]) if found else None


def parse_adapter(path: str) -> tuple[int, int] | None:
    """Parse an adapter file's name into (incarnation, version)."""
    found = _ADAPTER.fullmatch(path)
    return (int(found["incarnation"]), int(found["version"])) if found else None


def parse_metrics(path: str) -> tuple[int, int] | None:
    """Parse a metrics file's name into (update, incarnation)."""
    found = _METRICS.fullmatch(path)
    return (int(found["update"]), int(found["incarnation"])) if found else None


def parse_learner_complete(path: str) -> int | None:
    """Parse the name of a complete LearnerState's marker into its update."""
    found = _COMPLETE.fullmatch(path)
    return int(found["update"]) if found else None


def parse_config(path: str) -> int | None:
    """Parse a config file's name into its incarnation."""
    found = _CONFIG.fullmatch(path)
    return int(found["incarnation"]) if found else None


def parse_eval(path: str) -> EvalName | None:
    """Parse an evaluation directory, or any path inside one."""
    found = _EVAL.fullmatch(path)
    return EvalName(version=int(found["version"]), snapshot=found["snapshot"], protocol=found["protocol"]) if found else None


def parse_sheet(path: str) -> GroupName | None:
    """Parse an evaluation sheet's name."""
    found = _SHEET.fullmatch(path)
    return GroupName(number=int(found["number"]), lease_id=found["lease"]) if found else None


def parse_sheet_score(path: str) -> ScoreName | None:
    """Parse the name of a sheet's score file."""
    found = _SHEET_SCORE.fullmatch(path)
    return ScoreName(number=int(found["number"]), lease_id=found["lease"], reward=unquote(found["reward"])) if found else None


def parse_control(path: str) -> int | None:
    """Parse a control request's name."""
    found = _CONTROL.fullmatch(path)
    return int(found["number"]) if found else None
