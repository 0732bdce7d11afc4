"""The doctor's rows from facts: limits, GPUs, tokens, checkpoints in the cache, and what a cluster's nodes said."""

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.doctor.checks import Row, Status, as_json, has_failed
from deploy.doctor.gpu import NO_GPU, Gpu, driver_version, gpu_rows, look_at_torch, peer_row
from deploy.doctor.limits import look_at_limits, memory_left
from deploy.doctor.machine import look_at_clock
from deploy.doctor.model import checkpoints_of, look_at_checkpoints, revision_of
from deploy.doctor.ray import cluster_rows, look_at_token
from reward_servers.config import RewardConfig
from tests.run_fixtures import small_config

GIB, COMMIT = 2**30, "0123456789abcdef0123456789abcdef01234567"
H100 = Gpu(name="H100", free_bytes=70 * GIB, total_bytes=80 * GIB, capability=(9, 0), has_bf16=True)


def statuses(rows: Any) -> list[Status]:
    return [row.status for row in rows]


def limits(files: int, processes: int) -> Any:
    return lambda which: (files if which == resource.RLIMIT_NOFILE else processes, 1 << 20)


@pytest.mark.parametrize(
    ("files", "processes", "expected"),
    [(4096, resource.RLIM_INFINITY, [Status.OK, Status.OK]), (1024, 4095, [Status.WARN, Status.WARN]), (1023, 511, [Status.FAIL, Status.FAIL])],
)  # fmt: skip
def test_limits_warn_below_a_fleets_and_fail_below_a_laptops(tmp_path: Path, files: int, processes: int, expected: list[Status]) -> None:
    rows = look_at_limits(limits(files, processes), tmp_path)
    assert statuses(rows) == expected
    assert all(row.remedy for row in rows if row.status is not Status.OK)


def test_a_containers_own_bounds_count(tmp_path: Path) -> None:
    (tmp_path / "pids.max").write_text("300\n")
    _, processes = look_at_limits(limits(65536, 65536), tmp_path)
    assert processes.status is Status.FAIL and "300 by the container" in processes.found
    (tmp_path / "pids.max").write_text("max\n")
    assert statuses(look_at_limits(limits(65536, 65536), tmp_path)) == [Status.OK, Status.OK]
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert memory_left(meminfo, tmp_path) == 2048 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory_left(meminfo, tmp_path) == 600000


def test_without_a_gpu_the_rows_say_that_nothing_was_checked(tiny_sd3_dir: Path) -> None:
    (row,) = gpu_rows([], small_config(tiny_sd3_dir, "tiny-geneval"))
    assert (row.status, row.found, peer_row(0, []).found) == (Status.SKIP, NO_GPU, NO_GPU)
    assert not has_failed([row])


def test_a_gpu_is_held_against_the_recipes_weights_and_format(tiny_sd3_dir: Path) -> None:
    config = small_config(tiny_sd3_dir, "tiny-geneval", "model.device=cuda", "model.dtype=bfloat16")
    old = replace(H100, name="V100", capability=(7, 0), has_bf16=False)
    rows = gpu_rows([H100, old, replace(H100, free_bytes=0)], config)
    assert [(row.what, row.status) for row in rows] == [("gpu 0", Status.OK), ("gpu 1", Status.WARN), ("gpu 2", Status.FAIL)]
    assert "H100, 70.0 of 80.0 GiB free, compute capability 9.0, bf16" in rows[0].found and "float32" in rows[1].remedy
    assert statuses([peer_row(1, []), peer_row(2, []), peer_row(2, [(0, 1)])]) == [Status.SKIP, Status.OK, Status.WARN]


