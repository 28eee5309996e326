"""Trace one iteration of a recipe and print how many files and functions of ours it passes through, and how deep.

    python scripts/trace_iteration.py quickstart

Counted are frames of branchtree, branchtree_adapters and branchtree_rewards, in all threads, from the call of
``iterate`` to its return: files, named functions (comprehensions and lambdas apart), the frames between the rollout's
request for a prediction and the denoiser, and the deepest stack. The second iteration is traced, so that what is done
once a run does not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(str(ROOT / name) for name in ("branchtree", "adapters", "rewards"))
ITERATION = str(ROOT / "branchtree/training/iteration.py")
ROLLOUT = str(ROOT / "branchtree/core/rollout.py")


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of ours from the innermost outwards."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGES):
            yield frame
        frame = frame.f_back


class Trace:
    """Records the calls of our functions while it is switched on."""

    def __init__(self) -> None:
        self.codes: Counter[CodeType] = Counter()
        self.inside = False  # an iteration
        self.deepest: list[str] = []
        self.denoiser: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See ``sys.setprofile``."""
        code = frame.f_code
        if event in {"call", "return"} and code.co_name == "iterate" and code.co_filename == ITERATION:
            self.inside = event == "call"
        if not self.inside or event != "call" or not code.co_filename.startswith(PACKAGES):
            return
        self.codes[code] += 1
        named = [describe(each) for each in stack(frame)]
        if len(named) > len(self.deepest):
            self.deepest = named

    def forward(self, module: Any, arguments: Any) -> None:
        """Note the frames under a denoiser's forward that the rollout asked for."""
        if not type(module).__name__.endswith("DModel"):  # diffusers' name for a transformer as a whole
            return
        frames = list(stack(sys._getframe()))
        asked = next((i for i, frame in enumerate(frames) if frame.f_code.co_filename == ROLLOUT), None)
        if asked is not None and asked > len(self.denoiser):
            self.denoiser = [describe(frame) for frame in frames[:asked]]

    def switch(self, on: bool) -> None:
        """Begin or end recording, in this thread and in those that start from now on."""
        threading.setprofile(self if on else None)
        sys.setprofile(self if on else None)

    def report(self, listing: bool) -> str:
        """Return the figures, and under ``listing`` the functions of each file."""
        named = [code for code in self.codes if not code.co_name.startswith("<")]
        files = Counter(str(Path(code.co_filename).relative_to(ROOT)) for code in named)
        lines = [
            f"files: {len(files)}",
            f"named functions: {len(named)}",
            f"frames between a request of the rollout and the denoiser: {len(self.denoiser)}",
            *(f"    {each}" for each in self.denoiser),
            f"deepest stack: {len(self.deepest)}",
            *(f"    {each}" for each in self.deepest),
        ]
        if listing:
            for file in sorted(files):
                names = sorted(code.co_qualname for code in named if code.co_filename.endswith(file))
                lines.append(f"{file}: {', '.join(names)}")
        return "\n".join(lines)


def describe(frame: FrameType) -> str:
    """Return a frame's file and function."""
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}: {frame.f_code.co_qualname}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--list", action="store_true", help="also list the functions of each file")
    arguments = parser.parse_args()

    from torch.nn.modules.module import register_module_forward_pre_hook

    from branchtree.api import train
    from branchtree.plugins import Callback

    trace = Trace()

    class Second(Callback):
        def on_iteration(self, iteration: int, metrics: Any) -> None:
            trace.switch(iteration == 0)

    register_module_forward_pre_hook(trace.forward)
    overrides = {"run.iterations": 3, "run.sample_every": 100, "run.checkpoint_every": 100}
    with tempfile.TemporaryDirectory() as folder:
        train(recipe=arguments.recipe, output=Path(folder) / "run", overrides=overrides, callbacks=[Second()])
    print(trace.report(arguments.list))


if __name__ == "__main__":
    main()
