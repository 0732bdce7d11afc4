"""File names: formatted and parsed both ways; manifests and drops are read strictly."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AlreadyExists, CorruptFile
from common.store import paths
from common.store.manifests import Claim, decode_record, encode_record, read_drop, read_manifest, write_drop, write_manifest
from common.store.prompts_order import PromptOrder
from common.store.run_store import RunStore
from common.types import Drop, Manifest, ManifestGroup, Prompt

NUMBERS = st.integers(0, 10**9)
LEASES = st.from_regex(r"[0-9A-Za-z_-]{1,20}", fullmatch=True)
REWARDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: text not in (".", ".."))


@given(NUMBERS, LEASES, REWARDS)
def test_every_name_parses_back_into_what_it_was_made_of(number: int, lease: str, reward: str) -> None:
    name = paths.GroupName(number=number, lease_id=lease)
    assert paths.parse_group(paths.group_path(number, lease)) == name
    assert paths.parse_media(paths.media_path(number, lease)) == name
    assert paths.media_path_of(paths.group_path(number, lease)) == paths.media_path(number, lease)
    score = paths.ScoreName(number=number, lease_id=lease, reward=reward)
    assert paths.parse_score(paths.score_path(number, lease, reward)) == score
    directory = paths.eval_directory(number, "ema", "ab12")
    assert paths.parse_eval(directory) == paths.parse_eval(paths.result_path(directory))
    assert paths.parse_eval(directory) == paths.EvalName(version=number, snapshot="ema", protocol="ab12")
    assert paths.parse_sheet(paths.sheet_path(directory, number, lease)) == name
    assert paths.parse_drop(paths.drop_path(number)) == number
    assert paths.parse_adapter(paths.adapter_path(number, number)) == (number, number)


SIMPLE: list[tuple[Callable[[int], str], Callable[[str], Any]]] = [
    (paths.manifest_path, paths.parse_manifest), (paths.learner_complete_path, paths.parse_learner_complete),
    (paths.config_path, paths.parse_config), (paths.control_path, paths.parse_control), (paths.drop_path, paths.parse_drop),
]  # fmt: skip


@pytest.mark.parametrize(("write", "parse"), SIMPLE)
def test_numbered_names_round_trip_at_every_width(write: Callable[[int], str], parse: Callable[[str], Any]) -> None:
    for number in (0, 1, 999, 1000, 9999, 10**6, 10**8 + 1):
        assert parse(write(number)) == number
        assert parse("x" + write(number)) is None
        assert parse(write(number) + ".tmp") is None


def test_names_are_those_of_the_architecture() -> None:
    assert paths.group_path(17, "ab") == "groups/000/g00000017.ab.group.arrow"
    assert paths.group_path(12_345, "ab") == "groups/012/g00012345.ab.group.arrow"
    assert paths.score_path(17, "ab", "ocr") == "scores/000/g00000017.ab.ocr.arrow"
    assert paths.drop_path(17) == "drops/000/g00000017.json"
    assert paths.manifest_path(121) == "manifests/update_000121.json"
    assert paths.adapter_path(1, 120) == "policy/i0001/v000120.safetensors"
    assert paths.learner_complete_path(120) == "learner/update_000120/complete.json"
    assert paths.eval_directory(120, "ema", "p") == "eval/v000120.ema.p"
    assert paths.metrics_path(121, 1) == "metrics/update_000121.i0001.json"


def test_a_group_in_the_wrong_folder_is_not_a_group() -> None:
    assert paths.parse_group("groups/001/g00000017.ab.group.arrow") is None


MANIFEST = Manifest(
    update=1, incarnation=1, config_digest="c", max_staleness=1, drops=(Drop(number=1, reason="attempts", detail="x"),),
    groups=(
        ManifestGroup(
            number=0, path="g", media_path="m", version=0, num_bytes=3, prompt_id="p", scores={"r": (0.1, None)}, kept=(True, False)
        ),
    ),
)  # fmt: skip


def test_manifests_and_drops_round_trip_and_are_created_once(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    write_manifest(store, MANIFEST)
    assert read_manifest(store, 1) == MANIFEST
    write_drop(store, MANIFEST.drops[0], writer_id="i1")
    assert read_drop(store, 1) == MANIFEST.drops[0]
    with pytest.raises(AlreadyExists):
        write_manifest(store, dataclasses.replace(MANIFEST, incarnation=2))


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (b'"update": 1', b'"update": 1, "extra": 2', "has keys or types that no Manifest has"),
        (b'"incarnation": 1', b'"incarnation": "1"', "has keys or types that no Manifest has"),
        (b'"incarnation": 1', b'"incarnation": "one"', "is no Manifest"),
        (b'"prompt_id"', b'"prompt"', "is no Manifest"),
        (b'"update": 1', b'"update": 2', "is update 2 with groups"),
        (b"0.1,", b"", "score lists of unlike length"),
        (b"}", b"", "is no Manifest"),
    ],
)
def test_a_manifest_that_was_edited_is_refused_by_name(tmp_path: Path, old: bytes, new: bytes, rule: str) -> None:
    store = RunStore(str(tmp_path))
    path = write_manifest(store, MANIFEST)
    content = store.read(path)
    assert old in content
    store.replace(path, content.replace(old, new))
    with pytest.raises(CorruptFile, match=rule):
        read_manifest(store, 1)


def test_a_claim_keeps_the_whole_config() -> None:
    claim = Claim(incarnation=1, writer_id="w", started_at="t", config_digest="c", config={"a": {"b": [1, None, "x"]}})
    assert decode_record(Claim, "config.i0001.json", encode_record(claim)) == claim


def test_every_epoch_draws_every_prompt_once_in_an_order_of_its_own() -> None:
    prompts = [Prompt(id=str(index), text="x") for index in range(20)]
    order = PromptOrder(prompts, run_seed=1)
    epochs = [[order(20 * epoch + index).id for index in range(20)] for epoch in range(5)]
    assert all(sorted(epoch, key=int) == [str(index) for index in range(20)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert [PromptOrder(prompts, run_seed=1)(number).id for number in (37, 3, 85)] == [epochs[1][17], epochs[0][3], epochs[4][5]]
    assert [PromptOrder(prompts, run_seed=2)(number).id for number in range(20)] != epochs[0]
