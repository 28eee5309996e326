"""``branchtree doctor`` on machines that lack something."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from guests import Outcome, fake_distribution, run_command
from huggingface_hub import constants
from patience import PATIENCE
from pretend_gpu import pretend_gpu

from branchtree.doctor.check import Check, guarded
from branchtree.doctor.devices import check_memory, check_product, check_torch
from branchtree.doctor.hub import Hub, Repository, ask_hub, check_hub, check_repository, is_hub_id, look_up
from branchtree.doctor.needs import check_prompts, check_rewards
from branchtree.errors import DeviceMemoryError
from branchtree.plugins.values import RewardCard
from branchtree.recipe import load_recipe

NOWHERE = "http://127.0.0.1:9"


def doctor(*words: str, sites: tuple[Path, ...] = ()) -> tuple[Outcome, list[Check]]:
    """Run the command with --json in a process of its own."""
    done = run_command("doctor", *words, "--json", sites=sites)
    assert done.out.startswith("["), done.err
    return done, [Check(**check) for check in json.loads(done.out)]


def named(checks: list[Check], name: str) -> list[Check]:
    found = [check for check in checks if check.name == name]
    assert found, f"no {name} in {checks}"
    return found


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


# The command


def test_a_sound_machine_without_gpu_and_network(tmp_path: Path) -> None:
    done = run_command("doctor", fresh=True)  # a forked one has read whether it is offline
    assert done.code == 0, done.out
    lines = done.out.splitlines()
    assert lines[0].startswith("ok   Python: 3.")
    assert any(line.startswith("ok   packages: all ") and ": torch " in line for line in lines)
    hub = next(i for i, line in enumerate(lines) if line.startswith("warn hub:"))
    assert NOWHERE in lines[hub] and lines[hub + 1].startswith("     -> check the network")
    assert any(line.startswith("ok   matrix product: ") for line in lines)
    assert any(line.startswith("ok   iteration: one of quickstart with bundled:digits_flux") for line in lines)
    assert " 0 failed, " in lines[-1]
    assert len([line for line in lines if "reward: digits" in line]) == 1


def test_a_recipe_of_a_published_model(tmp_path: Path) -> None:
    """Its small version trains; what is to be downloaded is counted by the model's sizes, as nobody can be asked."""
    done, checks = doctor("flux_t2i_branchgrpo", "lora.rank=64", "run.keep_checkpoints=1")
    downloads = {check.text.partition(":")[0]: check for check in named(checks, "downloads")}
    model = downloads["black-forest-labs/FLUX.1-dev"]
    assert model.state == "warn" and "0.0 of about 33.7 GB" in model.text and model.remedy
    assert downloads.keys() >= {"xswu/HPSv2", "THUDM/ImageReward"}
    assert "licence Apache-2.0" in named(checks, "reward")[0].text
    failed = [check.name for check in checks if check.state == "fail"]
    assert set(failed) <= {"disk"} and done.code == bool(failed)  # this machine may have too little of it
    assert ("one of flux_t2i_branchgrpo with bundled:digits_flux" in named(checks, "iteration")[0].text) == (not failed)


def test_a_wrong_recipe() -> None:
    done, checks = doctor("quickstrat")
    assert done.code == 1
    assert "did you mean 'quickstart'" in named(checks, "recipe")[0].text
    assert named(checks, "iteration") == [
        Check("iteration", "warn", "not tried, since checks above failed", "correct those first")
    ]


def test_prompts_that_are_missing() -> None:
    recipe = load_recipe("quickstart", {"data.prompts": "/nowhere/prompts.txt"})
    (failed,) = guarded("prompts", lambda: check_prompts(recipe))
    assert failed.state == "fail" and "no prompt file /nowhere/prompts.txt" in failed.text
    (hub, _) = check_prompts(load_recipe("quickstart", {"data.prompts": "hub:org/prompts"}))
    assert (hub.state, hub.text) == ("ok", "data: hub:org/prompts is read when the run starts")


def test_a_broken_plugin(tmp_path: Path) -> None:
    code = "raise ImportError('no library named quux')\n"
    site = fake_distribution(tmp_path, "sick-plugin", {"sick": "sick_plugin"}, {"sick_plugin": code})
    done, checks = doctor(sites=(site,))
    assert done.code == 1
    (failed,) = [check for check in checks if check.state == "fail"]
    assert failed.text == "plug-in 'sick' of sick-plugin cannot be loaded: ImportError: no library named quux"
    assert failed.remedy == "install sick-plugin again with what it needs, or uninstall it"


