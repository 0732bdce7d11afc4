"""Optical character recognition behind one interface; engines are heavy, so one is made a process."""

from functools import cache
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, ScorerError

DETECTION_SIDE: Final = 192
"""The shorter side is enlarged to this many pixels at least before text is looked for (measured: ten times faster than 736, as right)."""


class TextReader(Protocol):
    """Reads the text lines of an image."""

    name: str
    version: str  # engine and models

    def read(self, image: NDArray[np.uint8]) -> list[str]:
        """Return the lines of an image [H, W, 3] uint8 RGB in the engine's order; [] without text. Raises ScorerError."""
        ...


class RapidOcrReader:
    """PaddleOCR's detection and recognition models, run by onnxruntime from rapidocr's wheel: offline, no angle classifier."""

    name = "rapidocr"

    def __init__(self, num_threads: int = 1) -> None:
        """Load the engine once a process (about a second). Raises ConfigError when the extra `ocr` is not installed."""
        self._engine, self._failures, self.version = _engine(num_threads)

    def read(self, image: NDArray[np.uint8]) -> list[str]:
        """Return the lines of an image [H, W, 3] uint8 RGB in the engine's order."""
        try:
            result = self._engine(np.ascontiguousarray(image[:, :, ::-1]))  # the engine expects BGR
        except self._failures as error:
            raise ScorerError(f"rapidocr could not read an image of shape {image.shape}: {error}") from error
        return [str(line) for line in result.txts or ()]


@cache
def _engine(num_threads: int) -> tuple[Any, tuple[type[Exception], ...], str]:
    """Return the process's engine, the errors that it raises, and its version."""
    try:
        import cv2  # noqa: PLC0415  (heavy, needed by this scorer only)
        import rapidocr  # noqa: PLC0415
        from rapidocr.inference_engine.onnxruntime.main import ONNXRuntimeError  # noqa: PLC0415
        from rapidocr.main import RapidOCRError  # noqa: PLC0415
        from rapidocr.utils.process_img import ResizeImgError  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"reader rapidocr: {error}; install the extra: pip install 'flowfleet[ocr]'") from error
    cv2.setNumThreads(num_threads)
    engine = rapidocr.RapidOCR(
        params={
            "Det.limit_side_len": DETECTION_SIDE,
            "Det.limit_type": "min",
            "Global.use_cls": False,
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": num_threads,
        }
    )
    return engine, (ONNXRuntimeError, RapidOCRError, ResizeImgError, cv2.error, ValueError, RuntimeError), _distribution_version()


def _distribution_version() -> str:
    from importlib.metadata import version  # noqa: PLC0415

    return f"rapidocr-{version('rapidocr')}-side{DETECTION_SIDE}"
