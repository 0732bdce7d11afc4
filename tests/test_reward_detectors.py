"""Detectors and the color model: small random checkpoints of the real classes, against slow computations written out here."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from geneval_models import make_clip, make_grounding_dino, make_mask2former, make_owlv2
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    GroundingDinoForObjectDetection,
    Mask2FormerForUniversalSegmentation,
    Owlv2ForObjectDetection,
)

from common.errors import ConfigError, ScorerError
from reward_servers.detection import ColorModel, Detection, Detector, PromptedDetector
from reward_servers.detectors.checkpoints import checkpoint_version
from reward_servers.detectors.clip_colors import ClipColors, color_weights, object_crop
from reward_servers.detectors.mask2former import Mask2FormerDetector, instances, mask_box
from reward_servers.detectors.open_vocabulary import (
    GroundingDinoDetector,
    Owlv2Detector,
    calibrated,
    class_sentence,
    image_corners,
    label_scores,
)
from reward_servers.detectors.vocabulary import COCO_CLASSES, COLORS, geneval_labels

ROUNDING = 1e-4
"""Float32 networks run twice, and sums in another order."""
LOW = {"found_score": 0.05, "counted_score": 0.9}  # random models are sure of nothing


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    makers = {"mask2former": make_mask2former, "owlv2": make_owlv2, "grounding_dino": make_grounding_dino, "clip": make_clip}
    return {name: make(root / name) for name, make in makers.items()}


@pytest.fixture(scope="module")
def mask2former(folders: dict[str, Path]) -> Mask2FormerDetector:
    return Mask2FormerDetector(str(folders["mask2former"]))


@pytest.fixture(scope="module")
def owlv2(folders: dict[str, Path]) -> Owlv2Detector:
    return Owlv2Detector(str(folders["owlv2"]), **LOW)


@pytest.fixture(scope="module")
def dino(folders: dict[str, Path]) -> GroundingDinoDetector:
    return GroundingDinoDetector(str(folders["grounding_dino"]), **LOW)


@pytest.fixture(scope="module")
def clip(folders: dict[str, Path]) -> ClipColors:
    return ClipColors(str(folders["clip"]))


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tuples(detections: list[Detection]) -> list[tuple[str, float, tuple[float, ...]]]:
    return sorted((item.label, item.confidence, item.box) for item in detections)


# --- classes ---


def test_the_classes_are_the_eighty_of_coco_in_genevals_spelling_and_the_hubs_spelling_is_understood() -> None:
    assert len(set(COCO_CLASSES)) == 80
    assert {"computer mouse", "tv remote", "computer keyboard", "tv", "couch", "potted plant", "hair drier"} < set(COCO_CLASSES)
    hub = dict(enumerate(COCO_CLASSES)) | {3: "motorbike", 57: "sofa", 62: "tvmonitor", 64: "mouse", 65: "remote", 66: "keyboard"}
    assert geneval_labels(hub, "m") == COCO_CLASSES
    assert [COCO_CLASSES[i] for i in (3, 57, 62, 64)] == ["motorcycle", "couch", "tv", "computer mouse"]


def test_a_checkpoint_of_other_classes_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows 133 classes, among them 'wall-brick'"):
        geneval_labels(dict(enumerate((*COCO_CLASSES, *["wall-brick"] * 53))), "m")
    with pytest.raises(ConfigError, match="80 classes"):
        geneval_labels(dict(enumerate((*COCO_CLASSES[:79], "person"))), "m")
    with pytest.raises(ConfigError, match="knows 3 classes, among them 'sky'"):
        Mask2FormerDetector(str(make_mask2former(tmp_path / "m", ("sky", "person", "dog"))))


# --- mask2former ---


def enlarged(logits: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear, pixel centers at .5, borders repeated: written out pixel by pixel."""
    rows, columns = logits.shape
    result = np.zeros((height, width))
    for y, x in itertools.product(range(height), range(width)):
        v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
        u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
        top, left = int(v), int(u)
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        upper = logits[top, left] * (1 - (u - left)) + logits[top, right] * (u - left)
        lower = logits[bottom, left] * (1 - (u - left)) + logits[bottom, right] * (u - left)
        result[y, x] = upper * (1 - (v - top)) + lower * (v - top)
    return result


