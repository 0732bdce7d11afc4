"""Group, media and score files: exact round trips, plain Arrow, and every broken rule named."""

import dataclasses
import io
import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from common.errors import CorruptFile, StoreError
from common.store import paths
from common.store.arrow_files import encode
from common.store.groups import GROUP_SCHEMA, read_group, write_group
from common.store.media import read_media
from common.store.run_store import RunStore
from common.store.scores import read_scores, write_scores
from common.types import RolloutGroup, Score, ScoreFile
from tests.store_fixtures import make_group, make_media


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "run") if request.param == "file" else f"memory://{tmp_path.name}")


def assert_same(left: RolloutGroup, right: RolloutGroup) -> None:
    for name in ("run", "number", "lease_id", "prompt", "adapter", "sampler", "seconds"):
        assert getattr(left, name) == getattr(right, name)
    for name in ("prompt_embeds", "pooled", "negative_embeds", "negative_pooled"):
        np.testing.assert_array_equal(getattr(left.features, name), getattr(right.features, name))
    for one, other in zip(left.trajectories, right.trajectories, strict=True):
        for field in dataclasses.fields(one):
            a, b = np.asarray(getattr(one, field.name)), np.asarray(getattr(other, field.name))
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize(("num_steps", "with_negative"), [(2, True), (1, False), (0, False)])
def test_a_group_reads_back_bit_for_bit(store: RunStore, num_steps: int, with_negative: bool) -> None:
    group = make_group(num_steps=num_steps, with_negative=with_negative)
    path = write_group(store, group, make_media())
    assert path == "groups/000/g00000007.ab12.group.arrow"
    assert_same(read_group(store, path, group_size=4), group)


def test_images_read_back_bit_for_bit_with_their_statistics(store: RunStore) -> None:
    media = make_media()
    found = read_media(store, paths.media_path_of(write_group(store, make_group(), media)))
    np.testing.assert_array_equal(found.images, media.images)
    np.testing.assert_array_equal(found.statistics["brightness"], media.statistics["brightness"])


def test_a_group_is_committed_after_its_media_and_a_failed_group_file_leaves_no_group(tmp_path: Path) -> None:
    def hook(stage: str, path: str) -> None:
        if stage == "link" and path.endswith(".group.arrow"):
            raise OSError(28, "No space left on device")

    store = RunStore(str(tmp_path), hook=hook)
    with pytest.raises(StoreError, match="No space"):
        write_group(store, make_group(), make_media())
    assert store.list() == ["groups/000/g00000007.ab12.media.arrow"]


def test_duckdb_and_pyarrow_read_a_group_without_our_code(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    group = make_group(with_negative=True)
    path = write_group(store, group, make_media())
    groups = pa.ipc.open_file(tmp_path / path).read_all()
    assert groups.schema.field("latents").type == pa.list_(pa.float32(), 3 * 2 * 3 * 4)
    assert json.loads(groups.schema.field("latents").metadata[b"shape"]) == [3, 2, 3, 4]
    assert [str(groups.schema.field(name).type) for name in ("sample_index", "seed", "step_index", "behavior_log_prob")] == [
        "int16", "uint64", "list<item: int16>", "list<item: float>",
    ]  # fmt: skip
    rows = duckdb.sql("select sample_index, seed, len(latents), behavior_log_prob[1], prompt_embeds is null from groups").fetchall()
    first = float(group.trajectories[0].behavior_log_prob[0])
    assert rows[0] == (0, 2**62, 72, first, False)
    assert [row[4] for row in rows] == [False, True, True, True]


def test_files_are_uncompressed_one_batch_and_versioned(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    group = make_group()
    path = write_group(store, group, make_media())
    content = store.read(path)
    assert group.trajectories[0].final_latents.tobytes() in content
    reader = pa.ipc.open_file(io.BytesIO(content))
    assert reader.num_record_batches == 1
    assert reader.schema.metadata[b"flowfleet.schema"] == b"group/1"


def test_every_single_flipped_byte_of_the_numbers_is_noticed(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    group = make_group()
    path = write_group(store, group, make_media())
    content = store.read(path)
    place = content.index(group.trajectories[2].final_latents.tobytes())
    for offset in (0, 5, 50):
        broken = bytearray(content)
        broken[place + offset] ^= 0x10
        store.replace(path, bytes(broken))
        with pytest.raises(CorruptFile, match=r"g00000007\.ab12\.group\.arrow: content differs from the digest"):
            read_group(store, path)


@pytest.mark.parametrize("keep", [0, 10, 500, -20])
def test_a_truncated_group_file_is_named(tmp_path: Path, keep: int) -> None:
    store = RunStore(str(tmp_path))
    path = write_group(store, make_group(), make_media())
    store.replace(path, store.read(path)[:keep])
    with pytest.raises(CorruptFile, match=r"g00000007\.ab12\.group\.arrow: is no readable Arrow IPC file"):
        read_group(store, path)


def test_a_file_with_an_extension_type_is_refused(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 3), np.float32))
    marked = pa.field("x", pa.int8(), metadata={"ARROW:extension:name": "evil"})
    for batch in (
        pa.RecordBatch.from_arrays([tensor], names=["x"]),
        pa.RecordBatch.from_arrays([pa.array([1], pa.int8())], schema=pa.schema([marked])),
        pa.RecordBatch.from_arrays([pa.array([{"y": 1}], pa.struct([marked.with_name("y")]))], names=["x"]),
    ):
        path = "groups/000/g00000001.aa.group.arrow"
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema.with_metadata({"flowfleet.schema": GROUP_SCHEMA})) as writer:
            writer.write_batch(batch.replace_schema_metadata({"flowfleet.schema": GROUP_SCHEMA}))
        store.replace(path, bytes(sink.getvalue()))
        with pytest.raises(CorruptFile, match="extension type; the rule is plain Arrow types only"):
            read_group(store, path)


