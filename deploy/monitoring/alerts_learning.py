"""Alerts on what is learned: rewards, divergences, ratios, clips, evaluation, sensors.

An update takes seconds or ten minutes, and Prometheus' windows are times. What needs several updates is asked twice, over a short and a
long pair of windows, and each pair counts only where the run made enough updates in it.
"""

from dataclasses import dataclass
from typing import Final

from deploy.monitoring.alert import Alert, promql


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """What is held against what."""

    newest: str  # whose mean is judged
    past: str  # what it is judged by
    step: str  # of subqueries over the past


FAST: Final = Windows(newest="10m", past="2h", step="1m")  # updates of up to about 100 s
SLOW: Final = Windows(newest="2h", past="1d", step="10m")  # updates of up to 20 minutes, and slow falls of quick runs
LEAST_NEWEST: Final = 6
"""Updates in the newest window: a mean of six scatters 2.4 times less than single updates do."""
LEAST_PAST: Final = 20
"""Updates in the past window: fewer tell neither what is usual nor how much it scatters."""
COLLAPSE_DEVIATIONS: Final = 3
"""Of single updates, that the mean must lose. Eleven recorded runs lose 1.1 at most; with images of noise after them, 10 and more."""
SCATTER_QUANTILE: Final = 0.25
"""Of the windows' deviations: the quieter ones tell how much single updates scatter, even where the fall fills half of a short run."""
COLLAPSE_FLOOR: Final = 0.01
"""Of the reward's size, on top: a reward that hardly scatters has no deviation to go by."""
KL_TIMES: Final = 10
"""Healthy divergences grow too, from nothing and like a power of the updates: t^3 stands at 8 times its own median, an explosion above."""
KL_PAST: Final = 40
"""Updates, more than elsewhere: during warm-up a healthy KL grows a thousandfold."""
STEP_RATIO: Final = (0.9, 1.1)
"""Ratios of mean log-probs: twice the widest clip range that a config may have (.05)."""
IMAGE_RATIO: Final = (0.1, 10)
"""Ratios of whole images (awm, vgrpo): their clip ranges go up to 1, so only an order of magnitude is out of range."""
IMAGE_OBJECTIVES: Final = "awm|vgrpo"
CLIPPED: Final = 0.8
"""Share of samples: a clip binds on a part of them; near all of them it does everything. Recorded runs stay below .01 (clip 1e-3)."""
FLAT: Final = 0.8
"""Share of groups without signal: healthy tiny runs stay below .6 in any single update and at .05 to .25 in the mean."""
EVALUATION_DEVIATIONS: Final = 0.3
"""Of single images' scores inside groups: three standard errors of an evaluation over 200 images. Eleven recorded runs lose .26 at most
(one that stands still)."""


def _enough(windows: Windows, past: int = LEAST_PAST) -> str:
    return f"""and on (run) max by (run) (changes(flowfleet_update[{windows.newest}])) >= {LEAST_NEWEST}
  and on (run) max by (run) (changes(flowfleet_update[{windows.past}])) >= {past}"""


def _collapse(windows: Windows) -> str:
    newest, past, step = windows.newest, windows.past, windows.step
    return f"""(
    max by (run) (max_over_time(avg_over_time(flowfleet_weighted_reward[{newest}])[{past}:{step}]))
      - max by (run) (avg_over_time(flowfleet_weighted_reward[{newest}]))
    >
    {COLLAPSE_DEVIATIONS} * max by (run) (
        quantile_over_time({SCATTER_QUANTILE}, stddev_over_time(flowfleet_weighted_reward[{newest}])[{past}:{step}])
      )
      + {COLLAPSE_FLOOR} * abs(max by (run) (max_over_time(flowfleet_weighted_reward[{past}])))
  )
  {_enough(windows)}"""


def _divergence(windows: Windows) -> str:
    return f"""(
    max by (run, estimator) (avg_over_time(flowfleet_kl[{windows.newest}]))
    >
    {KL_TIMES} * max by (run, estimator) (quantile_over_time(0.5, flowfleet_kl[{windows.past}]))
  )
  {_enough(windows, KL_PAST)}"""


