"""preview.html: before any training, do samples differ inside a group, and does the reward see it?"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from deploy.report.drawing import INK, Panel, color, legend, make_axes, to_uri
from deploy.report.grid import contact_sheet, to_png
from deploy.report.page import make_environment

FLAT_SPREAD = 1e-8  # the learner's
STRONG, WEAK = 0.5, 0.1  # share of groups with a spread
MAX_SIDE = 160  # pixels of an image on a sheet
COLUMNS = 4
Images = NDArray[np.uint8]
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What one reward sees in the groups."""

    reward: str
    mean: float | None  # None where nothing was scored
    std_in_group: float | None  # mean over groups
    std_between_groups: float | None  # of the groups' means
    flat_share: float  # groups without a spread, or without two scores
    coverage: float  # scored / asked

    @property
    def signal(self) -> str:
        """strong | weak | none."""
        live = 1.0 - self.flat_share
        return "strong" if live >= STRONG else "weak" if live >= WEAK else "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewGroup:
    """One prompt's two sheets."""

    prompt: str
    ode_uri: str
    sde_uri: str
    scores: tuple[tuple[str, tuple[float | None, ...]], ...]


def measure_spread(reward: str, scores: Scores) -> Spread:
    """Return the spread of one reward: [G, K], NaN = not scored."""
    groups = [row[~np.isnan(row)] for row in scores]
    present = [row for row in groups if row.size]
    means = np.array([row.mean() for row in present])
    return Spread(
        reward=reward,
        mean=float(np.concatenate(present).mean()) if present else None,
        std_in_group=float(np.mean([row.std() for row in present])) if present else None,
        std_between_groups=float(means.std()) if present else None,
        flat_share=float(np.mean([row.size < 2 or row.max() - row.min() <= FLAT_SPREAD for row in groups])),
        coverage=float(1.0 - np.isnan(scores).mean()),
    )


def describe(spread: Spread) -> str:
    """Return the sentence that says whether this reward can teach."""
    if spread.mean is None:
        return f"{spread.reward}: nothing was scored; see the scorer's errors with `flowfleet reward test`."
    live = 1.0 - spread.flat_share
    seen = f"{live:.0%} of the groups have a spread, standard deviation {spread.std_in_group or 0.0:.3f} inside a group"
    if spread.signal == "strong":
        return f"{spread.reward}: there is a signal. {seen}."
    remedy = "take harder prompts" if spread.mean > 0.7 else "take easier prompts, a denser reward, or a better base model"
    found = "the signal is weak" if spread.signal == "weak" else "there is no signal"
    return f"{spread.reward}: {found}. {seen}; raise group_size, or {remedy}."


def write_preview(
    out_path: Path, ode_images: Images, sde_images: Images, prompts: Sequence[str], rewards: Mapping[str, Scores], *, title: str = "preview"
) -> Path:
    """Draw the preview.

    Args:
        out_path: the html file, written over if it exists.
        ode_images: [G, K', H, W, 3] uint8, deterministic samples.
        sde_images: [G, K, H, W, 3] uint8, as the rollouts sample.
        prompts: G texts.
        rewards: name -> [G, K] scores of the SDE images, NaN = not scored.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(ode_images, sde_images, prompts, rewards)
    spreads = [measure_spread(name, np.asarray(scores, dtype=np.float64)) for name, scores in rewards.items()]
    groups = [_group(ode_images[g], sde_images[g], prompt, g, rewards) for g, prompt in enumerate(prompts)]
    html = make_environment().get_template("preview.html.j2").render(
        title=title, spreads=spreads, sentences=[(spread.signal, describe(spread)) for spread in spreads], groups=groups,
        group_size=sde_images.shape[1], panels=[draw_spread(name, scores, n) for n, (name, scores) in enumerate(rewards.items())],
    )  # fmt: skip
    out_path.parent.mkdir(parents=True, exist_ok=True)
    out_path.write_text(html, encoding="utf-8")
    return out_path


def _check(ode_images: Images, sde_images: Images, prompts: Sequence[str], rewards: Mapping[str, Scores]) -> None:
    if not prompts or ode_images.ndim != 5 or sde_images.ndim != 5 or {len(ode_images), len(sde_images)} != {len(prompts)}:
        raise ValueError(
            f"write_preview: came ode {ode_images.shape}, sde {sde_images.shape}, {len(prompts)} prompts; "
            "give [G, K, H, W, 3] images for G >= 1 prompts"
        )
    for name, scores in rewards.items():
        if scores.shape != sde_images.shape[:2]:
            raise ValueError(f"write_preview: reward {name!r} has scores {scores.shape} for sde images {sde_images.shape[:2]}; give [G, K]")


def _group(ode: Images, sde: Images, prompt: str, position: int, rewards: Mapping[str, Scores]) -> PreviewGroup:
    scores = tuple(
        (name, tuple(None if np.isnan(value) else float(value) for value in values[position])) for name, values in rewards.items()
    )  # fmt: skip
    return PreviewGroup(prompt=prompt, ode_uri=_sheet_uri(ode), sde_uri=_sheet_uri(sde), scores=scores)


def _sheet_uri(images: Images) -> str:
    side = min(images.shape[2], MAX_SIDE)
    columns = min(COLUMNS, len(images))
    png = to_png(contact_sheet(images, columns=columns, side=side, gap=2))
    return "data:image/png;base64," + base64.b64encode(png).decode()


def draw_spread(name: str, scores: Scores, position: int = 0) -> Panel:
    """One dot a sample, one column a group; a bar marks each group's mean."""
    figure, axes = make_axes()
    num_groups, size = scores.shape
    shift = np.linspace(-0.22, 0.22, size) if size > 1 else np.zeros(1)
    where = np.arange(1, num_groups + 1)[:, None] + shift
    axes.plot(where.ravel(), scores.ravel(), "o", color=color(position), markersize=3.5, alpha=0.55, markeredgewidth=0, label="a sample")
    known = ~np.isnan(scores)
    means = np.where(known.any(axis=1), np.nansum(scores, axis=1) / np.maximum(known.sum(axis=1), 1), np.nan)
    axes.hlines(means, where[:, 0] - 0.08, where[:, -1] + 0.08, color=INK, linewidth=1.6, label="mean of its group")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("prompt", loc="right")
    legend(axes)
    return Panel(title=name, caption="Dots apart inside a column are what a policy gradient learns from.", uri=to_uri(figure))
