"""Shared fixtures: tiny random model directories, made once a session."""

from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_tiny_flux, make_tiny_sd3

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small random StableDiffusion3Pipeline directory."""
    return make_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_flux_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small random FluxPipeline directory, guidance-distilled and with dynamic shifting as FLUX.1-dev is."""
    return make_tiny_flux(tmp_path_factory.mktemp("tiny") / "flux")
