"""Calling a server that may be busy, slow, or gone: requests with a deadline, and retries that back off.

What may pass (no connection, a time-out, a server overloaded or restarting) is tried again, after pauses
that double and are drawn at random so that many callers do not come back at once. What does not pass (a request that
the server refuses) is not. Proxies and credentials of the environment are never used.
"""

import random
import time
import weakref
from collections.abc import Mapping
from typing import Any

from branchtree_rewards.shared.source import cause

PASSING = frozenset({408, 429, 500, 502, 503, 504})
FIRST_PAUSE = 0.5  # seconds, at most
LONGEST_PAUSE = 20.0  # seconds
SHOWN = 300  # characters of a server's answer in a message


class CallError(Exception):
    """A request that got no good answer, retries included; its text says what happened.

    Attributes:
        status: The last answer's HTTP status, or None if there was none.
        passing: Whether the last failure was of a kind that may pass.
    """

    def __init__(self, reason: str, status: int | None, passing: bool) -> None:
        super().__init__(reason)
        self.status = status
        self.passing = passing


class Caller:
    """Sends requests to one server. May be used from several threads at once.

    Args:
        base: The server's URL; paths are appended to it.
        timeout: Seconds that one request may take, from connecting to the end of the answer.
        retries: How often a request that failed is sent again.
        headers: Sent with every request.
        connections: How many requests may be under way at once.
    """

    def __init__(
        self, base: str, timeout: float, retries: int, headers: Mapping[str, str], connections: int = 8
    ) -> None:
        import httpx

        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.Client(timeout=timeout, limits=limits, headers=dict(headers), trust_env=False)
        # Whoever drops a caller without closing it leaves no open connections behind.
        self._close = weakref.finalize(self, self._client.close)
        self._base, self._timeout, self._retries = base.rstrip("/"), timeout, retries

    def get(self, path: str, retries: int | None = None) -> bytes:
        """GET ``path``, with ``retries`` instead of the usual ones, and return the answer's body. Raises CallError."""
        return self._call("GET", path, self._retries if retries is None else retries)

    def post(self, path: str, json: Any = None, content: bytes | None = None) -> bytes:
        """POST ``json`` or the bytes ``content`` to ``path``, and return the answer's body. Raises CallError."""
        return self._call("POST", path, self._retries, json=json, content=content)

    def close(self) -> None:
        """Close all connections."""
        self._close()

    def _call(self, method: str, path: str, retries: int, **settings: Any) -> bytes:
        draw = random.Random()
        for attempt in range(retries + 1):
            try:
                return self._once(method, path, **settings)
            except CallError as failure:
                if not failure.passing or attempt == retries:
                    raise
            time.sleep(draw.uniform(0.5, 1.0) * min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, **settings: Any) -> bytes:
        import httpx

        deadline = time.monotonic() + self._timeout
        url = self._base + path
        try:
            with self._client.stream(method, url, **settings) as response:
                pieces = []
                for piece in response.iter_bytes():  # from a server that may send little by little
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    pieces.append(piece)
                body = b"".join(pieces)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise CallError(f"no answer from {url} within {self._timeout:g} s", None, passing=True) from error
        except httpx.TransportError as error:
            reason = f"no answer from {url} ({cause(error)})"
            raise CallError(reason, None, passing=not isinstance(error, httpx.UnsupportedProtocol)) from error
        except (httpx.InvalidURL, httpx.DecodingError) as error:
            reason = f"cannot talk to {url} ({cause(error)})"
            raise CallError(reason, None, passing=False) from error
        if not response.is_success:
            text = " ".join(body.decode(errors="replace").split())
            text = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
            reason = f"{url} answered {response.status_code} {response.reason_phrase}: {text or 'and gave no reason'}"
            raise CallError(reason, response.status_code, passing=response.status_code in PASSING)
        return body