def test_a_driver_beside_a_cpu_build_of_torch_is_named(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n")
    assert (driver_version(file), driver_version(tmp_path / "none")) == ("570.86.10", "")
    (row,) = look_at_torch(file)
    if torch.cuda.is_available():
        assert row.status is Status.OK
    else:
        assert row.status in (Status.WARN, Status.FAIL) and "driver 570.86.10" in row.found and row.remedy
    assert look_at_torch(tmp_path / "none")[0].status is Status.OK


def test_the_token_is_asked_for_and_never_shown(tmp_path: Path) -> None:
    folder = tmp_path / ".ray"
    folder.mkdir()
    file = folder / "auth_token"
    file.write_text("ray-token-value")
    file.chmod(0o640)
    (bare,) = look_at_token(None, {}, tmp_path)
    assert bare.status is Status.WARN and bare.remedy == f"chmod 600 {file}"  # no mode is set: Ray may use it by itself
    (strict,) = look_at_token(None, {"RAY_AUTH_MODE": "token"}, tmp_path)
    assert strict.status is Status.FAIL and "mode 640" in strict.found
    file.chmod(0o600)
    (sound,) = look_at_token("head:6379", {"RAY_AUTH_MODE": "token"}, tmp_path)
    (joined,) = look_at_token("head:6379", {}, tmp_path)
    (variable,) = look_at_token(None, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ray-token-value"}, tmp_path)
    file.write_text("")
    (empty,) = look_at_token(None, {"RAY_AUTH_MODE": "token"}, tmp_path)
    assert statuses([sound, joined, variable, empty]) == [Status.OK, Status.WARN, Status.WARN, Status.FAIL]
    assert "ray-token-value" not in as_json([bare, strict, sound, joined, variable, empty])


def cache_with(folder: Path, model: str, branch: str = "main") -> Path:
    """A Hugging Face cache that holds one snapshot; its only file is a link into blobs/."""
    place = folder / f"models--{model.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (place / part).mkdir(parents=True)
    (place / "refs" / branch).write_text(COMMIT)
    (place / "blobs" / "b").write_text("{}")
    (place / "snapshots" / COMMIT / "config.json").symlink_to(place / "blobs" / "b")
    return place


def test_a_rewards_checkpoints_are_looked_for_at_their_revision(tmp_path: Path) -> None:
    def rows(**options: Any) -> list[Row]:
        return list(look_at_checkpoints(RewardConfig(name="clip_score_vit_l14", options=options), tmp_path))

    (missing,) = rows()
    assert missing.status is Status.FAIL and "hf download openai/clip-vit-large-patch14 --revision main" in missing.remedy
    place = cache_with(tmp_path, "openai/clip-vit-large-patch14")
    (moving,) = rows()
    assert moving.status is Status.WARN and COMMIT in moving.found and "pin it" in moving.remedy
    (pinned,) = rows(revision=COMMIT)
    assert pinned.status is Status.OK
    (other,) = rows(revision="f" * 40)
    assert other.status is Status.FAIL and f"which holds {COMMIT}" in other.found
    (local,) = rows(model=str(tmp_path))
    assert local.status is Status.OK
    (place / "blobs" / "b").unlink()
    (broken,) = rows(revision=COMMIT)
    assert broken.status is Status.FAIL and "config.json lead nowhere" in broken.found
    assert (revision_of(place / "snapshots" / COMMIT), revision_of(tmp_path)) == (COMMIT, "")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("pickscore", {}, ["model", "processor"]), ("pickscore", {"model": "a/b"}, ["model"]), ("geneval_strict", {}, []),
        ("geneval_strict", {"detector": "owlv2"}, ["model", "clip_model"]), ("geneval_hf_dense", {}, ["model", "clip_model"]),
        ("aesthetic", {}, ["model", "head"]), ("ocr_strict", {}, []), ("ocr_strict", {"backend": "paddleocr"}, ["models"]),
        ("jpeg_compressibility", {}, []), ("image_reward", {}, ["model", "tokenizer"]),
    ],
)  # fmt: skip
def test_a_rewards_options_say_which_checkpoints_it_loads(name: str, options: dict[str, Any], expected: list[str]) -> None:
    assert [checkpoint.what for checkpoint in checkpoints_of(RewardConfig(name=name, options=options))] == expected


FACTS = {"ray": "2.60.0", "python": "3.11.7", "flowfleet": "0.1.0", "open_files": 65536, "shm_bytes": GIB, "skew_s": 0.0}


def told(store: str = "", **changes: Any) -> dict[str, Any]:
    return {"driver": FACTS, "nodes": {"node a": FACTS, "node b": FACTS | changes}, "store": store}


def test_a_sound_cluster_passes_and_every_difference_is_named_by_node() -> None:
    assert statuses(cluster_rows(told(), "/shared/run")) == [Status.OK] * 4
    assert cluster_rows(told(), None)[-1].status is Status.SKIP
    version, clocks, low, store = cluster_rows(
        told("gate store: node b does not share", ray="2.59.0", skew_s=90.0, open_files=256), "/shared/run"
    )
    assert version.status is Status.FAIL and version.found == "node b: ray 2.59.0, here 2.60.0"
    assert clocks.status is Status.WARN and "node b 90 s" in clocks.found
    assert low.status is Status.WARN and "node b 256 open files" in low.found
    assert store.status is Status.FAIL and "node b does not share" in store.found
    silent = told() | {"nodes": {"node c": {"problem": "did not answer within 120 s"}}}
    assert cluster_rows(silent, None)[0].status is Status.FAIL


def test_a_cluster_that_refuses_this_ray_is_told_apart_from_one_that_asks_for_a_token() -> None:
    (version,) = cluster_rows({"error": "Version mismatch: The cluster was started with Ray 2.59.0"}, None)
    (token,) = cluster_rows({"error": "head:6379: Token authentication is enabled"}, None)
    assert version.what == "cluster versions" and "cluster's versions" in version.remedy
    assert token.status is Status.FAIL and "RAY_AUTH_TOKEN_PATH" in token.remedy


def test_clocks_are_compared_with_the_file_systems_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(look_at_clock(tmp_path / "run")) == [Status.OK]
    monkeypatch.setattr("deploy.doctor.machine.time.time", lambda: 1.0)
    (row,) = look_at_clock(tmp_path)
    assert row.status is Status.WARN and "NTP" in row.remedy
    assert list(tmp_path.iterdir()) == []
    assert os.access(tmp_path, os.W_OK)
