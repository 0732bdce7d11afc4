"""Very small random checkpoints of the classes that GenEval's detectors load, written in a second."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
)

from deploy.pretrain.text import build_tokenizer
from reward_servers.detectors.vocabulary import COCO_CLASSES

HUB_SPELLINGS = {
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant", "dining table": "diningtable",
    "tv": "tvmonitor", "computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard",
}  # fmt: skip
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
Maker = Callable[[], torch.nn.Module]


def _save(folder: Path, make: Maker, preprocessing: dict[str, object]) -> Path:
    state = torch.get_rng_state()
    torch.manual_seed(7)
    try:
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():  # zeros of a fresh model would hide its inputs
                parameter.add_(0.05 * torch.randn_like(parameter))
            if isinstance(model, Mask2FormerForUniversalSegmentation):
                model.class_predictor.weight.mul_(40)  # 81 classes of much the same probability would all be too unsure
            if isinstance(model, Owlv2ForObjectDetection):
                model.box_head.dense2.weight.mul_(0.1)  # else its boxes have no area
    finally:
        torch.set_rng_state(state)
    model.save_pretrained(str(folder))
    settings = {"do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": MEAN, "image_std": STD, **preprocessing}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _swin(**more: object) -> SwinConfig:
    return SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, **more)


def make_mask2former(folder: Path, labels: tuple[str, ...] = COCO_CLASSES) -> Path:
    """Mask2Former of 6 queries on 64x64 pixels; its labels are written as the hub's checkpoint writes them."""
    names = {index: HUB_SPELLINGS.get(label, label) for index, label in enumerate(labels)}
    config = Mask2FormerConfig(
        backbone_config=_swin(out_features=["stage1", "stage2", "stage3", "stage4"]), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        id2label=names, label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    size = {"size": {"height": 64, "width": 64}, "size_divisor": 32, "image_processor_type": "Mask2FormerImageProcessor"}
    return _save(folder, lambda: Mask2FormerForUniversalSegmentation(config), size)


def make_owlv2(folder: Path) -> Path:
    """OWLv2 of 4 x 4 patches on 32x32 pixels and byte-level texts of up to 40 tokens."""
    tokenizer = build_tokenizer(folder / "bytes", max_tokens=40)
    text = {
        "vocab_size": 514, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 40, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    size = {"size": {"height": 32, "width": 32}, "do_pad": True, "image_processor_type": "Owlv2ImageProcessor"}
    _save(folder, lambda: Owlv2ForObjectDetection(config), size)
    tokenizer.save_pretrained(str(folder))
    return folder


def make_grounding_dino(folder: Path) -> Path:
    """Grounding DINO of 9 queries with a tokenizer of letters; special tokens stand where the class looks for BERT's."""
    words = [f"[unused{index}]" for index in range(1100)]
    words[0], words[100], words[101], words[102], words[1012], words[1029] = "[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?"
    letters = "abcdefghijklmnopqrstuvwxyz"
    words[200:226], words[300:326] = list(letters), [f"##{letter}" for letter in letters]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    text = BertConfig(vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = GroundingDinoConfig(
        backbone_config=_swin(out_indices=[2, 3, 4]), text_config=text, num_queries=9, encoder_layers=1, encoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=16, decoder_attention_heads=2, d_model=32, max_text_len=256,
        disable_custom_kernels=True,
    )  # fmt: skip
    size = {"size": {"shortest_edge": 64, "longest_edge": 128}, "do_pad": True, "image_processor_type": "GroundingDinoImageProcessor"}
    _save(folder, lambda: GroundingDinoForObjectDetection(config), size)
    BertTokenizer(str(vocabulary), model_max_length=512).save_pretrained(str(folder))
    return folder


def make_clip(folder: Path) -> Path:
    """CLIP of 16x16 pixels and byte-level texts of up to 77 tokens."""
    tokenizer = build_tokenizer(folder / "bytes", max_tokens=77)
    text = {
        "vocab_size": 514, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 77, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    size = {
        "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "resample": 3,
        "image_processor_type": "CLIPImageProcessor",
    }  # fmt: skip
    _save(folder, lambda: CLIPModel(config), size)
    tokenizer.save_pretrained(str(folder))
    return folder
