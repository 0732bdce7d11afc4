"""A run directory of the real writers with numbers that can be reckoned by hand: for the tests of export and model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from common.config import config_digest
from common.policy.adapters import write_adapter_bytes
from common.policy.config import ModelConfig
from common.policy.load import load_policy
from common.store import paths
from common.store.manifests import Claim, encode_record, write_manifest
from common.store.run_store import RunStore
from common.store.scores import write_scores
from common.types import Manifest, ManifestGroup, Score, ScoreFile, SnapshotInfo
from deploy.config import RunConfig
from tests.report_runs import evaluation, metrics, put_json
from tests.run_fixtures import small_config

VERSIONS: Final = 6
COMMIT: Final = "c0ffee" * 6 + "c0de"
SCORER: Final = "geneval_strict/7"
PROMPT: Final = "a {tag} <script>alert({index})</script> | **bold** [link](http://example.org) $x$"
SCORES: Final[Mapping[int, Mapping[str, Sequence[float | None]]]] = {
    0: {"colors": (0.0, 0.0, 1.0, 1.0), "counting": (0.0, 0.0)},  # means .5 and 0
    3: {"colors": (0.0, 1.0, 1.0, 1.0), "counting": (0.0, 1.0)},  # means .75 and .5
    6: {"colors": (1.0, 1.0, 1.0, 0.5), "counting": (1.0, 0.5)},  # means .875 and .75
}


def card_config(model: Path, *sets: str) -> RunConfig:
    """A shipped recipe on a small model: rank 2, alpha 6."""
    named = ("reward.0.name=geneval_strict", 'evaluation.rewards=["geneval_strict"]')
    return small_config(model, "tiny-geneval", "model.lora.rank=2", "model.lora.alpha=6", *named, *sets)


def trained_state(model: ModelConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """An adapter that changes what the model draws."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in load_policy(model).read_adapter().items()
    }


def publish(store: RunStore, version: int, snapshots: Mapping[str, Mapping[str, torch.Tensor]]) -> bytes:
    """Commit one published version."""
    infos = {name: SnapshotInfo(num_modules=len(state) // 2, canary=0.1) for name, state in snapshots.items()}
    own = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in snapshots.items()}  # snapshots share no memory
    content, _ = write_adapter_bytes(own, infos, incarnation=2, version=version)
    store.create_exclusive(paths.adapter_path(2, version), content, writer_id="test")
    return content


def claim(store: RunStore, config: RunConfig, incarnation: int) -> None:
    """Commit the claim of a start."""
    tables: dict[str, Any] = config.model_dump(mode="json")
    started = f"2026-01-0{incarnation}T00:00:00Z"
    record = Claim(incarnation=incarnation, writer_id="w", started_at=started, config_digest=config_digest(config), config=tables)
    store.create_exclusive(paths.config_path(incarnation), encode_record(record), writer_id="w")


def bare_run(root: Path, config: RunConfig, state: Mapping[str, torch.Tensor]) -> RunStore:
    """A run of which nothing but its configuration and one version is on file."""
    store = RunStore(str(root))
    claim(store, config, 1)
    publish(store, 1, {"live": state, "ema": state})
    return store


def card_run(root: Path, config: RunConfig, state: Mapping[str, torch.Tensor]) -> RunStore:
    """Six updates in two starts, the first of which had written updates 1 to 4; versions 0, 3 and 6 are evaluated."""
    store = RunStore(str(root))
    for incarnation in (1, 2):
        claim(store, config, incarnation)
        environment = {
            "flowfleet": "0.1.0", "commit": COMMIT + "+changes", "python": "3.11.7", "cpu": "a processor", "num_cpus": 2,
            "memory_bytes": 8 * 2**30, "packages": {"torch": "2.13.0", "diffusers": "0.42.1"},
        }  # fmt: skip
        put_json(store, paths.environment_path(incarnation), environment)
    for update, incarnation in [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (5, 2), (6, 2)]:
        put_json(store, paths.metrics_path(update, incarnation), metrics(update, VERSIONS, incarnation))
    for version, scores in SCORES.items():
        directory = evaluation(store, version, {tag: list(values) for tag, values in scores.items()}, text=PROMPT)
        _score(store, [value for values in scores.values() for value in values], 0, "aa11", directory)
    for update in (1, 2):
        write_manifest(store, _manifest(config, update))
    _score(store, [1.0, 0.0], 7, "bb22")
    publish(store, 3, {"live": state})
    publish(store, 6, {"live": state, "ema": state})
    return store


def _score(store: RunStore, values: Sequence[float | None], number: int, lease_id: str, directory: str = "") -> None:
    scores = tuple(Score(sample_index=index, value=value, error="" if value is not None else "none") for index, value in enumerate(values))
    file = ScoreFile(run="r", number=number, lease_id=lease_id, reward="geneval_strict", scorer_version=SCORER, scores=scores)
    write_scores(store, file, directory=directory)


def _manifest(config: RunConfig, update: int) -> Manifest:
    """Two groups, one of the same prompt in every update."""
    groups = tuple(
        ManifestGroup(
            number=2 * update + place, path=paths.group_path(2 * update + place, "bb22"), media_path=paths.media_path(2 * update + place, "bb22"),
            version=update - 1, num_bytes=1, prompt_id=prompt_id, scores={"geneval_strict": (1.0, 0.0)}, kept=(True, True),
        )
        for place, prompt_id in enumerate(("always", f"only-{update}"))
    )  # fmt: skip
    return Manifest(update=update, incarnation=1, config_digest=config_digest(config), max_staleness=1, groups=groups, drops=())
