"""How much the images of one prompt differ from each other: a groupwise reward without a model."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, ScorerError
from common.types import NOT_APPLICABLE, Prompt, Score
from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.base import Image
from reward_servers.scorers.groupwise import GroupwiseScorer

NAME: Final = "diversity"


class Diversity(GroupwiseScorer):
    """Mean distance of an image to the others of its group.

    An image becomes the means of num_blocks x num_blocks blocks a color channel, in [0, 1]; the distance of two images is the root mean
    square difference of their blocks. A group of one is not applicable.
    """

    name = NAME

    def __init__(self, num_blocks: int) -> None:
        self.version = f"1-blocks{num_blocks}"
        self._num_blocks = num_blocks

    def score_group(self, images: Image, prompt: Prompt) -> list[Score]:
        """Score a group [K, H, W, 3]. Raises ScorerError for images that are none, or smaller than the blocks."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < self._num_blocks:
            raise ScorerError(
                f"scorer {NAME}: images of {images.dtype} {images.shape} came; they must be uint8 [K, H, W, 3] with sides of at least "
                f"{self._num_blocks} pixels"
            )
        if len(images) < 2:
            return [Score(sample_index=index, value=None, error=NOT_APPLICABLE) for index in range(len(images))]
        blocks = block_means(images, self._num_blocks).reshape(len(images), -1)
        distances = np.sqrt(((blocks[:, None] - blocks[None]) ** 2).mean(axis=2))  # [K, K], 0 on the diagonal
        values = distances.sum(axis=1) / (len(images) - 1)
        return [Score(sample_index=index, value=float(value)) for index, value in enumerate(values)]


def block_means(images: Image, num_blocks: int) -> NDArray[np.float64]:
    """Return [K, b, b, 3] in [0, 1]: the means of images [K, H, W, 3] over b x b blocks as equal as whole pixels allow."""
    height, width = images.shape[1:3]
    rows, columns = (np.arange(num_blocks) * side // num_blocks for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(images.astype(np.float64), rows, axis=1), columns, axis=2)
    sizes = np.diff(rows, append=height)[:, None] * np.diff(columns, append=width)[None]
    means: NDArray[np.float64] = sums / (255.0 * sizes[None, :, :, None])
    return means


def make_diversity(*, num_blocks: int = 8) -> Diversity:
    """Make the reward. Raises ConfigError."""
    if not isinstance(num_blocks, int) or isinstance(num_blocks, bool) or num_blocks < 1:
        raise ConfigError(f"reward {NAME}: num_blocks is {num_blocks!r}; it must be an integer of at least 1")
    return Diversity(num_blocks)


CARD: Final = RewardCard(
    name=NAME,
    description="groupwise: mean distance of an image to the others of its prompt, by block averages",
    range="0..1",
    source="flowfleet",
    licence="none needed",
    needs="nothing",
    preprocessing="means of 8 x 8 blocks a color channel (option num_blocks), in [0, 1]",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_diversity)
