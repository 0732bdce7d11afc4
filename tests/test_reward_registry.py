"""Rewards by name: built-in ones, user code, options and the known-case gate."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConfigError, GateError
from common.types import Prompt, Score
from reward_servers.guarded import score_guarded
from reward_servers.registry import check_known_score, list_scorers, make_scorer
from reward_servers.scorers.base import KnownCase, PlainScorer

PROVEN = [
    "ocr_flowgrpo", "ocr_strict", "geneval_strict", "geneval_dense", "geneval_dense_flowgrpo", "jpeg_incompressibility",
    "jpeg_compressibility",
]  # fmt: skip
BUILT_IN = [
    *PROVEN[:5], "geneval_hf_strict", "geneval_hf_dense", "geneval_hf_dense_flowgrpo", "pickscore", "hps_v2.1", "clip_score_vit_l14",
    "aesthetic", "image_reward", "unified_reward", "vlm_yes_no", "deqa", "http", *PROVEN[5:], "diversity",
]  # fmt: skip
PROMPTS = [Prompt(id=str(i), text=f"prompt {i}", metadata={"level": i}) for i in range(3)]
IMAGES = np.stack([np.full((8, 8, 3), 10 * i, dtype=np.uint8) for i in range(3)])

USER_CODE = """
import numpy as np
from reward_servers.scorers.base import PlainScorer
from common.types import Score

constant = 3

def brightness(image, prompt, metadata, scale=1.0):
    return float(image.mean()) * scale + metadata["level"]

def sometimes(image, prompt, metadata):
    if image.mean() == 10:
        raise KeyError("no such level")
    return None if image.mean() == 20 else np.float32(0.5)

class Whole(PlainScorer):
    name = "whole"
    version = "7"
    def __init__(self, offset=0.0):
        self.offset = offset
    def score(self, images, prompts):
        return [Score(sample_index=i, value=float(image.max()) + self.offset) for i, image in enumerate(images)]

class Half:
    name = "half"
    version = "1"
"""


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    module = f"rewards_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(USER_CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return module


def test_the_list_names_every_built_in_reward_with_its_card() -> None:
    rows = list_scorers()
    assert [row.name for row in rows] == BUILT_IN
    assert all(row.range and row.source and row.licence and row.description for row in rows)


def test_what_needs_neither_model_nor_server_is_marked_so() -> None:
    assert [card.name for card in list_scorers() if card.is_self_contained] == [*PROVEN, "diversity"]


@pytest.mark.parametrize("name", PROVEN)
def test_every_self_contained_reward_proves_itself_on_its_known_case(name: str) -> None:
    scorer = make_scorer(name, {})
    assert scorer.name == name
    assert scorer.version
    assert check_known_score(scorer)


def test_an_unknown_name_is_a_config_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="nearest name is 'ocr_flowgrpo'"):
        make_scorer("ocr_flogrpo", {})


def test_an_unknown_or_bad_option_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"'detecto'.*detector"):
        make_scorer("geneval_dense", {"detecto": "shapes"})
    with pytest.raises(ConfigError, match="one of shapes"):
        make_scorer("geneval_dense", {"detector": "yolo"})
    with pytest.raises(ConfigError, match="num_threads"):
        make_scorer("ocr_strict", {"num_threads": 0})
    with pytest.raises(ConfigError, match="none"):
        make_scorer("jpeg_compressibility", {"quality": 3})


def test_jpeg_rewards_are_kilobytes_and_minus_kilobytes_over_500() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise[0]).save(buffer, format="JPEG", quality=95)
    kilobytes = len(buffer.getvalue()) / 1000
    assert make_scorer("jpeg_incompressibility", {}).score(noise, PROMPTS[:1])[0].value == kilobytes
    assert make_scorer("jpeg_compressibility", {}).score(noise, PROMPTS[:1])[0].value == -kilobytes / 500


def test_a_user_function_scores_with_prompt_metadata_and_options(user_code: str) -> None:
    scorer = make_scorer(f"{user_code}:brightness", {"scale": 2.0})
    assert [score.value for score in scorer.score(IMAGES, PROMPTS)] == [0.0, 21.0, 42.0]
    assert scorer.name == f"{user_code}:brightness"
    assert scorer.version != make_scorer(f"{user_code}:brightness", {"scale": 3.0}).version
    assert not check_known_score(scorer)


def test_what_a_user_function_raises_or_forgets_becomes_a_null_and_spares_the_others(user_code: str) -> None:
    scores = score_guarded(make_scorer(f"{user_code}:sometimes", {}), IMAGES, PROMPTS, micro_batch=3)
    assert [score.value for score in scores] == [0.5, None, None]
    assert "no such level" in scores[1].error
    assert "returned None" in scores[2].error
    assert [score.sample_index for score in scores] == [0, 1, 2]


def test_a_user_class_is_taken_as_it_is(user_code: str) -> None:
    scorer = make_scorer(f"{user_code}:Whole", {"offset": 0.5})
    assert (scorer.name, scorer.version) == ("whole", "7")
    assert [score.value for score in scorer.score(IMAGES, PROMPTS)] == [0.5, 10.5, 20.5]


@pytest.mark.parametrize(
    ("attribute", "options", "rule"),
    [
        ("nothing", {}, "offers .*brightness"),
        ("constant", {}, "is a int"),
        ("Half", {}, "lacks applies_to, check_prompt, score"),
        ("Whole", {"wrong": 1}, "cannot be made"),
        ("brightness", {"wrong": 1}, "cannot take"),
    ],
)
def test_user_code_that_is_no_scorer_is_a_config_error(user_code: str, attribute: str, options: Mapping[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        make_scorer(f"{user_code}:{attribute}", options)


def test_a_module_that_does_not_exist_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_scorer("no_module_of_this_name:score", {})


class Claims(PlainScorer):
    """A scorer whose known case it may miss."""

    name = "claims"
    version = "1"

    def __init__(self, value: float) -> None:
        self._value = value

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[Score]:
        """Say the value."""
        return [Score(sample_index=i, value=self._value) for i in range(len(prompts))]

    def known_case(self) -> KnownCase:
        """Expect 1 within .01."""
        return KnownCase(image=IMAGES[0], prompt=PROMPTS[0], expected=1.0, tolerance=0.01)


def test_a_scorer_that_misses_its_known_score_is_stopped_by_the_gate() -> None:
    assert check_known_score(Claims(1.005))
    with pytest.raises(GateError, match=r"gate scorer: claims scored its known image 1\.0200, expected 1\.0000"):
        check_known_score(Claims(1.02))
    with pytest.raises(GateError, match="not finite"):
        check_known_score(Claims(float("nan")))
