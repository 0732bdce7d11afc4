"""ImageReward: BLIP reads the prompt while it looks at the image, and a small head says how well people would like the pair.

The published checkpoint ImageReward.pt is a PyTorch pickle, which is never read here. It is turned into safetensors once, outside
(torch.load with weights_only=True, then safetensors.torch.save_file), and convert_image_reward makes a directory of it:

    vision/  config.json, model.safetensors     blip.visual_encoder.*, renamed: _VISION_NAMES, and blocks.N.* by _BLOCK_NAMES
    text/    config.json, model.safetensors     blip.text_encoder.*, the names after the prefix are transformers'
    head.safetensors                            mlp.layers.{0,2,4,6,7}.{weight,bias}, without "mlp."

blip.vision_proj.* and blip.text_proj.* are of no use to the score and left out.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from common.errors import ConfigError
from common.types import Prompt, Score
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.detectors.checkpoints import checkpoint_version, load_model, load_tokenizer
from reward_servers.scorers.aesthetic import LinearHead, head_tensors, read_tensors, write_head
from reward_servers.scorers.base import Image, PlainScorer
from reward_servers.scorers.clip_models import Fit, FloatArray, Preprocessing, score_together

NAME: Final = "image_reward"
TOKENIZER: Final = "google-bert/bert-base-uncased"
MEAN: Final = 0.16717362830052426
STD: Final = 1.0333394966054072
MAX_TOKENS: Final = 35
HEAD_FILE: Final = "head.safetensors"
VISION_HEADS: Final = 16
"""Attention heads of ViT-L; weights do not tell their number."""
TEXT_HEADS: Final = 12
VISION_EPSILON: Final = 1e-6
TEXT_EPSILON: Final = 1e-12
_VISION_PREFIX: Final = "blip.visual_encoder."
_TEXT_PREFIX: Final = "blip.text_encoder."
_VISION_NAMES: Final = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_BLOCK_NAMES: Final = {
    "norm1": "layer_norm1", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection", "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
_BLOCK: Final = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


class ImageReward(PlainScorer):
    """(head of the text encoder's first state - MEAN) / STD (Xu et al. 2023, ImageReward/ImageReward.py).

    The text encoder looks at the image from its first layer on, so the prompt's features cannot be shared by a group.
    """

    name = NAME

    def __init__(self, folder: Path, *, tokenizer: str = TOKENIZER, device: str = "cpu") -> None:
        """Load a directory that convert_image_reward wrote.

        Args:
            folder: the directory.
            tokenizer: BERT's uncased one, by id or local directory.
            device: as torch names it.

        Raises:
            ConfigError: a part cannot be loaded.
        """
        from transformers import BlipVisionModel  # noqa: PLC0415  (heavy, needed by this scorer only)

        self._head = LinearHead(head_tensors(read_tensors(folder / HEAD_FILE, f"reward {NAME}")))
        self._tokenizer = load_tokenizer(tokenizer, revision="")
        self._tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's, in this order
        self._vision = load_model(BlipVisionModel, str(folder / "vision"), revision="", device=device)
        self._text = load_model(_text_class(), str(folder / "text"), revision="", device=device)
        self._preprocessing = Preprocessing(side=int(self._vision.config.image_size), fit=Fit.CROP_ROUNDED)
        parts = "".join(checkpoint_version(str(part), "") for part in (folder, folder / "vision", folder / "text"))
        self.version = f"1-{hashlib.sha256(parts.encode()).hexdigest()[:12]}-{checkpoint_version(tokenizer, '')}"

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]. Raises ScorerError when it cannot be scored."""
        return score_together(self.name, images, prompts, self._values)

    def _values(self, images: Image, texts: Sequence[str]) -> FloatArray:
        import torch  # noqa: PLC0415

        with torch.inference_mode():
            pixels = torch.from_numpy(self._preprocessing.pixels(images)).to(self._vision.device)
            tokens = self._tokenizer(list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            tokens = tokens.to(self._text.device)
            states = self._text(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
                encoder_hidden_states=self._vision(pixel_values=pixels).last_hidden_state,
            ).last_hidden_state  # fmt: skip
        return (self._head(states[:, 0].float().cpu().numpy()) - np.float32(MEAN)) / np.float32(STD)


def convert_image_reward(published: Path, folder: Path, *, vision_heads: int = VISION_HEADS, text_heads: int = TEXT_HEADS) -> None:
    """Write the directory that ImageReward loads.

    Args:
        published: safetensors file with the published checkpoint's names.
        folder: where vision/, text/ and the head go.
        vision_heads: attention heads of the image encoder.
        text_heads: attention heads of the text encoder.

    Raises:
        ConfigError: the file is no such checkpoint.
    """
    from transformers import BlipVisionModel  # noqa: PLC0415

    tensors = read_tensors(published, f"reward {NAME}")
    vision = {_vision_name(name): tensor for name, tensor in _under(tensors, _VISION_PREFIX).items()}
    text = {name: tensor for name, tensor in _under(tensors, _TEXT_PREFIX).items() if not name.endswith("position_ids")}
    try:
        vision_config, text_config = _vision_config(vision, vision_heads), _text_config(text, text_heads)
        models = {"vision": BlipVisionModel(vision_config), "text": _text_class()(text_config)}
        for part, state in (("vision", vision), ("text", text)):
            _fill(models[part], state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"reward {NAME}: {str(published)!r} does not hold ImageReward's tensors ({str(error)[:300]}); make it of ImageReward.pt (THUDM/"
            "ImageReward) with the names as they are"
        ) from error
    write_head(tensors, _made(folder) / HEAD_FILE, prefix="mlp.")
    for part, model in models.items():
        model.save_pretrained(str(folder / part))


def _text_class() -> Any:
    """Return BlipTextModel without the pooling layer that the checkpoint lacks."""
    from transformers import BlipTextModel  # noqa: PLC0415

    class TextEncoder(BlipTextModel):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config, add_pooling_layer=False)

    return TextEncoder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _under(tensors: Mapping[str, FloatArray], prefix: str) -> dict[str, FloatArray]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _vision_name(name: str) -> str:
    """Return transformers' name of a tensor of BLIP's image encoder; one that is unknown stays, and is refused when it is loaded."""
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _BLOCK_NAMES:
        return _VISION_NAMES.get(name, name)
    return f"encoder.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"


def _vision_config(state: Mapping[str, FloatArray], num_heads: int) -> Any:
    """Read the image encoder's sizes off its tensors. Raises KeyError."""
    from transformers import BlipVisionConfig  # noqa: PLC0415

    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    num_patches = state["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0], num_attention_heads=num_heads,
        num_hidden_layers=sum(name.endswith("qkv.weight") for name in state), patch_size=patch, image_size=patch * round(num_patches**0.5),
        hidden_act="gelu", layer_norm_eps=VISION_EPSILON,
    )  # fmt: skip


def _text_config(state: Mapping[str, FloatArray], num_heads: int) -> Any:
    """Read the text encoder's sizes off its tensors; is_decoder gives it the cross-attention. Raises KeyError."""
    from transformers import BlipTextConfig  # noqa: PLC0415

    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary, hidden_size=width, encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0], num_attention_heads=num_heads,
        num_hidden_layers=sum(name.endswith(".intermediate.dense.weight") for name in state), is_decoder=True,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0], hidden_act="gelu", layer_norm_eps=TEXT_EPSILON,
    )  # fmt: skip


