"""`python -m deploy.monitoring.build` writes the dashboards as JSON into deploy/grafana/dashboards."""

from collections.abc import Mapping
from pathlib import Path

from deploy.monitoring import fleet, images, learning, pipeline, rewards

DASHBOARDS = Path(__file__).parent.parent / "grafana" / "dashboards"


def encoded() -> Mapping[str, str]:
    """File name -> JSON of every dashboard."""
    return {f"{board.slug}.json": board.encode() for board in (module.board() for module in (learning, pipeline, rewards, fleet, images))}


def write(folder: Path = DASHBOARDS) -> None:
    """Write every dashboard, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in encoded().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write()
