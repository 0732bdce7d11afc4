"""The audit: clean on honest runs, and it names group, update and rule of every tampering."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.store import paths
from common.store.audit import AuditReport, audit
from common.store.groups import encode_group, read_group
from common.store.manifests import Claim, encode_record, read_claim, read_manifest, read_status, write_status
from common.store.run_store import RunStore
from common.store.scores import read_scores, write_scores
from common.types import Drop, Manifest
from tests.store_fixtures import PROMPTS, Clock, learn, make_coordinator, make_settings, publish, run_to_end, work


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A whole run of three updates with one dropped group (number 0) and a start and an end evaluation."""
    store = RunStore(str(tmp_path / "run"))
    config = {"schedule": {"max_staleness": 1}, "learner": {"groups_per_update": 2}}
    claim = Claim(incarnation=1, writer_id="w", started_at="", config_digest="c0", config=config)
    store.create_exclusive(paths.config_path(1), encode_record(claim), writer_id="w")
    desk = make_coordinator(store, make_settings(eval_prompts=PROMPTS[:3]), Clock())
    publish(store, desk, 0)
    for _ in range(3):
        lease: Any = desk.ask_rollout("rollout.0")
        desk.fail_rollout(lease.lease_id, "out of memory")
    for update in (1, 2, 3):
        for _ in work(store, desk):
            pass
        learn(store, desk, update)
    for _ in work(store, desk):
        pass
    desk.close("done")
    return store


def test_an_honest_run_is_clean_and_counted(store: RunStore) -> None:
    report = audit(store)
    assert report == AuditReport(num_manifests=3, num_groups=6, num_drops=1, num_retired=0, num_adapters=3, violations=())
    assert report.is_clean


def edit(store: RunStore, update: int, change: Callable[[Manifest], Manifest]) -> None:
    manifest = change(read_manifest(store, update))
    store.replace(paths.manifest_path(update), encode_record(manifest))


def edit_group(store: RunStore, update: int, **changes: object) -> None:
    def change(manifest: Manifest) -> Manifest:
        first = dataclasses.replace(manifest.groups[0], **changes)  # type: ignore[arg-type]
        return dataclasses.replace(manifest, groups=(first, *manifest.groups[1:]))

    edit(store, update, change)


def consume_twice(store: RunStore) -> None:
    again = read_manifest(store, 1).groups[0]
    edit(store, 3, lambda manifest: dataclasses.replace(manifest, groups=(again, *manifest.groups)))


def raise_score(store: RunStore) -> None:
    edit_group(store, 2, scores={"r": (1.0, 1.0, 1.0, 1.0)})


def rewrite_score_file(store: RunStore) -> None:
    path = next(path for path in store.list("scores") if "g00000003" in path)
    file = read_scores(store, path)
    store.remove(path)
    write_scores(store, dataclasses.replace(file, scores=tuple(dataclasses.replace(score, value=0.75) for score in file.scores)))


def fake_version(store: RunStore) -> None:
    edit_group(store, 3, version=2)


def hide_staleness(store: RunStore) -> None:
    edit(store, 3, lambda manifest: dataclasses.replace(manifest, max_staleness=0))


def swap_batches(store: RunStore) -> None:
    second, third = read_manifest(store, 2), read_manifest(store, 3)
    edit(store, 2, lambda manifest: dataclasses.replace(manifest, groups=third.groups))
    edit(store, 3, lambda manifest: dataclasses.replace(manifest, groups=second.groups))


def lose_manifest(store: RunStore) -> None:
    store.remove(paths.manifest_path(2))


def break_manifest(store: RunStore) -> None:
    store.replace(paths.manifest_path(2), store.read(paths.manifest_path(2))[:-5])


def lose_group(store: RunStore) -> None:
    store.remove(read_manifest(store, 1).groups[1].path)


def lose_media(store: RunStore) -> None:
    store.remove(read_manifest(store, 1).groups[1].media_path)


def flip_group_byte(store: RunStore) -> None:
    path = read_manifest(store, 2).groups[0].path
    content = bytearray(store.read(path))
    place = bytes(content).index(read_group(store, path).trajectories[0].final_latents.tobytes())
    content[place] ^= 1
    store.replace(path, bytes(content))


def replace_group(store: RunStore) -> None:
    """A well-formed group with other latents and another version."""
    path = read_manifest(store, 2).groups[0].path
    group = read_group(store, path)
    rows = tuple(dataclasses.replace(row, final_latents=np.zeros_like(row.final_latents)) for row in group.trajectories)
    other = dataclasses.replace(group, trajectories=rows, adapter=dataclasses.replace(group.adapter, version=2))
    store.replace(path, encode_group(other, (8, 8)))


