"""Training of the text encoders and the transformer by rectified flow."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from deploy.pretrain.checkpoints import (
    module_tensors,
    optimizer_tensors,
    read_checkpoint,
    restore_module,
    restore_optimizer,
    write_checkpoint,
)
from deploy.pretrain.config import PretrainSettings, TransformerSettings
from deploy.pretrain.flow_model import FlowModel, VelocityModel, flow_loss
from deploy.pretrain.latents import load_latents
from deploy.pretrain.optimizers import Muon, split_parameters
from deploy.pretrain.processes import Ranks
from deploy.pretrain.progress import StageProgress
from deploy.pretrain.sampling import BatchSource, FlowBatch
from deploy.pretrain.schedule import warm_stable_decay
from deploy.pretrain.text import build_tokenizer

REPORT_INTERVAL = 25
GRADIENT_LIMIT = 1.0


@dataclass(slots=True, kw_only=True)
class FlowTraining:
    """What training changes: the model, its average, the optimizers and the step.

    Attributes:
        model: learns.
        average: exponential moving average of its parameters.
        muon: optimizer of the hidden matrices.
        adamw: optimizer of everything else.
        step: steps done.
    """

    model: FlowModel
    average: FlowModel
    muon: Muon
    adamw: torch.optim.AdamW
    step: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the whole state as named tensors."""
        return (
            module_tensors(self.model, "model")
            | module_tensors(self.average, "average")
            | optimizer_tensors(self.muon, "muon")
            | optimizer_tensors(self.adamw, "adamw")
        )

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Put back a checkpoint."""
        restore_module(self.model, tensors, "model")
        restore_module(self.average, tensors, "average")
        restore_optimizer(self.muon, tensors, "muon")
        restore_optimizer(self.adamw, tensors, "adamw")
        self.step = int(numbers["step"])


def build_flow(settings: PretrainSettings, work: Path) -> FlowModel:
    """Return the model with fresh weights; its tokenizer's files go to `work/tokenizer`."""
    own = settings.transformer
    tokenizer = build_tokenizer(work / "tokenizer", max_tokens=own.max_tokens)
    torch.manual_seed(settings.seed)
    return FlowModel(own, tokenizer, channels=settings.autoencoder.latent_channels, side=settings.latent_side)


def start_training(settings: PretrainSettings, work: Path, ranks: Ranks) -> FlowTraining:
    """Return a training that continues the newest checkpoint, or begins."""
    own = settings.transformer
    model = build_flow(settings, work).to(settings.device)
    model.attend_with_bias()
    matrices, others = split_parameters(model)
    training = FlowTraining(
        model=model,
        average=copy.deepcopy(model).requires_grad_(False),
        muon=Muon(matrices, lr=own.learning_rate, ranks=ranks),
        adamw=torch.optim.AdamW(others, lr=own.learning_rate, weight_decay=1e-2, betas=(0.9, 0.95), foreach=True),
    )
    found = read_checkpoint(work / "transformer")
    if found is not None:
        training.restore(*found)
    return training


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, *, decay: float, step: int) -> None:
    """Move the average towards the model; early steps count more, so the start is soon forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


def training_step(
    training: FlowTraining, velocity: VelocityModel, batch: FlowBatch, settings: TransformerSettings, ranks: Ranks
) -> torch.Tensor:
    """Do one step and return this process's loss, a float32 scalar.

    Args:
        training: changed in place.
        velocity: the model, or its compiled form.
        batch: this process's samples.
        settings: of the transformer.
        ranks: this process's place.
    """
    training.step += 1
    factor = warm_stable_decay(
        training.step,
        num_steps=settings.num_steps,
        warmup_steps=settings.warmup_steps,
        decay_share=settings.decay_share,
    )
    loss = flow_loss(velocity, batch, t5_tokens=settings.t5_tokens)
    loss.backward()
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    ranks.average(gradients)
    nn.utils.clip_grad_norm_([p for group in training.adamw.param_groups for p in group["params"]], GRADIENT_LIMIT)
    for optimizer in (training.muon, training.adamw):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    update_average(training.average, training.model, decay=settings.ema_decay, step=training.step)
    return loss.detach()


def train_flow(ranks: Ranks, *, settings: PretrainSettings, work: Path) -> None:
    """Train text encoders and transformer and leave their checkpoint under `work/transformer`.

    Args:
        ranks: this process's place.
        settings: all settings.
        work: folder of unfinished work.
    """
    own = settings.transformer
    tokenizer = build_tokenizer(work / "tokenizer", max_tokens=own.max_tokens)
    source = BatchSource(load_latents(work), tokenizer, own, settings.seed)
    training = start_training(settings, work, ranks)
    velocity: VelocityModel = torch.compile(training.model, dynamic=False) if settings.compile else training.model
    first, mean_loss, count = training.step, torch.zeros(()), 0
    shown = StageProgress("transformer", num_steps=own.last_step, log=work / "log.jsonl", console=Console(), is_shown=ranks.leads)
    while training.step < own.last_step:
        padded_share = own.padded_share if training.step >= own.padded_from * own.num_steps else 0.0
        batch = source.draw(training.step, ranks.rank, own.batch_size // ranks.size, padded_share=padded_share)
        mean_loss += training_step(training, velocity, batch.to(settings.device), own, ranks).cpu()
        step = training.step
        count += 1
        if step % REPORT_INTERVAL == 0 or step == own.last_step:
            images_per_s = (step - first) * own.batch_size / shown.seconds
            shown.report(step, loss=float(mean_loss) / count, images_per_s=images_per_s)
            mean_loss, count = torch.zeros(()), 0
        if ranks.leads and (step % settings.checkpoint_interval == 0 or step == own.last_step):
            write_checkpoint(work / "transformer", training.tensors(), {"step": step, "images": step * own.batch_size})
    shown.close()
