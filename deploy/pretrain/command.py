"""`flowfleet pretrain` as a plain function."""

from pathlib import Path

from deploy.pretrain.config import load_settings
from deploy.pretrain.prompts import write_prompts
from deploy.pretrain.run import pretrain

SHIPPED = Path(__file__).parents[1] / "recipes" / "pretrain-tiny.toml"


def run_pretrain(config: Path | None, out: Path, processes: int = 1, *, work: Path | None = None, prompts: Path | None = None) -> None:
    """Make the tiny model from nothing; the same command goes on after an interruption.

    Args:
        config: TOML file of PretrainSettings; None means the shipped model's own (they compile: on CPU that needs a C++ compiler).
        out: pipeline directory to write.
        processes: data-parallel processes.
        work: folder of unfinished work; `<out>.work` by default.
        prompts: where to write the prompt sets too; None means not at all.
    """
    if prompts is not None:
        write_prompts(prompts)
    folder = work if work is not None else out.with_name(f"{out.name}.work")
    pretrain(load_settings(config if config is not None else SHIPPED), out, work=folder, num_processes=processes)
