"""The records that travel between components: frozen, keyword-only, NumPy at most (no torch, no Ray).

Shape letters (architecture, section 2): K group size, T denoising steps, W stochastic steps kept, L latents kept,
C h w latent channels, height, width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
NOT_APPLICABLE: Final = "not applicable"
"""The error of a null score that is no failure: its reward does not judge this image's prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text to draw and what the scorers need to judge it."""

    id: str  # unique inside its file
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)  # e.g. GenEval's {tag, include, exclude}

    @property
    def tag(self) -> str:
        """The task kind that evaluation tables group by ("" when the metadata has none)."""
        return str(self.metadata.get("tag", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterId:
    """Which weights: the update that published them, by which incarnation, and the digest of their bytes."""

    incarnation: int
    version: int
    digest: str  # sha256 over names, shapes and float32 bytes, hex


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """What a loader must find when it binds one snapshot of a published file."""

    num_modules: int  # LoRA modules
    canary: float  # ||v(on) - v(off)|| / ||v(off)|| on the fixed input


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One published policy version."""

    adapter: AdapterId
    path: str  # relative to the run directory
    snapshots: Mapping[str, SnapshotInfo]  # live, behavior, ema ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReceipt:
    """Proof that weights arrived: what a worker found after binding a snapshot."""

    adapter: AdapterId
    snapshot: str
    num_modules: int
    canary: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """How a group was sampled; stored as JSON in the group file, so that a replay needs no config."""

    kernel: str  # ode | flow_sde | dance_sde | cps | dpm_sde
    noise_level: float  # eta
    num_steps: int  # T
    guidance_scale: float
    height: int
    width: int
    snapshot: str  # which snapshot sampled
    window: tuple[int, ...]  # indices of the stochastic steps, increasing
    shared_init: bool  # one initial noise for the whole group


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFeatures:
    """Encoded text of one prompt, float32."""

    prompt_embeds: FloatArray  # [N, D]
    pooled: FloatArray  # [Dp]
    negative_embeds: FloatArray | None = None  # [N, D]; None without guidance
    negative_pooled: FloatArray | None = None  # [Dp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One denoising run, kept around its stochastic steps."""

    sample_index: int
    seed: int
    step_index: NDArray[np.int16]  # [W]
    timestep: FloatArray  # [W], as fed to the network (1000 sigma)
    sigma: FloatArray  # [W]
    next_sigma: FloatArray  # [W]
    latents: FloatArray  # [L, C, h, w]
    latent_index: NDArray[np.int16]  # [L]: latents[j] is the state before step latent_index[j] (T = the clean state)
    behavior_log_prob: FloatArray  # [W], mean over latent elements
    final_latents: FloatArray  # [C, h, w]
    media_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The K trajectories of one prompt, by one worker at one policy version: the unit of work."""

    run: str
    number: int
    lease_id: str
    prompt: Prompt
    adapter: AdapterId
    sampler: SamplerSpec
    seconds: float
    features: PromptFeatures
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaBatch:
    """Decoded images of a group or of an evaluation sheet, with their statistics."""

    images: NDArray[np.uint8]  # [K, H, W, 3] RGB
    statistics: Mapping[str, FloatArray]  # name -> [K]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One scorer's word on one image. `value` None = not scored, with the reason in `error`; never a number for a failure."""

    sample_index: int
    value: float | None
    details: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    latency_s: float = 0.0
    may_pass: bool = False  # a null whose cause may pass (a connection): worth another try; never stored


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFile:
    """All scores of one reward for one group (or evaluation sheet)."""

    run: str
    number: int
    lease_id: str  # of the group file that was scored
    reward: str
    scorer_version: str
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A group number that leaves the sum, with its reason."""

    number: int
    reason: str  # stale | attempts | too_few_scores | flat | generation_failed ...
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestGroup:
    """One group of an update's batch."""

    number: int
    path: str  # of the group file, relative to the run directory
    media_path: str
    version: int
    num_bytes: int
    prompt_id: str
    scores: Mapping[str, tuple[float | None, ...]]  # reward -> K raw scores; only applicable rewards appear
    kept: tuple[bool, ...]  # K: scored by every applicable train reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole input of one update besides the group files."""

    update: int
    incarnation: int
    config_digest: str
    max_staleness: int  # in force when it was cut
    groups: tuple[ManifestGroup, ...]  # P, in number order
    drops: tuple[Drop, ...]  # since the last manifest


class LeaseKind(StrEnum):
    """What a rollout lease asks for."""

    TRAIN = "train"
    EVAL = "eval"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLease:
    """Permission to sample one group (TRAIN: one prompt, K samples) or one evaluation sheet (EVAL: one sample a prompt)."""

    lease_id: str
    kind: LeaseKind
    number: int
    prompts: tuple[Prompt, ...]
    publication: Publication
    snapshot: str
    window_round: int = 0  # number // P: what a WindowPlan draws from
    directory: str = ""  # where the files go, relative to the run directory (EVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringLease:
    """Permission to score one group or evaluation sheet for one reward."""

    lease_id: str
    kind: LeaseKind
    number: int
    reward: str
    group_lease_id: str
    media_path: str
    prompts: tuple[Prompt, ...]  # one an image
    directory: str = ""  # EVAL: where the score file goes
    scorer_version: str = ""  # of the reward's scores so far, which a server must share; "" before the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing to do now: ask again after `seconds`; `reason` names what is waited for."""

    seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The run ends; leave after finishing what is held."""

    reason: str
