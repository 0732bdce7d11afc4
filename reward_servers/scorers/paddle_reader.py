"""Text reading by PaddleOCR's own class, run by onnxruntime on local model directories: the paper's engine, without paddlepaddle.

The package pins other versions of NumPy, PyYAML and OpenCV than the rest of the project, so it lives in an environment of its own,
where this file needs nothing but NumPy and the package.
"""

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, ScorerError
from reward_servers.scorers.text_reader import DETECTION_SIDE

PARTS: Final = ("det", "rec")
"""Folders of a model directory: text detection and text recognition."""
FILES: Final = ("inference.yml", "inference.onnx")
"""What each of them holds, under PaddleX's names."""
_INSTALL: Final = (
    "make an environment of its own for it (it pins other versions of NumPy and OpenCV): "
    "python -m venv paddle && paddle/bin/pip install 'flowfleet[paddleocr]', and name its python as the reward's environment"
)


class PaddleOcrReader:
    """PaddleOCR's pipeline of detection and recognition (Cui et al. 2025); no angle classifier and no unwarping, as Flow-GRPO has it.

    Deviation: the engine is onnxruntime in place of PaddlePaddle, and the shorter side is enlarged to DETECTION_SIDE pixels.
    """

    name = "paddleocr"

    def __init__(self, num_threads: int = 1, *, models: str = "") -> None:
        """Load the pipeline once a process and model directory.

        Args:
            num_threads: of onnxruntime and OpenCV.
            models: a directory with PaddleX models in det/ and rec/, each an inference.yml beside an inference.onnx.

        Raises:
            ConfigError: the package is missing here, or the directory holds no such models.
        """
        self._pipeline, self._failures, self.version = _pipeline(num_threads, checked_models(models))

    def read(self, image: NDArray[np.uint8]) -> list[str]:
        """Return the lines of an image [H, W, 3] uint8 RGB in the engine's order, without empty ones. Raises ScorerError."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ScorerError(f"reader paddleocr: an image of shape {image.shape} and {image.dtype} came; it reads [H, W, 3] uint8 RGB")
        try:
            results = self._pipeline.predict(np.ascontiguousarray(image[:, :, ::-1]))  # the engine expects BGR
            return [str(line) for result in results for line in result["rec_texts"] if line]
        except self._failures as error:
            raise ScorerError(f"reader paddleocr could not read an image of shape {image.shape}: {error}") from error


def checked_models(models: str) -> Path:
    """Return the model directory after a look at what it holds.

    Raises:
        ConfigError: it names the file that is missing.
    """
    for part in PARTS:
        for file in FILES:
            if not models or not (Path(models) / part / file).is_file():
                raise ConfigError(
                    f"reader paddleocr: models is {models!r}, and {part}/{file} is not in it; name a local directory that holds PaddleX "
                    "models with ONNX weights, det/inference.yml, det/inference.onnx, rec/inference.yml and rec/inference.onnx"
                )
    return Path(models)


@cache
def _pipeline(num_threads: int, models: Path) -> tuple[Any, tuple[type[Exception], ...], str]:
    """Return the process's pipeline on a model directory, the errors that it raises, and its version."""
    try:
        import cv2  # noqa: PLC0415  (heavy, needed by this reader only)
        import yaml  # noqa: PLC0415
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException  # noqa: PLC0415
        from paddleocr import PaddleOCR  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"reader paddleocr: {error}; it needs the extra `paddleocr`: {_INSTALL}") from error
    cv2.setNumThreads(num_threads)
    try:
        names = [yaml.safe_load((models / part / "inference.yml").read_text(encoding="utf-8"))["Global"]["model_name"] for part in PARTS]
        pipeline = PaddleOCR(
            text_detection_model_name=names[0], text_detection_model_dir=str(models / "det"),
            text_recognition_model_name=names[1], text_recognition_model_dir=str(models / "rec"),
            use_doc_orientation_classify=False, use_doc_unwarping=False, use_textline_orientation=False,
            text_det_limit_side_len=DETECTION_SIDE, text_det_limit_type="min", device="cpu", engine="onnxruntime",
            engine_config={"intra_op_num_threads": num_threads, "inter_op_num_threads": num_threads},
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, AssertionError, yaml.YAMLError) as error:
        raise ConfigError(f"reader paddleocr: the models of {models} cannot be loaded ({error}); they must be PaddleX models") from error
    failures = (Fail, InvalidArgument, RuntimeException, cv2.error, ValueError, RuntimeError, TypeError, IndexError, ZeroDivisionError)
    return pipeline, failures, _version(models)


def _version(models: Path) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        for file in FILES:
            digest.update((models / part / file).read_bytes())
    return f"paddleocr-{metadata.version('paddleocr')}-side{DETECTION_SIDE}-{digest.hexdigest()[:12]}"
