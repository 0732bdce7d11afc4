"""What groupwise scorers share: cutting a batch into the groups of its prompts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common.types import Prompt, Score
from reward_servers.scorers.base import Image, PlainScorer


class GroupwiseScorer(PlainScorer, ABC):
    """A common.protocols.GroupScorer but for its judgement; `score` takes any batch and judges the images of each prompt together."""

    @abstractmethod
    def score_group(self, images: Image, prompt: Prompt) -> list[Score]:
        """Score the images [K, H, W, 3] of one prompt together."""

    def score(self, images: Image, prompts: Sequence[Prompt]) -> list[Score]:
        """Score a batch [B, H, W, 3]: each prompt's images are a group."""
        scores: dict[int, Score] = {}
        for group in groups_of(prompts, range(len(prompts))):
            found = self.score_group(np.asarray(images)[group], prompts[group[0]])
            scores |= {index: replace(score, sample_index=index) for index, score in zip(group, found, strict=True)}
        return [scores[index] for index in range(len(prompts))]


def groups_of(prompts: Sequence[Prompt], indices: Sequence[int]) -> list[list[int]]:
    """Return the indices that share a prompt (id and text), groups in the order of their first image."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index in indices:
        groups.setdefault((prompts[index].id, prompts[index].text), []).append(index)
    return list(groups.values())
