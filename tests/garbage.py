"""When Python looks for garbage: a pass over all that a worker has imported and built takes up to a second."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """A context in which nothing is freed but what no reference leads to."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
