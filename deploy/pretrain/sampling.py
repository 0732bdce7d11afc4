"""Training samples: pictures drawn from the cache, with captions as noisy as the web's."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPTokenizer

from deploy.pretrain.config import TransformerSettings
from deploy.pretrain.latents import LatentSet
from deploy.pretrain.text import tokenize


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowBatch:
    """One minibatch of the flow's regression.

    Attributes:
        clean: latents [B, C, h, w] float32.
        noise: [B, C, h, w] float32.
        times: flow times [B]; 1 is noise.
        ids: token ids [B, n].
        is_padded: [B], whether a sample sees the T5 tokens of diffusers' default padding.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    ids: torch.Tensor
    is_padded: torch.Tensor

    def to(self, device: str) -> "FlowBatch":
        """Return the same batch on a device."""
        return FlowBatch(
            clean=self.clean.to(device),
            noise=self.noise.to(device),
            times=self.times.to(device),
            ids=self.ids.to(device),
            is_padded=self.is_padded.to(device),
        )


class BatchSource:
    """Draws minibatches; a step's batch depends on (seed, rank, step) alone, so a resumed run goes on as it would have."""

    def __init__(self, latents: LatentSet, tokenizer: CLIPTokenizer, settings: TransformerSettings, seed: int) -> None:
        """Tokenize every caption once.

        Args:
            latents: the training set.
            tokenizer: the model's.
            settings: shares of dropout, wrong captions and padding.
            seed: of all draws.
        """
        self._settings, self._seed = settings, seed
        self._latents = latents.latents
        texts = sorted({caption.text for captions in latents.captions for caption in captions} | {""})
        number = {text: index for index, text in enumerate(texts)}
        self._ids = tokenize(tokenizer, texts)
        self._empty = number[""]
        self._choices = [np.array([number[caption.text] for caption in captions]) for captions in latents.captions]
        self._limits = [np.cumsum([caption.weight for caption in captions]) for captions in latents.captions]

    def _caption(self, picture: int, place: float) -> int:
        limits = self._limits[picture]
        return int(self._choices[picture][np.searchsorted(limits, place * limits[-1])])

    def draw(self, step: int, rank: int, size: int, *, padded_share: float) -> FlowBatch:
        """Draw one process's minibatch of a step.

        Args:
            step: number of the step.
            rank: the process.
            size: B.
            padded_share: chance of a sample to see the default padding.

        Returns:
            The batch, on CPU.
        """
        own = self._settings
        random = np.random.default_rng((self._seed, 3, step, rank))
        pictures = random.integers(len(self._choices), size=size)
        strangers = random.integers(len(self._choices), size=size)
        described = np.where(random.random(size) < own.wrong_captions, strangers, pictures)
        captions = np.array([self._caption(int(p), r) for p, r in zip(described, random.random(size), strict=True)])
        captions = np.where(random.random(size) < own.caption_dropout, self._empty, captions)
        clean = self._latents[torch.from_numpy(pictures)].float()
        normal = random.normal(own.time_mean, own.time_std, size=size)
        return FlowBatch(
            clean=clean,
            noise=torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32)),
            times=torch.from_numpy(1 / (1 + np.exp(-normal))).float(),
            ids=self._ids[torch.from_numpy(captions)],
            is_padded=torch.from_numpy(random.random(size) < padded_share),
        )