def _fill(model: Any, state: Mapping[str, FloatArray]) -> None:
    """Load every tensor. Raises RuntimeError when one is missing, unknown or of another shape."""
    import torch  # noqa: PLC0415

    model.load_state_dict({name: torch.from_numpy(np.array(tensor, dtype=np.float32)) for name, tensor in state.items()})


def make_image_reward(*, model: str = "", tokenizer: str = TOKENIZER, device: str = "cpu") -> ImageReward:
    """Make the reward.

    Args:
        model: directory written by convert_image_reward; there is no default, for the published checkpoint is a pickle.
        tokenizer: BERT's uncased one, by id or local directory.
        device: as torch names it.

    Raises:
        ConfigError: no directory is named, or a part cannot be loaded.
    """
    if not model:
        raise ConfigError(
            f"reward {NAME}: option model is not set; name the directory that reward_servers.scorers.image_reward.convert_image_reward makes "
            "of ImageReward.pt (THUDM/ImageReward) saved as safetensors"
        )
    return ImageReward(Path(model), tokenizer=tokenizer, device=device)


CARD: Final = RewardCard(
    name=NAME,
    description="how well people would like the image for its prompt, z-scored; option model names the converted directory",
    range="about -2.3..2",
    source="ImageReward (arXiv:2304.05977), THUDM/ImageReward",
    licence="code and weights Apache-2.0; BLIP BSD-3-Clause",
    model=f"THUDM/ImageReward ImageReward-v1.0 (BLIP ViT-L); tokenizer {TOKENIZER}",
    revision="the directory's digest is in the version",
    preprocessing="bicubic resize of the shorter edge to 224, center crop, CLIP's mean and std; prompts cut at 35 tokens",
    memory="1.8 GB of float32 weights",
    verified="not verified with real weights",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_image_reward)
