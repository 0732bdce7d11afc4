"""Every reward by its name: what it is, and how one is made. Heavy engines are imported by the scorer that needs them."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from common.errors import ConfigError, GateError
from common.protocols import Scorer
from reward_servers.detection import Detector
from reward_servers.guarded import score_guarded
from reward_servers.scorers.base import HasKnownCase
from reward_servers.scorers.geneval import GenEval
from reward_servers.scorers.jpeg import JpegCompressibility, JpegIncompressibility
from reward_servers.scorers.ocr import OcrFlowGrpo, OcrStrict
from reward_servers.scorers.text_reader import RapidOcrReader, TextReader
from reward_servers.shapes.detector import ShapesDetector
from reward_servers.user_scorers import load_user_scorer

DETECTORS: Final[dict[str, Callable[[], Detector]]] = {"shapes": ShapesDetector}
READERS: Final[dict[str, Callable[[int], TextReader]]] = {"rapidocr": RapidOcrReader}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerRow:
    """One line of `flowfleet reward ls`."""

    name: str
    range: str  # of raw scores
    source: str
    licence: str  # of models and definition
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    make: Callable[..., Scorer]
    row: ScorerRow


def _ocr_flowgrpo(*, backend: str = "rapidocr", num_threads: int = 1) -> Scorer:
    return OcrFlowGrpo(_reader(backend, num_threads))


def _ocr_strict(*, backend: str = "rapidocr", num_threads: int = 1) -> Scorer:
    return OcrStrict(_reader(backend, num_threads))


def _geneval_dense(*, detector: str = "shapes") -> Scorer:
    return GenEval("geneval_dense", _detector(detector))


def _geneval_dense_flowgrpo(*, detector: str = "shapes") -> Scorer:
    return GenEval("geneval_dense_flowgrpo", _detector(detector))


def _geneval_strict(*, detector: str = "shapes") -> Scorer:
    return GenEval("geneval_strict", _detector(detector))


def _reader(backend: str, num_threads: int) -> TextReader:
    if not isinstance(num_threads, int) or num_threads < 1:
        raise ConfigError(f"reward option num_threads is {num_threads!r}; it must be an integer of at least 1")
    return READERS[_known("backend", backend, READERS)](num_threads)


def _detector(name: str) -> Detector:
    return DETECTORS[_known("detector", name, DETECTORS)]()


def _known(option: str, name: str, table: Mapping[str, object]) -> str:
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"reward option {option} is {name!r}; it must be one of {', '.join(sorted(table))}")
    return name


_GENEVAL_SOURCE: Final = "GenEval (arXiv:2310.11513), djghosh13/geneval"
_FLOWGRPO_GENEVAL_SOURCE: Final = "Flow-GRPO (arXiv:2505.05470), yifan123/reward-server"


def _entry(make: Callable[..., Scorer], name: str, *, score_range: str, source: str, licence: str, description: str) -> _Entry:
    return _Entry(make=make, row=ScorerRow(name=name, range=score_range, source=source, licence=licence, description=description))


_ENTRIES: Final[tuple[_Entry, ...]] = (
    _entry(
        _ocr_flowgrpo, "ocr_flowgrpo", score_range="0..1", source="Flow-GRPO (arXiv:2505.05470), flow_grpo/ocr.py",
        licence="definition MIT; rapidocr and PaddleOCR models Apache-2.0",
        description="visual text: the first quoted span, right as a substring, else 1 - edit distance / length",
    ),
    _entry(
        _ocr_strict, "ocr_strict", score_range="0..1", source="flowfleet", licence="rapidocr and PaddleOCR models Apache-2.0",
        description="visual text: every quoted span, extra and repeated text costs; exact match beside it",
    ),
    _entry(
        _geneval_dense, "geneval_dense", score_range="0..1", source=_FLOWGRPO_GENEVAL_SOURCE, licence="definition MIT",
        description="composition: mean of count, color and position terms, each clipped to 0..1, the position once",
    ),
    _entry(
        _geneval_dense_flowgrpo, "geneval_dense_flowgrpo", score_range="-inf..1", source=_FLOWGRPO_GENEVAL_SOURCE, licence="definition MIT",
        description="composition: the paper's training reward, bug-compatible (unclipped; a wrong position gives .75)",
    ),
    _entry(
        _geneval_strict, "geneval_strict", score_range="0 or 1", source=_GENEVAL_SOURCE, licence="definition MIT",
        description="composition: the official all-or-nothing rule",
    ),
    _entry(
        JpegIncompressibility, "jpeg_incompressibility", score_range="about 1..400", source="DDPO (arXiv:2305.13301)",
        licence="none needed", description="kB of the JPEG at quality 95",
    ),
    _entry(
        JpegCompressibility, "jpeg_compressibility", score_range="-1..0", source="DDPO (arXiv:2305.13301), scaled as in Flow-GRPO",
        licence="none needed", description="minus kB of the JPEG at quality 95, over 500",
    ),
)  # fmt: skip
_BY_NAME: Final = {entry.row.name: entry for entry in _ENTRIES}


def list_scorers() -> tuple[ScorerRow, ...]:
    """Return a row a built-in reward, in the order of the docs."""
    return tuple(entry.row for entry in _ENTRIES)


def make_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """Make a reward.

    Args:
        name: of list_scorers, or `module:attribute` for user code.
        options: the scorer's own keyword arguments.

    Raises:
        ConfigError: unknown name (the nearest one is named), unknown or bad option, user code that is no scorer, missing extra.
    """
    if ":" in name:
        return load_user_scorer(name, options)
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.3)
        hint = f"the nearest name is {near[0]!r}" if near else f"names are {', '.join(_BY_NAME)}"
        raise ConfigError(f"reward {name!r} is unknown; {hint}; user code is named module:attribute")
    entry = _BY_NAME[name]
    known = [key for key in inspect.signature(entry.make).parameters if key not in ("args", "kwargs")]
    for key in options:
        if key not in known:
            raise ConfigError(f"reward {name}: unknown option {key!r}; it takes {', '.join(known) or 'none'}")
    return entry.make(**options)


def check_known_score(scorer: Scorer) -> bool:
    """Let a scorer prove itself on its known case (a start gate).

    Returns:
        Whether the scorer offers a known case; user code need not.

    Raises:
        GateError: named "scorer": no score came, or another than expected.
    """
    if not isinstance(scorer, HasKnownCase):
        return False
    case = scorer.known_case()
    (score,) = score_guarded(scorer, case.image[np.newaxis], [case.prompt], micro_batch=1)
    if score.value is None:
        raise GateError("scorer", f"{scorer.name} could not score its known image: {score.error}; mend its installation")
    if not math.isclose(score.value, case.expected, rel_tol=0, abs_tol=case.tolerance):
        raise GateError(
            "scorer",
            f"{scorer.name} scored its known image {score.value:.4f}, expected {case.expected:.4f} within {case.tolerance:g}; "
            "its model or a library differs from the tested one (constraints.txt)",
        )
    return True
