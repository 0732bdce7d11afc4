"""Small random checkpoints of the preference models, and what every scorer of images and texts must keep."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import BertTokenizer

from common.protocols import Scorer
from common.types import Prompt, Score
from reward_servers.guarded import score_guarded

FloatArray = NDArray[np.float32]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3
FIRST_LETTER, FIRST_INNER = 4, 30
"""Ids of "a" at a word's start and inside a word."""
VOCABULARY = 57
VISION_HEADS, TEXT_HEADS = 2, 3
SIDE, PATCH, VISION_WIDTH, TEXT_WIDTH, NUM_LAYERS = 32, 8, 16, 24, 2

TEXTS = ("a red cube", "", "ein Würfel, 猫と🦊, עברית", "cab " * 2500, "A RED cube", "b")
"""Plain, empty, Unicode, 10,000 characters, capitals, one letter."""
SAME = 1e-5
"""Float32 sums of another batch size come in another order; scores are of the order of 1 to 20."""


def prompts_of(texts: tuple[str, ...]) -> list[Prompt]:
    """A prompt a text."""
    return [Prompt(id=str(index), text=text) for index, text in enumerate(texts)]


def noise_images(num: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random images [num, height, width, 3] with a tint of their own, so that no two are alike after a crop."""
    generator = np.random.default_rng(seed)
    tints = generator.integers(0, 200, (num, 1, 1, 3))
    return (tints + generator.integers(0, 56, (num, height, width, 3))).astype(np.uint8)


def values_of(scores: list[Score]) -> NDArray[np.float64]:
    """The raw scores in order; a null fails."""
    assert [score.sample_index for score in scores] == list(range(len(scores)))
    assert all(score.value is not None for score in scores), scores
    return np.array([score.value for score in scores], dtype=np.float64)


def check_batches(scorer: Scorer, *, text_matters: bool) -> None:
    """Batch of N = N batches of 1, whatever the order; every prompt gets a number."""
    images, prompts = noise_images(len(TEXTS), 40, 55), prompts_of(TEXTS)
    together = values_of(scorer.score(images, prompts))
    assert np.isfinite(together).all() and np.ptp(together) > 100 * SAME
    singles = [values_of(scorer.score(images[i : i + 1], prompts[i : i + 1]))[0] for i in range(len(prompts))]
    np.testing.assert_allclose(singles, together, atol=SAME, rtol=SAME)
    order = np.random.default_rng(1).permutation(len(prompts))
    np.testing.assert_allclose(values_of(scorer.score(images[order], [prompts[i] for i in order])), together[order], atol=SAME, rtol=SAME)
    one_image = values_of(scorer.score(np.repeat(images[:1], len(prompts), axis=0), prompts))
    assert (np.ptp(one_image) > 100 * SAME) == text_matters
    assert scorer.score(images[:0], []) == []


def check_bad_images(scorer: Scorer) -> None:
    """A bad image is an error with its rule, never a number."""
    prompts = prompts_of(("a", "b"))
    for bad in (np.zeros((2, 40, 40, 3), np.float32), np.zeros((2, 40, 40, 4), np.uint8), np.zeros((2, 40, 40), np.uint8)):
        scores = score_guarded(scorer, bad, prompts, micro_batch=2)  # type: ignore[arg-type]
        assert [score.value for score in scores] == [None, None]
        assert all("[B, H, W, 3]" in score.error or "[H, W, 3] uint8 RGB" in score.error for score in scores), scores


def check_clients(scorer: Scorer) -> None:
    """A hundred callers at a time get what one gets."""
    images, prompts = noise_images(len(TEXTS), 40, 40, seed=2), prompts_of(TEXTS)
    expected = values_of(scorer.score(images, prompts))

    def ask(client: int) -> float:
        index = client % len(prompts)
        return float(values_of(scorer.score(images[index : index + 1], prompts[index : index + 1]))[0])

    with ThreadPoolExecutor(max_workers=100) as pool:
        answers = list(pool.map(ask, range(100)))
    np.testing.assert_allclose(answers, [expected[client % len(prompts)] for client in range(100)], atol=SAME, rtol=SAME)


def random_head(width: int, seed: int = 3, prefix: str = "") -> dict[str, FloatArray]:
    """A small head under the published names."""
    generator = np.random.default_rng(seed)
    tensors, sizes = {}, (width, 10, 8, 6, 4, 1)
    for place, index in enumerate((0, 2, 4, 6, 7)):
        shape = (sizes[place + 1], sizes[place])
        tensors[f"{prefix}layers.{index}.weight"] = (generator.normal(size=shape) * 1.5 / np.sqrt(shape[1])).astype(np.float32)
        tensors[f"{prefix}layers.{index}.bias"] = generator.normal(size=shape[:1]).astype(np.float32)
    return tensors


def make_bert_tokenizer(folder: Path) -> Path:
    """A tokenizer of letters: a word is its first letter and the inner ones."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "[MASK]"]
    assert len(words) == VOCABULARY
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(str(vocabulary), model_max_length=512).save_pretrained(str(folder))
    return folder


def letter_tokens(text: str, length: int) -> list[int]:
    """What BERT's tokenizer makes of lower-case letters and spaces, by hand, not padded."""
    pieces: list[int] = []
    for word in text.split():
        places = [LETTERS.index(letter) for letter in word]
        pieces += [FIRST_LETTER + places[0], *(FIRST_INNER + place for place in places[1:])]
    return [BEGIN, *pieces[: length - 2], END]


def published_image_reward(seed: int = 5) -> dict[str, NDArray[np.generic]]:
    """A small ImageReward under the published names, with the tensors that the score has no use for."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.generic]] = {}

    def add(name: str, *shape: int, spread: float = 0.3, center: float = 0.0) -> None:
        tensors[name] = (center + spread * generator.normal(size=shape)).astype(np.float32)

    def affine(name: str, out: int, into: int) -> None:
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, center=1.0)
        add(f"{name}.bias", width)

    image, text = "blip.visual_encoder", "blip.text_encoder"
    add(f"{image}.cls_token", 1, 1, VISION_WIDTH)
    add(f"{image}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, VISION_WIDTH)
    add(f"{image}.patch_embed.proj.weight", VISION_WIDTH, 3, PATCH, PATCH, spread=0.1)
    add(f"{image}.patch_embed.proj.bias", VISION_WIDTH)
    norm(f"{image}.norm", VISION_WIDTH)
    for index in range(NUM_LAYERS):
        block = f"{image}.blocks.{index}"
        norm(f"{block}.norm1", VISION_WIDTH)
        norm(f"{block}.norm2", VISION_WIDTH)
        affine(f"{block}.attn.qkv", 3 * VISION_WIDTH, VISION_WIDTH)
        affine(f"{block}.attn.proj", VISION_WIDTH, VISION_WIDTH)
        affine(f"{block}.mlp.fc1", 20, VISION_WIDTH)
        affine(f"{block}.mlp.fc2", VISION_WIDTH, 20)
    tensors[f"{text}.embeddings.position_ids"] = np.arange(50)[None]
    add(f"{text}.embeddings.word_embeddings.weight", VOCABULARY + 2, TEXT_WIDTH)
    add(f"{text}.embeddings.position_embeddings.weight", 50, TEXT_WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for index in range(NUM_LAYERS):
        layer = f"{text}.encoder.layer.{index}"
        for part, width in (("attention", TEXT_WIDTH), ("crossattention", VISION_WIDTH)):
            affine(f"{layer}.{part}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            affine(f"{layer}.{part}.self.key", TEXT_WIDTH, width)
            affine(f"{layer}.{part}.self.value", TEXT_WIDTH, width)
            affine(f"{layer}.{part}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{part}.output.LayerNorm", TEXT_WIDTH)
        affine(f"{layer}.intermediate.dense", 30, TEXT_WIDTH)
        affine(f"{layer}.output.dense", TEXT_WIDTH, 30)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    affine("blip.vision_proj", 8, VISION_WIDTH)
    affine("blip.text_proj", 8, TEXT_WIDTH)
    return tensors | dict(random_head(TEXT_WIDTH, prefix="mlp."))


def save_published(tensors: Mapping[str, NDArray[np.generic]], file: Path) -> Path:
    """Write tensors as the safetensors file that a user makes of a published pickle."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file)
    return file
