"""Detectors that are told in words what to look for: OWLv2 (Minderer et al. 2023) and Grounding DINO (Liu et al. 2023) of transformers.

They find any class, give boxes without masks, and their scores are no probabilities: OWLv2 is sure of an object at 0.3 already. GenEval's
borders (0.3, and 0.9 for counting) are therefore moved onto the model's own: `found_score` is the raw score that becomes 0.3 and
`counted_score` the one that becomes 0.9, linearly between them. Their defaults are a choice and not a calibration.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, ScorerError
from reward_servers.detection import Detection
from reward_servers.detectors.checkpoints import checked_image, checkpoint_version, load_image_processor, load_model, load_tokenizer
from reward_servers.detectors.vocabulary import COCO_CLASSES

FloatArray = NDArray[np.float32]
Raw = tuple[FloatArray, NDArray[np.int64], FloatArray]
"""Of Q boxes: raw scores [Q] in [0, 1], label indices [Q], boxes [Q, 4] as (center x, center y, width, height) in pixels."""

OWLV2: Final = "google/owlv2-base-patch16-ensemble"
GROUNDING_DINO: Final = "IDEA-Research/grounding-dino-tiny"
MIN_CONFIDENCE: Final = 0.05
"""Less is not reported; every rule asks for more."""
QUESTION: Final = "a photo of a {label}"
"""How OWLv2 is asked for a class."""


class _OpenVocabulary(ABC):
    """What both detectors share: the question's classes, and boxes from raw scores."""

    name = ""
    labels: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()

    def __init__(self, model: str, revision: str, found_score: float, counted_score: float) -> None:
        if not 0 < found_score < counted_score < 1:
            raise ConfigError(
                f"detector {self.name}: found_score {found_score} and counted_score {counted_score} came; it must be 0 < found < counted < 1"
            )
        self._borders = (found_score, counted_score)
        self.version = f"1-{checkpoint_version(model, revision)}-{found_score:g}-{counted_score:g}"

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Find objects of GenEval's 80 classes in an image [H, W, 3] uint8 RGB. Raises ScorerError."""
        return self.detect_classes(image, COCO_CLASSES)

    def detect_classes(self, image: NDArray[np.uint8], labels: Sequence[str]) -> list[Detection]:
        """Find objects of the named classes, whatever their order; a box carries the class that it fits best. Raises ScorerError."""
        asked = tuple(sorted(set(labels)))
        if not asked:
            return []
        try:
            scores, indices, boxes = self._ask(checked_image(image, f"detector {self.name}"), asked)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ScorerError(
                f"detector {self.name} failed on an image of shape {image.shape}, asked for {', '.join(asked)}: {error}"
            ) from error
        confidences = calibrated(scores, *self._borders)
        corners = image_corners(boxes, (image.shape[0], image.shape[1]))
        found = []
        for confidence, index, (left, top, right, bottom) in zip(confidences.tolist(), indices.tolist(), corners.tolist(), strict=True):
            if confidence > MIN_CONFIDENCE and right > left and bottom > top:
                found.append(Detection(label=asked[index], box=(left, top, right, bottom), confidence=confidence))
        return found

    @abstractmethod
    def _ask(self, image: NDArray[np.uint8], labels: tuple[str, ...]) -> Raw:
        """Return what the model says of an image, asked for these classes."""


