"""Each alert of learning, firing and not firing: values chosen so that the result follows by hand."""

from tests.alert_cases import Case, Firing, run, samples, tiny

MINUTES = 90
UPDATES = {run("update"): f"0+1x{MINUTES}"}  # one a minute: ten in ten minutes
SLOW_UPDATES = {run("update"): samples(range(56), hold=10)}  # one in ten minutes
NOISY = [0.6, 0.7] * 35  # deviation .05; a window of ten minutes holds eleven samples, six of .7 at its best: mean .6545
KL_FLAT = [1e-4] * 60
SCORE = run("evaluation_score", reward="geneval", task="all", snapshot="ema")
STD = run("reward_group_std", reward="geneval")


def _collapse(name: str, values: list[float], at: str, fires: tuple[Firing, ...] = ()) -> Case:
    series = {**UPDATES, run("weighted_reward"): samples(values)}
    return Case(alert="FlowfleetRewardCollapse", name=name, series=series, at=at, fires=fires)


def _slow_collapse(name: str, values: list[float], fires: tuple[Firing, ...] = ()) -> Case:
    series = {**SLOW_UPDATES, run("weighted_reward"): samples(values, hold=10)}
    return Case(alert="FlowfleetRewardCollapse", name=name, series=series, at="7h", fires=fires)


def _kl(name: str, values: list[float], fires: tuple[Firing, ...] = ()) -> Case:
    series = {**UPDATES, run("kl", estimator="kl"): samples(values)}
    return Case(alert="FlowfleetKlOutOfRange", name=name, series=series, at="74m", fires=fires)


def _ratio(name: str, objective: str, ends: tuple[float, float], fires: tuple[Firing, ...] = ()) -> Case:
    series = {
        run("run_info", objective=objective, incarnation="1", version="0.1.0"): "1x20",
        run("policy_ratio_min"): samples([ends[0]] * 20), run("policy_ratio_max"): samples([ends[1]] * 20),
    }  # fmt: skip
    return Case(alert="FlowfleetRatioOutOfRange", name=name, series=series, at="5m", fires=fires)


def _clip(name: str, up: str, down: str, fires: tuple[Firing, ...] = ()) -> Case:
    series = {run("clipped_ratio", side="up"): up, run("clipped_ratio", side="down"): down}
    return Case(alert="FlowfleetClipOutOfRange", name=name, series=series, at="20m", fires=fires)


def _evaluation(name: str, scores: str, rewards: str, fires: tuple[Firing, ...] = ()) -> Case:
    series = {SCORE: scores, STD: "0.3x90", run("weighted_reward"): rewards}
    return Case(alert="FlowfleetEvaluationFalls", name=name, series=series, at="60m", fires=fires)


def _plain(alert: str, name: str, series: dict[str, str], at: str, fires: tuple[Firing, ...] = ()) -> Case:
    return Case(alert=f"Flowfleet{alert}", name=name, series=series, at=at, fires=fires)


TRAINING_CASES = (
    _plain("NonFinite", "a skipped step fires at once", {run("skipped_steps_total"): "0 0 1 1"}, "2m", tiny()),
    _plain("NonFinite", "none was skipped", {run("skipped_steps_total"): "0x30"}, "20m"),
    _plain("NonFinite", "a step skipped long ago is past", {run("skipped_steps_total"): "0 1 1x40"}, "30m"),
    _collapse("from .65 to .1 is a collapse once the window has left the height", [*NOISY, *[0.1] * 20], "85m", tiny("0.555")),
    _collapse("a noisy plateau is none", [*NOISY, *[0.6, 0.7] * 10], "85m"),
    _collapse("ten hard batches in a row are none", [*NOISY, *[0.55] * 20], "85m"),
    _collapse("a reward that rises is none", [0.01 * step for step in range(90)], "85m"),
    _collapse("too few updates tell nothing", [0.6, 0.7, 0.65, 0.6, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], "14m"),
    _slow_collapse("updates of ten minutes collapse too", [*[0.6, 0.7] * 14, *[0.1] * 15], tiny("0.55")),
    _slow_collapse("updates of ten minutes on a plateau do not", [0.6, 0.7] * 21),
    _slow_collapse("PickScore's 22 with a deviation of .2 falls by half a point: noise", [*[21.8, 22.2] * 14, *[21.5] * 15]),
    _plain("HackingSuspected", "a sensor's alert fires at once, and names it",
           {run("sensor_alerts_total", sensor="dark_share"): "0 0 1 1", run("sensor_alerts_total", sensor="diversity"): "0x9"}, "2m",
           tiny(sensor="dark_share")),
    _plain("HackingSuspected", "quiet sensors", {run("sensor_alerts_total", sensor="dark_share"): "0x90"}, "80m"),
    _plain("NoSignal", "nine groups of ten are flat", {run("flat_groups_ratio"): "0.9x60"}, "15m", tiny("90%")),
    _plain("NoSignal", "a quarter is flat", {run("flat_groups_ratio"): "0.25x60"}, "40m"),
    _plain("NoSignal", "one flat update among others", {run("flat_groups_ratio"): "0.2x20 1x3 0.2x30"}, "24m"),
    _kl("a hundred times its median", [*KL_FLAT, *[1e-2] * 15], tiny("0.01", estimator="kl")),
    _kl("it grows with the square of time, as healthy ones do", [1e-6 * step**2 for step in range(75)]),
    _kl("one update far out is smoothed", [*KL_FLAT, 4e-3, *[1e-4] * 20]),
    Case(alert="FlowfleetKlOutOfRange", name="updates of ten minutes", at="9h", fires=tiny("0.01", estimator="kl_exact"),
         series={**SLOW_UPDATES, run("kl", estimator="kl_exact"): samples([*[1e-4] * 40, *[1e-2] * 15], hold=10)}),
    Case(alert="FlowfleetKlOutOfRange", name="ten updates say nothing yet", at="9m",
         series={**UPDATES, run("kl", estimator="kl"): samples([0.0] * 8 + [1e-3] * 4)}),
    _ratio("a step's ratio of 1.3", "grpo", (0.999, 1.3), tiny("1.3")),
    _ratio("a step's ratio of .5", "dance", (0.5, 1.001), tiny("0.5")),
    _ratio("an image's ratio of 1.3 is in range", "awm", (0.7, 1.3)),
    _ratio("an image's ratio of 20", "vgrpo", (0.7, 20), tiny("20")),
    _ratio("ratios near 1", "grpo", (0.998, 1.003)),
    _clip("both sides together", "0.5x60", "0.4x60", tiny("90%")),
    _clip("half of the samples", "0.3x60", "0.2x60"),
    _evaluation("it fell by half a deviation while training rises", "0.7x20 0.85x20 0.7x40", "0.5+0.001x90",
                tiny("0.15", reward="geneval", snapshot="ema")),
    _evaluation("it fell by less than evaluations scatter", "0.7x20 0.85x20 0.8x40", "0.5+0.001x90"),
    _evaluation("training falls with it: another alert's matter", "0.7x20 0.85x20 0.7x40", "0.8-0.001x90"),
    _evaluation("it rises", "0.7x20 0.75x20 0.8x40", "0.5+0.001x90"),
)  # fmt: skip
