"""Debian's Prometheus on loopback with storage of its own, asked over its HTTP API."""

import json
import math
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from deploy.local_cluster import free_port

ROOT = Path(__file__).resolve().parent.parent
BINARIES = ROOT / "build" / "prometheus" / "usr" / "bin"
RULES = ROOT / "deploy" / "prometheus" / "rules"
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: flowfleet
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def wait_until(holds: Callable[[], bool], what: str, *, seconds: float, every_s: float = 1.0) -> None:
    """Wait for a condition. Raises AssertionError naming what did not come."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come in {seconds:g} s"
        time.sleep(every_s)


class PrometheusServer:
    """A context: the server runs inside it.

    Args:
        folder: an empty one for configuration, storage and log.
        target_port: of the /metrics on loopback that it scrapes every second, as job flowfleet.
    """

    def __init__(self, folder: Path, target_port: int) -> None:
        self._folder, self._port = folder, free_port()
        (folder / "prometheus.yml").write_text(CONFIG.format(port=target_port, rules=json.dumps(str(RULES / "*.yml"))))

    def __enter__(self) -> "PrometheusServer":
        command = [
            str(BINARIES / "prometheus"), f"--config.file={self._folder / 'prometheus.yml'}", f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}", "--log.level=warn",
        ]  # fmt: skip
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._is_ready, "Prometheus", seconds=120)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(60)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "prometheus.log").read_text()
        try:
            with urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except (URLError, TimeoutError):
            return False

    def get(self, path: str, query: Mapping[str, object] | None = None) -> Any:
        """The `data` of an API call. Raises HTTPError for one that Prometheus refuses."""
        with urlopen(f"http://127.0.0.1:{self._port}/api/v1/{path}?{urlencode(query or {})}", timeout=60) as answer:
            content = json.load(answer)
        assert content["status"] == "success"
        return content["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression is now, one finite value a series."""
        found = [float(series["value"][1]) for series in self.get("query", {"query": expression})["result"]]
        return [value for value in found if math.isfinite(value)]

    def values_since(self, expression: str, seconds: float) -> list[float]:
        """Every finite value of an expression over the last seconds, all series together."""
        end = time.time()
        result = self.get("query_range", {"query": expression, "start": end - seconds, "end": end, "step": 1})["result"]
        found = [float(value) for series in result for _, value in series["values"]]
        return [value for value in found if math.isfinite(value)]

    def labels(self, selector: str, label: str) -> list[str]:
        """The values that a label has in the series of a selector, as Grafana's label_values asks."""
        return sorted(self.get(f"label/{label}/values", {"match[]": selector}))
