"""The LAION aesthetic predictor: five affine layers on CLIP's image embedding. The prompt is not looked at.

The published head is a PyTorch pickle, which is never read here. It is turned into safetensors once, outside (torch.load with
weights_only=True, then safetensors.torch.save_file); its names stay: layers.{0,2,4,6,7}.{weight,bias}.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from common.errors import ConfigError
from common.types import Prompt, Score
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.base import Image, PlainScorer
from reward_servers.scorers.clip_models import ClipModel, FloatArray, ImageTextEncoder, score_together

NAME: Final = "aesthetic"
MODEL: Final = "openai/clip-vit-large-patch14"
HEAD: Final = "sac+logos+ava1-l14-linearMSE"
LAYERS: Final = (0, 2, 4, 6, 7)
"""The affine layers' places in the published nn.Sequential; the others are dropout."""


class LinearHead:
    """Affine layers with nothing between them, in float32: what the published MLPs are once dropout is off."""

    def __init__(self, tensors: Mapping[str, FloatArray]) -> None:
        """Take the tensors of head_tensors."""
        self._layers = tuple((tensors[f"layers.{index}.weight"], tensors[f"layers.{index}.bias"]) for index in LAYERS)
        self.width = self._layers[0][0].shape[1]

    def __call__(self, features: FloatArray) -> FloatArray:
        """Map features [B, width] to scores [B]."""
        for weight, bias in self._layers:
            features = features @ weight.T + bias
        return features[:, 0]


def head_tensors(published: Mapping[str, FloatArray], prefix: str = "") -> dict[str, FloatArray]:
    """Convert a published checkpoint's head: the ten tensors under our names, float32.

    Args:
        published: tensors by published name.
        prefix: what stands before "layers." there ("mlp." in ImageReward).

    Raises:
        ConfigError: a tensor is missing, or a layer does not fit the next.
    """
    names = [f"layers.{index}.{part}" for index in LAYERS for part in ("weight", "bias")]
    absent = [name for name in names if prefix + name not in published]
    if absent:
        raise ConfigError(f"linear head: {prefix}{absent[0]} is missing among {len(published)} tensors; it needs {', '.join(names)}")
    tensors = {name: np.ascontiguousarray(published[prefix + name], dtype=np.float32) for name in names}
    weights, biases = ([tensors[f"layers.{index}.{part}"] for index in LAYERS] for part in ("weight", "bias"))
    fits = all(weight.ndim == 2 and bias.shape == weight.shape[:1] for weight, bias in zip(weights, biases, strict=True))
    if not fits or any(last.shape[0] != after.shape[1] for last, after in pairwise(weights)) or weights[-1].shape[0] != 1:
        shapes = ", ".join(str(weight.shape) for weight in weights)
        raise ConfigError(f"linear head: its weights have the shapes {shapes}; each must take what the one before gives, the last gives 1")
    return tensors


def read_tensors(file: Path, component: str) -> dict[str, FloatArray]:
    """Read a safetensors file. Raises ConfigError naming the component."""
    try:
        return load_file(file)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{component}: {str(file)!r} cannot be read ({error}); name a local safetensors file of float32 tensors"
        ) from error


def write_head(published: Mapping[str, FloatArray], file: Path, prefix: str = "") -> None:
    """Write a head's ten tensors as safetensors. Raises ConfigError as head_tensors does."""
    save_file(head_tensors(published, prefix), file)


class Aesthetic(PlainScorer):
    """The head on the unit image embedding (Schuhmann 2022, improved-aesthetic-predictor).

    Args:
        encoder: CLIP ViT-L/14.
        head: as wide as the encoder's embedding.
        head_version: digest of its file.
    """

    name = NAME

    def __init__(self, encoder: ImageTextEncoder, head: LinearHead, head_version: str) -> None:
        self._encoder, self._head = encoder, head
        self.version = f"1-{encoder.version}-{head_version}"

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]. Raises ScorerError when it cannot be scored."""
        return score_together(self.name, images, prompts, lambda batch, _texts: self._head(self._encoder.image_features(batch)))


def make_aesthetic(*, head: str = "", model: str = MODEL, revision: str = "", device: str = "cpu") -> Aesthetic:
    """Make the reward.

    Args:
        head: local safetensors file of the head; there is no default, for the published one is a pickle.
        model: a CLIPModel of ViT-L/14, by id or local directory.
        revision: of that id.
        device: as torch names it.

    Raises:
        ConfigError: the head or the checkpoint cannot be loaded, or they do not fit each other.
    """
    if not head:
        raise ConfigError(
            f"reward {NAME}: option head is not set; name a local safetensors file made of {HEAD}.pth (christophschuhmann/"
            "improved-aesthetic-predictor), whose names it keeps: layers.{0,2,4,6,7}.{weight,bias}"
        )
    file = Path(head)
    layers = LinearHead(head_tensors(read_tensors(file, f"reward {NAME}")))
    encoder = ClipModel(model, revision=revision, device=device)
    if layers.width != encoder.width:
        raise ConfigError(
            f"reward {NAME}: the head reads {layers.width} numbers and {model} gives {encoder.width}; it is the head of ViT-L/14"
        )
    return Aesthetic(encoder, layers, hashlib.sha256(file.read_bytes()).hexdigest()[:12])


CARD: Final = RewardCard(
    name=NAME,
    description="beauty of the image by LAION's predictor, whatever the prompt; option head names its safetensors file",
    range="mostly 1-10",
    source="christophschuhmann/improved-aesthetic-predictor; as a reward DDPO (arXiv:2305.13301)",
    licence="head Apache-2.0; weights of openai/CLIP MIT",
    model=f"{MODEL}; head {HEAD}",
    revision="main, or option revision; the head's digest is in the version",
    preprocessing="bicubic resize of the shorter edge to 224, center crop, CLIP's mean and std; unit embedding",
    memory="1.7 GB of float32 weights",
    verified="not verified with real weights",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_aesthetic)
