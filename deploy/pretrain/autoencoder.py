"""The f8 autoencoder: its shape, its loss and its training."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.console import Console
from torch.nn import functional

from deploy.pretrain.checkpoints import (
    module_tensors,
    optimizer_tensors,
    read_checkpoint,
    restore_module,
    restore_optimizer,
    write_checkpoint,
)
from deploy.pretrain.config import AutoencoderSettings, PretrainSettings
from deploy.pretrain.layouts import draw_mixed_scene
from deploy.pretrain.processes import Ranks
from deploy.pretrain.progress import StageProgress
from deploy.pretrain.scenes import render
from deploy.pretrain.schedule import warm_cosine
from reward_servers.shapes.vocabulary import IMAGE_SIZE

REPORT_INTERVAL = 50


def build_autoencoder(settings: AutoencoderSettings) -> AutoencoderKL:
    """Return an autoencoder with fresh weights, one level a width, without attention."""
    levels = len(settings.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(settings.channels),
        layers_per_block=settings.layers,
        latent_channels=settings.latent_channels,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Turn images [B, H, W, 3] uint8 into pixels [B, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def edge_distance(pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean L1 distance of the pictures' first differences, both [B, 3, H, W]."""
    across = (pixels.diff(dim=-1) - targets.diff(dim=-1)).abs().mean()
    down = (pixels.diff(dim=-2) - targets.diff(dim=-2)).abs().mean()
    return across + down


def color_distance(pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean square error of the pictures shrunk fourfold, both [B, 3, H, W]."""
    return functional.avg_pool2d(pixels - targets, 4).square().mean()


def autoencoder_loss(
    vae: AutoencoderKL, pixels: torch.Tensor, settings: AutoencoderSettings, *, is_refining: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, reconstruction's mean square error) of pixels [B, 3, H, W]; both float32 scalars."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    decoded = decoded.float()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    loss = (decoded - pixels).abs().mean() + settings.kl_weight * kl
    loss = loss + settings.edge_weight * edge_distance(decoded, pixels)
    if is_refining:
        loss = loss + settings.color_weight * color_distance(decoded, pixels)
    return loss, functional.mse_loss(decoded.detach(), pixels)


def learning_rate(step: int, settings: AutoencoderSettings) -> float:
    """Return the rate of a step: one cosine, then a second one from half the height while refining."""
    if step <= settings.num_steps:
        return settings.learning_rate * warm_cosine(step, num_steps=settings.num_steps, warmup_steps=100)
    refined = step - settings.num_steps
    return 0.5 * settings.learning_rate * warm_cosine(refined, num_steps=settings.refining_steps, warmup_steps=50)


def picture_batches(settings: PretrainSettings, size: int, *, stream: int) -> Iterator[torch.Tensor]:
    """Yield batches of rendered pixels [size, 3, H, W] for ever."""
    random = np.random.default_rng((settings.seed, 1, stream))
    while True:
        scenes = [draw_mixed_scene(settings.scenes.shares, random) for _ in range(size)]
        yield to_pixels(np.stack([render(scene) for scene in scenes]))


def train_autoencoder(ranks: Ranks, *, settings: PretrainSettings, work: Path) -> None:
    """Train the autoencoder and leave its checkpoint under `work/autoencoder`.

    Args:
        ranks: this process's place.
        settings: all settings.
        work: folder of unfinished work.
    """
    own, folder = settings.autoencoder, work / "autoencoder"
    torch.manual_seed(settings.seed)
    vae = build_autoencoder(own).to(settings.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=own.learning_rate, weight_decay=1e-2, betas=(0.9, 0.98))
    found, first = read_checkpoint(folder), 0
    if found is not None:
        first = int(found[1]["step"])
        restore_module(vae, found[0], "vae")
        restore_optimizer(optimizer, found[0], "optimizer")
    torch.manual_seed(settings.seed + 1000 * (ranks.rank + 1) + first)
    batches = picture_batches(settings, own.batch_size // ranks.size, stream=ranks.rank + 1000 * first)
    shown = StageProgress("autoencoder", num_steps=own.total_steps, log=work / "log.jsonl", console=Console(), is_shown=ranks.leads)
    for step in range(first + 1, own.total_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, own)
        loss, error = autoencoder_loss(vae, next(batches).to(settings.device), own, is_refining=step > own.num_steps)
        loss.backward()
        ranks.average(p.grad for p in vae.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % REPORT_INTERVAL == 0 or step == own.total_steps:
            psnr = float(10 * torch.log10(4 / error))
            images_per_s = (step - first) * own.batch_size / shown.seconds
            shown.report(step, loss=float(loss.detach()), psnr_db=psnr, images_per_s=images_per_s)
        if ranks.leads and (step % settings.checkpoint_interval == 0 or step == own.total_steps):
            tensors = module_tensors(vae, "vae") | optimizer_tensors(optimizer, "optimizer")
            write_checkpoint(folder, tensors, {"step": step})
    shown.close()
