"""PaddleOCR's own class behind the text reader, offline. It runs in an environment of its own and is not collected by default:

    python -m venv build/paddleocr
    build/paddleocr/bin/pip install "paddleocr>=3.7" onnxruntime pytest rapidfuzz
    build/paddleocr/bin/pip install --no-deps rapidocr
    build/paddleocr/bin/python -m pytest -c /dev/null --rootdir . --noconftest -p no:cacheprovider tests/lane_paddleocr.py

rapidocr is there for its model files alone: PaddleX model directories are made of its ONNX files, so nothing is downloaded.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.errors import ConfigError, ScorerError
from common.types import Prompt
from reward_servers.scorers.ocr import OcrFlowGrpo, OcrStrict
from reward_servers.scorers.paddle_reader import PaddleOcrReader

WORDS = ("BREAD", "Stop", "exit", "CAFE", "Hello World")


def rapidocr_models() -> Path:
    """Return the folder of ONNX files inside rapidocr's wheel; the package itself is not imported."""
    spec = importlib.util.find_spec("rapidocr")
    assert spec is not None and spec.origin is not None, "install rapidocr for its model files: pip install --no-deps rapidocr"
    return Path(spec.origin).parent / "models"


def write_models(folder: Path) -> Path:
    """Write det/ and rec/ as PaddleX wants them. YAML is a superset of JSON, so inference.yml is written as JSON."""
    source = rapidocr_models()
    (detection,), (recognition,) = sorted(source.glob("*_det_small.onnx")), sorted(source.glob("*_rec_small.onnx"))
    session = onnxruntime.InferenceSession(str(recognition), providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].split("\n")
    assert session.get_outputs()[0].shape[-1] == len(characters) + 2  # a blank before them and a space after them
    normalize = {"NormalizeImage": {"mean": [0.5] * 3, "std": [0.5] * 3, "scale": 1 / 255, "order": "hwc"}}
    detection_config = {
        "Global": {"model_name": "PP-OCRv6_small_det"},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}, {"DetResizeForTest": {"limit_side_len": 736, "limit_type": "min"}},
                normalize, {"ToCHWImage": None}, {"KeepKeys": {"keep_keys": ["image", "shape"]}},
            ]
        },
        "PostProcess": {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.5, "max_candidates": 1000, "unclip_ratio": 1.6},
    }  # fmt: skip
    recognition_config = {
        "Global": {"model_name": "PP-OCRv6_small_rec"},
        "PreProcess": {
            "transform_ops": [{"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}, {"RecResizeImg": {"image_shape": [3, 48, 320]}}]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": characters},
    }
    for part, weights, config in (("det", detection, detection_config), ("rec", recognition, recognition_config)):
        (folder / part).mkdir(parents=True)
        shutil.copy(weights, folder / part / "inference.onnx")
        (folder / part / "inference.yml").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("paddle") / "models")


@pytest.fixture(scope="module")
def reader(models: Path) -> PaddleOcrReader:
    return PaddleOcrReader(1, models=str(models))


def word_image(word: str, size: tuple[int, int] = (256, 128)) -> NDArray[np.uint8]:
    canvas = Image.new("RGB", size, (235, 235, 230))
    middle = (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(canvas).text(middle, word, font=ImageFont.load_default(size=36), fill=(20, 20, 90), anchor="mm")
    return np.asarray(canvas)


def test_the_real_class_reads_rendered_words(reader: PaddleOcrReader) -> None:
    assert ["".join(reader.read(word_image(word))) for word in WORDS] == list(WORDS)


def test_an_empty_image_has_no_line(reader: PaddleOcrReader) -> None:
    assert reader.read(np.full((128, 128, 3), 230, dtype=np.uint8)) == []


def test_two_lines_come_one_after_the_other(reader: PaddleOcrReader) -> None:
    image = np.concatenate([word_image("FIRST"), word_image("SECOND")])
    assert reader.read(image) == ["FIRST", "SECOND"]


def test_both_rewards_score_with_it_whatever_the_batch_and_prove_themselves_on_the_known_image(reader: PaddleOcrReader) -> None:
    images = np.stack([*map(word_image, WORDS), np.full((128, 256, 3), 230, dtype=np.uint8)])
    prompts = [Prompt(id=str(i), text=f'a sign that says "{word}"') for i, word in enumerate((*WORDS, "void"))]
    for scorer in (OcrFlowGrpo(reader), OcrStrict(reader)):
        together = [score.value for score in scorer.score(images, prompts)]
        assert together == [1.0] * len(WORDS) + [0.0]
        assert [scorer.score(images[i : i + 1], prompts[i : i + 1])[0].value for i in range(len(prompts))] == together
        assert [score.value for score in scorer.score(images[::-1], prompts[::-1])] == together[::-1]
        case = scorer.known_case()
        assert scorer.score(case.image[np.newaxis], [case.prompt])[0].value == case.expected
        assert "paddleocr-3" in scorer.version


def test_half_a_word_is_scored_by_its_letters(reader: PaddleOcrReader) -> None:
    (score,) = OcrStrict(reader).score(word_image("BREAD")[np.newaxis], [Prompt(id="0", text='a sign that says "BREADBREAD"')])
    assert score.value == pytest.approx(0.5)  # five of ten letters are missing


def test_a_bad_image_is_an_error_and_not_an_empty_text(reader: PaddleOcrReader) -> None:
    for bad in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(ScorerError, match="uint8 RGB"):
            reader.read(bad)  # type: ignore[arg-type]


def test_a_pipeline_is_made_once_a_process_and_its_version_follows_the_models(
    models: Path, tmp_path: Path, reader: PaddleOcrReader
) -> None:
    assert PaddleOcrReader(1, models=str(models))._pipeline is reader._pipeline
    other = tmp_path / "models"
    shutil.copytree(models, other)
    config = other / "det" / "inference.yml"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert PaddleOcrReader(1, models=str(other)).version != reader.version


def test_models_that_are_no_models_are_config_errors(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"det/inference\.yml is not in it"):
        PaddleOcrReader(1, models=str(tmp_path))
    other = tmp_path / "models"
    shutil.copytree(models, other)
    (other / "rec" / "inference.yml").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        PaddleOcrReader(1, models=str(other))
