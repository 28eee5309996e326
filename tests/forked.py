"""Python processes that find the large libraries imported, which takes a fresh interpreter several seconds each time.

They are forked from one server that has done nothing but import. What a fresh interpreter does at its start is tested
with ``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

PRELOADED = [
    "accelerate",
    "branchtree.training.trainer",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
    "peft",
    "torch._dynamo",
]
ROOT = Path(__file__).parents[1]


def context() -> ForkServerContext:
    """Where processes are forked; a target must be importable from ``tests``."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


class Python:
    """``python`` with some arguments, in the environment and folder of this process; what it prints goes to files."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._streams = Path(tempfile.mkdtemp(prefix="forked-"))
        weakref.finalize(self, shutil.rmtree, self._streams, ignore_errors=True)
        for name in ("out", "err"):
            self._file(name).touch()
        given = dict(os.environ if environment is None else environment)
        streams = [str(self._file(name)) for name in ("out", "err")]
        # As a daemon it ends with the tests, whatever becomes of them.
        self._process = context().Process(target=_run, args=(arguments, given, os.getcwd(), streams), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._file("out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return self._file("err").read_text(encoding="utf-8")

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def wait_for(self, file: Path, text: str = "") -> None:
        """Wait until a file, its own output included, holds a text."""
        deadline = time.monotonic() + PATIENCE
        while not (file.exists() and text in file.read_text(encoding="utf-8")):
            assert self.is_running(), self.out + self.err
            assert time.monotonic() < deadline, f"no '{text}' in {file}"
            time.sleep(0.01)

    def wait_for_output(self, text: str, stream: str = "out") -> None:
        """Wait until it has printed a text to ``out`` or ``err``."""
        self.wait_for(self._file(stream), text)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def ended(self) -> int:
        """Wait for the end, and return the exit code, below 0 where a signal ended it."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, f"it hangs: {self.out}{self.err}"
        return self._process.exitcode

    def _file(self, name: str) -> Path:
        return self._streams / name


def end_together(processes: Sequence[Python]) -> list[int]:
    """Wait for all, and return their exit codes; where one fails, the others, which may wait for it, are killed."""
    while running := [process for process in processes if process.is_running()]:
        if any(process.ended() for process in processes if process not in running):
            for process in running:
                process.send(signal.SIGKILL)
        time.sleep(0.05)
    return [process.ended() for process in processes]


def _run(arguments: Sequence[str], environment: Mapping[str, str], folder: str, streams: Sequence[str]) -> None:
    """In the process: what ``python`` does with ``-m NAME``, ``-c CODE`` or a script."""
    for descriptor, file in enumerate(streams, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sites = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, sites), *filter(_is_installed, sys.path)]
    first, *rest = arguments
    if first == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def _is_installed(entry: str) -> bool:
    """Whether a fresh interpreter would import from there: no folder of the tests, and none that a test has added."""
    inside = any(Path(entry).is_relative_to(folder) for folder in (sys.prefix, sys.base_prefix, ROOT))
    return inside and Path(entry) not in (ROOT / "tests", ROOT / "benchmarks")


def shared_environment() -> dict[str, str]:
    """What ``accelerate launch --config_file fsdp2.yaml`` and torch's agent put into two processes' environment."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = [
        "--config_file",
        str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    words.append("process_runs.py")
    started: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "multi_gpu_launcher", started.append)
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return {**prepare_multi_gpu_env(started[0]), **address, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
