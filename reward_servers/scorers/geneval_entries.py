"""GenEval's rewards as the registry knows them: a rule, a detector, and a color model for detectors that see no colors."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from common.errors import ConfigError
from reward_servers.cards import NO_MODEL, RewardCard, RewardEntry
from reward_servers.detection import Detector
from reward_servers.detectors.clip_colors import MODEL as CLIP
from reward_servers.detectors.clip_colors import ClipColors
from reward_servers.detectors.mask2former import MODEL as MASK2FORMER
from reward_servers.detectors.mask2former import Mask2FormerDetector
from reward_servers.detectors.open_vocabulary import GroundingDinoDetector, Owlv2Detector
from reward_servers.scorers.geneval import DetectedGenEval, GenEval
from reward_servers.shapes.detector import ShapesDetector

_NAME_OF: Final = {"mask2former": "hf", "owlv2": "owlv2", "grounding_dino": "grounding_dino"}
"""What a detector of photographs adds to the score's name: geneval_strict judged by mask2former is geneval_hf_strict."""


def make_geneval(
    rule: str,
    *,
    detector: str = "shapes",
    model: str = "",
    revision: str = "",
    clip_model: str = "",
    clip_revision: str = "",
    device: str = "cpu",
    found_score: float | None = None,
    counted_score: float | None = None,
) -> DetectedGenEval:
    """Make a GenEval reward.

    Args:
        rule: geneval_strict, geneval_dense or geneval_dense_flowgrpo.
        detector: shapes, mask2former, owlv2 or grounding_dino.
        model: the detector's checkpoint, an id or a local directory ("" = its default).
        revision: of that id.
        clip_model: the color model's checkpoint ("" = its default).
        clip_revision: of that id.
        device: of both models.
        found_score: raw score of owlv2 and grounding_dino that counts as GenEval's 0.3.
        counted_score: raw score of those that counts as GenEval's 0.9.

    Raises:
        ConfigError: an unknown detector, an option that the detector does not take, or a checkpoint that cannot be loaded.
    """
    borders = {key: value for key, value in (("found_score", found_score), ("counted_score", counted_score)) if value is not None}
    checkpoints = {"model": model, "revision": revision, "clip_model": clip_model, "clip_revision": clip_revision}
    if detector == "shapes":
        _refuse(detector, [*(key for key, value in checkpoints.items() if value), *borders])
        return GenEval(rule, ShapesDetector())
    if detector == "mask2former":
        _refuse(detector, list(borders))
    if detector not in _NAME_OF:
        raise ConfigError(f"reward option detector is {detector!r}; it must be one of shapes, {', '.join(_NAME_OF)}")
    found: Detector
    if detector == "mask2former":
        found = Mask2FormerDetector(model, revision=revision, device=device)
    elif detector == "owlv2":
        found = Owlv2Detector(model, revision=revision, device=device, **borders)
    else:
        found = GroundingDinoDetector(model, revision=revision, device=device, **borders)
    name = rule.replace("geneval_", f"geneval_{_NAME_OF[detector]}_", 1)
    return DetectedGenEval(name, found, ClipColors(clip_model, revision=clip_revision, device=device), rule=rule)


def _refuse(detector: str, options: Sequence[str]) -> None:
    if options:
        raise ConfigError(f"reward option {options[0]} is nothing that the detector {detector} takes; leave it out")


_GENEVAL: Final = "GenEval (arXiv:2310.11513), djghosh13/geneval"
_FLOWGRPO: Final = "Flow-GRPO (arXiv:2505.05470), yifan123/reward-server"
_RULES: Final = (
    ("geneval_strict", "0 or 1", _GENEVAL, "composition: the official all-or-nothing rule"),
    ("geneval_dense", "0..1", _FLOWGRPO, "composition: mean of count, color and position terms, each clipped to 0..1, the position once"),
    (
        "geneval_dense_flowgrpo", "-inf..1", _FLOWGRPO,
        "composition: the paper's training reward, bug-compatible (unclipped; a wrong position gives .75)",
    ),
)  # fmt: skip


def _entry(rule: str, score_range: str, source: str, description: str) -> RewardEntry:
    card = RewardCard(
        name=rule, description=description, range=score_range, source=source, licence="definition MIT; models by the detector's choice",
        model=NO_MODEL, preprocessing="by the detector (option detector: shapes, mask2former, owlv2, grounding_dino)",
        memory="141 MiB with shapes, AMD EPYC", speed="740 to 790 images/s of 64x64 a core with shapes, AMD EPYC",
        verified="definition tested on fixtures; the detector shapes on rendered scenes, the others are not verified with real weights",
        needs="nothing",
    )  # fmt: skip
    return RewardEntry(card=card, make=partial(make_geneval, rule))


def _hf_entry(rule: str, score_range: str, source: str, description: str) -> RewardEntry:
    card = RewardCard(
        name=rule.replace("geneval_", "geneval_hf_", 1), range=score_range, source=source,
        description=f"{description}; photographs, by mask2former of transformers and CLIP colors, not calibrated against the original",
        licence="definition MIT; Mask2Former MIT, CLIP MIT", model=f"{MASK2FORMER}; {CLIP}", revision="main; main",
        preprocessing="Mask2Former: 384x384, ImageNet mean; CLIP: crop of the box, pixels outside the mask #999, 224x224",
        verified="not verified with real weights",
    )  # fmt: skip
    return RewardEntry(card=card, make=partial(_make_hf, rule))


def _make_hf(
    rule: str, *, model: str = "", revision: str = "", clip_model: str = "", clip_revision: str = "", device: str = "cpu"
) -> DetectedGenEval:
    return make_geneval(
        rule, detector="mask2former", model=model, revision=revision, clip_model=clip_model, clip_revision=clip_revision, device=device
    )


_MAKERS: Final[tuple[Callable[[str, str, str, str], RewardEntry], ...]] = (_entry, _hf_entry)
ENTRIES: Final = tuple(make(*row) for make in _MAKERS for row in _RULES)
"""geneval_* with a detector of one's choice (shapes by default), then geneval_hf_* for photographs."""
