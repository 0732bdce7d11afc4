"""Training batches: reproducible, and as noisy as they say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.pretrain.captions import captions_of
from deploy.pretrain.config import TransformerSettings
from deploy.pretrain.latents import LatentSet
from deploy.pretrain.layouts import LAYOUTS, draw_scene
from deploy.pretrain.sampling import BatchSource
from deploy.pretrain.schedule import warm_stable_decay
from deploy.pretrain.text import build_tokenizer


def _source(folder: Path, **settings: object) -> BatchSource:
    random = np.random.default_rng(0)
    scenes = [draw_scene(task, random) for task in LAYOUTS for _ in range(20)]
    latents = LatentSet(
        latents=torch.arange(len(scenes)).view(-1, 1, 1, 1).half(),
        layouts=[scene.task for scene in scenes],
        captions=[captions_of(scene) for scene in scenes],
        shift=0.0,
        scale=1.0,
    )
    own = TransformerSettings.model_validate({"caption_dropout": 0.0, **settings})
    return BatchSource(latents, build_tokenizer(folder, max_tokens=36), own, 7)


def test_a_batch_depends_on_step_and_rank_alone(tmp_path: Path) -> None:
    source = _source(tmp_path)
    first, again = (source.draw(5, 1, 8, padded_share=0.5) for _ in range(2))
    other = source.draw(5, 0, 8, padded_share=0.5)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)


def test_layouts_come_in_their_shares_whatever_the_cache_holds(tmp_path: Path) -> None:
    shares = {"single": 0.0, "pair": 0.75, "counting": 0.25, "text": 0.0}
    pictures = _source(tmp_path, shares=shares).draw(0, 0, 4000, padded_share=0.0).clean.flatten().long() // 20
    counts = torch.bincount(pictures, minlength=len(LAYOUTS)) / 4000
    # A share's standard deviation over 4,000 draws is below .008.
    assert counts.tolist() == pytest.approx([shares[layout] for layout in LAYOUTS], abs=0.03)


def test_wrong_captions_are_those_of_another_picture_of_the_layout(tmp_path: Path) -> None:
    wrong = {"single": 0.0, "pair": 0.0, "counting": 0.0, "text": 1.0}
    shares = {"single": 0.5, "pair": 0.0, "counting": 0.0, "text": 0.5}
    batch = _source(tmp_path, wrong_captions=wrong, shares=shares).draw(0, 0, 500, padded_share=0.0)
    quote = build_tokenizer(tmp_path, max_tokens=36).convert_tokens_to_ids('"</w>')
    says = (batch.ids == quote).any(dim=1)
    is_text = batch.clean.flatten().long() // 20 == list(LAYOUTS).index("text")
    assert torch.equal(says, is_text)


def test_the_learning_rate_warms_stays_and_decays() -> None:
    factors = [warm_stable_decay(step, num_steps=100, warmup_steps=10, decay_share=0.2) for step in (1, 10, 50, 80, 91, 100)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.05])
