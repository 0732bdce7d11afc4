"""CLIP and its relatives as scorers use them: preprocessing, unit features of images and texts, and the cosine between them."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from threading import Lock
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from common.errors import ConfigError, ScorerError
from common.types import Prompt, Score
from reward_servers.detectors.checkpoints import checked_image, checkpoint_version, load_image_processor, load_model, load_tokenizer
from reward_servers.scorers.base import Image, PlainScorer

FloatArray = NDArray[np.float32]
Channels = tuple[float, float, float]

CLIP_MEAN: Final[Channels] = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final[Channels] = (0.26862954, 0.26130258, 0.27577711)
MAX_CACHED_TEXTS: Final = 1024
"""Prompts whose features stay: a few MB."""


class Fit(Enum):
    """How an image that is not square becomes one. A square image is resized, whatever the way."""

    CROP = "crop"  # shorter edge resized, middle kept, an odd pixel cut at the far side (transformers)
    CROP_ROUNDED = "crop_rounded"  # the same with the offset rounded half to even (torchvision)
    PAD = "pad"  # longer edge resized, black around it (open_clip's resize_longest_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """From pixels to what a network reads: bicubic resize by Pillow in 8 bits, a square, then (x / 255 - mean) / std."""

    side: int  # pixels
    mean: Channels = CLIP_MEAN
    std: Channels = CLIP_STD
    fit: Fit = Fit.CROP

    def pixels(self, images: Image) -> FloatArray:
        """Prepare images [B, H, W, 3] uint8 RGB: [B, 3, side, side] float32."""
        squares = np.stack([self._square(image) for image in images])
        scaled = (squares.astype(np.float32) / np.float32(255) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def _square(self, image: Image) -> Image:
        height, width = image.shape[:2]
        edge = max(height, width) if self.fit is Fit.PAD else min(height, width)
        if self.fit is Fit.PAD:
            scale = self.side / edge
            height, width = max(round(height * scale), 1), max(round(width * scale), 1)  # an edge of a pixel at least
        else:
            height, width = int(self.side * height / edge), int(self.side * width / edge)
        resized = np.asarray(PillowImage.fromarray(image).resize((width, height), PillowImage.Resampling.BICUBIC))
        return self._padded(resized) if self.fit is Fit.PAD else self._cropped(resized)

    def _cropped(self, image: Image) -> Image:
        top, left = (self._offset(size - self.side) for size in image.shape[:2])
        return image[top : top + self.side, left : left + self.side]

    def _offset(self, excess: int) -> int:
        return round(excess / 2) if self.fit is Fit.CROP_ROUNDED else excess // 2

    def _padded(self, image: Image) -> Image:
        rows, columns = self.side - image.shape[0], self.side - image.shape[1]
        return np.pad(image, ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0)))


def clip_preprocessing(processor: Any, model: str) -> Preprocessing:
    """Return what a transformers CLIP image processor is set to.

    Raises:
        ConfigError: it is set to anything but a bicubic resize of the shorter edge, a square crop of that size and normalizing.
    """
    size, crop = dict(processor.size or {}), dict(processor.crop_size or {})
    side = size.get("shortest_edge")
    steps = (processor.do_resize, processor.do_center_crop, processor.do_rescale, processor.do_normalize)
    is_square_crop = side is not None and (crop.get("height"), crop.get("width")) == (side, side)
    is_plain = is_square_crop and processor.resample == PillowImage.Resampling.BICUBIC and math.isclose(processor.rescale_factor, 1 / 255)
    if side is None or not all(steps) or not is_plain or len(processor.image_mean) != 3:
        raise ConfigError(
            f"CLIP scorer: the image processor of {model} has size {size}, crop {crop} and steps {steps}; it must resize the shorter edge "
            "(bicubic), crop a square of that size, divide by 255 and normalize; name a checkpoint of CLIP"
        )
    mean, std = ((float(red), float(green), float(blue)) for red, green, blue in (processor.image_mean, processor.image_std))
    return Preprocessing(side=int(side), mean=mean, std=std)


class ImageTextEncoder(Protocol):
    """A model that puts images and texts into one space."""

    version: str

    def image_features(self, images: Image) -> FloatArray:
        """Encode images [B, H, W, 3] uint8 RGB as unit vectors [B, D]."""
        ...

    def text_features(self, texts: Sequence[str]) -> FloatArray:
        """Encode texts as unit vectors [B, D]."""
        ...


class TextCache:
    """The features of the texts seen last. The samples of a group share a prompt, so most of them find it here.

    Args:
        encode: gives the features [T, D] of T distinct texts.
        capacity: texts kept; the one that was asked for longest ago leaves first.
    """

    def __init__(self, encode: Callable[[list[str]], FloatArray], capacity: int = MAX_CACHED_TEXTS) -> None:
        self._encode, self._capacity = encode, capacity
        self._kept: OrderedDict[str, FloatArray] = OrderedDict()
        self._lock = Lock()

    def features(self, texts: Sequence[str]) -> FloatArray:
        """Return features [B, D] of B texts, each distinct text encoded once. Raises ScorerError for a text that is no Unicode."""
        distinct = dict.fromkeys(texts)
        with self._lock:
            found = {text: self._kept[text] for text in distinct if text in self._kept}
        absent = [text for text in distinct if text not in found]
        for text in absent:
            _check_unicode(text)
        if absent:
            found |= dict(zip(absent, self._encode(absent), strict=True))
        with self._lock:
            for text in distinct:
                self._kept[text] = found[text]
                self._kept.move_to_end(text)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return np.stack([found[text] for text in texts])


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ScorerError(f"text encoder: the prompt {text[:80]!a} is no valid Unicode ({error.reason}); mend the prompt file") from error


class ClipModel:
    """A transformers CLIPModel as an ImageTextEncoder, float32."""

    def __init__(self, model: str, *, revision: str = "", processor: str = "", device: str = "cpu") -> None:
        """Load a checkpoint.

        Args:
            model: id on the hub or local directory.
            revision: of that id.
            processor: where the preprocessing and the tokenizer come from ("" = model).
            device: as torch names it.

        Raises:
            ConfigError: a part cannot be loaded, or preprocesses otherwise than CLIP.
        """
        from transformers import CLIPModel  # noqa: PLC0415  (heavy, needed by CLIP scorers only)

        parts, parts_revision = (processor, "") if processor else (model, revision)
        self._preprocessing = clip_preprocessing(load_image_processor(parts, revision=parts_revision), parts)
        self._tokenizer = load_tokenizer(parts, revision=parts_revision)
        self._model = load_model(CLIPModel, model, revision=revision, device=device)
        self._max_tokens = int(self._model.config.text_config.max_position_embeddings)
        self._cache = TextCache(self._encoded_texts)
        self.width = int(self._model.config.projection_dim)
        self.logit_scale = math.exp(float(self._model.logit_scale.detach()))
        self.version = checkpoint_version(model, revision) + (f"-{checkpoint_version(processor, '')}" if processor else "")

    def image_features(self, images: Image) -> FloatArray:
        """Encode images [B, H, W, 3] uint8 RGB as unit vectors [B, D]."""
        import torch  # noqa: PLC0415

        with torch.inference_mode():
            pixels = torch.from_numpy(self._preprocessing.pixels(images)).to(self._model.device)
            return unit_features(self._model.get_image_features(pixel_values=pixels).pooler_output)

    def text_features(self, texts: Sequence[str]) -> FloatArray:
        """Encode texts, cut at the model's context (77 tokens), as unit vectors [B, D]. Raises ScorerError."""
        return self._cache.features(texts)

    def _encoded_texts(self, texts: list[str]) -> FloatArray:
        import torch  # noqa: PLC0415

        with torch.inference_mode():
            tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
            tokens = tokens.to(self._model.device)
            encoded = self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            return unit_features(encoded.pooler_output)


