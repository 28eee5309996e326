"""What all tests share: an offline environment, and the guest plug-in as a user would have it installed."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from guests import Outcome, install_guest, run_command
from mishaps import SETTINGS, mishaps

from branchtree.plugins.registry import registry

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Our tensors are tiny: on a machine whose cores are shared, a second thread makes the tests several times slower.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
gc.disable()  # until all is imported, of which there is nothing to collect

LONGEST = """phantom gpu_runs sharding published conformance diffusers_adapter every_pipeline training any_pipeline
denoisers motion_rewards benchmarks compare wan_adapter unnamed_pipelines limits failing_servers microbatch methods
flux_adapter tokens_example actions_example alarm processes adaptive combinations evaluate decoders teams preflight
errors unifiedreward guest""".split()  # noqa: SIM905
collect_ignore = ["guest_plugin"]  # its tests need it installed; test_conformance.py runs them so


def pytest_configure() -> None:
    """Refuse to run against an installation that lacks some of the library's own plug-ins."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {point.name for point in entry_points(group="branchtree")}
    missing = sorted(project["entry-points"]["branchtree"].keys() - installed)
    if missing:
        raise pytest.UsageError(
            f"branchtree's plug-ins {', '.join(missing)} are not installed; run: pip install -e '.[dev]'"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no worker is left alone with one at the end."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """Leave what is imported out of every later garbage collection, which took much of the tests' time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Leave files to the system's cache: those of tests need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def guest_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guest distribution is installed; the developer's environment is left alone."""
    return install_guest(tmp_path_factory.mktemp("guest_site"))


@pytest.fixture(scope="session")
def examples_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of examples/, installed as strangers' packages."""
    target = tmp_path_factory.mktemp("examples_site")
    for name in ("tokens", "actions"):
        install_guest(target, Path(__file__).parents[1] / "examples" / name)
    return target


@pytest.fixture(scope="session")
def guest_run(guest_site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """One training run of the recipe ``guest`` by the command line, and its directory."""
    output = tmp_path_factory.mktemp("runs") / "guest"
    return run_command("train", "guest", "--output", str(output), sites=[guest_site]), output


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CLIP's whole vocabulary, as open_clip ships it."""
    from clip_publisher import write_vocabulary

    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder)
    return folder


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Make the distributions in a folder visible to this test, in this process."""

    def add(site: Path) -> None:
        monkeypatch.syspath_prepend(site)
        registry.cache_clear()

    yield add
    registry.cache_clear()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """Run ``branchtree`` with some arguments in this process."""
    log = logging.getLogger("branchtree")
    before = (log.handlers, log.propagate, log.level)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Outcome:
        from branchtree.cli import main

        monkeypatch.setattr("sys.argv", ["branchtree", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Outcome(int(stopped.value.code or 0), *capsys.readouterr())

    yield run
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture(scope="session")
def mishap_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mishaps(tmp_path_factory.mktemp("mishaps"))


@pytest.fixture
def cli(
    guest_site: Path,
    mishap_site: Path,
    plug: Callable[[Path], None],
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Outcome]:
    """``branchtree train guest`` with settings, in this process; the room for files is given back afterwards."""
    plug(guest_site)
    plug(mishap_site)
    monkeypatch.setenv("COLUMNS", "1000")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(output: Path, *flags: str, **changes: Any) -> Outcome:
        settings = {**SETTINGS, "callbacks": [], **{key.replace("__", "."): value for key, value in changes.items()}}
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        try:
            return command("train", "guest", *words, "--output", str(output), *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return run
