"""A small policy with an exact velocity, a desk and a sink in memory, and a clock that only moves when told."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ModelError
from common.flow.grid import sigma_grid
from common.policy.base import AdapterState, FeatureBatch
from common.seeding import derive_seed
from common.types import (
    AdapterId,
    LeaseKind,
    LoadReceipt,
    MediaBatch,
    Prompt,
    PromptFeatures,
    Publication,
    RolloutGroup,
    RolloutLease,
    SnapshotInfo,
    Stop,
    Wait,
)

CHANNELS, SIDE, PIXELS, RANK = 4, 4, 16, 2
DATA_STD = 0.4


class FakePolicy:
    """Data of a prompt is N(m, 0.4^2) with m a channel vector of its text; the velocity is exact, plus a LoRA over channels B A x."""

    def __init__(self, seed: int = 0) -> None:
        self.device = torch.device("cpu")
        self.latent_shape = (CHANNELS, SIDE, SIDE)
        self.image_size = (PIXELS, PIXELS)
        self.num_adapter_modules = 1
        self.num_encoded = 0
        self.num_loads = 0
        self.velocity_batches: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        self._down = torch.nn.Parameter(torch.randn((RANK, CHANNELS), generator=generator))
        self._up = torch.nn.Parameter(torch.zeros((CHANNELS, RANK)))
        self._enabled = True

    def sigmas(self, num_steps: int) -> torch.Tensor:
        return sigma_grid(num_steps, 3.0)

    def encode(self, texts: Sequence[str], *, with_negative: bool) -> list[PromptFeatures]:
        self.num_encoded += len(texts)
        return [
            PromptFeatures(
                prompt_embeds=np.zeros((2, CHANNELS), dtype=np.float32),
                pooled=_mean_of(text),
                negative_embeds=np.zeros((2, CHANNELS), dtype=np.float32) if with_negative else None,
                negative_pooled=_mean_of("") if with_negative else None,
            )
            for text in texts
        ]

    def batch_features(self, features: Sequence[PromptFeatures]) -> FeatureBatch:
        negatives = [f.negative_pooled for f in features if f.negative_pooled is not None]
        return FeatureBatch(
            prompt_embeds=torch.from_numpy(np.stack([f.prompt_embeds for f in features])),
            pooled=torch.from_numpy(np.stack([f.pooled for f in features])),
            negative_pooled=torch.from_numpy(np.stack(negatives)) if negatives else None,
        )

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, features: FeatureBatch, *, guidance_scale: float = 1.0, detach_uncond: bool = True
    ) -> torch.Tensor:
        self.velocity_batches.append(len(latents))
        conditional = self._branch(latents, sigma, features.pooled)
        if guidance_scale == 1.0:
            return conditional
        assert features.negative_pooled is not None
        unconditional = self._branch(latents, sigma, features.negative_pooled)
        unconditional = unconditional.detach() if detach_uncond else unconditional
        return unconditional + guidance_scale * (conditional - unconditional)

    def _branch(self, x: torch.Tensor, sigma: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        t, m = sigma.view(-1, 1, 1, 1), mean.view(-1, CHANNELS, 1, 1)
        a = 1 - t
        clean = m + a * DATA_STD**2 / (a**2 * DATA_STD**2 + t**2) * (x - a * m)
        velocity = (x - clean) / t
        return velocity + torch.einsum("dr,rc,bchw->bdhw", self._up, self._down, x) if self._enabled else velocity

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        assert not torch.is_grad_enabled()
        scale = PIXELS // SIDE
        images = (torch.sigmoid(latents[:, :3]) * 255).round().to(torch.uint8)
        pixels: NDArray[np.uint8] = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
        return pixels

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        return [self._down, self._up]

    def read_adapter(self) -> dict[str, torch.Tensor]:
        return {"mix.down": self._down.detach().clone(), "mix.up": self._up.detach().clone()}

    def load_adapter(self, state: AdapterState) -> int:
        if set(state) != {"mix.down", "mix.up"}:
            raise ModelError(f"FakePolicy: adapter names {sorted(state)} came; mix.down and mix.up are needed")
        self.num_loads += 1
        with torch.no_grad():
            self._down.copy_(state["mix.down"])
            self._up.copy_(state["mix.up"])
        return 1

    @contextmanager
    def using(self, state: AdapterState) -> Iterator[None]:
        before = self.read_adapter()
        self.load_adapter(state)
        try:
            yield
        finally:
            self.load_adapter(before)

    @contextmanager
    def base(self) -> Iterator[None]:
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    @torch.no_grad()
    def inspect_adapter(self) -> SnapshotInfo:
        x = torch.linspace(-1, 1, CHANNELS * SIDE * SIDE).view(1, CHANNELS, SIDE, SIDE)
        features = self.batch_features(self.encode(["canary"], with_negative=False))
        self.num_encoded -= 1
        on = self.velocity(x, torch.tensor([0.5]), features)
        with self.base():
            off = self.velocity(x, torch.tensor([0.5]), features)
        return SnapshotInfo(num_modules=1, canary=float((on - off).norm() / off.norm()))


def _mean_of(text: str) -> NDArray[np.float32]:
    if not text:
        return np.zeros(CHANNELS, np.float32)
    return np.random.default_rng(derive_seed(0, text)).standard_normal(CHANNELS).astype(np.float32)


def adapter_state(scale: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """An adapter of a given size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "mix.down": torch.randn((RANK, CHANNELS), generator=generator),
        "mix.up": scale * torch.randn((CHANNELS, RANK), generator=generator),
    }


