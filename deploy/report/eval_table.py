"""The table of one evaluation: every task's mean with its interval, and the protocol in one line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.report.bootstrap import by_prompt, estimates
from deploy.report.compare import MEAN

_DIGEST = 12  # shown characters of a digest
_MODEL_KEYS = {"embedded_guidance": "embedded guidance", "grid_shift": "grid shift"}  # of a protocol, where it has them


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalLine:
    """One line of an evaluation's table."""

    reward: str
    task: str  # a tag, or MEAN; "" when prompts carry no tags
    is_mean: bool  # whether this line sums up its reward: MEAN, or the only task
    num_prompts: int  # with a scored image
    num_images: int  # scored
    mean: float | None  # as result.json holds it; None where nothing was scored
    low: float | None  # 95 % interval
    high: float | None


def eval_lines(result: Mapping[str, Any]) -> list[EvalLine]:
    """Return the table of a result.json: per reward the mean over tasks, then each task; only the one task where there is one."""
    return [line for name, entry in result["rewards"].items() for line in _reward_lines(name, entry, result["rows"])]


def _reward_lines(reward: str, entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[EvalLine]:
    scored = [(row["tag"], row["prompt_id"], (row["scores"][reward],)) for row in rows if row["scores"].get(reward) is not None]
    prompts = by_prompt(sorted(scored, key=lambda row: row[0]))
    if not prompts:
        return [_line(reward, task, 0, None, is_mean=len(entry["tasks"]) == 1) for task in entry["tasks"]]
    *found, whole = [columns[0] for columns in estimates(list(prompts.values()))]
    intervals = {task: (estimate.low, estimate.high) for task, estimate in zip(prompts, found, strict=True)}
    lines = [
        _line(reward, name, task["n"], task["mean"], is_mean=len(entry["tasks"]) == 1, num_prompts=len(prompts.get(name, ())),
              interval=intervals.get(name, (None, None)))
        for name, task in entry["tasks"].items()
    ]  # fmt: skip
    if len(lines) > 1:
        total = sum(len(values) for values in prompts.values())
        mean = _line(reward, MEAN, len(scored), entry["mean"], is_mean=True, num_prompts=total, interval=(whole.low, whole.high))
        lines.insert(0, mean)
    return lines


def _line(
    reward: str, task: str, num_images: int, mean: float | None, *, is_mean: bool, num_prompts: int = 0,
    interval: tuple[float | None, float | None] = (None, None),
) -> EvalLine:  # fmt: skip
    low, high = interval
    return EvalLine(
        reward=reward, task=task, is_mean=is_mean, num_prompts=num_prompts, num_images=num_images, mean=mean, low=low, high=high
    )


def describe_protocol(protocol: Mapping[str, Any], digest: str) -> str:
    """Return the frozen protocol in one line, as it is printed with every number."""
    repeats, limit = int(protocol["images_per_prompt"]), protocol.get("max_sequence_length")
    drawn = f"{protocol['num_prompts']} prompts (digest {str(protocol['prompts_digest'])[:_DIGEST]})" + (
        f" x {repeats} images" if repeats > 1 else ""
    )
    parts = [
        "ODE", f"{protocol['num_steps']} steps", f"guidance (CFG) {protocol['guidance_scale']:g}", f"seed {protocol['seed']} by prompt id",
        drawn, f"snapshot {protocol['snapshot']}", *([f"{limit} T5 tokens"] if limit else []),
        *(f"{words} {protocol[key]:g}" for key, words in _MODEL_KEYS.items() if key in protocol),
    ]  # fmt: skip
    return f"protocol {digest[:_DIGEST]}: {', '.join(parts)}"
