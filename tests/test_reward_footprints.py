"""What rewards say of their memory, against what is published and against the networks that they load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_rewards.clip.hps import FILES
from branchtree_rewards.small.clip import write_clip_folder, write_open_clip
from branchtree_rewards.small.clip import write_small_aesthetic as write_aesthetic
from branchtree_rewards.small.geneval import write_small_geneval as write_geneval
from branchtree_rewards.small.hpsv3 import write_small_hpsv3 as write_hpsv3
from branchtree_rewards.small.imagereward import write_small_imagereward as write_imagereward
from branchtree_rewards.small.unifiedreward import write_small_unifiedreward as write_unifiedreward
from branchtree_rewards.small.videoalign import write_small_videoalign as write_videoalign

from branchtree.plugins import RewardFootprint
from branchtree.plugins.protocols import SizedReward
from branchtree.plugins.registry import registry


def built(name: str, **settings: Any) -> Any:
    entry = registry().reward(name)
    reward = entry.build(entry.config(**settings))
    assert isinstance(reward, SizedReward)
    return reward


# Parameters: those of the publishers' checkpoints, as their files or model cards have them.
@pytest.mark.parametrize(
    ("name", "settings", "parameters", "number_bytes"),
    [
        ("hps", {}, 986_109_441, 4),
        ("pickscore", {}, 986_109_441, 4),
        ("clip", {}, 151_277_313, 4),
        ("clip", {"variant": "openai-l14"}, 427_616_513, 4),
        ("videoalign", {}, 2_208_985_600, 2),
        ("videoalign", {"dtype": "float32"}, 2_208_985_600, 4),
        ("hpsv3", {}, 7_746_378_240, 2),
        ("geneval", {}, 154_966_792 + 427_616_513, 4),
        ("unifiedreward", {}, 8_292_166_656, 2),
    ],
)
def test_published_models(name: str, settings: dict[str, Any], parameters: int, number_bytes: int) -> None:
    assert built(name, **settings).footprint() == RewardFootprint(parameters * number_bytes)


def test_published_models_of_which_a_part_is_used() -> None:
    imagereward = built("imagereward").footprint().weights
    assert 0.99 < imagereward / 1_790_000_000 < 1  # of its file, which also holds four layers that take no part
    aesthetic = built("aesthetic", path="/nowhere").footprint().weights
    assert aesthetic == 4 * (303_179_776 + 1024 * 768)  # CLIP's ViT-L/14 and its projection


def test_the_text_half_of_clip_is_dropped() -> None:
    similarity = built("clip_similarity").footprint().weights
    assert similarity == 4 * (87_456_000 + 768 * 512)  # ViT-B/32 and its projection


def test_what_leaves_the_device_says_so() -> None:
    assert built("hps", path="random:small", offload=True).footprint() == RewardFootprint(0, offloads=True)
    assert built("clip", offload=True).footprint().offloads
    assert built("unifiedreward", path="random:small", offload=True).footprint().offloads


@pytest.mark.parametrize("name", ["digits", "diversity", "motion_smoothness", "motion_direction"])
def test_rewards_without_weights(name: str) -> None:
    assert built(name).footprint() == RewardFootprint(0)


def test_rewards_that_are_served_take_nothing_here() -> None:
    assert built("remote", url="http://127.0.0.1:1").footprint() == RewardFootprint(0)
    assert built("unifiedreward", server="http://127.0.0.1:1/v1").footprint() == RewardFootprint(0)


def test_a_size_that_is_assumed_says_of_what() -> None:
    assert built("pickscore", path="someone/other").footprint().assumed == "yuvalkirstain/PickScore_v1"
    assert built("videoalign", base="someone/other").footprint().assumed == "Qwen/Qwen2-VL-2B-Instruct"
    assert built("hpsv3", base="someone/other").footprint().assumed == "Qwen/Qwen2-VL-7B-Instruct"
    assert built("geneval", path="someone/other").footprint().assumed == "google/owlv2-base-patch16-ensemble"
    assert built("videoalign", path="someone/other").footprint().assumed == ""  # the base tells the size


def numbers(reward: Any) -> int:
    """Parameters of what a reward has loaded."""
    network = reward._opened.network if hasattr(reward, "_opened") else reward._backend._model
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "write", "settings"),
    [
        ("hps", lambda at: write_open_clip(at, FILES["v2.1"], "state_dict", quick_gelu=False, seed=0), {}),
        ("pickscore", lambda at: write_clip_folder(at, seed=0), {}),
        ("clip", lambda at: write_clip_folder(at, seed=0), {}),
        ("unifiedreward", write_unifiedreward, {"dtype": "float32"}),
        ("videoalign", write_videoalign, {"dtype": "float32"}),
        ("geneval", write_geneval, {}),
    ],
)
def test_a_folders_own_configuration_tells_the_size(
    name: str, write: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path)
    reward = built(name, path=str(tmp_path), **settings)
    footprint = reward.footprint()
    reward.load(torch.device("cpu"))
    assert footprint.assumed == ""
    # VideoAlign's head is not in the configuration, and its vocabulary has three tokens more.
    assert footprint.weights == pytest.approx(4 * numbers(reward), rel=0.02 if name == "videoalign" else 0)


def test_a_head_beside_its_clip(tmp_path: Path) -> None:
    write_aesthetic(tmp_path)
    reward = built("aesthetic", path=str(tmp_path))
    footprint = reward.footprint()
    reward.load(torch.device("cpu"))
    assert footprint.weights == pytest.approx(4 * numbers(reward), rel=0.01)  # the head is not in CLIP's configuration


def test_a_head_that_no_configuration_tells(tmp_path: Path) -> None:
    write_hpsv3(tmp_path)
    reward = built("hpsv3", path=str(tmp_path), dtype="float32")
    footprint = reward.footprint()
    reward.load(torch.device("cpu"))
    head = 33 * 1024 + 1025 * 16 + 17 * 2  # of the small checkpoint's 32 numbers a state
    assert footprint.weights == 4 * (numbers(reward) - head)


def test_a_damaged_configuration_is_left_to_loading(tmp_path: Path) -> None:
    write_clip_folder(tmp_path, seed=0)
    (tmp_path / "config.json").write_text("{")
    assert built("clip", path=str(tmp_path)).footprint() is None
    write_imagereward(tmp_path)
    (tmp_path / "med_config.json").write_text("[]")
    assert built("imagereward", path=str(tmp_path)).footprint() is None
    assert built("unifiedreward", path=str(tmp_path)).footprint() is None
