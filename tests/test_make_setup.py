"""`make setup`, as make prints it: which index torch comes from. Nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INDEX = "https://torch.example/cpu"


def commands(folder: Path, *arguments: str) -> list[str]:
    """The pip lines of `make setup` in a checkout where nothing is set up yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("TORCH_INDEX", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["make", "--dry-run", "setup", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return [line for line in done.stdout.splitlines() if "pip install" in line]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_setup_takes_torch_alone_from_another_index_and_only_when_it_is_told_to(tmp_path: Path) -> None:
    (everything,) = commands(tmp_path)
    assert "--index-url" not in everything and '-e ".[ocr,dev]"' in everything
    torch, same = commands(tmp_path, f"TORCH_INDEX={INDEX}")
    assert same == everything
    assert f'--no-deps --index-url "{INDEX}"' in torch
    picked = torch.rpartition('"$(')[2].partition(")")[0]  # the shell's word for what is installed
    chosen = subprocess.run(["sh", "-c", picked], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert len(chosen) == 1 and chosen[0].startswith("torch==")
