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
        counts = {layout: latents.layouts.count(layout) for layout in set(latents.layouts)}
        weights = np.array([settings.shares[layout] / counts[layout] for layout in latents.layouts])
        self._pictures = np.cumsum(weights / weights.sum())
        self._wrong = np.array([settings.wrong_captions[layout] for layout in latents.layouts])
        layouts = np.array(latents.layouts)
        self._layouts = layouts
        self._members = {layout: np.flatnonzero(layouts == layout) for layout in counts}
        self._limits = [np.cumsum([caption.weight for caption in captions]) for captions in latents.captions]

    def _caption(self, picture: int, place: float) -> int:
        limits = self._limits[picture]
        return int(self._choices[picture][np.searchsorted(limits, place * limits[-1])])

    def _described(self, pictures: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the pictures that the captions are about: some are another of the same layout."""
        is_wrong = random.random(len(pictures)) < self._wrong[pictures]
        places = random.random(len(pictures))
        members = [self._members[self._layouts[picture]] for picture in pictures]
        strangers = np.array([kin[int(place * len(kin))] for kin, place in zip(members, places, strict=True)])
        return np.where(is_wrong, strangers, pictures)

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
        pictures = np.searchsorted(self._pictures, random.random(size)).clip(max=len(self._choices) - 1)
        described = self._described(pictures, random)
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
