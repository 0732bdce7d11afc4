"""PickScore: CLIP ViT-H/14 tuned on what people picked of two images."""

from typing import Final

from reward_servers.cards import RewardCard, RewardEntry
from reward_servers.scorers.clip_models import ClipModel, CosineScorer

NAME: Final = "pickscore"
MODEL: Final = "yuvalkirstain/PickScore_v1"
PROCESSOR: Final = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def make_pickscore(*, model: str = MODEL, revision: str = "", processor: str = "", device: str = "cpu") -> CosineScorer:
    """Make the reward: exp(logit_scale) * cosine (Kirstain et al. 2023). It is stored raw; papers divide it by 26.

    Args:
        model: a CLIPModel, by id or local directory.
        revision: of that id.
        processor: preprocessing and tokenizer ("" = PROCESSOR for MODEL, else the model's own).
        device: as torch names it.

    Raises:
        ConfigError: the checkpoint cannot be loaded.
    """
    encoder = ClipModel(model, revision=revision, processor=processor or (PROCESSOR if model == MODEL else ""), device=device)
    return CosineScorer(NAME, encoder, scale=encoder.logit_scale)


CARD: Final = RewardCard(
    name=NAME,
    description="what people would pick for a prompt: exp(logit_scale) * cosine, raw (papers divide by 26)",
    range="mostly 17-26",
    source="PickScore (arXiv:2305.01569), yuvalkirstain/PickScore",
    licence="code and weights MIT",
    model=f"{MODEL}, processor {PROCESSOR}",
    revision="main, or option revision",
    preprocessing="bicubic resize of the shorter edge to 224, center crop, CLIP's mean and std; prompts cut at 77 tokens",
    memory="3.9 GB of float32 weights",
    verified="not verified with real weights",
)
ENTRY: Final = RewardEntry(card=CARD, make=make_pickscore)