@dataclass
class FakePolicyFiles:
    """Published versions in memory; `load` is an AdapterLoader."""

    states: dict[tuple[int, str], dict[str, torch.Tensor]] = field(default_factory=dict)
    num_loads: int = 0

    def publish(self, version: int, states: Mapping[str, dict[str, torch.Tensor]]) -> Publication:
        infos: dict[str, SnapshotInfo] = {}
        for name, state in states.items():
            probe = FakePolicy()
            probe.load_adapter(state)
            infos[name] = probe.inspect_adapter()
            self.states[version, name] = state
        adapter = AdapterId(incarnation=1, version=version, digest=f"d{version}")
        return Publication(adapter=adapter, path=f"policy/i0001/v{version:06d}.safetensors", snapshots=infos)

    def load(self, publication: Publication, snapshot: str) -> AdapterState:
        self.num_loads += 1
        return self.states[publication.adapter.version, snapshot]


def train_lease(number: int, publication: Publication, *, text: str | None = None, groups_per_update: int = 2) -> RolloutLease:
    """A TRAIN lease of one prompt."""
    prompt = Prompt(id=f"p{number}", text=text or f"prompt {number}", metadata={"tag": "counting"})
    return RolloutLease(
        lease_id=f"lease{number}", kind=LeaseKind.TRAIN, number=number, prompts=(prompt,), publication=publication, snapshot="live",
        window_round=number // groups_per_update,
    )  # fmt: skip


def eval_lease(number: int, publication: Publication, ids: Sequence[str], snapshot: str = "ema") -> RolloutLease:
    """An EVAL lease: one sample a prompt."""
    prompts = tuple(Prompt(id=name, text=f"text of {name}") for name in ids)
    return RolloutLease(
        lease_id=f"sheet{number}", kind=LeaseKind.EVAL, number=number, prompts=prompts, publication=publication, snapshot=snapshot,
        directory="eval/v000000.ema.abc",
    )  # fmt: skip


class FakeDesk:
    """Hands out a script in order; what follows the script is Stop. Records every word."""

    def __init__(self, script: Sequence[RolloutLease | Wait | Stop]) -> None:
        self._script = deque(script)
        self._lock = threading.Lock()
        self.asked: list[str] = []
        self.receipts: list[tuple[str, LoadReceipt]] = []
        self.committed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.returned: dict[str, str] = {}
        self.beats: list[tuple[str, tuple[str, ...], dict[str, float]]] = []
        self.beat_errors: deque[Exception | None] = deque()

    def ask_rollout(self, slot: str) -> RolloutLease | Wait | Stop:
        self.asked.append(slot)
        with self._lock:
            return self._script.popleft() if self._script else Stop(reason="the script ends")

    def confirm_weights(self, slot: str, receipt: LoadReceipt) -> None:
        self.receipts.append((slot, receipt))

    def commit_rollout(self, lease_id: str, path: str, seconds: float) -> None:
        self.committed[lease_id] = path
        self.seconds[lease_id] = seconds

    def fail_rollout(self, lease_id: str, error: str) -> None:
        self.failed[lease_id] = error

    def return_rollout(self, lease_id: str, reason: str) -> None:
        self.returned[lease_id] = reason

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        error = self.beat_errors.popleft() if self.beat_errors else None
        if error is not None:
            raise error
        self.beats.append((slot, tuple(lease_ids), dict(metrics)))


class FakeSink:
    """A run directory in memory; `errors` are raised first, one a write."""

    def __init__(self, errors: Sequence[Exception] = ()) -> None:
        self.errors = deque(errors)
        self.groups: dict[str, tuple[RolloutGroup, MediaBatch]] = {}
        self.sheets: dict[str, tuple[RolloutLease, MediaBatch]] = {}

    def write_group(self, group: RolloutGroup, media: MediaBatch) -> str:
        self._refuse()
        path = f"groups/000/g{group.number:08d}.{group.lease_id}.group.arrow"
        self.groups[path] = (group, media)
        return path

    def write_sheet(self, lease: RolloutLease, media: MediaBatch) -> str:
        self._refuse()
        path = f"{lease.directory}/s{lease.number:08d}.{lease.lease_id}.media.arrow"
        self.sheets[path] = (lease, media)
        return path

    def _refuse(self) -> None:
        if self.errors:
            raise self.errors.popleft()


class FakeClock:
    """Seconds that pass only through sleep."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
