"""Damaged files of reward checkpoints: a part of `sweep_reward_folders.py`, which sweeps all of them as a program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweep_reward_folders import REWARDS, Folder, folder_of, load, sweep

from branchtree.errors import RewardError

SWEPT = ("hps", "imagereward", "videoalign", "unifiedreward")
"""One of each kind: open_clip's layout, a file of words, a checkpoint in a folder, several shards."""


@pytest.fixture(scope="module", params=SWEPT)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return folder_of(request.param, tmp_path_factory.mktemp(request.param) / "folder", sums=False)


def test_no_missing_cut_or_zeroed_file_gives_another_score(folder: Folder) -> None:
    trials = list(sweep(folder, ("deleted", "cut", "zeroed")))
    assert {trial.outcome for trial in trials} <= {"refused", "same scores"}, trials
    refused = {trial.file for trial in trials if trial.outcome == "refused"}
    weights = {file for file in folder.files() if file.endswith((".pt", ".pth", ".safetensors"))}
    assert weights and weights <= refused


def test_with_digests_no_flipped_bit_is_read(tmp_path: Path) -> None:
    folder = folder_of("hps", tmp_path / "folder", sums=True)
    trials = [trial for trial in sweep(folder, ("flipped at 3/4",)) if trial.file != "SHA256SUMS"]
    assert trials and {trial.outcome for trial in trials} == {"refused"}, trials
    assert all(trial.file in trial.detail for trial in trials)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(number: float, tmp_path: Path) -> None:
    folder = folder_of("pickscore", tmp_path / "folder", sums=False)
    file = folder.path / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    state["visual_projection.weight"][0, 0] = number
    file.unlink()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(RewardError, match=r"not finite in visual_projection\.weight"):
        load("pickscore", folder.path)


def test_a_vocabulary_without_some_of_its_merges_is_refused(tmp_path: Path) -> None:
    """Words would be cut where the model has never seen them cut; the real vocabulary of CLIP is whole."""
    from branchtree_rewards.clip.text import CLIP_TOKENIZER
    from clip_publisher import write_vocabulary

    write_vocabulary(tmp_path)
    CLIP_TOKENIZER.load(str(tmp_path))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "merges.txt").write_text("".join(merges[: len(merges) // 2]), encoding="utf-8")
    with pytest.raises(RewardError, match="entries that no merge makes"):
        CLIP_TOKENIZER.load(str(tmp_path))


def test_the_sweep_leaves_no_reward_with_weights_out() -> None:
    from branchtree.plugins.registry import registry

    names = {name for name, entry in registry().rewards.items() if entry.distribution == "branchtree-grpo"}
    with_weights = {name for name in names if "path" in registry().rewards[name].config.model_fields}
    assert {name.partition("-")[0] for name in REWARDS} == with_weights


def test_a_good_folder_scores(folder: Folder) -> None:
    assert bool(torch.isfinite(folder.values).all())
