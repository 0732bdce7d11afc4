"""The paddleocr reader where its package is not: what is missing is said before anything is loaded. The rest is tests/lane_paddleocr.py."""

import sys
from pathlib import Path

import pytest

from common.errors import ConfigError
from reward_servers.scorers.paddle_reader import FILES, PARTS, PaddleOcrReader


def test_a_missing_package_is_a_config_error_that_names_the_extra_and_an_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in PARTS:
        (tmp_path / part).mkdir()
        for file in FILES:
            (tmp_path / part / file).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "paddleocr", None)  # as if it were not installed, wherever this runs
    with pytest.raises(ConfigError, match=r"(?s)extra `paddleocr`.*environment of its own.*flowfleet\[paddleocr\]"):
        PaddleOcrReader(1, models=str(tmp_path))


@pytest.mark.parametrize("missing", [f"{part}/{file}" for part in PARTS for file in FILES])
def test_a_model_directory_that_lacks_a_file_is_a_config_error_that_names_it(tmp_path: Path, missing: str) -> None:
    for part in PARTS:
        (tmp_path / part).mkdir()
        for file in FILES:
            if f"{part}/{file}" != missing:
                (tmp_path / part / file).write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{missing} is not in it".replace(".", r"\.")):
        PaddleOcrReader(1, models=str(tmp_path))


def test_no_model_directory_at_all_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="models is ''"):
        PaddleOcrReader()
