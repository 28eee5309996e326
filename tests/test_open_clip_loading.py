"""Reading open_clip's checkpoints, which HPS and DFN5B are: every tensor has its place, and nothing else gets through.

`data/rewards/open_clip_vit_h_14_keys.json` lists name and shape of every tensor of the ViT-H-14 of open-clip-torch
3.3.0, built on the meta device from its own `ViT-H-14.json`; HPSv2 publishes state dicts of that model. A test builds
it again and compares.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from branchtree_rewards.clip.hps import Hps, HpsConfig
from branchtree_rewards.clip.network import (
    VIT_H_14,
    clip_config,
    load_open_clip,
    published_shapes,
    read_config,
    to_transformers,
)
from branchtree_rewards.small.clip import write_tokenizer
from clip_publisher import write_hps

from branchtree.errors import RewardError

FILE = "HPS_v2.1_compressed.pt"
KEYS = Path(__file__).parent / "data" / "rewards" / "open_clip_vit_h_14_keys.json"


def loaded(path: Path | str, **settings: Any) -> Hps:
    reward = Hps(HpsConfig(path=str(path), **settings))
    reward.load(torch.device("cpu"))
    return reward


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[open_clip.CLIP, Path]:
    """open_clip's own small model, and a folder with its weights as HPS is published."""
    folder = tmp_path_factory.mktemp("hps")
    return write_hps(folder, quick_gelu=False), folder


def test_every_tensor_of_the_published_checkpoint_has_its_place() -> None:
    from transformers import CLIPModel

    published = {name: tuple(shape) for name, shape in json.loads(KEYS.read_text()).items()}
    assert len(published) == 686
    assert published_shapes(VIT_H_14) == published
    with torch.device("meta"):
        state = {name: torch.empty(shape, dtype=torch.float16) for name, shape in published.items()}
        wanted = CLIPModel(clip_config(VIT_H_14)).state_dict()
    converted = to_transformers(state)
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in wanted.items()
    }
    assert sum(value.numel() for value in converted.values()) == sum(value.numel() for value in state.values())


def test_the_list_of_tensors_is_open_clips() -> None:
    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        towers = open_clip.CLIPVisionCfg(**config["vision_cfg"]), open_clip.CLIPTextCfg(**config["text_cfg"])
        state = open_clip.CLIP(config["embed_dim"], *towers).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == json.loads(KEYS.read_text())


def _renamed(state: dict[str, Any]) -> None:
    state["visual.projection"] = state.pop("visual.proj")


def _reshaped(state: dict[str, Any]) -> None:
    state["text_projection"] = state["text_projection"].T.contiguous()


def _extended(state: dict[str, Any]) -> None:
    state["visual.transformer.resblocks.2.ln_1.weight"] = torch.ones(64)


def _shortened(state: dict[str, Any]) -> None:
    del state["transformer.resblocks.1.attn.in_proj_bias"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_renamed, r"1 missing: visual\.proj; 1 unknown: visual\.projection"),
        (_reshaped, r"1 of another shape: text_projection is \(24, 32\), not \(32, 24\)"),
        (_extended, r"1 unknown: visual\.transformer\.resblocks\.2\.ln_1\.weight"),
        (_shortened, r"1 missing: transformer\.resblocks\.1\.attn\.in_proj_bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    checkpoint: tuple[open_clip.CLIP, Path],
    tmp_path: Path,
    spoil: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    model, folder = checkpoint
    state = dict(model.state_dict())
    spoil(state)
    torch.save({"state_dict": state}, tmp_path / FILE)
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    with pytest.raises(RewardError, match=message):
        loaded(tmp_path)


def test_an_old_causal_mask_is_dropped(checkpoint: tuple[open_clip.CLIP, Path]) -> None:
    model, folder = checkpoint
    state = {**model.state_dict(), "attn_mask": torch.zeros(77, 77)}
    load_open_clip(state, read_config(folder / "open_clip_config.json"), "here")


class Harmful:
    """Anything but a tensor."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"visual.proj": Harmful()}}, "cannot read weights"),
        ({"model": {}}, "no entry 'state_dict'"),
        ({"state_dict": {"visual.proj": "a word"}}, "holds no state dict"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / FILE)
    with pytest.raises(RewardError, match=message):
        loaded(tmp_path)


def test_a_pickle_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=rf"holds no '{FILE}'"):
        loaded(tmp_path)
    (tmp_path / FILE).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(RewardError, match="cannot read weights"):
        loaded(tmp_path)


def test_a_wrong_digest_is_refused(checkpoint: tuple[open_clip.CLIP, Path], vocabulary: Path) -> None:
    _, folder = checkpoint
    digest = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    loaded(folder, tokenizer=str(vocabulary), sha256=digest)
    with pytest.raises(RewardError, match="not the pinned 0000"):
        loaded(folder, tokenizer=str(vocabulary), sha256="0" * 64)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"model_cfg": {"embed_dim": 24}}, "does not describe a CLIP"),
        ({"embed_dim": 24}, "does not describe a CLIP"),
        ({"model_cfg": {"embed_dim": 24, "vision_cfg": {"timm_model_name": "x"}, "text_cfg": {}}}, "timm_model_name"),
    ],
)
def test_another_architecture_is_refused(
    checkpoint: tuple[open_clip.CLIP, Path], tmp_path: Path, described: Any, message: str
) -> None:
    _, folder = checkpoint
    (tmp_path / FILE).symlink_to(folder / FILE)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(RewardError, match=message):
        loaded(tmp_path)


def test_a_tokenizer_of_another_model_or_none_is_refused(
    checkpoint: tuple[open_clip.CLIP, Path], tmp_path: Path
) -> None:
    _, folder = checkpoint
    write_tokenizer(tmp_path)
    with pytest.raises(RewardError, match=r"ends prompts with id 513, and the model of .* reads texts at id 49407"):
        loaded(folder, tokenizer=str(tmp_path))
    with pytest.raises(RewardError, match="cannot load a CLIP tokenizer from 'laion/"):
        loaded(folder)  # the folder has none, and the hub cannot be reached