def flip_adapter_byte(store: RunStore) -> None:
    path = paths.adapter_path(1, 2)
    content = bytearray(store.read(path))
    content[-1] ^= 1
    store.replace(path, bytes(content))


def swap_adapters(store: RunStore) -> None:
    store.replace(paths.adapter_path(1, 2), store.read(paths.adapter_path(1, 3)))


def drop_consumed(store: RunStore) -> None:
    store.create_exclusive(paths.drop_path(3), encode_record(Drop(number=3, reason="flat")), writer_id="x")


def lose_drop(store: RunStore) -> None:
    store.remove(paths.drop_path(0))


def rewrite_drop(store: RunStore) -> None:
    store.replace(paths.drop_path(0), encode_record(Drop(number=0, reason="flat")))


def break_state(store: RunStore) -> None:
    store.replace(f"{paths.learner_directory(2)}/state.safetensors", b"other")


def foreign_config(store: RunStore) -> None:
    edit(store, 2, lambda manifest: dataclasses.replace(manifest, config_digest="c1"))


def loosen_config(store: RunStore) -> None:
    claim = read_claim(store, 1)
    store.replace(paths.config_path(1), encode_record(dataclasses.replace(claim, config={"schedule": {"max_staleness": 0}})))


def polish_evaluation(store: RunStore) -> None:
    path = next(path for path in store.list("eval") if path.endswith("result.json"))
    result = json.loads(store.read(path))
    result["rows"][0]["scores"]["r"] = 1.0
    store.replace(path, json.dumps(result).encode())


@pytest.mark.parametrize(
    ("tamper", "rule", "where"),
    [
        (consume_twice, "consumed_once", "group 1, update 3"),
        (raise_score, "scores", "group 3, update 2"),
        (rewrite_score_file, "scores", "group 3, update 2"),
        (fake_version, "group_file", "group 5, update 3"),
        (hide_staleness, "staleness", "group 5, update 3"),
        (swap_batches, "order", "group 3, update 2"),
        (lose_manifest, "manifests", "update 2"),
        (break_manifest, "corrupt", "manifests/update_000002.json"),
        (lose_group, "group_file", "group 2, update 1"),
        (lose_media, "group_file", "group 2, update 1"),
        (flip_group_byte, "group_file", "group 3, update 2"),
        (replace_group, "group_file", "group 3, update 2"),
        (flip_adapter_byte, "digest", "policy/i0001/v000002.safetensors"),
        (swap_adapters, "digest", "policy/i0001/v000002.safetensors"),
        (drop_consumed, "conservation", "group 3, update 2"),
        (lose_drop, "order", "group 0, update 1"),
        (rewrite_drop, "conservation", "group 0, update 1"),
        (break_state, "learner_state", "learner/update_000002/complete.json"),
        (foreign_config, "config", "update 2"),
        (loosen_config, "config", "update 2"),
        (polish_evaluation, "evaluation", "eval/v000000.ema"),
    ],
)
def test_every_tampering_is_named(store: RunStore, tamper: Callable[[RunStore], None], rule: str, where: str) -> None:
    tamper(store)
    report = audit(store)
    assert not report.is_clean
    assert any(found.rule == rule and found.where.startswith(where) for found in report.violations), report.violations


def test_retired_groups_are_counted_and_no_violation(store: RunStore) -> None:
    status = read_status(store)
    assert status is not None
    write_status(store, dataclasses.replace(status, retired_through=1))
    for group in read_manifest(store, 1).groups:
        store.remove(group.path)
        store.remove(group.media_path)
    report = audit(store)
    assert report.is_clean, report.violations
    assert report.num_retired == 2


def test_a_run_that_was_cut_short_is_clean(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "short"))
    claim = Claim(incarnation=1, writer_id="w", started_at="", config_digest="c0", config={})
    store.create_exclusive(paths.config_path(1), encode_record(claim), writer_id="w")
    assert audit(store).is_clean
    desk = make_coordinator(store, make_settings(), Clock())
    publish(store, desk, 0)
    for _ in work(store, desk):
        assert audit(store).is_clean
    desk.next_manifest(1)
    assert audit(store).is_clean


def test_a_whole_run_through_the_helper_is_clean_in_memory_too() -> None:
    store = RunStore("memory://audited")
    claim = Claim(incarnation=1, writer_id="w", started_at="", config_digest="c0", config={})
    store.create_exclusive(paths.config_path(1), encode_record(claim), writer_id="w")
    run_to_end(store, make_coordinator(store, make_settings(), Clock()))
    assert audit(store).violations == ()