class CosineScorer(PlainScorer):
    """scale * cosine(image, text).

    Args:
        name: of the reward.
        encoder: the model.
        scale: factor of the cosine.
    """

    def __init__(self, name: str, encoder: ImageTextEncoder, *, scale: float = 1.0) -> None:
        self.name, self.version = name, f"1-{encoder.version}"
        self._encoder, self._scale = encoder, scale

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]. Raises ScorerError when it cannot be scored."""
        return score_together(self.name, images, prompts, self._values)

    def _values(self, images: Image, texts: Sequence[str]) -> FloatArray:
        cosines: FloatArray = (self._encoder.image_features(images) * self._encoder.text_features(texts)).sum(axis=1)
        return cosines * np.float32(self._scale)


def score_together(
    name: str, images: Image, prompts: Sequence[Prompt], judge: Callable[[Image, Sequence[str]], FloatArray]
) -> list[Score]:  # fmt: skip
    """Score a batch by one call of a network.

    Args:
        name: of the reward.
        images: [B, H, W, 3] uint8 RGB.
        prompts: B prompts.
        judge: images and texts in, raw scores [B] out.

    Raises:
        ScorerError: the images are none, or the network failed; the caller tries again one by one (reward_servers/guarded.py).
    """
    if images.ndim != 4 or len(images) != len(prompts):
        raise ScorerError(
            f"{name}: images of shape {images.shape} came with {len(prompts)} prompts; it reads [B, H, W, 3], one prompt an image"
        )
    if not len(images):
        return []
    checked_image(images[0], name)
    try:
        values = judge(images, [prompt.text for prompt in prompts])
    except (RuntimeError, ValueError) as error:
        raise ScorerError(f"{name} failed on images of shape {images.shape}: {error}") from error
    return [Score(sample_index=index, value=float(value)) for index, value in enumerate(values)]


def unit_features(features: Any) -> FloatArray:
    """Return a tensor's rows [B, D] as float32 unit vectors on the CPU."""
    rows = features.float()
    units: FloatArray = (rows / rows.norm(dim=-1, keepdim=True)).cpu().numpy()
    return units
