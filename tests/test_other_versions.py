"""Weights of another version than the settings ask for are refused, and frame rates are told apart by their names."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from branchtree_rewards.clip.aesthetic import _check_pair
from branchtree_rewards.clip.network import clip_size
from branchtree_rewards.clip.pickscore import OTHERS as NO_PICKSCORE
from branchtree_rewards.shared.source import RANDOM_SMALL, refuse_name
from branchtree_rewards.unifiedreward.templates import OTHERS
from branchtree_rewards.videoalign.frames import Sampling, frame_indices
from hypothesis import given, settings
from hypothesis import strategies as st

from branchtree.errors import BranchTreeError, RewardError
from branchtree.plugins import Condition, Media
from branchtree.recipe.build import make_reward

CPU = torch.device("cpu")


def loaded(name: str, **options: Any) -> Any:
    reward, _ = make_reward(name, options, ("reward",))
    reward.load(CPU)
    return reward


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small HPS checkpoint of version v2.1."""
    folder = tmp_path_factory.mktemp("folder")
    file = loaded("hps", path=RANDOM_SMALL)._opened.files["HPS_v2.1_compressed.pt"]
    shutil.copytree(file.parent, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("HPS_v2.1_compressed.pt", "v2.0", True),
        ("HPS_v2_compressed.pt", "v2.1", True),
        ("hpsv2.0.pt", "v2.1", True),
        ("HPSv2_1.pt", "v2.0", True),
        ("HPS_v2.1_compressed.pt", "v2.1", False),
        ("HPS_v2_compressed.pt", "v2.0", False),
        ("weights.pt", "v2.0", False),
    ],
)
def test_a_file_of_the_other_hps_is_refused(name: str, version: str, refused: bool, hps: Path, tmp_path: Path) -> None:
    """Both versions have the same shapes; a name that says nothing is taken at its word."""
    folder = shutil.copytree(hps, tmp_path / "copy")
    (folder / "HPS_v2.1_compressed.pt").rename(folder / name)
    if not refused:
        loaded("hps", path=str(folder / name), version=version)
        return
    with pytest.raises(RewardError, match=f"{name}' says by its name .*hps is to be {version}; set version"):
        loaded("hps", path=str(folder / name), version=version)


@pytest.mark.parametrize(
    ("reward", "file"),
    [
        ("vbench_dynamic", "raft-sintel.pth"),
        ("vbench_dynamic", "raft_large_C_T_SKHT_V2-ff5fadd5.pth"),
        ("vbench_imaging", "musiq_koniq_ckpt-e95806b9.pth"),
        ("vbench_imaging", "musiq_ava_ckpt-e8d3f067.pth"),
    ],
)
def test_weights_for_other_data_are_refused(reward: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"never read")
    with pytest.raises(RewardError, match="another version"):
        loaded(reward, path=str(tmp_path / file))


def test_a_clip_that_pickscore_was_tuned_from_is_no_pickscore(tmp_path: Path) -> None:
    folder = tmp_path / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    folder.mkdir()
    with pytest.raises(RewardError, match=r"laion2b.*PickScore v1"):
        loaded("pickscore", path=str(folder))
    refuse_name("yuvalkirstain/PickScore_v1", NO_PICKSCORE, "")


def clip_config(patch: int, width: int, image: int = 224, act: str = "quick_gelu") -> Any:
    """What is looked at of a CLIPConfig."""
    vision = SimpleNamespace(patch_size=patch, hidden_size=width, image_size=image, hidden_act=act)
    return SimpleNamespace(vision_config=vision)


def test_clips_are_told_apart_by_the_sizes_that_transformers_gives_them() -> None:
    from transformers import CLIPConfig

    assert clip_size(CLIPConfig()) == "vit_b_32"  # transformers' defaults are those of openai/clip-vit-base-patch32
    large = {"patch_size": 14, "hidden_size": 1024, "num_attention_heads": 16}
    assert clip_size(CLIPConfig(vision_config=large)) == "vit_l_14"
    assert clip_size(CLIPConfig(vision_config={**large, "image_size": 336})) == "vit_l_14_336"
    assert clip_size(clip_config(14, 32, 28)) is None


def test_the_weights_of_another_clip_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from branchtree_rewards.clip import clip_score as clip

    small = loaded("clip", path=RANDOM_SMALL)
    folder = shutil.copytree(small._opened.files["model.safetensors"].parent, tmp_path / "copy")
    # Small weights cannot have the published sizes, so these are taken for those of L/14.
    monkeypatch.setattr(clip, "clip_size", lambda config: "vit_l_14")
    with pytest.raises(
        RewardError, match="openai-l14 by its sizes, and variant is openai-b32; set variant: openai-l14"
    ):
        loaded("clip", path=str(folder))
    loaded("clip", path=str(folder), variant="openai-l14")


