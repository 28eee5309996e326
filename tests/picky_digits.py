"""The command line in several processes, with a digits reward that cannot read every sample.

As a script: ``picky_digits.py PROCESSES WORDS...``. It imports everything once and forks, which costs a fraction of as
many starts.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from branchtree_rewards.digits import Digits

from branchtree.cli import main
from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media

LEAST = -2.3
"""Log-probabilities below it count as unreadable."""


def read_picky(replace: Callable[[object, str, object], None]) -> None:
    """Have samples that are far from their digit not valid; ``replace`` sets an attribute."""
    plain = Digits.score

    def score(self: Digits, media: Media, conditions: Sequence[Condition]) -> Scores:
        scores = plain(self, media, conditions)
        valid = scores.valid & (scores.values > LEAST)
        return Scores(scores.values.where(valid, torch.nan), valid)

    replace(Digits, "score", score)


def fork(processes: int) -> int | None:
    """Start processes that find each other as accelerate's do; returns the rank in each, None in this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(processes):
        if os.fork() == 0:
            each = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in each.items()})
            return rank
    return None


def wait(processes: int) -> int:
    """Wait for all; as soon as one fails, end the others, which would wait for it. Returns the worst exit status."""
    statuses = []
    for _ in range(processes):
        statuses.append(os.waitstatus_to_exitcode(os.wait()[1]))
        if statuses[-1]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(0, signal.SIGTERM)
    return max(map(abs, statuses))


if __name__ == "__main__":
    os.setpgrp()
    count = int(sys.argv.pop(1))
    read_picky(setattr)
    for module in ("branchtree.training.trainer", "accelerate", "tiny_flux"):  # the last imports all that a FLUX needs
        import_module(module)
    if fork(count) is None:
        sys.exit(wait(count))
    main()
