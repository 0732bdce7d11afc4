"""Speed and memory of every stage, one core each: `python -m deploy.bench --model models/tiny-sd3 --out docs/benchmarks`."""

import dataclasses
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from common.errors import FlowfleetError
from common.policy.index import read_index
from deploy.bench_stages import RECIPES, BenchSettings, recipe
from deploy.environment import describe_environment
from reward_servers.registry import list_scorers

MIN_REPEATS = 5
STAGE_TIMEOUT_S = 1800.0
REFERENCE = "sampling"  # what ratios are relative to
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_GIBIBYTE = 1 << 30


class BenchError(FlowfleetError):
    """A stage's process failed or took too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What one stage's process measured."""

    stage: str
    num_images: int  # a repeat
    seconds: tuple[float, ...]  # a repeat
    peak_mib: float

    @property
    def seconds_per_image(self) -> float:
        """Median over repeats."""
        return statistics.median(self.seconds) / self.num_images

    @property
    def images_per_second(self) -> tuple[float, float, float]:
        """Median, lowest and highest over repeats."""
        return 1 / self.seconds_per_image, self.num_images / max(self.seconds), self.num_images / min(self.seconds)


def default_stages() -> list[str]:
    """Every stage, in the order that an image passes them; scoring once a reward."""
    rewards = [f"scoring.{row.name}" for row in list_scorers() if row.is_self_contained and row.name != "diversity"]
    return [REFERENCE, "decoding", "committing", *rewards, *(f"learning.{objective}" for objective in RECIPES)]