def _ratio(ends: tuple[float, float], objectives: str) -> str:
    low, high = ends
    return f"""(
    max by (run) (flowfleet_policy_ratio_max) > {high:g} or on (run) min by (run) (flowfleet_policy_ratio_min) < {low:g}
  )
  and on (run) flowfleet_run_info{{objective{objectives}"{IMAGE_OBJECTIVES}"}}"""


NON_FINITE: Final = Alert(
    name="FlowfleetNonFinite", area="learning", severity="critical",
    expr="sum by (run) (increase(flowfleet_skipped_steps_total[15m])) > 0",
    hold_reason="one such step is one too many",
    summary="{{ $labels.run }}: an optimizer step was skipped, its loss or gradient was not finite",
    when="an optimizer step was skipped in the last 15 minutes",
    means="Float16 overflows, or the rate is too high. After learner.max_nonfinite skipped steps in a row the run stops (gate non_finite).",
    remedy="`flowfleet report RUN`: did gradient_norm or kl jump before? Start a new run with `--set model.dtype=bfloat16` or a "
    "lower learner.learning_rate (on a resume `--allow-change learner.learning_rate` permits it).",
)  # fmt: skip
REWARD_COLLAPSE: Final = Alert(
    name="FlowfleetRewardCollapse", area="learning", severity="critical",
    expr=promql(f"""
        {_collapse(FAST)}
        or on (run)
        {_collapse(SLOW)}"""),
    hold="5m", hold_reason="a mean over a window moves slowly, so what holds for five minutes is no single batch of hard prompts",
    summary='{{ $labels.run }}: the training reward has fallen by {{ $value | printf "%.3g" }} from its best mean',
    when=f"the mean reward of {FAST.newest} (or {SLOW.newest}) lies more than {COLLAPSE_DEVIATIONS} standard deviations of single "
    f"updates below its best of {FAST.past} ({SLOW.past}); at least {LEAST_NEWEST} and {LEAST_PAST} updates in the two windows",
    means="The policy has left what it had learned.",
    remedy="`flowfleet report RUN`: find the update, look at its samples, at kl and gradient_norm. `flowfleet stop RUN`; start a new "
    "run with a KL, a lower learner.learning_rate or learner.decay_steps (docs/objectives.md, Known failures); "
    "`flowfleet export RUN --version N` saves a good version that is kept.",
)  # fmt: skip
HACKING: Final = Alert(
    name="FlowfleetHackingSuspected", area="learning", severity="warning",
    expr="sum by (run, sensor) (increase(flowfleet_sensor_alerts_total[1h])) > 0",
    hold_reason="a sensor has already waited for three updates in a row; the alert stands for an hour",
    summary="{{ $labels.run }}: sensor {{ $labels.sensor }} left the base model's band while a training reward rose",
    when="a sensor's own alert came within the last hour (docs/rewards.md, Sensors)",
    means="The reward may be gamed: images change in a way that it does not see.",
    remedy="Look at the images: `flowfleet report RUN --serve`, the newest grids beside the base. If they are worse: "
    "`flowfleet stop RUN`, then a KL, a second reward, or a watch reward that sees the fault.",
)  # fmt: skip
NO_SIGNAL: Final = Alert(
    name="FlowfleetNoSignal", area="learning", severity="warning",
    expr=f"max by (run) (avg_over_time(flowfleet_flat_groups_ratio[30m])) > {FLAT}",
    hold="10m", hold_reason="the first updates of a run may meet easy prompts only; ten minutes are an update of the largest runs",
    summary="{{ $labels.run }}: {{ $value | humanizePercentage }} of the groups teach nothing",
    when=f"more than {FLAT:.0%} of the groups of 30 minutes had scores that do not differ",
    means="The reward is 0, or full, for nearly every image of a prompt: no advantage, no gradient.",
    remedy="`flowfleet preview RECIPE` shows the spread inside groups. Add a dense reward beside a strict one, weigh prompts "
    "(prompts.tag_weights), raise rollout.noise_level or rollout.group_size. If rewards are full the run is done: `flowfleet stop RUN`.",
)  # fmt: skip
KL: Final = Alert(
    name="FlowfleetKlOutOfRange", area="learning", severity="warning",
    expr=promql(f"""
        {_divergence(FAST)}
        or on (run, estimator)
        {_divergence(SLOW)}"""),
    hold="2m", hold_reason="the mean over a window has smoothed single updates already",
    summary='{{ $labels.run }}: {{ $labels.estimator }} is {{ $value | printf "%.3g" }}, more than ten times its median',
    when=f"a divergence's mean of {FAST.newest} (or {SLOW.newest}) exceeds {KL_TIMES} times its median of {FAST.past} ({SLOW.past}); "
    f"at least {LEAST_NEWEST} and {KL_PAST} updates in the two windows",
    means="The policy runs away from the base, or from the policy that sampled; scales differ between objectives, so it is held against "
    "the run's own past.",
    remedy="Look at the samples and the frozen evaluation (`flowfleet report RUN`). Raise kl_beta, lower learner.learning_rate, or set "
    "learner.decay_steps.",
)  # fmt: skip
RATIO: Final = Alert(
    name="FlowfleetRatioOutOfRange", area="learning", severity="warning",
    expr=promql(f"""
        {_ratio(STEP_RATIO, "!~")}
        or on (run)
        {_ratio(IMAGE_RATIO, "=~")}"""),
    hold="1m", hold_reason="quick runs show it in several updates; a slow run's update stands for longer than a minute",
    summary='{{ $labels.run }}: a policy ratio is {{ $value | printf "%.3g" }}',
    when=f"the newest update's least or largest ratio lies outside {STEP_RATIO[0]:g} to {STEP_RATIO[1]:g} ({IMAGE_RATIO[0]:g} to "
    f"{IMAGE_RATIO[1]:g} for {IMAGE_OBJECTIVES.replace('|', ', ')})",
    means="Sampling and recomputation disagree, or one update moves the policy far beyond its clip.",
    remedy='objective_value{name="mismatch_abs_dlogp"} near the clip range: set learner.anchor=recompute and equal micro_batch. Else '
    "lower learner.learning_rate or learner.optimizer_steps.",
)  # fmt: skip
CLIP: Final = Alert(
    name="FlowfleetClipOutOfRange", area="learning", severity="warning",
    expr=f"sum by (run) (avg_over_time(flowfleet_clipped_ratio[15m])) > {CLIPPED}",
    hold="5m", hold_reason="one batch may be clipped far; five minutes more than the 15 of the mean are none",
    summary="{{ $labels.run }}: the clip stops {{ $value | humanizePercentage }} of the samples",
    when=f"in the mean of 15 minutes the clip stopped more than {CLIPPED:.0%} of the samples, both sides together",
    means="The clip does everything: most images no longer teach. The range is of another latent size or window, or the rate is too high.",
    remedy="Widen learner.objective.clip_range (docs/objectives.md, Kernels: it goes with 1 / sqrt of the latent's elements), or lower "
    "learner.learning_rate.",
)  # fmt: skip
EVALUATION_FALLS: Final = Alert(
    name="FlowfleetEvaluationFalls", area="learning", severity="warning",
    expr=promql(f"""
        (
          max by (run, reward, snapshot) (max_over_time(flowfleet_evaluation_score{{task="all"}}[1d]))
            - max by (run, reward, snapshot) (flowfleet_evaluation_score{{task="all"}})
          > on (run, reward) group_left ()
          {EVALUATION_DEVIATIONS} * max by (run, reward) (quantile_over_time(0.5, flowfleet_reward_group_std[1d]))
        )
        and on (run) max by (run) (deriv(flowfleet_weighted_reward[1d])) > 0"""),
    hold="2m", hold_reason="an evaluation stands until the next one, so two minutes cost nothing and pass over a scrape between two writes",
    summary='{{ $labels.run }}: the evaluation of {{ $labels.reward }} fell by {{ $value | printf "%.3g" }} from its best, while '
    "training rises",
    when=f"a frozen evaluation lies more than {EVALUATION_DEVIATIONS:g} standard deviations inside groups below its best of a day, and "
    "the training reward's slope over that day is positive",
    means="What is trained no longer helps on unseen prompts: over-optimization, or a task that is forgotten.",
    remedy="`flowfleet report RUN`: which task fell? Evaluate an earlier version (`flowfleet eval RUN --version N`), export the best "
    "one that is kept (`flowfleet export RUN --version N`), and go on with decay_steps or a higher kl_beta.",
)  # fmt: skip
LEARNING: Final = (NON_FINITE, REWARD_COLLAPSE, HACKING, NO_SIGNAL, KL, RATIO, CLIP, EVALUATION_FALLS)
