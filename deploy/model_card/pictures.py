"""The pictures beside a card: the report's curves as SVG files, and one grid of the base beside the tuned model."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image

from deploy.model_card.markdown import slug
from deploy.report.curves import draw_training
from deploy.report.drawing import Panel
from deploy.report.grid import Images, contact_sheet
from deploy.report.image_curves import SensorRecord, draw_sensors
from deploy.report.records import EvaluationRecord, RunHistory
from deploy.report.samples import GridRow, MediaShelf, sample_grid

CURVES, GRID = "curves", "samples/base_beside_tuned.webp"
_PAIRS: Final = 3  # a line of the grid
_SIDE: Final = 128  # of a tile that is smaller; larger ones come as thumbnails of 192 pixels already
_QUALITY: Final = 90
_OPENED: Final = re.compile(rb"<svg\b[^>]*>")
_PAPER: Final = b'<rect width="100%" height="100%" fill="#ffffff"/>'


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveFile:
    """One figure of the card."""

    path: str  # relative to the card
    title: str
    caption: str
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The base beside the tuned model on the same prompts and seeds."""

    version: int  # of the tuned side
    rows: tuple[GridRow, ...]  # one prompt each: the base's shot, then the tuned one's
    content: bytes  # WebP


def curve_files(history: RunHistory, sensors: SensorRecord) -> list[CurveFile]:
    """Draw the report's panels of training and of the sensors, on white, since a page around them may be dark."""
    drawn = draw_sensors(sensors)
    panels = [*draw_training(history), *([] if drawn is None else [drawn])]
    return [_curve_file(number, panel) for number, panel in enumerate(panels, start=1)]


def _curve_file(number: int, panel: Panel) -> CurveFile:
    content = base64.b64decode(panel.uri.partition(",")[2])
    opened = _OPENED.search(content)
    assert opened is not None, "the report draws SVG"
    on_paper = content[: opened.end()] + _PAPER + content[opened.end() :]
    return CurveFile(path=f"{CURVES}/{number:02d}-{slug(panel.title)}.svg", title=panel.title, caption=panel.caption, content=on_paper)


def draw_samples(history: RunHistory, shelf: MediaShelf, tuned: EvaluationRecord) -> Samples | None:
    """Return at most 12 prompts, evenly over tasks and never chosen by score; None when no prompt has both images.

    Raises:
        CorruptFile: a media file breaks its form.
    """
    base = history.base
    if base is None:
        return None
    found = sample_grid(replace(history, evaluations=(base, tuned)), shelf)
    rows = tuple(row for row in found.rows if all(shot.uri for shot in row.shots)) if found else ()
    if not rows:
        return None
    reward = next(iter(tuned.rewards), "")
    captions = [
        f"{number} {side} {_score(dict(shot.scores).get(reward))}".rstrip()
        for number, row in enumerate(rows, start=1)
        for side, shot in zip(("base", "tuned"), row.shots, strict=True)
    ]
    return Samples(version=tuned.version, rows=rows, content=_grid([shot.uri for row in rows for shot in row.shots], captions))


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _grid(uris: Sequence[str], captions: Sequence[str]) -> bytes:
    tiles: list[Images] = []
    for uri in uris:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])), formats=["WEBP"]) as image:
            tiles.append(np.asarray(image.convert("RGB")))
    side = max(_SIDE, tiles[0].shape[1])
    sink = io.BytesIO()
    sheet = contact_sheet(np.stack(tiles), columns=2 * min(_PAIRS, len(uris) // 2), side=side, captions=captions)
    sheet.save(sink, "WEBP", quality=_QUALITY, method=4)
    return sink.getvalue()
