"""The shared token: read from the environment, sent as a bearer token, compared in constant time, never printed."""

from __future__ import annotations

import hmac
import os

from branchtree.errors import RewardError


def read_token(variable: str | None) -> str | None:
    """Return the token in an environment variable, or None if no variable is named.

    Raises RewardError if the variable is not set, empty, or has characters that an HTTP header cannot contain.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise RewardError(
            f"environment variable {variable} is not set, or empty: it must hold the token that the reward's server "
            "and its clients share"
        )
    if not (token.isascii() and token.isprintable()):
        raise RewardError(f"the token in environment variable {variable} must be of printable ASCII characters")
    return token


def authorization(token: str | None) -> dict[str, str]:
    """Return the HTTP headers that carry a token."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def admits(token: str | None, given: str | None) -> bool:
    """Return whether ``given``, an Authorization header's value, has the token; True where there is no token."""
    if token is None:
        return True
    return hmac.compare_digest((given or "").encode(), f"Bearer {token}".encode())
