"""CLIP's family as rewards: small random checkpoints, against transformers' own forward pass and plain NumPy."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_fixtures import (
    TEXTS,
    check_bad_images,
    check_batches,
    check_clients,
    noise_images,
    prompts_of,
    random_head,
    save_published,
    values_of,
)
from geneval_models import make_clip
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from common.errors import ConfigError, ScorerError
from common.protocols import Scorer
from reward_servers.guarded import score_guarded
from reward_servers.scorers.aesthetic import ENTRY as AESTHETIC
from reward_servers.scorers.aesthetic import head_tensors, make_aesthetic, write_head
from reward_servers.scorers.clip_models import ClipModel, CosineScorer, Fit, Preprocessing, TextCache, clip_preprocessing
from reward_servers.scorers.clip_score import ENTRY as CLIP_SCORE
from reward_servers.scorers.clip_score import make_clip_score_vit_l14
from reward_servers.scorers.hps import ENTRY as HPS
from reward_servers.scorers.hps import NAME as HPS_NAME
from reward_servers.scorers.hps import make_hps_v2_1
from reward_servers.scorers.pickscore import ENTRY as PICKSCORE
from reward_servers.scorers.pickscore import make_pickscore

ROUNDING = 1e-4
"""Float32 networks run twice, with sums in another order."""
COSINES = ("clip_score_vit_l14", "pickscore", "hps_v2.1")
NAMES = (*COSINES, "aesthetic")
ODD = 3
"""Index of the prompt that is cut."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published(random_head(12), tmp_path_factory.mktemp("head") / "head.safetensors")


@pytest.fixture(scope="module")
def scorers(folder: Path, head_file: Path) -> dict[str, Scorer]:
    """hps_v2.1 stands on transformers' CLIP here: open_clip's lane tests its encoder, this one the score."""
    return {
        "clip_score_vit_l14": make_clip_score_vit_l14(model=str(folder)),
        "pickscore": make_pickscore(model=str(folder)),
        "aesthetic": make_aesthetic(model=str(folder), head=str(head_file)),
        "hps_v2.1": CosineScorer(HPS_NAME, ClipModel(str(folder))),
    }