def slow_instances(
    class_logits: NDArray[np.float64], mask_logits: NDArray[np.float64], size: tuple[int, int]
) -> list[tuple[int, float, float]]:
    """Return (label, confidence, mask area) of every instance, as the paper's instance inference goes."""
    exponents = np.exp(class_logits)
    probabilities = (exponents / exponents.sum(axis=1, keepdims=True))[:, :-1]
    pairs = sorted(np.ndindex(probabilities.shape), key=lambda pair: -probabilities[pair])[: len(class_logits)]
    found = []
    for query, label in pairs:
        logits = enlarged(mask_logits[query], *size)
        inside = logits > 0
        if inside.any():
            confidence = probabilities[query, label] * np.mean(1 / (1 + np.exp(-logits[inside])))
            if confidence > 0.05:
                found.append((label, float(confidence), float(inside.sum())))
    return found


def test_hand_made_logits_become_the_boxes_and_confidences_of_their_masks() -> None:
    class_logits = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.04, 0.01, 0.95], [0.1, 0.8, 0.1]]))  # the last column is "no object"
    mask_logits = torch.full((3, 5, 6), -9.0)
    mask_logits[0, 1:4, 2:4] = np.log(3)  # probability .75
    mask_logits[1, 0, 0] = 9.0
    found = instances(class_logits, mask_logits, (5, 6))  # the 3 best pairs: .8 without a mask, .6 and .3 with query 0's
    assert [(item.label, round(item.confidence, 6), mask_box(item.mask)) for item in found] == [
        (0, 0.45, (2, 1, 4, 4)),
        (1, 0.225, (2, 1, 4, 4)),
    ]