def run_bench(model: Path, out: Path, *, num_repeats: int, stages: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure the stages one after the other, each in a fresh process on one thread, and write core.json and core.md.

    Args:
        model: a pipeline directory.
        out: where the two files go; made if need be, overwritten if there.
        num_repeats: timed repeats a stage.
        stages: names of default_stages; sampling must be among them.

    Returns:
        What core.json holds.

    Raises:
        ModelError: `model` is no pipeline directory.
        BenchError: a stage failed.
    """
    read_index(model, "sd3")
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        settings = BenchSettings(model=str(model.resolve()), folder=str(Path(folder) / "run"), num_repeats=num_repeats)
        answers = [run_stage(stage, settings, Path(folder)) for stage in track(["prepare", *stages], "measuring", console=console)][1:]
    results = [
        StageResult(stage=a["stage"], num_images=a["num_images"], seconds=tuple(a["seconds"]), peak_mib=a["peak_mib"])
        for a in answers if "skipped" not in a
    ]  # fmt: skip
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "deploy.bench", "--model", str(model), "--out", str(out), "--repeats", str(num_repeats)]),
        "model": str(model),
        "recipe": _describe_recipe(settings),
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "stages": describe_stages(results),
        "skipped": {a["stage"]: a["skipped"] for a in answers if "skipped" in a},
        "machine": describe_environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "core.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "core.md").write_text(render_markdown(report), encoding="utf-8")
    return report


def describe_stages(results: Sequence[StageResult]) -> list[dict[str, Any]]:
    """Return a row a stage as core.json holds it; ratios are relative to the sampling of the same run."""
    reference = next(result.seconds_per_image for result in results if result.stage == REFERENCE)
    rows = []
    for result in results:
        median, lowest, highest = result.images_per_second
        rows.append(
            dataclasses.asdict(result)
            | {"images_per_second": {"median": median, "min": lowest, "max": highest}}
            | {"seconds_per_image": result.seconds_per_image, "ratio_to_sampling": result.seconds_per_image / reference}
        )
    return rows


def render_markdown(report: Mapping[str, Any]) -> str:
    """Return core.md: a table and what it says; every number is the report's."""
    machine, rows = report["machine"], report["stages"]
    header = ["| stage | images/s, median (min to max) | seconds an image / sampling's | peak memory, MiB |", "| --- | --- | --- | --- |"]
    table = [
        f"| {row['stage']} | {_short(rate['median'])} ({_short(rate['min'])} to {_short(rate['max'])}) | {_short(row['ratio_to_sampling'])} "
        f"| {row['peak_mib']:.0f} |"
        for row in rows for rate in (row["images_per_second"],)
    ]  # fmt: skip
    skipped = [f"- {stage} was not measured: {reason}" for stage, reason in report["skipped"].items()]
    facts = [
        f"- model: {report['model']}; date: {report['date']}; commit: {machine['commit']}",
        f"- machine: {machine['cpu']}, {machine['num_cpus']} cores, {machine['memory_bytes'] / _GIBIBYTE:.1f} GiB; torch {machine['packages']['torch']}",
        f"- load average before and after: {report['load_average']['before']:.2f}, {report['load_average']['after']:.2f} (other work slows every row)",
    ]
    how = [
        f"Each stage runs in a process of its own on one thread: one untimed repeat, then {len(rows[0]['seconds'])} timed ones. Sampling is "
        f"that of recipe {report['recipe']['name']}: K = {report['recipe']['group_size']}, {report['recipe']['num_steps']} ODE steps, guidance "
        f"{report['recipe']['guidance_scale']:g}. Learning is a whole update; each of its images counts once, with all of the objective's "
        "forwards and backwards. Memory is the process's peak."
    ]
    blocks = [
        ["# Speed and memory of the core, one core a stage"],
        [f"    {report['command']}"],
        facts,
        how,
        header + table,
        skipped,
        _sentences(rows),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _describe_recipe(settings: BenchSettings) -> dict[str, Any]:
    config = recipe(RECIPES["nft"], settings)
    sampler = {key: getattr(config.rollout, key) for key in ("group_size", "num_steps", "guidance_scale", "micro_batch")}
    return {
        "name": config.run.name,
        **sampler,
        "groups_per_update": config.learner.groups_per_update,
        "lora": config.model.lora.model_dump(mode="json"),
    }


def _sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    by_name = {row["stage"]: row for row in rows}
    kinds = {kind: [row for row in rows if row["stage"].startswith(f"{kind}.")] for kind in ("scoring", "learning")}
    reference, largest = by_name[REFERENCE], max(rows, key=lambda row: row["peak_mib"])
    said = [f"Sampling makes {_short(reference['images_per_second']['median'])} images a second on one core."]
    for kind, group in kinds.items():
        if group:
            low, high = (choose(group, key=lambda row: row["ratio_to_sampling"]) for choose in (min, max))
            span = f"{_short(low['ratio_to_sampling'])} ({low['stage']}) to {_short(high['ratio_to_sampling'])} ({high['stage']})"
            if low is high:
                said.append(
                    f"{kind.capitalize()} an image takes {_short(low['ratio_to_sampling'])} times as long as sampling it ({low['stage']})."
                )
            else:
                said.append(f"{kind.capitalize()} an image takes {span} times as long as sampling it.")
    others = [f"{name} {_short(by_name[name]['ratio_to_sampling'])}" for name in ("decoding", "committing") if name in by_name]
    if others:
        said.append(f"Per image and relative to sampling: {', '.join(others)}.")
    said.append(f"The largest process is that of {largest['stage']}, with {largest['peak_mib']:.0f} MiB.")
    return said


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.6f}"


def run_stage(stage: str, settings: BenchSettings, folder: Path) -> dict[str, Any]:
    """Return what a stage's own process wrote into `folder`. Raises BenchError with the last thing it said."""
    out = folder / f"{stage}.json"
    arguments = [sys.executable, "-m", "deploy.bench_stages", stage, json.dumps(dataclasses.asdict(settings)), str(out)]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, "1") | quiet
    try:
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=STAGE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"benchmark: stage {stage} took more than {STAGE_TIMEOUT_S:.0f} s; measure on a quieter machine") from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BenchError(f"benchmark: stage {stage} ended with code {done.returncode} ({last[0]}); mend that and measure again")
    answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return answer


def _command(
    model: Annotated[Path, typer.Option(help="A pipeline directory.")] = Path("models/tiny-sd3"),
    out: Annotated[Path, typer.Option(help="Where core.json and core.md go.")] = Path("docs/benchmarks"),
    repeats: Annotated[int, typer.Option(min=MIN_REPEATS, help="Timed repeats a stage.")] = 7,
) -> None:
    """Measure every stage and write core.json and core.md."""
    console = Console()
    try:
        run_bench(model, out, num_repeats=repeats, stages=default_stages(), console=console)
    except FlowfleetError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(error.exit_code) from error
    console.print((out / "core.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(_command)
