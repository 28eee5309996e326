"""Runs in processes of their own: killed, interrupted, and shared by two."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_flux import tiny_flux
from training_runs import arguments, metrics, small

from branchtree import train

ENCODERS = tuple(
    f"final/{part}.safetensors"
    for part in ("text_encoder/model", "text_encoder_2/model", "vae/diffusion_pytorch_model")
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def wait_for_lines(process: subprocess.Popen[str], file: Path, lines: int) -> None:
    """Wait until a run has logged some iterations."""
    deadline = time.monotonic() + 120
    while not file.exists() or file.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get on"
        time.sleep(0.02)


def test_a_run_killed_again_and_again_comes_to_the_same_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four SIGKILLs: at random moments, inside the writing of a checkpoint, and as a resumption begins."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    kills = importlib.import_module("kills")
    overrides = small(model, run__iterations=12, run__checkpoint_every=2)
    train("quickstart", overrides, output=tmp_path / "whole")
    job = kills.Job("quickstart", overrides, tmp_path / "killed")
    struck = kills.kill_again_and_again(job, 4, seed=1, longest=1.5)
    assert len(struck) > 1
    kills.finish(job)
    same = kills.compare(tmp_path / "whole", job.output)
    assert set(same) == {"metrics.jsonl", "final/transformer/diffusion_pytorch_model.safetensors", *ENCODERS}
    assert all(same.values()), same


def test_ctrl_c_ends_the_iteration_and_leaves_a_checkpoint(model: Path, tmp_path: Path) -> None:
    overrides = small(model, run__iterations=10_000, run__checkpoint_every=10_000)
    process = start(
        "-m", "branchtree", "train", "quickstart", *arguments(overrides), "--output", str(tmp_path / "run")
    )  # fmt: skip
    wait_for_lines(process, tmp_path / "run/metrics.jsonl", 1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    done = len(metrics(tmp_path / "run"))
    assert process.returncode == 0, output
    assert "--resume" in output and "Traceback" not in output
    assert (tmp_path / f"run/checkpoints/iteration_{done:06d}/state.json").is_file()
    assert not (tmp_path / "run/final").exists()
