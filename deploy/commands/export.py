"""`flowfleet export`. What loads torch is imported by the command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy.commands.artifacts import RunArgument, open_run


class ExportFormat(StrEnum):
    """Who reads the exported LoRA."""

    PEFT = "peft"
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"


def export(
    run: RunArgument,
    *,
    out: Annotated[Path, typer.Option(help="directory to write; it must not exist or be empty")],
    fmt: Annotated[
        ExportFormat,
        typer.Option("--format", help="peft: a PEFT directory; diffusers: for load_lora_weights; kohya: for ComfyUI and sd-scripts (SD3)"),
    ] = ExportFormat.DIFFUSERS,
    snapshot: Annotated[str, typer.Option(help="live, ema or behavior")] = "ema",
    version: Annotated[int | None, typer.Option(help="default: the newest that is kept")] = None,
    card_samples: Annotated[
        bool, typer.Option("--card-samples/--no-card-samples", help="put sample images, base beside tuned, into the model card")
    ] = True,
) -> None:
    """Export a LoRA that PEFT, diffusers or ComfyUI loads, with its model card."""
    from deploy.lora.export import ExportRequest, export_run

    request = ExportRequest(out=out, fmt=fmt.value, snapshot=snapshot, version=version, card_samples=card_samples)
    written = export_run(open_run(run), request)
    Console().print(f"version {written}, snapshot {snapshot}: {out}", highlight=False, soft_wrap=True, markup=False)


def register(app: typer.Typer) -> None:
    """Put this command under the command line."""
    app.command("export")(export)
