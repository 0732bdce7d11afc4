"""The text side: a byte-level tokenizer and two small CLIP encoders, computed exactly as the SD3 pipeline does."""

import json
import os
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from deploy.pretrain.config import TransformerSettings

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def _write(path: Path, text: str) -> None:
    """Write a file that other processes may be writing and reading too."""
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def build_tokenizer(folder: Path, *, max_tokens: int) -> CLIPTokenizer:
    """Make a CLIP tokenizer without merges: one byte is one token, and a word's last byte has its own entry.

    It lower-cases, as CLIP's tokenizer does: "CAFE" and "cafe" are the same prompt.

    Args:
        folder: where vocab.json and merges.txt are written.
        max_tokens: model_max_length, begin and end included.

    Returns:
        A tokenizer of 514 entries.
    """
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), BEGIN, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    _write(vocabulary, json.dumps({entry: number for number, entry in enumerate(entries)}))
    _write(merges, "#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=max_tokens)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Return token ids [B, model_max_length] int64, padded as the pipeline pads."""
    length = tokenizer.model_max_length
    ids: torch.Tensor = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids


def build_text_encoder(settings: TransformerSettings, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Return a text encoder with fresh weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.text_width,
        intermediate_size=4 * settings.text_width,
        projection_dim=settings.text_width,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=settings.text_width // 32,
        max_position_embeddings=settings.max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("_embedding.weight"):
            nn.init.normal_(parameter, std=0.5)
    return encoder


class TextStack(nn.Module):
    """Both text encoders as one module."""

    def __init__(self, first: CLIPTextModelWithProjection, second: CLIPTextModelWithProjection) -> None:
        """Hold the pipeline's text_encoder and text_encoder_2."""
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts as StableDiffusion3Pipeline.encode_prompt does at max_sequence_length=0.

        Args:
            ids: [B, n] token ids.

        Returns:
            Embeddings [B, n, width of both] and pooled projections [B, width of both].
        """
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.first, self.second)]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return embeds, pooled
