"""A run's report over HTTP, for browsers of this machine: made again when the run has written something."""

from __future__ import annotations

import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from branchtree.errors import OutputError
from branchtree.report.page import render_report
from branchtree.report.read import read_run
from branchtree.run.directory import LOGS, SAMPLES, SUMMARY, TREES
from branchtree.run.lock import LOCK

HOST = "127.0.0.1"
RELOAD = 10
"""Seconds after which a browser asks again while the run trains."""


class LiveReport:
    """A server of one page. Raises OutputError if there is no run or the port is taken."""

    def __init__(self, run: Path, port: int) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._stamp: object = None
        self._page, self._running = b"", False
        self.refresh()
        try:
            self._server = ThreadingHTTPServer((HOST, port), _handler(self))
        except OSError as error:
            raise OutputError(f"cannot listen at port {port}: {error.strerror}; give another --port") from None

    @property
    def url(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self._server.server_port}/"

    @property
    def hosts(self) -> frozenset[str]:
        """What requests may name as the host: no web page elsewhere reads the report under a name of its own."""
        return frozenset(f"{name}:{self._server.server_port}" for name in (HOST, "localhost"))

    def run(self) -> None:
        """Answer requests until ``close``, or until the process is interrupted."""
        with suppress(KeyboardInterrupt):
            self._server.serve_forever()

    def close(self) -> None:
        """End ``run`` in another thread."""
        self._server.shutdown()

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.server_close()

    def refresh(self) -> tuple[bytes, bool]:
        """Return the page as it is now, and whether the run trains. Raises OutputError if it cannot be read."""
        with self._lock:
            stamp = _stamp(self._run)
            if stamp != self._stamp:
                run = read_run(self._run)
                self._page, self._running = render_report(run).encode(), run.state == "running"
                self._stamp = stamp
            return self._page, self._running


def _stamp(run: Path) -> object:
    """Return what differs once the run has written something."""
    found = []
    for name in (*LOGS, SUMMARY, SAMPLES, TREES, LOCK):
        try:
            about = (run / name).stat()
        except OSError:
            continue
        found.append((name, about.st_mtime_ns, about.st_size))
    return found


def _handler(report: LiveReport) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host") not in report.hosts:
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            if self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                page, running = report.refresh()
            except OutputError as error:
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            if running:
                self.send_header("Refresh", str(RELOAD))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep requests out of the terminal."""

    return Handler
