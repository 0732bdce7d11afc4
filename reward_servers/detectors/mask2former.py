"""Instance segmentation by Mask2Former (Cheng et al. 2022) of transformers: GenEval's detector in another library's weights.

Deviations from the benchmark's own set-up (mmdetection): the checkpoint is facebook/mask2former-swin-small-coco-instance, and its
preprocessing resizes to a square. Scores are therefore named geneval_hf until they are calibrated against the original.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import ScorerError
from reward_servers.detection import Detection
from reward_servers.detectors.checkpoints import checked_image, checkpoint_version, load_image_processor, load_model
from reward_servers.detectors.vocabulary import geneval_labels

MODEL: Final = "facebook/mask2former-swin-small-coco-instance"
MIN_CONFIDENCE: Final = 0.05
"""Less is not reported; every rule asks for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One object before its class has a name."""

    label: int  # class index
    confidence: float
    mask: NDArray[np.bool_]  # [H, W], with at least a pixel


class Mask2FormerDetector:
    """Finds objects of COCO's 80 classes with their masks; a box is the hull of its mask."""

    name = "mask2former"
    colors: tuple[str, ...] = ()

    def __init__(self, model: str = "", *, revision: str = "", device: str = "cpu") -> None:
        """Load a checkpoint of Mask2FormerForUniversalSegmentation ("" = MODEL) that knows COCO's classes. Raises ConfigError."""
        from transformers import Mask2FormerForUniversalSegmentation  # noqa: PLC0415  (heavy, needed by this detector only)

        model = model or MODEL
        self._processor = load_image_processor(model, revision=revision)
        self._model = load_model(Mask2FormerForUniversalSegmentation, model, revision=revision, device=device)
        self.labels = geneval_labels(self._model.config.id2label, model)
        self.version = f"1-{checkpoint_version(model, revision)}"

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Find the objects of an image [H, W, 3] uint8 RGB. Raises ScorerError."""
        class_logits, mask_logits = self._logits(checked_image(image, "detector mask2former"))
        found = instances(class_logits, mask_logits, (image.shape[0], image.shape[1]))
        return [
            Detection(label=self.labels[item.label], box=mask_box(item.mask), confidence=item.confidence, mask=item.mask) for item in found
        ]

    def _logits(self, image: NDArray[np.uint8]) -> tuple[Any, Any]:
        """Return class logits [Q, classes + 1] and mask logits [Q, h, w] of one image, float32 on the model's device."""
        import torch  # noqa: PLC0415

        try:
            with torch.inference_mode():
                inputs = self._processor(images=[image], return_tensors="pt", input_data_format="channels_last").to(self._model.device)
                outputs = self._model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        except (RuntimeError, ValueError) as error:
            raise ScorerError(f"detector mask2former failed on an image of shape {image.shape}: {error}") from error
        return outputs.class_queries_logits[0], outputs.masks_queries_logits[0]


def instances(class_logits: Any, mask_logits: Any, size: tuple[int, int]) -> list[Instance]:
    """Turn a query's logits into objects, as Mask2Former's instance inference does.

    The Q most probable pairs of query and class are taken; a pair's confidence is its probability times the mean probability
    of the pixels inside its mask, and its mask is where the logits, bilinearly enlarged to the image, are positive.

    Args:
        class_logits: [Q, classes + 1] float32 tensor; the last column is "no object".
        mask_logits: [Q, h, w] float32 tensor of the whole image.
        size: (H, W) of the image.

    Returns:
        Objects above MIN_CONFIDENCE with a mask that is not empty, the most probable pairs first.
    """
    from torch.nn.functional import interpolate  # noqa: PLC0415

    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    num_queries, num_classes = probabilities.shape
    top, pairs = probabilities.flatten().topk(min(num_queries, probabilities.numel()))
    found = []
    for probability, pair in zip(top.tolist(), pairs.tolist(), strict=True):
        if probability <= MIN_CONFIDENCE:  # the mask can only lower it
            break
        query, label = divmod(pair, num_classes)
        logits = interpolate(mask_logits[None, query : query + 1].float(), size=size, mode="bilinear", align_corners=False)[0, 0]
        inside = logits > 0
        if not inside.any():
            continue
        confidence = probability * float(logits[inside].sigmoid().mean())
        if confidence > MIN_CONFIDENCE:
            found.append(Instance(label=label, confidence=confidence, mask=inside.cpu().numpy()))
    return found


def mask_box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return the smallest box (left, top, right, bottom) around a mask [H, W]; right and bottom lie behind its last pixel."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