def test_a_dfn5b_without_its_activation_is_refused(tmp_path: Path) -> None:
    small = loaded("clip", path=RANDOM_SMALL, variant="dfn5b")
    folder = shutil.copytree(small._opened.files["open_clip_pytorch_model.bin"].parent, tmp_path / "copy")
    described = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    del described["model_cfg"]["quick_gelu"]
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(RewardError, match="does not set quick_gelu"):
        loaded("clip", path=str(folder), variant="dfn5b")


@pytest.mark.parametrize(
    ("head", "config", "message"),
    [
        ("sa_0_4_vit_b_32_linear.pth", clip_config(16, 768), "fitted to vit_b_32, and clip 'name' is vit_b_16"),
        ("sa_0_4_vit_l_14_linear.pth", clip_config(14, 1024, 336), "is vit_l_14_336"),
        ("sa_0_4_vit_l_14_linear.pth", clip_config(14, 1024, act="gelu"), "is not OpenAI's"),
        ("sa_0_4_vit_l_14_linear.pth", clip_config(14, 1024), None),
        ("head.pth", clip_config(14, 1024), None),
    ],
)
def test_a_head_of_another_clip_is_refused(head: str, config: Any, message: str | None) -> None:
    if message is None:
        _check_pair(Path(head), config, "name")
        return
    with pytest.raises(RewardError, match=message):
        _check_pair(Path(head), config, "name")


MODELS: Mapping[str, frozenset[str]] = {
    "CodeGoat24/UnifiedReward-qwen-7b": frozenset({"semantic", "score"}),
    "CodeGoat24/UnifiedReward-7b-v1.5": frozenset({"semantic", "score", "flowgrpo_llava"}),
    "CodeGoat24/UnifiedReward-2.0-qwen-7b": frozenset({"acs_v2"}),
    "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b": frozenset({"acs_v2"}),
    "/models/UnifiedReward": frozenset(OTHERS),
    "": frozenset(OTHERS),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_template_of_another_model_version_is_refused(model: str) -> None:
    for template, other in OTHERS.items():
        if template in MODELS[model]:
            refuse_name(model, other, "")
        else:
            with pytest.raises(RewardError, match="another version"):
                refuse_name(model, other, "")


def test_it_is_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(RewardError, match="it was not trained on template 'semantic'; set template"):
        loaded("unifiedreward", path="CodeGoat24/UnifiedReward-2.0-qwen-7b")


# Frame rates


@pytest.mark.parametrize(("reward", "sampling"), [("videoalign", True), ("vbench_dynamic", False)])
def test_a_rate_that_could_mean_two_is_refused(reward: str, sampling: bool) -> None:
    with pytest.raises(BranchTreeError, match="'clip_fps' for the frames a second at which the clip plays") as caught:
        make_reward(reward, {"path": RANDOM_SMALL, "fps": 8.0}, ("reward",))
    assert ("sample_fps" in str(caught.value)) is sampling


def smart_nframes(total: int, video_fps: float, fps: float) -> int:
    """The count by `vision_process.py` of KwaiVGI/VideoAlign: in pairs, 4 frames at least, 768 at most."""
    most = math.floor(min(768, total) / 2) * 2
    count = round(min(max(total / video_fps * fps, 4), most) / 2) * 2
    return min(count, total)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    total=st.integers(2, 400),
    clip_fps=st.sampled_from([6.0, 8.0, 15.0, 16.0, 23.976, 24.0, 30.0, 60.0]),
    sample_fps=st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 30.0]),
)
def test_the_rate_of_sampling_is_the_publishers_fps(total: int, clip_fps: float, sample_fps: float) -> None:
    count = smart_nframes(total, clip_fps, sample_fps)
    expected = torch.linspace(0, total - 1, count).round().long().tolist()
    assert frame_indices(total, clip_fps, Sampling(fps=sample_fps)) == expected


def test_both_rates_reach_the_score(tmp_path: Path) -> None:
    """17 frames at 8 a second: 4 are seen at 2 a second, 8 at 4, as many at 4 in half the time at twice the rate."""
    videos = torch.rand(1, 17, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    media = Media(videos=videos, fps=8.0)

    def scored(**options: Any) -> float:
        return float(loaded("videoalign", path=RANDOM_SMALL, **options).score(media, [Condition("a cat")]).values)

    plain, often, slow = scored(), scored(sample_fps=4.0), scored(clip_fps=4.0)
    assert plain == scored(clip_fps=8.0, sample_fps=2.0)
    assert often != plain
    assert slow == often  # the same clip at half the rate lasts twice as long


def test_a_checkpoint_of_a_fixed_number_of_frames_has_no_rate(tmp_path: Path) -> None:
    file = loaded("videoalign", path=RANDOM_SMALL)._opened.files["model.pth"]
    folder = shutil.copytree(file.parents[1], tmp_path / "copy")
    described = json.loads((folder / "model_config.json").read_text(encoding="utf-8"))
    described["data_config"]["num_frames"] = 6
    (folder / "model_config.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(RewardError, match="sample_fps is 4, but this checkpoint is shown 6 frames of every clip"):
        loaded("videoalign", path=str(folder), sample_fps=4.0)
