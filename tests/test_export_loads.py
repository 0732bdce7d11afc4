"""An exported LoRA changes diffusers' own image exactly as the trainer's policy does, also where alpha is not the rank."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from common.errors import CorruptFile, UserError
from common.policy.adapters import write_adapter_bytes
from common.policy.config import LoraConfig, ModelConfig
from common.policy.load import load_policy
from common.types import SnapshotInfo
from deploy.lora.export import export_adapter
from tests.export_runs import trained_state

PROMPT, STEPS, RANK = "a red circle", 3, 4
TOLERANCE = 1e-4  # of latents of about 1: the same float32 arithmetic in another order of calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A published version, and what the trainer's policy makes of it."""

    model: ModelConfig
    content: bytes
    start: torch.Tensor  # [1, C, h, w] initial latents
    latents: torch.Tensor  # the clean ones


@pytest.fixture(scope="module", params=[RANK, 3 * RANK], ids=["alpha is the rank", "alpha is three times the rank"])
def trained(request: pytest.FixtureRequest, tiny_sd3_dir: Path) -> Trained:
    model = ModelConfig(path=str(tiny_sd3_dir), lora=LoraConfig(rank=RANK, alpha=request.param))
    policy, state = load_policy(model), trained_state(model)
    info = SnapshotInfo(num_modules=policy.num_adapter_modules, canary=0.1)
    content, _ = write_adapter_bytes({"ema": state}, {"ema": info}, incarnation=1, version=7)
    start = torch.randn((1, *policy.latent_shape), generator=torch.Generator().manual_seed(5))
    features, latents = policy.batch_features(policy.encode([PROMPT], with_negative=False)), start
    with torch.no_grad(), policy.using(state):
        for sigma, following in pairwise(policy.sigmas(STEPS)):
            latents = latents + (following - sigma) * policy.velocity(latents, sigma.reshape(1), features)
    return Trained(model=model, content=content, start=start, latents=latents)


def clean_pipeline(directory: Path) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(str(directory), text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusion3Pipeline, start: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, latents=start, max_sequence_length=0, height=64, width=64,
            output_type="latent",
        ).images  # fmt: skip


@pytest.mark.parametrize("fmt", ["peft", "diffusers"])
def test_an_exported_lora_gives_the_trainers_latents_in_a_clean_pipeline(trained: Trained, tiny_sd3_dir: Path, tmp_path: Path, fmt) -> None:
    out = export_adapter(trained.content, "ema", trained.model, tmp_path / "lora", fmt)
    pipe = clean_pipeline(tiny_sd3_dir)
    base = draw(pipe, trained.start)
    if fmt == "peft":
        PeftModel.from_pretrained(pipe.transformer, str(out))
    else:
        pipe.load_lora_weights(str(out))
        assert pipe.get_active_adapters() == ["default_0"]
    layers = [module for module in pipe.transformer.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 15
    assert all(layer.active_adapters and not layer.disable_adapters and not layer.merged for layer in layers)
    assert all(list(layer.scaling.values()) == [trained.model.lora.alpha / RANK] for layer in layers)
    tuned = draw(pipe, trained.start)
    assert (tuned - base).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(tuned, trained.latents, atol=TOLERANCE, rtol=0)


def test_an_export_never_writes_over_what_is_there(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="not empty"):
            export_adapter(trained.content, "ema", trained.model, out, "peft")
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_weights_that_do_not_match_the_published_digest_are_not_exported(trained: Trained, tmp_path: Path) -> None:
    damaged = bytearray(trained.content)
    damaged[-1] ^= 1
    with pytest.raises(CorruptFile, match="digest"):
        export_adapter(bytes(damaged), "ema", trained.model, tmp_path / "lora", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_fails_at_its_end(trained: Trained, tmp_path: Path) -> None:
    def fail() -> dict[str, bytes]:
        raise CorruptFile("the card could not be made")

    with pytest.raises(CorruptFile, match="the card"):
        export_adapter(trained.content, "ema", trained.model, tmp_path / "deep" / "lora", "peft", beside=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_and_not_a_traceback(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        export_adapter(trained.content, "ema", trained.model, tmp_path / "file" / "lora", "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