def test_another_schema_version_or_a_missing_column_is_named(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    path = "groups/000/g00000001.aa.group.arrow"
    batch = pa.RecordBatch.from_pydict({"sample_index": pa.array([0], pa.int16())})
    store.replace(path, encode(batch, schema_version="group/9", metadata={}))
    with pytest.raises(CorruptFile, match=r"has schema version 'group/9'; this code reads 'group/1'"):
        read_group(store, path)
    store.replace(path, encode(batch, schema_version=GROUP_SCHEMA, metadata={"num_samples": 1}))
    with pytest.raises(CorruptFile, match="lacks or mistypes"):
        read_group(store, path)


def _with_row(group: RolloutGroup, index: int, **changes: object) -> RolloutGroup:
    rows = list(group.trajectories)
    rows[index] = dataclasses.replace(rows[index], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(group, trajectories=tuple(rows))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"behavior_log_prob": np.array([0.5, np.nan], np.float32)}, "sample 1: behavior_log_prob .* is not finite"),
        ({"final_latents": np.full((2, 3, 4), np.inf, np.float32)}, "sample 1: latents are not finite"),
        ({"sample_index": 3}, r"has samples \[0, 3, 2, 3\]"),
        ({"media_row": 0}, "one image a sample"),
        ({"sigma": np.zeros(3, np.float32)}, "step columns have lengths"),
        ({"latent_index": np.zeros(2, np.int16)}, "they agree"),
    ],
)
def test_a_broken_group_is_not_committed(store: RunStore, change: dict[str, object], rule: str) -> None:
    with pytest.raises(CorruptFile, match=rule):
        write_group(store, _with_row(make_group(), 1, **change), make_media())
    assert store.list() == []


def test_a_group_of_the_wrong_size_is_refused_in_both_directions(store: RunStore) -> None:
    path = write_group(store, make_group(), make_media())
    with pytest.raises(CorruptFile, match="has 4 of 5 samples; a group is committed whole"):
        read_group(store, path, group_size=5)
    with pytest.raises(CorruptFile, match="comes with 3 images for 4 samples"):
        write_group(store, make_group(8), make_media(3))


def test_a_group_file_under_another_name_is_refused(store: RunStore) -> None:
    path = write_group(store, make_group(), make_media())
    store.replace("groups/000/g00000009.ab12.group.arrow", store.read(path))
    with pytest.raises(CorruptFile, match="holds group 7 of lease ab12; a file's name and content agree"):
        read_group(store, "groups/000/g00000009.ab12.group.arrow")


def make_scores(*scores: Score, reward: str = "ocr") -> ScoreFile:
    return ScoreFile(run="test", number=7, lease_id="ab12", reward=reward, scorer_version="2", scores=scores)


def test_scores_read_back_with_nulls_details_and_float32_values(store: RunStore) -> None:
    file = make_scores(
        Score(sample_index=0, value=0.25, details={"chars": 4.0}), Score(sample_index=1, value=None, error="engine died", latency_s=0.5),
        reward="my.module:Reward/x",
    )  # fmt: skip
    path = write_scores(store, file)
    assert path == "scores/000/g00000007.ab12.my.module%3AReward%2Fx.arrow"
    assert read_scores(store, path) == file


def test_the_first_score_file_stands(store: RunStore) -> None:
    first, second = (make_scores(Score(sample_index=0, value=value)) for value in (0.25, 0.5))
    assert write_scores(store, first) == write_scores(store, second)
    assert read_scores(store, write_scores(store, second)) == first


@pytest.mark.parametrize(
    ("scores", "rule"),
    [
        ((Score(sample_index=0, value=float("nan")),), "a failure is null with its reason, never a number"),
        ((Score(sample_index=0, value=None),), "null without a reason"),
        ((Score(sample_index=1, value=1.0),), r"has samples \[1\]"),
        ((), r"has samples \[\]"),
    ],
)
def test_broken_scores_are_not_committed(store: RunStore, scores: tuple[Score, ...], rule: str) -> None:
    with pytest.raises(CorruptFile, match=rule):
        write_scores(store, make_scores(*scores))
    assert store.list() == []
