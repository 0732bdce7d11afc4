"""The Images dashboard: each sensor beside the base model's band, so that a hacked reward is seen in the images."""

from deploy.monitoring.board import Board, Section, sensor_variable
from deploy.monitoring.expressions import RANGE, gauge, or_zero, rises
from deploy.monitoring.panels import COUNT, GREEN, PLAIN, RED, PanelBuilder, Step, above, ask, frame, lines, now, number, repeated

CHOSEN = 'sensor="$sensor"'


def board() -> Board:
    """The dashboard."""
    return Board(
        slug="images",
        title="Images",
        text="Image statistics and watch rewards beside the base model's band.",
        variables=(sensor_variable(),),
        sections=(
            Section(title="All sensors", panels=_all_sensors()),
            Section(title="Each sensor beside the base's band", panels=(_one_sensor(),)),
        ),
    )


def outside() -> str:
    """PromQL of the sensors outside their bands: below the lower end, or above an upper end that exists."""
    position, high = gauge("sensor_position"), gauge("sensor_high")
    return f"({position} < -1) or (({position} > 1) and on (sensor) {high})"


def _all_sensors() -> tuple[PanelBuilder, ...]:
    ends = (Step(value=None, color=RED), Step(value=-1, color=GREEN), Step(value=1, color=RED))
    return (
        lines(
            frame(
                "Positions in the bands",
                PLAIN,
                "Every sensor on one scale: -1 and 1 are the ends of its band. Outside while a train reward rises: look at the samples. "
                "diversity and watch rewards have no upper end.",
                width=14,
                height=10,
            ),
            ask(gauge("sensor_position"), "{{sensor}}"),
            steps=ends,
        ),
        number(
            frame(
                "Outside",
                "suffix:sensors",
                "Sensors outside their bands now; one is worth a look at the report's samples.",
                width=4,
                height=10,
            ),
            now(or_zero(f"count({outside()})")),
            steps=above((1, RED)),
        ),
        number(
            frame(
                "Alerts by sensor",
                COUNT,
                "Times that a sensor left its band while a train reward rose, in the time shown; each is worth a look at the samples.",
                width=6,
                height=10,
            ),
            now(rises("sensor_alerts", "sensor", over=RANGE), "{{sensor}}"),
            steps=above((0.5, RED)),
        ),
    )


def _one_sensor() -> PanelBuilder:
    panel = lines(
        frame(
            "$sensor",
            PLAIN,
            "Smoothed over 5 updates, with the band of the base model (dashed); outside it while a reward rises, the reward may be hacked.",
            width=8,
        ),
        ask(gauge("sensor_value", CHOSEN), "{{sensor}}"),
        ask(gauge("sensor_low", CHOSEN), "band: low"),
        ask(gauge("sensor_high", CHOSEN), "band: high"),
        dashed="^band: ",
    )
    return repeated(panel, "sensor", 3)
