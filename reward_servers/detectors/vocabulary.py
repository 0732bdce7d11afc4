"""What GenEval's prompts may name: 80 classes and 10 colors, in the benchmark's spelling and order."""

from collections.abc import Mapping
from typing import Final

from common.errors import ConfigError

COCO_CLASSES: Final = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 classes of COCO as GenEval's metadata write them (evaluation/object_names.txt); the order is COCO's."""

COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

_OTHER_SPELLINGS: Final = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv", "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "hair dryer": "hair drier",
}  # fmt: skip


def geneval_labels(names: Mapping[int, str], model: str) -> tuple[str, ...]:
    """Return a checkpoint's class names in GenEval's spelling, by class index.

    Args:
        names: id2label of the checkpoint's config.
        model: the checkpoint, for the message.

    Raises:
        ConfigError: the classes are not COCO's 80.
    """
    labels = tuple(_OTHER_SPELLINGS.get(names[index].lower(), names[index].lower()) for index in sorted(names))
    strangers = sorted(set(labels) - set(COCO_CLASSES))
    if len(labels) != len(COCO_CLASSES) or len(set(labels)) != len(labels) or strangers:
        named = f", among them {', '.join(map(repr, strangers[:3]))}" if strangers else ""
        raise ConfigError(f"detector: {model} knows {len(labels)} classes{named}; GenEval needs a checkpoint of COCO's 80 classes")
    return labels
