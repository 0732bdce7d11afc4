"""`flowfleet reward test`: a reward on a folder of images, as a table."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from common.errors import DataError
from common.types import Prompt
from reward_servers.guarded import score_guarded
from reward_servers.registry import make_scorer

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRow:
    """One image and its score."""

    image: str  # file name
    prompt_id: str
    text: str
    value: float | None
    error: str
    details: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTable:
    """What a test found."""

    rows: tuple[RewardRow, ...]
    images_per_s: float
    num_nulls: int
    has_non_finite: bool  # some raw value was NaN or infinite

    @property
    def mean(self) -> float | None:
        """The mean over scored images, None without any."""
        values = [row.value for row in self.rows if row.value is not None]
        return sum(values) / len(values) if values else None


def test_scorer(name: str, options: Mapping[str, Any], images_dir: Path, prompts: Sequence[Prompt]) -> RewardTable:
    """Score a folder of images.

    Args:
        name: of the reward.
        options: its options.
        images_dir: PNG, JPEG or WebP files, named by prompt id (`<id>.png`, or `<id>_<anything>.png` for several a prompt), or
            as many as there are prompts and in their order when sorted by name, numbers by value.
        prompts: what the images should show.

    Raises:
        ConfigError: the reward or an option is wrong.
        DataError: no image, images that match no prompt, a prompt that the reward cannot judge, or a file that is no image.
    """
    scorer = make_scorer(name, options)
    rows: list[RewardRow] = []
    seconds = 0.0
    for file, prompt in match_images(images_dir, prompts):
        scorer.check_prompt(prompt)
        image = _read_image(file)
        started = time.perf_counter()
        (score,) = score_guarded(scorer, image[np.newaxis], [prompt], micro_batch=1)
        seconds += time.perf_counter() - started
        rows.append(
            RewardRow(image=file.name, prompt_id=prompt.id, text=prompt.text, value=score.value, error=score.error, details=score.details)
        )
    return RewardTable(
        rows=tuple(rows),
        images_per_s=len(rows) / max(seconds, 1e-9),
        num_nulls=sum(row.value is None for row in rows),
        has_non_finite=any(row.error.startswith("not finite") for row in rows),
    )


def match_images(images_dir: Path, prompts: Sequence[Prompt]) -> list[tuple[Path, Prompt]]:
    """Pair every image of a folder with its prompt, by id or by order. Raises DataError when neither works."""
    if not images_dir.is_dir():
        raise DataError(f"reward test: {images_dir} is no folder; name one that holds images ({', '.join(SUFFIXES)})")
    files = sorted((file for file in images_dir.iterdir() if file.suffix.lower() in SUFFIXES), key=lambda file: _natural(file.stem))
    if not files:
        raise DataError(f"reward test: {images_dir} holds no image; it looks for {', '.join(SUFFIXES)}")
    by_id = {prompt.id: prompt for prompt in prompts}
    named = [(file, _prompt_of(file.stem, by_id)) for file in files]
    unknown = [file.name for file, prompt in named if prompt is None]
    if not unknown:
        return [(file, prompt) for file, prompt in named if prompt is not None]
    if len(files) == len(prompts):
        return list(zip(files, prompts, strict=True))
    raise DataError(
        f"reward test: {len(files)} images for {len(prompts)} prompts, and {unknown[0]!r} begins with no prompt's id; "
        "name images <prompt id>.png, or give as many images as prompts, in order"
    )


def _prompt_of(stem: str, by_id: Mapping[str, Prompt]) -> Prompt | None:
    if stem in by_id:
        return by_id[stem]
    pieces = stem.split("_")
    heads = ("_".join(pieces[:length]) for length in range(len(pieces) - 1, 0, -1))
    return next((by_id[head] for head in heads if head in by_id), None)


def _natural(stem: str) -> list[tuple[int, int, str]]:
    """Order names with the numbers in them by value: 9 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", stem) if part]


def _read_image(file: Path) -> NDArray[np.uint8]:
    try:
        with PillowImage.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"reward test: {file} is no readable image ({error}); remove or replace it") from error
