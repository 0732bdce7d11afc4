"""The doctor's look at ports: those that a run needs are free, and nothing of Ray's is open to the network without a token."""

import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

from deploy.config import RunConfig
from deploy.doctor.checks import Bench, Row

DASHBOARD_PORT: Final = 8265
REPORT_PORT: Final = 8266
HEAD_PORTS: Final = {6379: "the head's GCS", 10001: "Ray Client"}
TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
JOBS_PATH: Final = "/api/jobs/"  # who may list jobs may submit one
ASK_S: Final = 5.0


class Door(StrEnum):
    """What a dashboard says to somebody without a token."""

    OPEN = "answers anybody"
    TOKEN = "asks for a token"
    SILENT = "does not answer"


def look_at_ports(config: RunConfig | None) -> Sequence[Row]:
    """The ports of /metrics, of Ray's dashboard and of `report --serve`, and that loopback can be listened on at all."""
    host, port = ("127.0.0.1", 0) if config is None else (config.cluster.metrics_host, config.cluster.metrics_port)
    bench = Bench(what="port metrics", rule=f"{host}:{port} is free (cluster.metrics_port)" if port else "loopback can be listened on")
    refusal = taken(host, port)
    remedy = "set cluster.metrics_port to a free one, or 0 for none; end who holds it"
    rows = [bench.fail(f"{host}:{port}: {refusal}", remedy) if refusal else bench.ok(f"port {port} is free" if port else "yes")]
    for what, number, remedy in (
        ("port dashboard", DASHBOARD_PORT, "if that is no Ray dashboard of yours: ray start --head --dashboard-port with another one"),
        ("port report", REPORT_PORT, "give `flowfleet report --serve` another --port"),
    ):
        bench, refusal = Bench(what=what, rule=f"127.0.0.1:{number} is free"), taken("127.0.0.1", number)
        rows.append(bench.warn(f"127.0.0.1:{number}: {refusal}", remedy) if refusal else bench.ok("free"))
    return rows


def taken(host: str, port: int) -> str:
    """Why nobody can listen there, "" when one can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def ask_dashboard(host: str, port: int) -> Door:
    """Ask for the list of jobs without a token, past any proxy."""
    shown = f"[{host}]" if ":" in host else host
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{shown}:{port}{JOBS_PATH}", timeout=ASK_S):
            return Door.OPEN
    except urllib.error.HTTPError as refusal:
        return Door.TOKEN if refusal.code in (401, 403) else Door.SILENT
    except (OSError, ValueError):
        return Door.SILENT


def look_at_dashboard(
    tables: Iterable[Path] = TABLES, port: int = DASHBOARD_PORT, ask: Callable[[str, int], Door] = ask_dashboard
) -> Sequence[Row]:
    """A Ray dashboard that the network reaches runs anybody's code, unless it asks for a token: it is asked."""
    bench = Bench(what="ray dashboard", rule=f"port {port} listens on loopback only, or asks for a token")
    wide = wide_listeners(tables, port)
    if not wide:
        return [bench.ok("not open to the network")]
    doors = {address: ask(_reachable(address), port) for address in wide}
    told = "; ".join(f"{address}:{port} {door}" for address, door in doors.items())
    remedy = "start Ray with --dashboard-host 127.0.0.1, or with RAY_AUTH_MODE=token and a token file of mode 600"
    if Door.OPEN in doors.values():
        return [bench.fail(told, remedy)]
    if Door.SILENT in doors.values() and os.environ.get("RAY_AUTH_MODE") != "token":
        return [bench.fail(f"{told}, and RAY_AUTH_MODE is not token", remedy)]
    return [bench.ok(told)]


def look_at_heads(tables: Iterable[Path] = TABLES) -> Sequence[Row]:
    """The other doors of a Ray head: who reaches them without a token runs code."""
    tables = tuple(tables)
    bench = Bench(what="ray head", rule="ports 6379 and 10001 are closed to the network, or Ray runs with tokens")
    wide = {port: found for port in HEAD_PORTS if (found := wide_listeners(tables, port))}
    told = "; ".join(f"{HEAD_PORTS[port]} on {', '.join(found)}:{port}" for port, found in wide.items())
    if not wide:
        return [bench.ok("not open to the network")]
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return [bench.ok(f"{told}, with RAY_AUTH_MODE=token")]
    return [
        bench.warn(f"{told}, and RAY_AUTH_MODE is not token", "if that is Ray: start it with RAY_AUTH_MODE=token; close the ports outside")
    ]


def _reachable(address: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def wide_listeners(tables: Iterable[Path], port: int) -> list[str]:
    """Local addresses beyond loopback that listen on a port, from the kernel's /proc/net/tcp tables."""
    lines = [line for table in tables if table.exists() for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    found = []
    for fields in (line.split() for line in lines):
        address, _, number = fields[1].partition(":")
        if fields[3] == "0A" and int(number, 16) == port:
            parsed = parse_address(address)
            mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
            if not (mapped or parsed).is_loopback:
                found.append(str(parsed))
    return found


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address as the kernel prints it: hex, each word of four bytes in this machine's order (little-endian)."""
    raw = bytes.fromhex(text)
    turned = b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4))
    return ipaddress.ip_address(turned)
