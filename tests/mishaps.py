"""A distribution whose plug-ins bring on what can happen to a run: a full disk, a vanished file, a slow reward."""

from __future__ import annotations

from pathlib import Path

from guests import fake_distribution

MODULE = """
    import os
    import resource
    import threading
    import time
    from pathlib import Path

    from pydantic import BaseModel

    from branchtree.frames import first_frame
    from branchtree.hookspecs import hookimpl
    from branchtree.protocols import Callback
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


    class Mishap(Callback):
        def __init__(self, config):
            self.config = config

        def on_start(self, output, iteration, iterations):
            self.metrics = output / "metrics.jsonl"

        def on_iteration(self, iteration, metrics):
            config = self.config
            if iteration != config.at:
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


    class Slow(Brightness):
        def score(self, media, conditions):
            if "SLOW" in os.environ:
                print("scoring", flush=True)
                time.sleep(float(os.environ["SLOW"]))
            return super().score(media, conditions)


    @hookimpl
    def register_models(register):
        for build in (Crowded, Framed):
            register(build.__name__.lower(), build=build, config=GuestGaussianConfig, summary="for tests")


    @hookimpl
    def register_rewards(register):
        register("slow", build=Slow, config=BrightnessConfig, summary="for tests")


    @hookimpl
    def register_callbacks(register):
        register("mishap", build=Mishap, config=Config, summary="for tests")
"""


def mishaps(site: Path) -> Path:
    """Lay the distribution out in a folder; the guest must be installed too."""
    return fake_distribution(site, "mishaps", {"mishaps": "mishaps_plugin"}, {"mishaps_plugin": MODULE})
