"""An S3 server on loopback (moto's) that can be stopped, started again with all it holds, made to answer 503, or to hang."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

SECRET = "planted-secret-8d1f6c27"
BUCKET = "runs"


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing."""


class S3Server:
    """One request at a time: moto looks for the name and puts in two steps, S3 in one."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server: BaseWSGIServer | None = None
        self.port = 0
        self.is_busy = False  # 503 to everything
        self.hang_s = 0.0  # before each answer
        self.num_requests = self.num_conditional_puts = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """WSGI."""
        self.num_requests += 1
        self.num_conditional_puts += environ["REQUEST_METHOD"] == "PUT" and environ.get("HTTP_IF_NONE_MATCH") == "*"
        time.sleep(self.hang_s)
        if self.is_busy:
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            body = b"<Error><Code>ServiceUnavailable</Code><Message>away for a while</Message></Error>"
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        with self._lock:
            return list(self._moto(environ, start_response))

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the port of the time before."""
        self._server = make_server("127.0.0.1", self.port, self, threaded=True, request_handler=Quiet)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections; what is stored stays."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def fill(self) -> None:
        """Make the bucket."""
        boto3.client("s3", endpoint_url=self.url, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1").create_bucket(
            Bucket=BUCKET
        )


def _forget_clients() -> None:
    """fsspec keeps one client a process, and with it the endpoint of whichever server came first."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def served() -> Iterator[S3Server]:
    """A running server whose endpoint and credentials stand in the environment."""
    server = S3Server()
    server.start()
    server.fill()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_DEFAULT_REGION", raising=False)
        _forget_clients()
        yield server
        _forget_clients()
    server.stop()
