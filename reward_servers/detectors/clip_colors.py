"""The color of a detected object by CLIP, zero-shot, as GenEval asks for it (Ghosh et al. 2023, evaluation/evaluate_images.py)."""

from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from common.errors import ScorerError
from reward_servers.detection import Detection
from reward_servers.detectors.checkpoints import checked_image, checkpoint_version, load_image_processor, load_model, load_tokenizer
from reward_servers.detectors.vocabulary import COLORS

FloatArray = NDArray[np.float32]

MODEL: Final = "openai/clip-vit-large-patch14"
TEMPLATES: Final = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
BACKGROUND: Final = (0x99, 0x99, 0x99)
"""RGB of the pixels outside the mask."""
MAX_CLASSES: Final = 512
"""Classes whose texts stay encoded."""


class ClipColors:
    """A ColorClassifier: the color whose texts lie nearest to the object's crop."""

    name = "clip"
    colors: tuple[str, ...] = COLORS

    def __init__(self, model: str = "", *, revision: str = "", device: str = "cpu") -> None:
        """Load a checkpoint of CLIPModel ("" = MODEL). Raises ConfigError."""
        from transformers import CLIPModel  # noqa: PLC0415  (heavy, needed by this classifier only)

        model = model or MODEL
        self._processor = load_image_processor(model, revision=revision)
        self._tokenizer = load_tokenizer(model, revision=revision)
        self._model = load_model(CLIPModel, model, revision=revision, device=device)
        self._weights = lru_cache(maxsize=MAX_CLASSES)(self._encoded_colors)
        self.version = f"clip-1-{checkpoint_version(model, revision)}"

    def __call__(self, image: NDArray[np.uint8], detection: Detection) -> str | None:
        """Name the color of one detected object of an image [H, W, 3] uint8 RGB. Raises ScorerError."""
        similarities = self.similarities(image, detection)
        return self.colors[int(similarities.argmax())]

    def similarities(self, image: NDArray[np.uint8], detection: Detection) -> FloatArray:
        """Return the cosine between the object's crop and each of the colors [10]. Raises ScorerError."""
        crop = object_crop(checked_image(image, "color model clip"), detection)
        try:
            cosines: FloatArray = self._weights(detection.label) @ self._encoded_crop(crop)
        except (RuntimeError, ValueError) as error:
            raise ScorerError(f"color model clip failed on a {detection.label} at {detection.box}: {error}") from error
        return cosines

    def _encoded_crop(self, crop: PillowImage.Image) -> FloatArray:
        import torch  # noqa: PLC0415

        with torch.inference_mode():
            pixels = self._processor(images=[crop], return_tensors="pt")["pixel_values"].to(self._model.device)
            return _unit(_array(self._model.get_image_features(pixel_values=pixels).pooler_output)[0])

    def _encoded_colors(self, label: str) -> FloatArray:
        """Return color_weights of a class."""
        import torch  # noqa: PLC0415

        texts = [template.format(color=color, label=label) for color in self.colors for template in TEMPLATES]
        with torch.inference_mode():
            tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self._model.device)
            features = self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
            return color_weights(_array(features).reshape(len(self.colors), len(TEMPLATES), -1))


def color_weights(embeddings: FloatArray) -> FloatArray:
    """Return one unit vector a color: the mean over templates of the normalized embeddings, normalized again.

    Args:
        embeddings: [colors, templates, D].

    Returns:
        [colors, D].
    """
    return _unit(_unit(embeddings).mean(axis=1))


def object_crop(image: NDArray[np.uint8], detection: Detection) -> PillowImage.Image:
    """Cut an object's box out of an image [H, W, 3]; pixels outside its mask, if it has one, are gray (BACKGROUND).

    The box's borders are rounded to pixels, as GenEval does, and kept inside the image with at least a pixel.

    Raises:
        ScorerError: the mask is not the image's size.
    """
    if detection.mask is not None:
        if detection.mask.shape != image.shape[:2]:
            raise ScorerError(f"color model clip: a mask of shape {detection.mask.shape} came with an image of shape {image.shape}")
        image = np.where(detection.mask[..., None], image, np.array(BACKGROUND, dtype=np.uint8))
    left, right = _inside(detection.box[0], detection.box[2], image.shape[1])
    top, bottom = _inside(detection.box[1], detection.box[3], image.shape[0])
    return PillowImage.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))


def _inside(first: float, last: float, size: int) -> tuple[int, int]:
    start = min(max(round(first), 0), size - 1)
    return start, min(max(round(last), start + 1), size)


def _array(features: Any) -> FloatArray:
    values: FloatArray = features.float().cpu().numpy()
    return values


def _unit(vectors: FloatArray) -> FloatArray:
    scaled: FloatArray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return scaled
