"""ImageReward: a small random checkpoint under the published names, against BLIP written out in NumPy."""

import math
from pathlib import Path

import numpy as np
import pytest
from clip_fixtures import (
    NUM_LAYERS,
    PAD,
    PATCH,
    SIDE,
    TEXT_HEADS,
    VISION_HEADS,
    VISION_WIDTH,
    check_bad_images,
    check_batches,
    check_clients,
    letter_tokens,
    make_bert_tokenizer,
    noise_images,
    prompts_of,
    published_image_reward,
    save_published,
    values_of,
)
from numpy.typing import NDArray
from PIL import Image
from scipy.special import erf

from common.errors import ConfigError
from reward_servers.scorers.image_reward import ENTRY, ImageReward, convert_image_reward, make_image_reward

Array = NDArray[np.float64]
ROUNDING = 1e-4
"""Float32 against float64."""
HEADS = {"vision_heads": VISION_HEADS, "text_heads": TEXT_HEADS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("image_reward")
    make_bert_tokenizer(root / "tokenizer")
    convert_image_reward(save_published(published_image_reward(), root / "published.safetensors"), root / "model", **HEADS)
    return root


@pytest.fixture(scope="module")
def scorer(root: Path) -> ImageReward:
    return make_image_reward(model=str(root / "model"), tokenizer=str(root / "tokenizer"))


# --- the oracle: BLIP and the head, one pair at a time, float64, published names ---


class Oracle:
    """Salesforce's BLIP (models/vit.py, models/med.py) and ImageReward's head, written like the papers."""

    def __init__(self) -> None:
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in published_image_reward().items()}

    def affine(self, name: str, x: Array) -> Array:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Array, epsilon: float) -> Array:
        spread = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
        scaled: Array = (x - x.mean(axis=-1, keepdims=True)) / spread
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def see(self, pixels: Array) -> Array:
        """Image [3, SIDE, SIDE] to states [1 + patches, width]."""
        name, patches = "blip.visual_encoder", []
        kernel = self.tensors[f"{name}.patch_embed.proj.weight"]
        for top in range(0, SIDE, PATCH):
            for left in range(0, SIDE, PATCH):
                patch = pixels[:, top : top + PATCH, left : left + PATCH]
                patches.append([(kernel[out] * patch).sum() for out in range(VISION_WIDTH)] + self.tensors[f"{name}.patch_embed.proj.bias"])
        x: Array = np.concatenate([self.tensors[f"{name}.cls_token"][0], np.array(patches)]) + self.tensors[f"{name}.pos_embed"][0]
        for index in range(NUM_LAYERS):
            block = f"{name}.blocks.{index}"
            query, key, value = np.split(self.affine(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)), 3, axis=1)
            x = x + self.affine(f"{block}.attn.proj", attend(query, key, value, VISION_HEADS))
            x = x + self.affine(f"{block}.mlp.fc2", gelu(self.affine(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))))
        return self.norm(f"{name}.norm", x, 1e-6)

    def read(self, tokens: list[int], seen: Array) -> Array:
        """Tokens without padding, and the image's states, to the first token's state [width]."""
        name = "blip.text_encoder"
        embedded = self.tensors[f"{name}.embeddings.word_embeddings.weight"][tokens]
        x = self.norm(
            f"{name}.embeddings.LayerNorm", embedded + self.tensors[f"{name}.embeddings.position_embeddings.weight"][: len(tokens)], 1e-12
        )
        for index in range(NUM_LAYERS):
            layer = f"{name}.encoder.layer.{index}"
            for part, memory in (("attention", None), ("crossattention", seen)):
                source = x if memory is None else memory
                query, key, value = (
                    self.affine(f"{layer}.{part}.self.{role}", y) for role, y in (("query", x), ("key", source), ("value", source))
                )
                attended = self.affine(f"{layer}.{part}.output.dense", attend(query, key, value, TEXT_HEADS))
                x = self.norm(f"{layer}.{part}.output.LayerNorm", x + attended, 1e-12)
            widened = self.affine(f"{layer}.output.dense", gelu(self.affine(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", x + widened, 1e-12)
        first: Array = x[0]
        return first

    def score(self, image: NDArray[np.uint8], text: str) -> float:
        state = self.read(letter_tokens(text, 35), self.see(prepared(image)))
        for index in (0, 2, 4, 6, 7):
            state = self.affine(f"mlp.layers.{index}", state)
        return float((state[0] - 0.16717362830052426) / 1.0333394966054072)


def attend(query: Array, key: Array, value: Array, num_heads: int) -> Array:
    heads = []
    for q, k, v in zip(*(np.split(x, num_heads, axis=1) for x in (query, key, value)), strict=True):
        weights = np.exp(q @ k.T / math.sqrt(q.shape[1]))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
    return np.concatenate(heads, axis=1)


def gelu(x: Array) -> Array:
    exact: Array = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return exact


def prepared(image: NDArray[np.uint8]) -> Array:
    """torchvision's Resize, CenterCrop, ToTensor and Normalize, on Pillow."""
    height, width = image.shape[:2]
    size = (SIDE, int(SIDE * height / width)) if width <= height else (int(SIDE * width / height), SIDE)
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    pixels = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    normalized: Array = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return normalized.transpose(2, 0, 1)


# --- scores ---


@pytest.mark.parametrize("size", [(40, 55), (47, 32)])
def test_the_score_equals_blip_written_out_with_the_published_names(scorer: ImageReward, size: tuple[int, int]) -> None:
    texts = ("a red cube", "", "b", "cab " * 20)  # the last is cut at 35 tokens, the others are padded
    images = noise_images(len(texts), *size, seed=8)
    oracle = Oracle()
    expected = [oracle.score(image, text) for image, text in zip(images, texts, strict=True)]
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(values_of(scorer.score(images, prompts_of(texts))), expected, atol=ROUNDING)


def test_the_tokenizer_of_the_fixture_is_what_the_oracle_takes_it_for_and_knows_blips_two_tokens(scorer: ImageReward) -> None:
    tokens = scorer._tokenizer(["A cab", "[ENC] [DEC]"], padding="max_length", max_length=8)["input_ids"]
    assert tokens[0] == [*letter_tokens("a cab", 8), *[PAD] * 2]
    assert tokens[1][1:3] == [58, 57]  # behind the vocabulary's 57


def test_a_batch_scores_as_its_images_one_by_one_in_any_order_and_with_any_prompt(scorer: ImageReward) -> None:
    check_batches(scorer, text_matters=True)


def test_a_bad_image_is_an_error_and_not_a_number(scorer: ImageReward) -> None:
    check_bad_images(scorer)


def test_a_hundred_clients_at_a_time_get_the_scores_of_one(scorer: ImageReward) -> None:
    check_clients(scorer)


def test_the_card_owns_that_real_weights_were_never_run(scorer: ImageReward) -> None:
    assert ENTRY.card.name == scorer.name == "image_reward"
    assert ENTRY.card.verified == "not verified with real weights"


# --- what a user may get wrong ---


def test_the_version_follows_the_weights(root: Path, scorer: ImageReward, tmp_path: Path) -> None:
    convert_image_reward(save_published(published_image_reward(seed=6), tmp_path / "p.safetensors"), tmp_path / "model", **HEADS)
    assert make_image_reward(model=str(tmp_path / "model"), tokenizer=str(root / "tokenizer")).version != scorer.version
    assert make_image_reward(model=str(root / "model"), tokenizer=str(root / "tokenizer")).version == scorer.version


@pytest.mark.parametrize(
    ("lost", "gained", "rule"),
    [
        ("blip.visual_encoder.pos_embed", "", "embeddings.position_embedding"),
        ("blip.visual_encoder.blocks.1.attn.proj.bias", "", "self_attn.projection.bias"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", "", "crossattention.self.key.bias"),
        ("", "blip.visual_encoder.blocks.0.attn.gate.weight", "blocks.0.attn.gate.weight"),
        ("mlp.layers.4.weight", "", "mlp.layers.4.weight is missing"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_the_tensors_name(tmp_path: Path, lost: str, gained: str, rule: str) -> None:
    tensors = {name: tensor for name, tensor in published_image_reward().items() if name != lost}
    tensors |= {gained: np.zeros(3, np.float32)} if gained else {}
    with pytest.raises(ConfigError, match=rule):
        convert_image_reward(save_published(tensors, tmp_path / "p.safetensors"), tmp_path / "model", **HEADS)


def test_no_directory_or_an_empty_one_is_a_config_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="option model is not set"):
        make_image_reward()
    with pytest.raises(ConfigError, match="cannot be read"):
        make_image_reward(model=str(tmp_path), tokenizer=str(root / "tokenizer"))
