"""The OCR rewards as the registry knows them: a rule and a reader."""

from collections.abc import Callable
from functools import partial
from typing import Final

from common.errors import ConfigError
from common.protocols import Scorer
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.ocr import OcrFlowGrpo, OcrStrict
from reward_servers.scorers.paddle_reader import PaddleOcrReader
from reward_servers.scorers.text_reader import RapidOcrReader, TextReader

_RULES: Final[dict[str, Callable[[TextReader], Scorer]]] = {"ocr_flowgrpo": OcrFlowGrpo, "ocr_strict": OcrStrict}
_READERS: Final = ("rapidocr", "paddleocr")
_RAPID_MODELS: Final = "PP-OCR detection and recognition, inside rapidocr's wheel"


def make_ocr(rule: str, *, backend: str = "rapidocr", num_threads: int = 1, models: str = "") -> Scorer:
    """Make an OCR reward.

    Args:
        rule: ocr_flowgrpo or ocr_strict.
        backend: rapidocr, or paddleocr in an environment of its own.
        num_threads: of the engine.
        models: paddleocr's model directory.

    Raises:
        ConfigError: an unknown backend, a bad number of threads, an engine that is not installed, models that are not there.
    """
    return _RULES[rule](_reader(backend, num_threads, models))


def _reader(backend: str, num_threads: int, models: str) -> TextReader:
    if not isinstance(num_threads, int) or num_threads < 1:
        raise ConfigError(f"reward option num_threads is {num_threads!r}; it must be an integer of at least 1")
    if backend not in _READERS:
        raise ConfigError(f"reward option backend is {backend!r}; it must be one of {', '.join(_READERS)}")
    if backend == "paddleocr":
        return PaddleOcrReader(num_threads, models=models)
    if models:
        raise ConfigError("reward option models is nothing that the backend rapidocr takes, whose models lie in its wheel; leave it out")
    return RapidOcrReader(num_threads)


def _entry(name: str, *, source: str, licence: str, description: str) -> RewardEntry:
    card = RewardCard(
        name=name, description=description, range="0..1", source=source, licence=licence, model=_RAPID_MODELS, revision="of the wheel",
        preprocessing="shorter side enlarged to 192, BGR, no angle classifier", memory="273 MiB, AMD EPYC", speed="26 images/s of 64x64 a core, AMD EPYC",
        verified="rapidocr with its real models; paddleocr's class on local models by `make lane-paddleocr`", extra="ocr", needs="nothing",
    )  # fmt: skip
    return RewardEntry(card=card, make=partial(make_ocr, name))


ENTRIES: Final = (
    _entry(
        "ocr_flowgrpo", source="Flow-GRPO (arXiv:2505.05470), flow_grpo/ocr.py",
        licence="definition MIT; rapidocr and PaddleOCR models Apache-2.0",
        description="visual text: the first quoted span, right as a substring, else 1 - edit distance / length",
    ),
    _entry(
        "ocr_strict", source="flowfleet", licence="rapidocr and PaddleOCR models Apache-2.0",
        description="visual text: every quoted span, extra and repeated text costs; exact match beside it",
    ),
)  # fmt: skip