def own_logits(folder: Path, images: NDArray[np.uint8], texts: tuple[str, ...]) -> tuple[NDArray[np.float64], float]:
    """Return transformers' logits of each image with its own text, and exp(logit_scale); pair by pair, no padding."""
    model = CLIPModel.from_pretrained(str(folder)).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(str(folder), backend="pil"), AutoTokenizer.from_pretrained(str(folder))
    logits = []
    for image, text in zip(images, texts, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
        pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits.append(model(input_ids=tokens["input_ids"], pixel_values=pixels).logits_per_image.item())
    return np.array(logits), float(model.logit_scale.detach().exp())


# --- the contract ---


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scores_as_its_images_one_by_one_in_any_order_and_with_any_prompt(scorers: dict[str, Scorer], name: str) -> None:
    check_batches(scorers[name], text_matters=name != "aesthetic")


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_image_is_an_error_and_not_a_number(scorers: dict[str, Scorer], name: str) -> None:
    check_bad_images(scorers[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_clients_at_a_time_get_the_scores_of_one(scorers: dict[str, Scorer], name: str) -> None:
    check_clients(scorers[name])


@pytest.mark.parametrize("entry", [CLIP_SCORE, PICKSCORE, AESTHETIC, HPS], ids=lambda entry: entry.card.name)
def test_a_card_bears_the_scorers_name_and_owns_that_real_weights_were_never_run(scorers: dict[str, Scorer], entry: object) -> None:
    card = entry.card  # type: ignore[attr-defined]
    assert scorers[card.name].name == card.name
    assert card.verified == "not verified with real weights"
    assert (card.extra == "openclip") == (card.name == "hps_v2.1")


# --- scores ---


@pytest.mark.parametrize("size", [(40, 55), (55, 40), (16, 16), (7, 30)])
def test_cosine_rewards_equal_transformers_own_logits(folder: Path, scorers: dict[str, Scorer], size: tuple[int, int]) -> None:
    images = noise_images(len(TEXTS), *size, seed=4)
    logits, scale = own_logits(folder, images, TEXTS)
    assert scale > 5  # far from 1, so that the two scores differ
    prompts = prompts_of(TEXTS)
    np.testing.assert_allclose(values_of(scorers["pickscore"].score(images, prompts)), logits, atol=ROUNDING)
    for name in ("clip_score_vit_l14", "hps_v2.1"):
        np.testing.assert_allclose(values_of(scorers[name].score(images, prompts)), logits / scale, atol=ROUNDING)


def test_a_prompt_is_cut_at_77_tokens(scorers: dict[str, Scorer]) -> None:
    images = noise_images(1, 20, 20)
    head = TEXTS[ODD].replace(" ", "")[:75]  # begin and end take two; a byte is a token, spaces are none
    first, second, other = (
        values_of(scorers["clip_score_vit_l14"].score(images, prompts_of((text,))))[0] for text in (head + "a" * 900, head + "a" * 50, head)
    )
    assert abs(first - second) < 1e-6 and abs(first - other) > 1e-6  # the last byte kept ends a word only in `other`


def test_the_aesthetic_score_is_the_published_mlp_on_the_unit_embedding(folder: Path, scorers: dict[str, Scorer]) -> None:
    """The published nn.Sequential, dropout and all, in float64 and eval mode."""
    mlp = torch.nn.Sequential(
        torch.nn.Linear(12, 10), torch.nn.Dropout(0.2), torch.nn.Linear(10, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 6),
        torch.nn.Dropout(0.1), torch.nn.Linear(6, 4), torch.nn.Linear(4, 1),
    ).double().eval()  # fmt: skip
    mlp.load_state_dict({name.removeprefix("layers."): torch.from_numpy(value).double() for name, value in random_head(12).items()})
    images = noise_images(5, 33, 20, seed=6)
    model = CLIPModel.from_pretrained(str(folder)).eval()
    processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    with torch.no_grad():
        states = model.vision_model(**processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")).pooler_output
        embeddings = model.visual_projection(states).double()
        expected = mlp(embeddings / (embeddings**2).sum(dim=1, keepdim=True).sqrt())[:, 0].numpy()
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(values_of(scorers["aesthetic"].score(images, prompts_of(TEXTS[:5]))), expected, atol=ROUNDING)


# --- preprocessing ---


def test_preprocessing_equals_the_processors_on_any_shape(folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    preprocessing = clip_preprocessing(processor, "m")
    for size in ((16, 16), (40, 55), (55, 40), (16, 19), (19, 16), (3, 50), (1, 1)):
        images = noise_images(2, *size, seed=sum(size))
        expected = processor(images=[Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(preprocessing.pixels(images), expected, atol=1e-5)


def test_an_odd_pixel_is_cut_as_each_library_cuts_it_and_padding_is_black() -> None:
    ramp = np.arange(7, dtype=np.uint8)
    image = np.broadcast_to(ramp[None, :, None], (4, 7, 3))[None].copy()
    plain = {"side": 4, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # pixels come out as they went in
    rows = {fit: Preprocessing(fit=fit, **plain).pixels(image)[0, 0, 0] for fit in (Fit.CROP, Fit.CROP_ROUNDED)}  # type: ignore[arg-type]
    np.testing.assert_allclose(rows[Fit.CROP], [1, 2, 3, 4], atol=1e-5)  # 3 // 2 = 1
    np.testing.assert_allclose(rows[Fit.CROP_ROUNDED], [2, 3, 4, 5], atol=1e-5)  # round(1.5) = 2
    narrow = Preprocessing(fit=Fit.CROP_ROUNDED, **plain).pixels(image[:, :, :5])[0, 0, 0]  # type: ignore[arg-type]
    np.testing.assert_allclose(narrow, [0, 1, 2, 3], atol=1e-5)  # round(.5) = 0
    padded = Preprocessing(fit=Fit.PAD, **{**plain, "side": 7}).pixels(image)[0, 1]  # type: ignore[arg-type]
    np.testing.assert_allclose(padded, [[0] * 7, *[list(range(7))] * 4, [0] * 7, [0] * 7], atol=1e-5)  # 3 rows: 1 above, 2 below
    assert Preprocessing(side=16, fit=Fit.PAD).pixels(noise_images(1, 1, 900)).shape == (1, 3, 16, 16)


def test_a_checkpoint_that_preprocesses_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    for index, change in enumerate(({"do_center_crop": False}, {"resample": 2}, {"crop_size": {"height": 8, "width": 8}})):
        other = shutil.copytree(folder, tmp_path / str(index))
        (other / "preprocessor_config.json").write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.raises(ConfigError, match="it must resize the shorter edge"):
            ClipModel(str(other))


# --- text features ---


def test_a_text_is_encoded_once_and_the_one_asked_for_longest_ago_leaves() -> None:
    asked: list[list[str]] = []

    def encode(texts: list[str]) -> NDArray[np.float32]:
        asked.append(texts)
        return np.array([[len(text), ord(text[0])] for text in texts], dtype=np.float32)

    cache = TextCache(encode, capacity=2)
    np.testing.assert_array_equal(cache.features(["ab", "c", "ab", "ab"]), [[2, 97], [1, 99], [2, 97], [2, 97]])
    np.testing.assert_array_equal(cache.features(["ab"] * 16), [[2, 97]] * 16)
    assert asked == [["ab", "c"]]
    cache.features(["def"])  # "c" leaves, not "ab"
    cache.features(["ab", "def", "c"])
    assert asked == [["ab", "c"], ["def"], ["c"]]
    np.testing.assert_array_equal(cache.features(["x", "y", "zz"]), [[1, 120], [1, 121], [2, 122]])  # more than it keeps


def test_half_a_character_is_an_error_that_spoils_no_neighbor(scorers: dict[str, Scorer]) -> None:
    images, texts = noise_images(3, 20, 20), ("one", "half \ud800", "three")
    scores = score_guarded(scorers["pickscore"], images, prompts_of(texts), micro_batch=3)
    assert [score.value is None for score in scores] == [False, True, False]
    assert "no valid Unicode" in scores[1].error
    with pytest.raises(ScorerError, match=r"'half \\ud800'"):
        scorers["pickscore"].score(images, prompts_of(texts))


# --- versions and what a user may get wrong ---


def test_the_version_follows_weights_head_and_processor(folder: Path, scorers: dict[str, Scorer], tmp_path: Path) -> None:
    versions = {scorers[name].version for name in ("clip_score_vit_l14", "aesthetic")}
    assert scorers["hps_v2.1"].version in versions  # the same checkpoint
    other = shutil.copytree(folder, tmp_path / "other")
    model = CLIPModel.from_pretrained(str(other))
    with torch.no_grad():
        model.logit_scale.add_(0.1)
    model.save_pretrained(str(other))
    versions |= {ClipModel(str(other)).version, ClipModel(str(other), processor=str(folder)).version}
    head = save_published(random_head(12, seed=9), tmp_path / "head.safetensors")
    versions.add(make_aesthetic(model=str(folder), head=str(head)).version)
    assert len(versions) == 5


def test_a_converted_head_is_read_back_as_it_was(folder: Path, head_file: Path, tmp_path: Path) -> None:
    write_head(random_head(12, prefix="mlp.") | {"blip.other": np.zeros(3, np.float32)}, tmp_path / "h.safetensors", prefix="mlp.")
    images, prompts = noise_images(2, 20, 20), prompts_of(("a", "b"))
    both = [make_aesthetic(model=str(folder), head=str(file)).score(images, prompts) for file in (head_file, tmp_path / "h.safetensors")]
    assert both[0] == both[1]


def test_a_head_that_does_not_fit_is_refused(folder: Path, head_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="option head is not set"):
        make_aesthetic(model=str(folder))
    with pytest.raises(ConfigError, match="cannot be read"):
        make_aesthetic(model=str(folder), head=str(tmp_path / "none.safetensors"))
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_aesthetic(model=str(folder), head=str(tmp_path / "pickle.pth"))
    with pytest.raises(ConfigError, match=r"layers\.7\.bias is missing among 9"):
        head_tensors({name: value for name, value in random_head(12).items() if name != "layers.7.bias"})
    with pytest.raises(ConfigError, match="each must take what the one before gives"):
        head_tensors(random_head(12) | {"layers.2.weight": np.zeros((8, 11), np.float32)})
    wide = save_published(random_head(13), tmp_path / "wide.safetensors")
    with pytest.raises(ConfigError, match=r"reads 13 numbers and .* gives 12"):
        make_aesthetic(model=str(folder), head=str(wide))


def test_hps_without_open_clip_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match="extra `openclip`"):
        make_hps_v2_1(weights="x.safetensors")


def test_a_missing_checkpoint_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        make_pickscore(model=str(tmp_path))
