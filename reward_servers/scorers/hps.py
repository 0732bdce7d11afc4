"""HPS v2.1: CLIP ViT-H/14 tuned on human preferences, run by open_clip as its authors do.

The published checkpoint HPS_v2.1_compressed.pt is a PyTorch pickle, which is never read here. Its "state_dict" is turned into safetensors
once, outside (torch.load with weights_only=True, then safetensors.torch.save_file); the names stay open_clip's.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from common.errors import ConfigError
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.base import Image
from reward_servers.scorers.clip_models import CosineScorer, Fit, FloatArray, Preprocessing, TextCache, unit_features

NAME: Final = "hps_v2.1"
ARCHITECTURE: Final = "ViT-H-14"
CHECKPOINT: Final = "HPS_v2.1_compressed.pt"
_BUFFER: Final = "attn_mask"
"""The causal mask, which early versions of open_clip saved among the weights."""


class OpenClipModel:
    """An open_clip model as an ImageTextEncoder, float32. Its images are padded to a square, as HPSv2 prepares them."""

    def __init__(self, architecture: str, weights: Path, *, device: str = "cpu") -> None:
        """Build a model and load its weights.

        Args:
            architecture: of open_clip's model configs.
            weights: local safetensors file under open_clip's names.
            device: as torch names it.

        Raises:
            ConfigError: open_clip is missing, or the file does not hold this model's weights.
        """
        open_clip = _open_clip()
        from safetensors import SafetensorError  # noqa: PLC0415
        from safetensors.torch import load_file  # noqa: PLC0415

        try:
            tensors = {name: tensor for name, tensor in load_file(weights).items() if name != _BUFFER}
            model = open_clip.create_model(architecture, pretrained=None, precision="fp32")
            model.load_state_dict(tensors)
            self._model = model.to(device).eval()
        except (OSError, SafetensorError, RuntimeError, AssertionError, ValueError, KeyError) as error:
            raise ConfigError(
                f"reward {NAME}: {str(weights)!r} cannot be loaded as open_clip's {architecture} on {device} ({str(error)[:300]}); name the "
                f"safetensors file that was made of {CHECKPOINT}'s state_dict"
            ) from error
        self._device = device
        self._tokenizer = open_clip.get_tokenizer(architecture)
        self._preprocessing = Preprocessing(side=_square_side(self._model.visual.image_size), fit=Fit.PAD)
        self._cache = TextCache(self._encoded_texts)
        with weights.open("rb") as stream:
            self.version = f"{architecture}-{hashlib.file_digest(stream, 'sha256').hexdigest()[:12]}"

    def image_features(self, images: Image) -> FloatArray:
        """Encode images [B, H, W, 3] uint8 RGB as unit vectors [B, D]."""
        import torch  # noqa: PLC0415

        with torch.inference_mode():
            return unit_features(self._model.encode_image(torch.from_numpy(self._preprocessing.pixels(images)).to(self._device)))

    def text_features(self, texts: Sequence[str]) -> FloatArray:
        """Encode texts, cut at 77 tokens, as unit vectors [B, D]. Raises ScorerError."""
        return self._cache.features(texts)

    def _encoded_texts(self, texts: list[str]) -> FloatArray:
        import torch  # noqa: PLC0415

        with torch.inference_mode():
            return unit_features(self._model.encode_text(self._tokenizer(texts).to(self._device)))


def _open_clip() -> Any:
    try:
        import open_clip  # noqa: PLC0415  (an extra)
    except (ImportError, RuntimeError) as error:  # a torchvision that does not match torch ends in a RuntimeError
        raise ConfigError(
            f"reward {NAME}: open_clip cannot be imported ({error}); it needs the extra `openclip`: pip install 'flowfleet[openclip]', in an "
            "environment of its own where no torchvision matches torch, and name its python as the reward's environment"
        ) from error
    return open_clip


def _square_side(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else int(size[0])


def make_hps_v2_1(*, weights: str = "", device: str = "cpu") -> CosineScorer:
    """Make the reward: the cosine (Wu et al. 2023, hpsv2/img_score.py).

    Deviation: float32 throughout, where the reference scores under CUDA's autocast.

    Args:
        weights: local safetensors file; there is no default, for the published checkpoint is a pickle.
        device: as torch names it.

    Raises:
        ConfigError: open_clip is missing, or the weights cannot be loaded.
    """
    _open_clip()
    if not weights:
        raise ConfigError(
            f"reward {NAME}: option weights is not set; name a local safetensors file made of the state_dict in {CHECKPOINT} (xswu/HPSv2)"
        )
    return CosineScorer(NAME, OpenClipModel(ARCHITECTURE, Path(weights), device=device))


CARD: Final = RewardCard(
    name=NAME,
    description="what people prefer for a prompt: the plain cosine of HPS v2.1; option weights names its safetensors file",
    range="-1..1, mostly .20-.37",
    source="HPSv2 (arXiv:2306.09341), tgxs002/HPSv2",
    licence="code and weights Apache-2.0; open_clip MIT",
    model=f"xswu/HPSv2 {CHECKPOINT} on open_clip {ARCHITECTURE}",
    revision="the file's digest is in the version",
    preprocessing="bicubic resize of the longer edge to 224, black padding to a square, CLIP's mean and std; prompts cut at 77 tokens",
    memory="3.9 GB of float32 weights",
    verified="not verified with real weights",
    extra="openclip",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_hps_v2_1)