class Owlv2Detector(_OpenVocabulary):
    """OWLv2: every image patch proposes a box and names the text that it is nearest to."""

    name = "owlv2"

    def __init__(
        self, model: str = "", *, revision: str = "", device: str = "cpu", found_score: float = 0.2, counted_score: float = 0.3
    ) -> None:
        """Load a checkpoint of Owlv2ForObjectDetection ("" = OWLV2). Raises ConfigError."""
        from transformers import Owlv2ForObjectDetection  # noqa: PLC0415  (heavy, needed by this detector only)

        model = model or OWLV2
        super().__init__(model, revision, found_score, counted_score)
        self._processor = load_image_processor(model, revision=revision)
        self._tokenizer = load_tokenizer(model, revision=revision)
        self._model = load_model(Owlv2ForObjectDetection, model, revision=revision, device=device)
        self._max_tokens = int(self._model.config.text_config.max_position_embeddings)

    def _ask(self, image: NDArray[np.uint8], labels: tuple[str, ...]) -> Raw:
        import torch  # noqa: PLC0415

        texts = [QUESTION.format(label=label) for label in labels]
        with torch.inference_mode():
            tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=self._max_tokens, return_tensors="pt")
            pixels = self._processor(images=[image], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
            outputs = self._model(
                input_ids=tokens["input_ids"].to(self._model.device), attention_mask=tokens["attention_mask"].to(self._model.device),
                pixel_values=pixels.to(self._model.device),
            )  # fmt: skip
        best = outputs.logits[0].float().max(dim=-1)
        side = max(image.shape[:2])  # the preprocessing pads an image to a square, at its right and bottom
        boxes = outputs.pred_boxes[0].float().cpu().numpy() * np.float32(side)
        return best.values.sigmoid().cpu().numpy(), best.indices.cpu().numpy(), boxes


class GroundingDinoDetector(_OpenVocabulary):
    """Grounding DINO: one sentence names the classes, and each query scores each of its tokens.

    A class's score is the mean over its tokens, as in the authors' evaluation on COCO.
    """

    name = "grounding_dino"

    def __init__(
        self, model: str = "", *, revision: str = "", device: str = "cpu", found_score: float = 0.3, counted_score: float = 0.4
    ) -> None:
        """Load a checkpoint of GroundingDinoForObjectDetection ("" = GROUNDING_DINO). Raises ConfigError."""
        from transformers import GroundingDinoForObjectDetection  # noqa: PLC0415  (heavy, needed by this detector only)

        model = model or GROUNDING_DINO
        super().__init__(model, revision, found_score, counted_score)
        self._processor = load_image_processor(model, revision=revision)
        self._tokenizer = load_tokenizer(model, revision=revision)
        self._model = load_model(GroundingDinoForObjectDetection, model, revision=revision, device=device)
        self._max_tokens = int(self._model.config.max_text_len)

    def _ask(self, image: NDArray[np.uint8], labels: tuple[str, ...]) -> Raw:
        import torch  # noqa: PLC0415

        sentence, spans = class_sentence(labels)
        with torch.inference_mode():
            tokens = self._tokenizer(sentence, return_offsets_mapping=True, return_token_type_ids=True, return_tensors="pt")
            if tokens["input_ids"].shape[1] > self._max_tokens:
                raise ValueError(f"the class names have {tokens['input_ids'].shape[1]} tokens, {self._max_tokens} at most")
            offsets = tokens.pop("offset_mapping")[0].numpy()
            images = self._processor(images=[image], return_tensors="pt", input_data_format="channels_last")
            outputs = self._model(**tokens.to(self._model.device), **images.to(self._model.device))
        scores = label_scores(outputs.logits[0].float().sigmoid().cpu().numpy(), offsets, spans)
        height, width = image.shape[:2]
        boxes = outputs.pred_boxes[0].float().cpu().numpy() * np.array([width, height, width, height], dtype=np.float32)
        return scores.max(axis=1), scores.argmax(axis=1), boxes


def class_sentence(labels: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return the sentence "first. second." that names the classes, and each one's span of characters in it."""
    sentence, spans = "", []
    for label in labels:
        name = label.lower().replace(".", " ")
        spans.append((len(sentence), len(sentence) + len(name)))
        sentence += f"{name}. "
    return sentence.rstrip(), spans


def label_scores(probabilities: FloatArray, offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> FloatArray:
    """Average token scores over the tokens of each class name.

    Args:
        probabilities: [Q, tokens or more].
        offsets: [tokens, 2], the characters of each token; (0, 0) for special ones.
        spans: the characters of each class name.

    Returns:
        [Q, classes].

    Raises:
        ValueError: a class name has no token.
    """
    columns = []
    for start, stop in spans:
        own = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > offsets[:, 0]))
        if len(own) == 0:
            raise ValueError(f"the class name at characters {start} to {stop} has no token")
        columns.append(probabilities[:, own].mean(axis=1))
    return np.stack(columns, axis=1)


def calibrated(scores: FloatArray, found_score: float, counted_score: float) -> NDArray[np.float64]:
    """Return confidences [Q]: piecewise linear in the raw scores [Q], through (found_score, 0.3) and (counted_score, 0.9)."""
    return np.interp(scores, (0.0, found_score, counted_score, 1.0), (0.0, 0.3, 0.9, 1.0))


def image_corners(boxes: FloatArray, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return boxes [Q, 4] (center x, center y, width, height) as (left, top, right, bottom), cut at the borders of an image (H, W)."""
    centers, extents = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    limits = np.array([size[1], size[0]], dtype=np.float64)
    return np.concatenate([np.clip(centers - extents / 2, 0, limits), np.clip(centers + extents / 2, 0, limits)], axis=1)
