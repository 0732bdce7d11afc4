"""From nothing to the shipped model: the stages in order, each skipped where its result already lies."""

import shutil
from functools import partial
from pathlib import Path

from rich.console import Console

from deploy.pretrain.autoencoder import train_autoencoder
from deploy.pretrain.checkpoints import append_record, read_json, write_json
from deploy.pretrain.config import PretrainSettings
from deploy.pretrain.export import export_pipeline
from deploy.pretrain.latents import encode_pictures
from deploy.pretrain.processes import run_processes
from deploy.pretrain.train_flow import train_flow


def _steps_done(work: Path, stage: str) -> int:
    path = work / stage / "state.json"
    return int(read_json(path)["step"]) if path.exists() else 0


def pretrain(settings: PretrainSettings, out: Path, *, work: Path, num_processes: int = 1) -> None:
    """Make the model, going on from whatever the work folder already holds.

    Args:
        settings: all settings; may be changed between starts only for stages that are not done.
        out: the pipeline directory to write.
        work: folder of unfinished work.
        num_processes: data-parallel processes.
    """
    console = Console()
    work.mkdir(parents=True, exist_ok=True)
    append_record(work / "log.jsonl", {"stage": "start", "processes": num_processes, "settings": settings.model_dump()})
    run = partial(run_processes, num_processes=num_processes, threads=settings.threads)
    if _steps_done(work, "autoencoder") < settings.autoencoder.total_steps:
        run(partial(train_autoencoder, settings=settings, work=work))
    if not (work / "latents" / "complete.json").exists():
        run(partial(encode_pictures, settings=settings, work=work))
    if _steps_done(work, "transformer") < settings.transformer.last_step:
        run(partial(train_flow, settings=settings, work=work))
    export_pipeline(settings, work, out)
    write_json(out / "pretrain_config.json", settings.model_dump())
    shutil.copyfile(work / "log.jsonl", out / "pretrain_log.jsonl")
    console.print(f"wrote {out}")