def test_an_old_torch_and_a_package_that_is_missing(tmp_path: Path) -> None:
    info = tmp_path / "torch-2.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    old = tmp_path / "datasets-1.0.dist-info"  # of an extra
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 1.0\n")
    done, checks = doctor(sites=(tmp_path,))
    assert done.code == 1
    packages = named(checks, "packages")
    assert Check("packages", "fail", "torch is 2.1.0, and branchtree needs torch>=2.8", "pip install 'torch>=2.8'") in (
        packages
    )
    assert Check(
        "packages", "warn", "datasets is 1.0, and branchtree needs datasets>=4", "pip install 'datasets>=4'"
    ) in (packages)


def test_a_full_disk(tmp_path: Path) -> None:
    """A real file system without space, in a name space of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no name spaces for users here")
    code = """
        import os, subprocess, sys
        disk = sys.argv[1]
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=True)
        os.chdir(disk)
        os.environ["HF_HOME"] = disk
        try:
            with open("full", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        except OSError:
            pass
        sys.argv[:] = ["branchtree", "doctor", "--json"]
        from branchtree.cli import main
        main()
    """
    words = ["unshare", "-rm", sys.executable, "-c", dedent(code), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1, done.stderr
    (failed,) = [check for check in json.loads(done.stdout) if check["state"] == "fail"]
    assert failed["name"] == "disk"
    assert failed["text"].startswith("0.0 GB are free in ")
    assert failed["remedy"].startswith("free space there, or give --output on a larger disk")


# The hub


class Answers(http.server.BaseHTTPRequestHandler):
    """A hub of three repositories, for whoever has the token."""

    repositories: Mapping[str, Mapping[str, Any]] = {
        "org/open": {"gated": False, "cardData": {"license": "apache-2.0"}},
        "org/gated": {"gated": "auto", "cardData": {"license": "other", "license_name": "big-non-commercial-license"}},
    }
    files = (
        ("model_index.json", 1000),
        ("all-in-one.safetensors", 9_000_000_000),
        ("transformer/part-1.safetensors", 3_000_000_000),
        ("transformer/part-1.fp16.safetensors", 1_500_000_000),
        ("vae/weights.bin", 500_000_000),
        ("picture.png", 10_000_000),
    )

    def do_HEAD(self) -> None:
        """Answer that the hub is there."""
        self.answer(200, {})

    def do_GET(self) -> None:
        """Answer what the hub's client asks."""
        path = self.path.partition("?")[0]
        known = self.headers.get("Authorization") == "Bearer good"
        name = path.removeprefix("/api/models/").removesuffix("/auth-check")
        if path == "/api/whoami-v2":
            self.answer(200 if known else 401, {"name": "someone"})
        elif name not in self.repositories:
            self.answer(404, {}, "RepoNotFound")
        elif path.endswith("/auth-check"):
            may = known or not self.repositories[name]["gated"]
            self.answer(200 if may else 403, {}, "" if may else "GatedRepo")
        else:
            siblings = [{"rfilename": file, "size": size} for file, size in self.files]
            self.answer(200, {"id": name, "modelId": name, "siblings": siblings, **self.repositories[name]})

    def answer(self, status: int, content: Mapping[str, Any], error: str = "") -> None:
        """Send some JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    _use(monkeypatch, at, tmp_path)
    yield at
    server.shutdown()
    server.server_close()


def _use(monkeypatch: pytest.MonkeyPatch, endpoint: str, folder: Path) -> None:
    """Point the client, which reads the environment when it is imported, to an endpoint and an empty cache."""

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_hub_that_answers(hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(check_hub(ask_hub())) == [
        Check("hub", "ok", f"{hub} answers; not logged in, which gated models alone need")
    ]
    monkeypatch.setenv("HF_TOKEN", "good")
    assert next(check_hub(ask_hub())).text == f"{hub} answers; logged in"
    monkeypatch.setenv("HF_TOKEN", "bad")
    (wrong,) = check_hub(ask_hub())
    assert (wrong.state, wrong.text) == ("fail", f"{hub} does not know the token that is set")


def test_what_a_repository_takes(hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = ask_hub()
    whole = look_up(asked, "org/open", None, 5, whole=True)
    assert whole == Repository("org/open", 3_000_001_000, 0, licence="apache-2.0")
    blobs = tmp_path / "cache" / "models--org--open" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "one").write_bytes(bytes(1000))
    some = look_up(asked, "org/open", None, 5000, whole=False)
    assert (some.size, some.cached, some.missing) == (5000, 1000, 4000)
    assert check_repository(asked, whole).state == "ok"


def test_a_gated_repository(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = check_repository(ask_hub(), look_up(ask_hub(), "org/gated", None, 5, whole=True))
    assert refused.state == "fail"
    assert refused.text.endswith("; licence big-non-commercial-license, and it is gated")
    assert "accept its licence on huggingface.co/org/gated" in refused.remedy
    monkeypatch.setenv("HF_TOKEN", "good")
    granted = check_repository(ask_hub(), look_up(ask_hub(), "org/gated", None, 5, whole=True))
    assert (granted.state, granted.remedy) == ("warn", "do not use it commercially")
    missing = check_repository(ask_hub(), look_up(ask_hub(), "org/none", None, 5, whole=True))
    assert missing.state == "fail" and "shows no such repository" in missing.text


def test_a_hub_that_is_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A port that takes connections and never answers."""
    monkeypatch.setattr("branchtree.doctor.hub.TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        _use(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        asked = ask_hub()
    assert not asked.answers and asked.reason
    (check,) = check_hub(asked)
    assert check.state == "warn" and "does not answer" in check.text


def test_offline_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (check,) = check_hub(ask_hub())
    assert (check.state, check.text) == ("warn", "HF_HUB_OFFLINE is set: nothing is downloaded")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    paths = ("org/model", "here/model", "bundled:digits_flux", "./org/model", None)
    assert [is_hub_id(path) for path in paths] == [True, False, False, False, False]


def test_a_cache_that_is_complete_needs_no_hub() -> None:
    offline = Hub(answers=False, offline=True, logged_in=False)
    assert check_repository(offline, Repository("org/model", 10, 12)).state == "ok"
    assert check_repository(offline, Repository("org/model", 10, 9)).state == "warn"


# Devices


def test_a_gpu_and_its_memory() -> None:
    with pretend_gpu("cuda"):
        (accelerator,) = check_torch()
        assert accelerator.state == "ok"
        lines = list(check_memory(load_recipe("quickstart")))
        assert [line.state for line in lines] == ["ok", "ok"]
        assert "GiB are free" in lines[0].text
        assert "quickstart needs" in lines[1].text
        with pytest.raises(DeviceMemoryError, match="What would fit"):
            list(check_memory(load_recipe("flux_t2i_branchgrpo")))


def test_a_product_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("branchtree.doctor.devices.SECONDS", 0.01)
    monkeypatch.setattr("branchtree.doctor.devices.SIZES", {"cpu": 64})
    (right,) = check_product()
    assert right.state == "ok"
    monkeypatch.setattr("branchtree.doctor.devices._products", lambda a, b: (a @ b + 1, 1.0))
    (wrong,) = check_product()
    assert wrong.state == "fail" and wrong.remedy


# Single checks


@pytest.mark.parametrize(("forbids", "state"), [(True, "warn"), (None, "warn"), (False, "ok")])
def test_licences(forbids: bool | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from branchtree.plugins.registry import registry

    card = RewardCard(frozenset(), "org/weights", 1, "CC BY-NC 4.0", forbids, "a paper")
    monkeypatch.setitem(
        registry().rewards,
        "digits",
        type(registry().reward("digits"))(**{**vars(registry().reward("digits")), "card": card}),
    )
    check = next(iter(check_rewards(load_recipe("quickstart"))))
    assert check.state == state
    assert ("non-commercial" in check.text) is (state == "warn")
    assert check.text.startswith("digits: checkpoint org/weights; licence CC BY-NC 4.0")


def test_a_check_that_raises_is_one_that_fails() -> None:
    def broken() -> Iterator[Check]:
        yield Check("a", "ok", "first")
        raise ZeroDivisionError("by\nzero")

    first, failed = guarded("b", broken)
    assert first.state == "ok"
    assert (failed.name, failed.state, failed.text) == ("b", "fail", "ZeroDivisionError: by zero")
    assert os.linesep not in failed.text