def test_a_box_is_the_hull_of_all_that_a_mask_holds() -> None:
    mask = np.zeros((7, 9), dtype=bool)
    mask[2, 3] = mask[6, 8] = True
    assert mask_box(mask) == (3, 2, 9, 7)
    assert mask_box(np.ones((1, 1), dtype=bool)) == (0, 0, 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_random_logits_give_what_a_slow_computation_gives(seed: int) -> None:
    random = np.random.default_rng(seed)
    class_logits, mask_logits = 2 * random.standard_normal((5, 4)), random.standard_normal((5, 4, 6))
    found = instances(torch.tensor(class_logits, dtype=torch.float32), torch.tensor(mask_logits, dtype=torch.float32), (13, 10))
    got = [(item.label, item.confidence, float(item.mask.sum())) for item in found]
    expected = slow_instances(class_logits, mask_logits, (13, 10))
    assert len(expected) >= 3
    assert got == [pytest.approx(row, abs=ROUNDING) for row in expected]


def test_mask2former_detects_what_its_logits_say(mask2former: Mask2FormerDetector, folders: dict[str, Path]) -> None:
    image = noise(40, 56)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(str(folders["mask2former"]))
    inputs = AutoImageProcessor.from_pretrained(str(folders["mask2former"]), backend="pil")(Image.fromarray(image), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    arrays = (outputs.class_queries_logits[0].double().numpy(), outputs.masks_queries_logits[0].double().numpy())
    expected = slow_instances(*arrays, (40, 56))
    detections = mask2former.detect(image)
    assert len(expected) >= 2
    assert [COCO_CLASSES[label] for label, _, _ in expected] == [item.label for item in detections]
    for item, (_, confidence, area) in zip(detections, expected, strict=True):
        assert item.confidence == pytest.approx(confidence, abs=ROUNDING)
        assert item.mask is not None and item.mask.shape == (40, 56) and item.mask.sum() == pytest.approx(area, abs=2)
        rows, columns = np.nonzero(item.mask)
        assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert mask2former.labels == COCO_CLASSES


# --- open vocabulary ---


@pytest.mark.parametrize("shape", [(48, 72), (72, 48), (32, 32)])
def test_owlv2_gives_the_boxes_that_the_library_gives_cut_at_the_image(
    owlv2: Owlv2Detector, folders: dict[str, Path], shape: tuple[int, int]
) -> None:
    image, folder = noise(*shape, seed=1), str(folders["owlv2"])
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(["a photo of a cup", "a photo of a dog"], padding="max_length", max_length=40, return_tensors="pt")
    with torch.no_grad():
        outputs = Owlv2ForObjectDetection.from_pretrained(folder)(**texts, **processor(images=Image.fromarray(image), return_tensors="pt"))
    (result,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[shape])
    expected = []
    for score, label, (left, top, right, bottom) in zip(result["scores"].tolist(), result["labels"], result["boxes"].tolist(), strict=True):
        box = (max(left, 0), max(top, 0), min(right, shape[1]), min(bottom, shape[0]))
        confidence = 6 * score if score < 0.05 else 0.3 + 0.6 * (score - 0.05) / 0.85 if score < 0.9 else score
        if confidence > 0.05 and box[2] - box[0] > 1e-6 and box[3] - box[1] > 1e-6:
            expected.append((("cup", "dog")[label], confidence, box))
    got = [item for item in owlv2.detect_classes(image, ["dog", "cup"]) if min(np.subtract(item.box[2:], item.box[:2])) > 1e-6]
    assert len(expected) >= 3
    assert len(got) == len(expected)
    for item, (label, confidence, box) in zip(got, expected, strict=True):
        assert item.label == label
        assert item.confidence == pytest.approx(confidence, abs=ROUNDING)
        assert item.box == pytest.approx(box, abs=100 * ROUNDING)
        assert item.mask is None


def test_grounding_dino_scores_a_class_by_the_mean_over_its_tokens(dino: GroundingDinoDetector, folders: dict[str, Path]) -> None:
    image, folder = noise(48, 72, seed=2), str(folders["grounding_dino"])
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("computer mouse. dog.", return_tensors="pt")  # [CLS] 8 letters 5 letters . 3 letters . [SEP]
    assert tokens["input_ids"].shape[1] == 1 + 13 + 1 + 3 + 1 + 1
    with torch.no_grad():
        outputs = GroundingDinoForObjectDetection.from_pretrained(folder)(
            **tokens, **processor(images=Image.fromarray(image), return_tensors="pt")
        )
    probabilities = outputs.logits[0].sigmoid().double().numpy()
    mouse, dog = probabilities[:, 1:14].mean(axis=1), probabilities[:, 15:18].mean(axis=1)
    detections = dino.detect_classes(image, ["dog", "computer mouse"])
    assert len(detections) == 9
    assert {item.label for item in detections} <= {"computer mouse", "dog"}
    for query, item in enumerate(detections):
        score = max(mouse[query], dog[query])
        x, y, width, height = outputs.pred_boxes[0, query].tolist()
        corners = ((x - width / 2) * 72, (y - height / 2) * 48, (x + width / 2) * 72, (y + height / 2) * 48)
        assert item.label == ("computer mouse" if mouse[query] > dog[query] else "dog")
        assert item.confidence == pytest.approx(0.3 + 0.6 * (score - 0.05) / 0.85, abs=ROUNDING)
        assert item.box == pytest.approx(np.clip(corners, 0, [72, 48, 72, 48]), abs=100 * ROUNDING)


def test_the_order_and_the_repetition_of_the_classes_change_nothing(owlv2: Owlv2Detector, dino: GroundingDinoDetector) -> None:
    image = noise(48, 72, seed=3)
    for detector in (owlv2, dino):
        assert isinstance(detector, PromptedDetector)
        first = as_tuples(detector.detect_classes(image, ["dog", "cup"]))
        assert first and first == as_tuples(detector.detect_classes(image, ["cup", "dog", "cup"]))
        assert detector.detect_classes(image, []) == []
        assert {item.label for item in detector.detect_classes(image, ["héron 鹭"])} <= {"héron 鹭"}


def test_without_a_prompt_an_open_vocabulary_is_asked_for_the_eighty_classes(owlv2: Owlv2Detector) -> None:
    image = noise(32, 32, seed=4)
    assert as_tuples(owlv2.detect(image)) == as_tuples(owlv2.detect_classes(image, COCO_CLASSES))
    assert not owlv2.labels  # any class may be named


def test_a_class_name_of_ten_thousand_letters_is_cut_by_owlv2_and_refused_by_grounding_dino(
    owlv2: Owlv2Detector, dino: GroundingDinoDetector
) -> None:
    assert all(np.isfinite(item.confidence) for item in owlv2.detect_classes(noise(32, 32), ["a" * 10_000]))
    with pytest.raises(ScorerError, match="tokens, 256 at most"):
        dino.detect_classes(noise(32, 32), ["dog " * 2500])


def test_class_scores_are_means_over_the_tokens_inside_a_name() -> None:
    sentence, spans = class_sentence(("Dog", "St. Bernard"))
    assert sentence == "dog. st  bernard."
    assert [sentence[start:stop] for start, stop in spans] == ["dog", "st  bernard"]
    offsets = np.array([[0, 0], [0, 2], [2, 3], [3, 4], [5, 7], [9, 16], [16, 17], [0, 0]])
    probabilities = np.array([[9, 0.2, 0.4, 9, 0.5, 0.7, 9, 9, 9]], dtype=np.float32)
    assert label_scores(probabilities, offsets, spans) == pytest.approx(np.array([[0.3, 0.6]]))
    with pytest.raises(ValueError, match="no token"):
        label_scores(probabilities, offsets, [(100, 104)])


def test_raw_scores_meet_genevals_borders_where_they_are_told_to() -> None:
    confidences = calibrated(np.array([0, 0.1, 0.2, 0.25, 0.3, 0.65, 1], dtype=np.float64), 0.2, 0.3)
    assert confidences == pytest.approx([0, 0.15, 0.3, 0.6, 0.9, 0.95, 1], abs=1e-12)


@pytest.mark.parametrize(("found", "counted"), [(0.3, 0.3), (0, 0.5), (0.4, 0.3), (0.2, 1.0)])
def test_borders_out_of_order_are_config_errors(folders: dict[str, Path], found: float, counted: float) -> None:
    with pytest.raises(ConfigError, match="0 < found < counted < 1"):
        Owlv2Detector(str(folders["owlv2"]), found_score=found, counted_score=counted)


def test_boxes_are_cut_at_the_borders_of_the_image() -> None:
    boxes = np.array([[10, 10, 4, 6], [1, 19, 10, 10], [50, 5, 4, 4]], dtype=np.float32)
    expected = [[8, 7, 12, 13], [0, 14, 6, 20], [30, 3, 30, 7]]
    assert image_corners(boxes, (20, 30)) == pytest.approx(np.array(expected))


# --- colors ---


def test_a_color_is_named_by_the_mean_of_three_texts_on_the_masked_crop(clip: ClipColors, folders: dict[str, Path]) -> None:
    image, mask = noise(40, 50, seed=5), np.zeros((40, 50), dtype=bool)
    mask[8:30, 12:40] = True
    crop = image.copy()
    crop[~mask] = 0x99
    model, folder = CLIPModel.from_pretrained(str(folders["clip"])), str(folders["clip"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(Image.fromarray(crop[5:32, 10:45]), return_tensors="pt").pixel_values
    expected = []
    for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"):
        texts = [f"a photo of a {color} hot dog", f"a photo of a {color}-colored hot dog", f"a photo of a {color} object"]
        with torch.no_grad():
            outputs = model(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
        mean = outputs.text_embeds.double().numpy().mean(axis=0)  # the library's embeddings are normalized already
        expected.append(float(outputs.image_embeds.double().numpy()[0] @ mean / np.sqrt(mean @ mean)))
    detection = Detection(label="hot dog", box=(10.4, 4.6, 45.0, 31.9), confidence=0.9, mask=mask)
    assert clip.similarities(image, detection) == pytest.approx(expected, abs=ROUNDING)
    assert clip(image, detection) == COLORS[int(np.argmax(expected))]
    assert isinstance(clip, ColorModel)


def test_weights_are_normalized_means_of_normalized_embeddings() -> None:
    weights = color_weights(np.array([[[3, 4], [0, 2], [8, 6]]], dtype=np.float32))  # unit: (.6, .8), (0, 1), (.8, .6)
    assert weights == pytest.approx(np.array([[1.4, 2.4]]) / np.hypot(1.4, 2.4), abs=1e-6)


def test_a_crop_keeps_the_masked_pixels_and_grays_the_others() -> None:
    image, mask = noise(6, 8), np.zeros((6, 8), dtype=bool)
    mask[2, 3] = True
    crop = np.asarray(object_crop(image, Detection(label="cup", box=(2.6, 1.4, 5.4, 3.6), confidence=1, mask=mask)))
    expected = np.full((3, 2, 3), 0x99, dtype=np.uint8)  # columns 3 and 4, rows 1 to 3
    expected[1, 0] = image[2, 3]
    assert np.array_equal(crop, expected)
    bare = np.asarray(object_crop(image, Detection(label="cup", box=(-3, 4, 2, 99), confidence=1)))
    assert np.array_equal(bare, image[4:6, 0:2])
    assert object_crop(image, Detection(label="cup", box=(7.9, 5.9, 7.95, 5.95), confidence=1)).size == (1, 1)
    with pytest.raises(ScorerError, match="mask of shape"):
        object_crop(image, Detection(label="cup", box=(0, 0, 1, 1), confidence=1, mask=mask[:4]))


def test_a_color_does_not_depend_on_what_was_asked_before_and_any_class_name_is_taken(clip: ClipColors, folders: dict[str, Path]) -> None:
    image = noise(32, 32, seed=6)
    things = [Detection(label=label, box=(2, 2, 30, 30), confidence=1) for label in ("dog", "héron 鹭", "a" * 10_000, "")]
    first = [clip(image, thing) for thing in things]
    assert set(first) <= set(COLORS)
    fresh = ClipColors(str(folders["clip"]))
    assert [fresh(image, thing) for thing in things[::-1]][::-1] == first


# --- loading and failing ---


def make_detector(name: str, folder: str) -> Detector | ClipColors:
    classes = {"mask2former": Mask2FormerDetector, "owlv2": Owlv2Detector, "grounding_dino": GroundingDinoDetector, "clip": ClipColors}
    return classes[name](folder)


NAMES = ("mask2former", "owlv2", "grounding_dino", "clip")


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)]
)
def test_a_bad_image_is_an_error_and_not_an_empty_finding(
    image: NDArray[np.uint8], mask2former: Mask2FormerDetector, owlv2: Owlv2Detector, dino: GroundingDinoDetector, clip: ClipColors
) -> None:
    for detector in (mask2former, owlv2, dino):
        with pytest.raises(ScorerError, match="uint8 RGB"):
            detector.detect(image)
    with pytest.raises(ScorerError, match="uint8 RGB"):
        clip(image, Detection(label="cup", box=(0, 0, 4, 4), confidence=1))


@pytest.mark.parametrize("name", NAMES)
def test_the_version_follows_every_file_that_a_score_depends_on(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[name], copy)
    version = checkpoint_version(str(folders[name]), "")
    assert checkpoint_version(str(copy), "") == version
    config = copy / "preprocessor_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("0.25", "0.26"), encoding="utf-8")
    assert checkpoint_version(str(copy), "") != version
    assert checkpoint_version("owner/name", "") == "owner/name@main"
    assert checkpoint_version("owner/name", "abc") == "owner/name@abc"


def test_what_cannot_be_loaded_is_a_config_error_that_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in NAMES:
        with pytest.raises(ConfigError, match="nowhere"):
            make_detector(name, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"lacks \d+ of its parameters|cannot be loaded"):
        make_detector("clip", str(folders["owlv2"]))
    with pytest.raises(ConfigError, match="device 'abacus'"):
        ClipColors(str(folders["clip"]), device="abacus")
    pickled = tmp_path / "pickled"
    shutil.copytree(folders["clip"], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        ClipColors(str(pickled))
