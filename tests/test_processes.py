"""Runs in processes of their own: killed, interrupted, and shared by two."""

from __future__ import annotations

import importlib
import random
import signal
from pathlib import Path

import pytest
from forked import Python
from tiny_flux import tiny_flux
from training_runs import arguments, metrics, small

ENCODERS = tuple(
    f"final/{part}.safetensors"
    for part in ("text_encoder/model", "text_encoder_2/model", "vae/diffusion_pytorch_model")
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def test_a_run_killed_again_and_again_comes_to_the_same_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five SIGKILLs: in an iteration, a checkpoint's writing, two startups in a row, and the writing of ``final/``."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    kills = importlib.import_module("kills")
    overrides = small(model, run__iterations=12, run__checkpoint_every=2)
    whole, killed = (kills.Job("quickstart", overrides, tmp_path / name) for name in ("whole", "killed"))
    seconds = kills.watch(whole)
    draw = random.Random(1)
    struck = kills.kill_again_and_again(killed, kills.spread(5, 12, draw), seconds, draw)
    assert [kill.aim for kill in struck] == ["training", "checkpoint", "startup", "startup", "final"]
    assert struck[-1].iterations == 12
    kills.finish(killed)
    same = kills.compare(whole.output, killed.output)
    assert set(same) == {"metrics.jsonl", "final/transformer/diffusion_pytorch_model.safetensors", *ENCODERS}
    assert all(same.values()), same


def test_kills_are_spread_over_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its part of the run, and before the end but for those that wait for ``final/``."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    kills = importlib.import_module("kills")
    targets = kills.spread(30, 60, random.Random(0))
    places = [target.iterations for target in targets]
    assert all(part * 60 // 27 <= place < (part + 1) * 60 / 27 for part, place in enumerate(places[:27]))
    assert [target.aim for target in targets[27:]] == ["final"] * 3 and places[27:] == [60] * 3


def test_ctrl_c_ends_the_iteration_and_leaves_a_checkpoint(model: Path, tmp_path: Path) -> None:
    overrides = small(model, run__iterations=10_000, run__checkpoint_every=10_000)
    words = ("train", "quickstart", *arguments(overrides), "--output", str(tmp_path / "run"))
    process = Python("-m", "branchtree", *words)
    process.wait_for(tmp_path / "run/metrics.jsonl", "\n")
    process.send(signal.SIGINT)
    code, output = process.ended(), process.out + process.err
    done = len(metrics(tmp_path / "run"))
    assert code == 0, output
    assert "--resume" in output and "Traceback" not in output
    assert (tmp_path / f"run/checkpoints/iteration_{done:06d}/state.json").is_file()
    assert not (tmp_path / "run/final").exists()
