"""Servers of rewards for tests: in a thread of this process, or in a process of their own; and the samples they score.

It is also run as a program, as one of several clients: see ``main``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from forked import Python
from patience import PATIENCE
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media, RewardAdapter
from branchtree.serving.server import RewardServer, bind
from branchtree.serving.service import NamedAdapter, Service

CPU = torch.device("cpu")
TOKEN = "a token of the tests"
VARIABLE = "BRANCHTREE_TEST_TOKEN"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", VARIABLE: TOKEN}
SERVED: dict[str, list[str]] = {
    "digits": ["digits"],
    "motion": ["motion_smoothness", "measure=subject"],
    "hps": ["hps", "path=random:small", "scale=x100"],
}


class Mean:
    """A reward of tests: the mean of each sample's pixels."""

    modalities: frozenset[str] = frozenset({"image"})

    def load(self, device: torch.device) -> None:
        """Nothing is needed."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """The means, exact for small whole numbers."""
        values = media.pixels.flatten(1).mean(dim=1)
        return Scores(values, torch.ones(len(values), dtype=torch.bool))


@contextmanager
def serving(
    reward: RewardAdapter,
    name: str = "mean",
    options: Mapping[str, Any] | None = None,
    token: str | None = None,
    max_body: int = 2**20,
    port: int = 0,
    until_ready: bool = True,
) -> Iterator[str]:
    """A context in which a thread serves a reward; gives the URL."""
    service = Service(NamedAdapter(name, options or {}, reward), CPU, max_body)
    server = RewardServer(service, bind("127.0.0.1", port, token), token)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda _: ready.set(),))
    thread.start()
    try:
        assert not until_ready or ready.wait(PATIENCE)
        yield server.url
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Process:
    """``branchtree serve-reward`` in a process of its own, at a free port."""

    def __init__(self, *words: str, site: Path | None = None) -> None:
        """``site`` is a folder with further distributions."""
        command = ["-m", "branchtree", "serve-reward", *words, "--port", "0", "--token-env", VARIABLE]
        environment = ENVIRONMENT if site is None else {**ENVIRONMENT, "PYTHONPATH": str(site)}
        self._process = Python(*command, environment=environment)
        self.line = ""

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_running():
            self.send(signal.SIGKILL)
        self.ended()

    def await_ready(self) -> None:
        """Wait for the line that tells where it serves."""
        self._process.wait_for_output("\n")
        self.line = self._process.out.partition("\n")[0]

    @property
    def url(self) -> str:
        """Where it serves."""
        return next(word for word in self.line.split() if word.startswith("http://"))

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send(number)

    def ended(self) -> int:
        """Wait for the end, and give the exit code."""
        return self._process.ended()


def samples(kind: str, seed: int, folder: Path) -> tuple[Media, list[Condition]]:
    """Samples for a served reward, and conditions of all kinds; some cannot be scored."""
    source = torch.Generator().manual_seed(seed)
    if kind == "motion":
        videos = torch.rand(3, 1, 3, 16, 24, generator=source).expand(-1, 5, -1, -1, -1).clone()
        for frame in range(5):
            videos[:, frame] = videos[:, 0].roll(frame, -1)
        videos[2, 1, 0, 0, 0] = torch.nan
        return Media(videos=videos, fps=8.0), [
            Condition("a pan to the right", image=folder / "first.png", metadata={"seed": seed}),
            Condition("a pan to the right", image=folder / "first.png", location="prompts.jsonl:2"),
            Condition("a pan, 左から右へ", negative_prompt="shaking"),
        ]
    images = torch.rand(4, 3, 20, 28, generator=source)
    images[3, 0, 0, 0] = torch.inf
    return Media(images=images), [Condition(f"the digit {word}") for word in ("seven", "3", "of none", "two")]


def parts(scores: Scores) -> dict[str, Tensor]:
    """All that scores hold, as bits, so that one NaN equals another."""
    tensors = {"values": scores.values, "valid": scores.valid, "raw": scores.raw, **scores.details}
    return {name: _bits(tensor) for name, tensor in tensors.items() if tensor is not None}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def main(seed: int, folder: Path, urls: Mapping[str, str]) -> None:
    """Score samples by every server in turn, several times over; leave the scores in ``folder``."""
    from branchtree_rewards.remote import Remote, RemoteConfig

    rewards = {kind: Remote(RemoteConfig(url=url, token_env=VARIABLE, wait=30)) for kind, url in urls.items()}
    for reward in rewards.values():
        reward.load(CPU)
    for turn in range(3):
        for kind, reward in rewards.items():
            scores = reward.score(*samples(kind, seed + turn, folder))
            torch.save((parts(scores), dict(scores.reasons)), folder / f"{kind}-{seed + turn}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
