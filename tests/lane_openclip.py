"""open_clip's own classes behind hps_v2.1, offline. It runs in an environment of its own and is not collected by default:

    python -m venv build/openclip
    build/openclip/bin/pip install -c constraints.txt -e . pytest
    build/openclip/bin/pip install --no-deps open_clip_torch torchvision timm ftfy wcwidth
    build/openclip/bin/python -m pytest -c /dev/null --rootdir . --noconftest -p no:cacheprovider tests/lane_openclip.py

No torchvision build may match torch; then two of its operators, which nothing here calls, are declared before the import.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

try:
    import torchvision  # noqa: F401
except RuntimeError:  # "operator torchvision::nms does not exist"
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip
from clip_fixtures import TEXTS, check_bad_images, check_batches, check_clients, noise_images, prompts_of, values_of

from common.errors import ConfigError
from reward_servers.scorers.clip_models import CosineScorer, Fit, Preprocessing
from reward_servers.scorers.hps import ARCHITECTURE, NAME, OpenClipModel, make_hps_v2_1

TINY = "ViT-tiny-test"
SIDE = 32
ROUNDING = 1e-4
"""Float32 networks run twice, with sums in another order."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small model of the same classes, with the mask that early versions saved."""
    folder = tmp_path_factory.mktemp("openclip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / f"{TINY}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder / f"{TINY}.json")
    torch.manual_seed(7)
    model = open_clip.create_model(TINY, pretrained=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors | {"attn_mask": torch.zeros(77, 77)}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def scorer(weights: Path) -> CosineScorer:
    return CosineScorer(NAME, OpenClipModel(TINY, weights))


def padded_pixels(image: NDArray[np.uint8]) -> torch.Tensor:
    """HPSv2's transform in open_clip's own words: the longer edge resized, black around it."""
    transform = open_clip.image_transform(SIDE, is_train=False, resize_mode="longest", interpolation="bicubic", fill_color=0)
    pixels: torch.Tensor = transform(Image.fromarray(image))
    return pixels


@pytest.mark.parametrize("size", [(40, 56), (56, 40), (32, 32), (20, 20)])
def test_the_preprocessing_equals_open_clips(size: tuple[int, int]) -> None:
    images = noise_images(2, *size, seed=3)
    expected = np.stack([padded_pixels(image).numpy() for image in images])
    np.testing.assert_allclose(Preprocessing(side=SIDE, fit=Fit.PAD).pixels(images), expected, atol=1e-5)


def test_the_score_is_the_diagonal_of_open_clips_features(scorer: CosineScorer, weights: Path) -> None:
    from safetensors.torch import load_file

    model = open_clip.create_model(TINY, pretrained=None, output_dict=True).eval()
    model.load_state_dict({name: tensor for name, tensor in load_file(weights).items() if name != "attn_mask"})
    images = noise_images(len(TEXTS), 40, 56, seed=4)
    with torch.no_grad():
        outputs = model(torch.stack([padded_pixels(image) for image in images]), open_clip.get_tokenizer(TINY)(list(TEXTS)))
        expected = torch.diagonal(outputs["image_features"] @ outputs["text_features"].T).numpy()
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(values_of(scorer.score(images, prompts_of(TEXTS))), expected, atol=ROUNDING)


def test_the_scorer_keeps_the_contract(scorer: CosineScorer) -> None:
    check_batches(scorer, text_matters=True)
    check_bad_images(scorer)
    check_clients(scorer)


def test_the_architecture_is_one_that_open_clip_knows() -> None:
    assert open_clip.get_model_config(ARCHITECTURE)["embed_dim"] == 1024


def test_weights_that_are_none_or_of_another_model_are_config_errors(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="option weights is not set"):
        make_hps_v2_1()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        OpenClipModel(TINY, tmp_path / "none.safetensors")
    save_file({"logit_scale": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        OpenClipModel(TINY, tmp_path / "other.safetensors")
