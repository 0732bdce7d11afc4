"""The cached training set: latents of all pictures and the captions that hold for each."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.console import Console
from safetensors.torch import load_file, save_file

from deploy.pretrain.autoencoder import build_autoencoder, to_pixels
from deploy.pretrain.captions import Caption, captions_of
from deploy.pretrain.checkpoints import read_checkpoint, read_json, restore_module, write_json
from deploy.pretrain.config import PretrainSettings
from deploy.pretrain.layouts import draw_mixed_scene
from deploy.pretrain.processes import Ranks
from deploy.pretrain.progress import StageProgress
from deploy.pretrain.scenes import Scene, render

ENCODE_BATCH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSet:
    """Training pictures as the transformer meets them.

    Attributes:
        latents: [n, C, h, w] float16, shifted and scaled to mean 0 and deviation 1.
        layouts: n names of layouts.
        captions: n lists of captions.
        shift: what was subtracted.
        scale: what the difference was multiplied by.
    """

    latents: torch.Tensor
    layouts: list[str]
    captions: list[list[Caption]]
    shift: float
    scale: float


def picture_line(scene: Scene) -> str:
    """Return one line of JSON: a picture's layout and captions."""
    captions = [[caption.text, caption.weight] for caption in captions_of(scene)]
    return json.dumps({"layout": scene.task, "captions": captions})


def load_autoencoder(settings: PretrainSettings, work: Path) -> AutoencoderKL:
    """Return the trained autoencoder, for inference."""
    found = read_checkpoint(work / "autoencoder")
    if found is None:
        raise FileNotFoundError(f"load_autoencoder: {work} holds no autoencoder; run that stage first")
    vae = build_autoencoder(settings.autoencoder)
    restore_module(vae, found[0], "vae")
    return vae.eval().requires_grad_(False).to(settings.device)


@torch.no_grad()
def encode_pictures(ranks: Ranks, *, settings: PretrainSettings, work: Path) -> None:
    """Render and encode this process's share of the pictures into `work/latents/part_<rank>`.

    Args:
        ranks: this process's place.
        settings: all settings.
        work: folder of unfinished work.
    """
    vae = load_autoencoder(settings, work)
    count = -(-settings.scenes.num_images // ranks.size)
    random = np.random.default_rng((settings.seed, 2, ranks.rank, ranks.size))
    shown = StageProgress("latents", num_steps=count, log=work / "log.jsonl", console=Console(), is_shown=ranks.leads)
    parts: list[torch.Tensor] = []
    lines: list[str] = []
    for start in range(0, count, ENCODE_BATCH):
        size = min(ENCODE_BATCH, count - start)
        scenes = [draw_mixed_scene(settings.scenes.shares, random) for _ in range(size)]
        pixels = to_pixels(np.stack([render(scene) for scene in scenes])).to(settings.device)
        parts.append(vae.encode(pixels).latent_dist.mean.cpu())
        for scene in scenes:
            lines.append(picture_line(scene))
        if start // ENCODE_BATCH % 50 == 49:
            shown.report(start + size, images_per_s=(start + size) * ranks.size / shown.seconds)
    folder = work / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"latents": torch.cat(parts).half().contiguous()}, folder / f"part_{ranks.rank}.safetensors")
    (folder / f"part_{ranks.rank}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ranks.wait()
    if ranks.leads:
        write_json(folder / "complete.json", _moments(folder, ranks.size))
    shown.close()


def _moments(folder: Path, num_parts: int) -> dict[str, float | int]:
    latents = torch.cat([load_file(folder / f"part_{rank}.safetensors")["latents"] for rank in range(num_parts)])
    mean, deviation = latents.float().mean(), latents.float().std()
    return {"num_parts": num_parts, "shift": float(mean), "scale": float(1 / deviation)}


def load_moments(work: Path) -> tuple[float, float]:
    """Return (shift, scale) of the cached latents."""
    moments = read_json(work / "latents" / "complete.json")
    return float(moments["shift"]), float(moments["scale"])


def load_latents(work: Path) -> LatentSet:
    """Read the cached training set."""
    folder = work / "latents"
    moments = read_json(folder / "complete.json")
    latents, records = [], []
    for rank in range(moments["num_parts"]):
        latents.append(load_file(folder / f"part_{rank}.safetensors")["latents"])
        with (folder / f"part_{rank}.jsonl").open(encoding="utf-8") as file:
            records += [json.loads(line) for line in file]
    scaled = ((torch.cat(latents).float() - moments["shift"]) * moments["scale"]).half()
    return LatentSet(
        latents=scaled,
        layouts=[record["layout"] for record in records],
        captions=[[Caption(text=text, weight=weight) for text, weight in record["captions"]] for record in records],
        shift=moments["shift"],
        scale=moments["scale"],
    )
