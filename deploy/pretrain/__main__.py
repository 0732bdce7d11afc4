"""`python -m deploy.pretrain`: the command without the rest of flowfleet."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.pretrain.command import run_pretrain


def main(
    out: Annotated[Path, typer.Option(help="pipeline directory to write")] = Path("models/tiny-sd3"),
    config: Annotated[Path | None, typer.Option(help="TOML file of settings")] = None,
    processes: Annotated[int, typer.Option(help="data-parallel processes")] = 1,
    work: Annotated[Path | None, typer.Option(help="folder of unfinished work")] = None,
    prompts: Annotated[Path | None, typer.Option(help="also write the prompt sets here")] = None,
) -> None:
    """Make the tiny model from nothing; the same command goes on after an interruption."""
    run_pretrain(config, out, processes, work=work, prompts=prompts)


if __name__ == "__main__":
    typer.run(main)
