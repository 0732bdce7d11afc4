"""CLIP score by ViT-L/14: the cosine between image and prompt, as it is."""

from typing import Final

from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.clip_models import ClipModel, CosineScorer

NAME: Final = "clip_score_vit_l14"
MODEL: Final = "openai/clip-vit-large-patch14"


def make_clip_score_vit_l14(*, model: str = MODEL, revision: str = "", device: str = "cpu") -> CosineScorer:
    """Make the reward (Radford et al. 2021; Hessel et al. 2021).

    Deviation from CLIPScore: the plain cosine, neither clipped at 0 nor multiplied by 2.5 or 100.

    Args:
        model: a CLIPModel of ViT-L/14, by id or local directory.
        revision: of that id.
        device: as torch names it.

    Raises:
        ConfigError: the checkpoint cannot be loaded.
    """
    return CosineScorer(NAME, ClipModel(model, revision=revision, device=device))


CARD: Final = RewardCard(
    name=NAME,
    description="agreement of image and prompt: the plain cosine of CLIP ViT-L/14 (not clipped, not times 2.5 or 100)",
    range="-1..1, mostly .20-.35",
    source="CLIP (arXiv:2103.00020); CLIPScore (arXiv:2104.08718) without its factor",
    licence="code and weights of openai/CLIP MIT",
    model=MODEL,
    revision="main, or option revision",
    preprocessing="bicubic resize of the shorter edge to 224, center crop, CLIP's mean and std; prompts cut at 77 tokens",
    memory="1.7 GB of float32 weights",
    verified="not verified with real weights",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_clip_score_vit_l14)
