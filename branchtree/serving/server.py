"""The server process: its socket, its start, and its end."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from branchtree.errors import RewardError, shortened
from branchtree.serving.service import Service
from branchtree.serving.wire import Info

GRACE = 30  # seconds that running requests have after the signal to end
KEEP_ALIVE = 60  # seconds; longer than clients keep connections, so that none is closed while a client reuses it


def require_packages() -> None:
    """Raise RewardError that says what to install, unless FastAPI and uvicorn are installed."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RewardError(
            f"serving a reward needs the package '{error.name}'; run: pip install 'branchtree-grpo[serve]'"
        ) from None


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """Return a socket bound to an address, at a free port if ``port`` is 0.

    Raises RewardError if the address cannot be used, or if other machines can reach it and there is no token.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no name of a machine"
        raise RewardError(
            f"host '{shortened(host)}' is not known ({reason}); give an address of this machine"
        ) from None
    if token is None and not all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found):
        raise RewardError(
            f"host '{host}' can be reached from other machines: give --token-env NAME, the environment variable that "
            "holds the token which clients must show, or serve this machine alone at 127.0.0.1"
        )
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise RewardError(f"cannot listen at {host}, port {port}: {error.strerror}; give another --port") from None
    return bound


class RewardServer:
    """Serves a reward at a bound socket until it is stopped. It listens while the reward is still loading."""

    def __init__(self, service: Service, bound: socket.socket, token: str | None) -> None:
        import uvicorn

        from branchtree.serving.app import make_app

        host, port = bound.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._service, self._bound = service, bound
        config = uvicorn.Config(
            make_app(service, token),
            lifespan="off",
            log_config=None,
            access_log=False,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE,
        )
        self._server = uvicorn.Server(config)

    def run(self, on_ready: Callable[[Info], None]) -> None:
        """Serve until SIGTERM, SIGINT or ``stop``; ``on_ready`` is called when the reward is loaded.

        Raises RewardError if the reward cannot be loaded.
        """
        with _handled_signals(self.stop):
            asyncio.run(self._serve(on_ready))

    def stop(self) -> None:
        """End after the running requests; may be called from any thread."""
        self._server.should_exit = True

    async def _serve(self, on_ready: Callable[[Info], None]) -> None:
        loading = asyncio.create_task(self._load(on_ready))
        try:
            await self._server.serve(sockets=[self._bound])
        finally:
            self._bound.close()
            self._service.close()
        if loading.done():
            loading.result()
        loading.cancel()

    async def _load(self, on_ready: Callable[[Info], None]) -> None:
        try:
            on_ready(await self._service.load())
        except BaseException:
            self.stop()
            raise


@contextmanager
def _handled_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Return a context in which SIGTERM and SIGINT call ``stop`` and do nothing else.

    While it serves, uvicorn has its own handlers. When it has ended, it raises the signal again for the handlers that
    were set before: without these, the process would die of a signal that it has already handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
