"""A distribution whose plug-ins bring on what can happen to a run: a full disk, a vanished file, a slow reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guests import Outcome, fake_distribution

SETTINGS: dict[str, Any] = {"run.iterations": 6, "run.checkpoint_every": 1, "evaluation": None, "run.tree_every": 100}
"""What the fixture ``cli`` changes of the recipe ``guest``."""

MODULE = """
    import os
    import resource
    import threading
    import time
    from pathlib import Path

    import torch
    from pydantic import BaseModel

    from branchtree.data.frames import first_frame
    from branchtree.plugins.hookspecs import hookimpl
    from branchtree.plugins import Callback
    from branchtree_guest.model import GuestGaussian, GuestGaussianConfig
    from branchtree_guest.reward import Brightness, BrightnessConfig

    WHOLE = resource.getrlimit(resource.RLIMIT_FSIZE)


    def allow(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, WHOLE[1]))


    class Config(BaseModel):
        at: int  # after this iteration
        room: int | None = None  # files may grow to so many bytes
        log: int | None = None  # metrics.jsonl may grow by so many bytes
        remove: Path | None = None
        block: str | None = None  # of this name there is a file in the run's directory then, where a folder should be
        error: str | None = None  # raised with this message
        hook: str = "on_iteration"  # or on_start, on_evaluation, on_end, whatever the iteration
        interrupt: bool = False  # as Ctrl-C would
        fail: str | None = None  # what a fragile model or reward fails in from then on


    class Mishap(Callback):
        def __init__(self, config):
            self.config = config

        def on_start(self, output, iteration, iterations):
            self.metrics = output / "metrics.jsonl"

            self.happen("on_start")

        def on_evaluation(self, iteration, figures):
            self.happen("on_evaluation")

        def on_end(self, output):
            self.happen("on_end")

        def on_iteration(self, iteration, metrics):
            if iteration == self.config.at:
                self.happen("on_iteration")

        def happen(self, hook):
            config = self.config
            if hook != config.hook:
                return
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()  # what is being written is not what shall fail
            if config.room is not None:
                allow(config.room)
            if config.log is not None:
                allow(self.metrics.stat().st_size + config.log)
            if config.remove is not None:
                config.remove.unlink()
            if config.block is not None:
                (self.metrics.parent / config.block).parent.mkdir(exist_ok=True)
                (self.metrics.parent / config.block).write_text("in the way")
            if config.fail is not None:
                os.environ["FAIL"] = config.fail
            if config.interrupt:
                raise KeyboardInterrupt
            if config.error is not None:
                raise ValueError(config.error)


    class Crowded(GuestGaussian):
        def export(self, directory, denoiser_state=None):
            if "CROWDED" in os.environ:
                allow(1000)
            super().export(directory, denoiser_state)


    class Framed(GuestGaussian):
        def check(self, condition):
            first_frame(condition)

        def encode(self, conditions):
            for condition in conditions:
                first_frame(condition)
            return super().encode(conditions)


    class Fragile(GuestGaussian):
        def decode(self, latents):
            if os.environ.get("FAIL") == "decoder":
                raise ZeroDivisionError("the decoder broke")
            if os.environ.get("FAIL") == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().decode(latents)


    class Brittle(Brightness):
        def score(self, media, conditions):
            if os.environ.get("FAIL") == "reward":
                raise ConnectionError("the judge does not answer")
            return super().score(media, conditions)


    class Slow(Brightness):
        def score(self, media, conditions):
            if "SLOW" in os.environ:
                print("scoring", flush=True)
                time.sleep(float(os.environ["SLOW"]))
            return super().score(media, conditions)


    @hookimpl
    def register_models(register):
        for build in (Crowded, Framed, Fragile):
            register(build.__name__.lower(), build=build, config=GuestGaussianConfig, summary="for tests")


    @hookimpl
    def register_rewards(register):
        for build in (Slow, Brittle):
            register(build.__name__.lower(), build=build, config=BrightnessConfig, summary="for tests")


    @hookimpl
    def register_callbacks(register):
        register("mishap", build=Mishap, config=Config, summary="for tests")
"""


def mishaps(site: Path) -> Path:
    """Lay the distribution out in a folder; the guest must be installed too."""
    return fake_distribution(site, "mishaps", {"mishaps": "mishaps_plugin"}, {"mishaps_plugin": MODULE})


def same_end(run: Path, whole: Path, *names: str) -> bool:
    """Whether two runs of ``guest`` left the same metrics, the same model, and the same further files."""
    every = ("metrics.jsonl", "final/denoiser.safetensors", *names)
    return all((run / name).read_bytes() == (whole / name).read_bytes() for name in every)


def told(done: Outcome) -> str:
    """The one message of a command that failed."""
    assert done.code == 2, done.out + done.err
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    return done.err[done.err.index("error: ") + len("error: ") :].strip()
