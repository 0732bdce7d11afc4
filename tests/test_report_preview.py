"""preview.html and contact sheets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.report.grid import contact_sheet, write_contact_sheet
from deploy.report.preview import describe, measure_spread, write_preview


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 16, 16, 3), dtype=np.uint8)


def test_the_spread_of_a_reward_is_the_hand_computed_one() -> None:
    """Groups (0, 1), (1, 1), (nan, .5): means .5, 1, .5; std in a group (.5 + 0 + 0) / 3; the second is flat, the third has one score."""
    spread = measure_spread("r", np.array([[0.0, 1.0], [1.0, 1.0], [np.nan, 0.5]]))
    assert spread.mean == pytest.approx(3.5 / 5)
    assert spread.std_in_group == pytest.approx(0.5 / 3)
    assert spread.std_between_groups == pytest.approx(np.sqrt(2) / 6)  # of .5, 1, .5
    assert spread.flat_share == pytest.approx(2 / 3)
    assert spread.coverage == pytest.approx(5 / 6)
    assert spread.signal == "weak"


def test_a_reward_that_scored_nothing_has_no_mean_and_says_so() -> None:
    spread = measure_spread("r", np.full((2, 3), np.nan))
    assert (spread.mean, spread.std_in_group, spread.coverage, spread.signal) == (None, None, 0.0, "none")
    assert "nothing was scored" in describe(spread)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([[0.0, 1.0], [0.2, 0.4]], "there is a signal"),
        ([[0.0, 0.0], [0.0, 0.0]], "take easier prompts"),
        ([[1.0, 1.0], [1.0, 1.0]], "take harder prompts"),
    ],
)
def test_the_sentence_names_the_remedy(scores: list[list[float]], sentence: str) -> None:
    assert sentence in describe(measure_spread("r", np.array(scores)))


def test_the_preview_is_self_contained_and_escapes_prompts(tmp_path: Path) -> None:
    scores = {"good": np.array([[0.0, 1.0], [1.0, 0.0]]), "dead": np.array([[np.nan, np.nan], [0.0, 0.0]])}
    path = write_preview(tmp_path / "preview.html", images(2, 1), images(2, 2), ["<script>alert(1)</script>", "a"], scores)
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "http://" not in html
    assert "https://" not in html
    assert "good: there is a signal" in html
    assert "dead: there is no signal" in html


def test_scores_of_another_shape_than_the_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'r' has scores \(2, 3\)"):
        write_preview(tmp_path / "preview.html", images(2, 1), images(2, 2), ["a", "b"], {"r": np.zeros((2, 3))})


def test_a_contact_sheet_places_images_row_by_row_with_square_pixels(tmp_path: Path) -> None:
    pixels = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    pixels[1, 0, 0] = (255, 0, 0)
    sheet = np.asarray(Image.open(write_contact_sheet(tmp_path / "sheet.png", pixels, columns=2, side=4, gap=1)))
    assert sheet.shape == (4 + 1 + 4, 4 + 1 + 4, 3)
    assert (sheet[0:2, 5:7] == (255, 0, 0)).all()  # the second image's first pixel, twice as large
    assert (sheet[:, 4] == 255).all()  # the gap
    assert (sheet[5:, 5:] == 255).all()  # no fourth image


def test_a_contact_sheet_refuses_what_is_no_batch_of_images() -> None:
    with pytest.raises(ValueError, match="at least 1 column"):
        contact_sheet(np.zeros((2, 4, 4, 3), dtype=np.uint8), columns=0)
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        contact_sheet(np.zeros((2, 4, 4, 3), dtype=np.uint8), columns=1, captions=["a"])
