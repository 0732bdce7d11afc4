"""The `shapes` detector: right on renders and on the shipped autoencoder's reconstructions, and not to be fooled."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from common.errors import ScorerError
from common.types import Prompt
from deploy.pretrain.layouts import draw_scene
from deploy.pretrain.scenes import Scene, Shape, render
from reward_servers.registry import make_scorer
from reward_servers.scorers.geneval_rules import kept_detections, relations_of
from reward_servers.shapes.detector import ShapesDetector, color_name
from reward_servers.shapes.vocabulary import DISTRACTOR_COLORS, IMAGE_SIZE, SHAPES, TASK_COLORS, shape_outline

Images = NDArray[np.uint8]
VAE = Path(__file__).parents[1] / "models" / "tiny-sd3" / "vae"
SCENES = 200
GRAY = (232, 230, 233)
COLORS = tuple(TASK_COLORS)


def drawn(layout: str, number: int, seed: int) -> tuple[list[Scene], Images]:
    random = np.random.default_rng(seed)
    scenes = [draw_scene(layout, random) for _ in range(number)]
    return scenes, np.stack([render(scene) for scene in scenes])


def painted(*objects: tuple[str, tuple[int, int, int], float, float, float]) -> Images:
    """Draw (shape, color, x, y, size) objects, which may overlap and leave the picture."""
    canvas = Image.new("RGB", (4 * IMAGE_SIZE, 4 * IMAGE_SIZE), GRAY)
    for name, color, x, y, size in objects:
        corners = (shape_outline(name) * size + (x, y)) * 4
        ImageDraw.Draw(canvas).polygon([(float(a), float(b)) for a, b in corners], fill=color)
    return np.asarray(canvas.reduce(4))


@pytest.fixture(scope="module")
def reconstruct() -> Any:
    """A function images -> what the shipped autoencoder makes of them."""
    assert VAE.is_dir(), f"{VAE} is missing: the shipped model is made by `flowfleet pretrain` and belongs to the repository"
    import torch
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32)

    def run(images: Images) -> Images:
        rebuilt = []
        for start in range(0, len(images), 50):
            pixels = torch.from_numpy(images[start : start + 50]).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad():
                decoded = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
            rebuilt.append(((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        return np.concatenate(rebuilt)

    return run


def box_of(shape: Shape) -> tuple[float, float, float, float]:
    outline = shape_outline(shape.name) * shape.size + (shape.x, shape.y)
    left, top = outline.min(axis=0)
    right, bottom = outline.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def true_tasks(scene: Scene) -> Iterator[dict[str, Any]]:
    """Yield metadata of every GenEval task that the scene fulfills."""
    shapes = scene.shapes
    plain = [{"class": shape.name, "count": 1} for shape in shapes]
    colored = [{**item, "color": shape.color} for item, shape in zip(plain, shapes, strict=True)]
    if scene.task == "counting":
        count = len(shapes)
        include = [{"class": shapes[0].name, "count": count}]
        yield {"tag": "counting", "include": include, "exclude": [{"class": shapes[0].name, "count": count + 1}]}
    elif scene.task == "pair":
        yield {"tag": "two_object", "include": plain}
        yield {"tag": "color_attr", "include": colored}
        for relation in sorted(relations_of(box_of(shapes[1]), box_of(shapes[0])))[:1]:
            yield {"tag": "position", "include": [plain[0], {**plain[1], "position": [relation, 0]}]}
    else:
        yield {"tag": "single_object", "include": plain}
        yield {"tag": "colors", "include": colored}


def accuracy_by_task(scenes: Sequence[Scene], images: Images) -> dict[str, float]:
    results: dict[str, list[float]] = {}
    for scene, image in zip(scenes, images, strict=True):
        for metadata in true_tasks(scene):
            results.setdefault(metadata["tag"], []).append(strict(image, metadata))
    return {task: float(np.mean(values)) for task, values in results.items()}


STRICT = make_scorer("geneval_strict", {})


def strict(image: Images, metadata: dict[str, Any]) -> float:
    (score,) = STRICT.score(image[None], [Prompt(id="0", text="t", metadata=metadata)])
    assert score.value is not None, score.error
    return score.value


@pytest.mark.parametrize("layout", ["single", "pair", "counting"])
def test_every_task_is_right_on_every_render(layout: str) -> None:
    accuracies = accuracy_by_task(*drawn(layout, 100, seed=1))
    assert set(accuracies.values()) == {1.0}, accuracies


@pytest.mark.parametrize("layout", ["single", "pair", "counting"])
def test_every_task_is_right_on_at_least_98_of_100_reconstructions(layout: str, reconstruct: Any) -> None:
    scenes, images = drawn(layout, SCENES, seed=2)
    accuracies = accuracy_by_task(scenes, reconstruct(images))
    assert min(accuracies.values()) >= 0.98, accuracies


def test_words_are_read_on_at_least_98_of_100_reconstructions(reconstruct: Any) -> None:
    scenes, images = drawn("text", 100, seed=3)
    words = [scene.lettering.word for scene in scenes if scene.lettering is not None]
    prompts = [Prompt(id=str(i), text=f'a sign that says "{word}"') for i, word in enumerate(words)]
    scores = make_scorer("ocr_strict", {}).score(reconstruct(images), prompts)
    assert np.mean([score.details["exact"] for score in scores]) >= 0.98


def test_boxes_lie_within_a_pixel_of_the_truth_on_renders() -> None:
    detector = ShapesDetector()
    for scene, image in zip(*drawn("single", 50, seed=4), strict=True):
        (found,) = detector.detect(image)
        assert found.box == pytest.approx(box_of(scene.shapes[0]), abs=1.0)  # templates stand half a pixel of size apart
        assert found.confidence > 0.99


def test_blur_and_sensor_noise_leave_the_answer_right() -> None:
    random = np.random.default_rng(5)
    right = []
    for layout in ("single", "pair", "counting"):
        scenes, images = drawn(layout, 40, seed=5)
        rough = ndimage.gaussian_filter(images.astype(float), (0, 0.7, 0.7, 0)) + random.normal(0, 6, images.shape)
        right += list(accuracy_by_task(scenes, np.clip(rough, 0, 255).astype(np.uint8)).values())
    assert min(right) >= 0.95  # of 40 scenes a task: two may fail


@pytest.mark.parametrize("shape", SHAPES)
def test_distractor_colors_are_no_task_color_though_the_shape_is_found(shape: str) -> None:
    for rgb in DISTRACTOR_COLORS.values():
        (found,) = ShapesDetector().detect(painted((shape, rgb, 31.3, 33.1, 10.5)))
        assert (found.label, found.color) == (shape, None)


def test_a_color_between_two_task_colors_is_neither() -> None:
    for first, second in (("red", "orange"), ("blue", "purple"), ("red", "purple"), ("green", "blue")):
        middle = (np.array(TASK_COLORS[first]) + np.array(TASK_COLORS[second])) / 2
        assert color_name(middle.astype(np.float32)) is None


@pytest.mark.parametrize("overlap", [1.0, 3.0, 6.0])
def test_two_merged_circles_are_not_counted_as_two(overlap: float) -> None:
    distance = 2 * 0.94 * 9 - overlap
    image = painted(("circle", TASK_COLORS["red"], 32 - distance / 2, 32, 9), ("circle", TASK_COLORS["red"], 32 + distance / 2, 32, 9))
    assert strict(image, {"tag": "counting", "include": [{"class": "circle", "count": 2}]}) == 0


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross", "heart"])
def test_a_shape_that_the_border_cuts_in_half_is_not_found(shape: str) -> None:
    image = painted((shape, TASK_COLORS["blue"], 1.0, 32, 11))
    assert not kept_detections(ShapesDetector().detect(image), "single_object")


def test_objects_of_two_colors_that_touch_are_found_and_a_two_colored_object_is_not() -> None:
    red, blue = TASK_COLORS["red"], TASK_COLORS["blue"]
    touching = ShapesDetector().detect(painted(("square", red, 20, 32, 10), ("square", blue, 36.8, 32, 10)))
    assert sorted((found.label, found.color) for found in touching if found.confidence > 0.9) == [("square", "blue"), ("square", "red")]
    halves = painted(("circle", red, 32, 32, 11)).copy()
    halves[:, 32:] = painted(("circle", blue, 32, 32, 11))[:, 32:]
    assert not kept_detections(ShapesDetector().detect(halves), "colors")


@pytest.mark.parametrize("shape", SHAPES)
def test_one_object_too_many_or_too_few_fails_the_count(shape: str) -> None:
    places = ((17, 17), (47, 17), (17, 47), (47, 47))
    image = painted(*((shape, TASK_COLORS["purple"], x, y, 8.0) for x, y in places[:3]))
    small = painted(*((shape, TASK_COLORS["purple"], x, y, 8.0) for x, y in places[:2]), (shape, TASK_COLORS["purple"], 17, 47, 6.5))
    for count, expected in ((2, 0.0), (3, 1.0), (4, 0.0)):
        metadata = {
            "tag": "counting", "include": [{"class": shape, "count": count}], "exclude": [{"class": shape, "count": count + 1}],
        }  # fmt: skip
        assert strict(image, metadata) == expected
        assert strict(small, metadata) == expected  # a smaller third object counts too


def test_turned_or_squeezed_shapes_are_not_those_that_prompts_name() -> None:
    detector = ShapesDetector()
    for name, turn in (("square", 45), ("triangle", 90), ("cross", 45), ("heart", 180), ("star", 36)):
        angle = np.deg2rad(turn)
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        canvas = Image.new("RGB", (256, 256), GRAY)
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in shape_outline(name) @ rotation * 40 + 128], fill=(34, 158, 62))
        assert not kept_detections(detector.detect(np.asarray(canvas.reduce(4))), "single_object"), name


def test_noise_flat_pictures_and_words_hold_no_object() -> None:
    detector = ShapesDetector()
    random = np.random.default_rng(6)
    num_found = 0
    for _ in range(50):
        for width in (0, 1, 2, 3):
            field = ndimage.gaussian_filter(random.normal(size=(64, 64, 3)), (width, width, 0))
            picture = np.clip(field / field.std() * 55 + random.uniform(120, 200), 0, 255).astype(np.uint8)
            num_found += bool(kept_detections(detector.detect(picture), "single_object"))
    assert num_found <= 2  # of 200
    for level in (0, 128, 255):
        assert detector.detect(np.full((64, 64, 3), level, dtype=np.uint8)) == []
    _, words = drawn("text", 50, seed=7)
    assert not any(kept_detections(detector.detect(image), "single_object") for image in words)


def test_an_image_of_another_size_is_an_error_and_becomes_a_null() -> None:
    with pytest.raises(ScorerError, match="64x64"):
        ShapesDetector().detect(np.zeros((512, 512, 3), dtype=np.uint8))
    prompt = Prompt(id="0", text="t", metadata={"tag": "single_object", "include": [{"class": "star", "count": 1}]})
    (score,) = make_scorer("geneval_dense", {}).score(np.zeros((1, 512, 512, 3), dtype=np.uint8), [prompt])
    assert score.value is None


def test_detections_do_not_depend_on_what_was_detected_before() -> None:
    _, images = drawn("counting", 10, seed=8)
    first = [ShapesDetector().detect(image) for image in images]
    detector = ShapesDetector()
    assert [detector.detect(image) for image in images[::-1]] == first[::-1]
