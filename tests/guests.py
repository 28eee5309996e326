"""Other people's distributions: the guest plug-in, and small made-up ones that misbehave."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from forked import Python
from patience import PATIENCE

GUEST = Path(__file__).parent / "guest_plugin"


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def install_guest(target: Path, source: Path = GUEST) -> Path:
    """Install the guest, or another folder, into ``target`` by pip, offline where its build backend is at hand."""
    flags = ["--no-build-isolation", "--no-index"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", *flags]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"'{source}' cannot be installed: {done.stderr}")
    return target


def fake_distribution(
    site: Path, name: str, entry_points: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> Path:
    """Lay a distribution out in ``site`` as an installer would: metadata, entry points, modules by name."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    points = "".join(f"{point} = {module}\n" for point, module in entry_points.items())
    (info / "entry_points.txt").write_text(f"[branchtree]\n{points}")
    for module, code in (modules or {}).items():
        (site / f"{module}.py").write_text(dedent(code))
    return site


def run_command(*arguments: str, sites: Sequence[Path] = (), fresh: bool = False) -> Outcome:
    """Run ``python -m branchtree`` with some arguments in a process of its own, a fresh interpreter or a forked one."""
    return _run(["-m", "branchtree", *arguments], sites, fresh)


def run_code(code: str, fresh: bool = False) -> Outcome:
    """Run some Python in a process of its own, a fresh interpreter or a forked one."""
    return _run(["-c", dedent(code)], (), fresh)


def _run(arguments: Sequence[str], sites: Sequence[Path], fresh: bool) -> Outcome:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(site) for site in sites),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    if not fresh:
        process = Python(*arguments, environment=environment)
        return Outcome(process.ended(), process.out, process.err)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
