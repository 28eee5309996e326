"""The `aesthetic` reward against its formula on features of transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_rewards.clip.aesthetic import Aesthetic, AestheticConfig
from branchtree_rewards.small.clip import write_clip_folder, write_small_aesthetic
from clip_publisher import random_pictures
from torch import Tensor
from torchvision import transforms

from branchtree.errors import RewardError
from branchtree.files.checksums import file_sha256
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

HEAD = "sa_0_4_vit_l_14_linear.pth"  # as LAION names it
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aesthetic")
    write_small_aesthetic(path)
    return path


def loaded(path: Path | str, **options: Any) -> Aesthetic:
    reward = Aesthetic(AestheticConfig(path=str(path), **options))
    reward.load(CPU)
    return reward


@torch.no_grad()
def by_the_formula(head: Path, clip: Path, pictures: Tensor) -> Tensor:
    """Ratings of bytes (B, 3, H, W), which torchvision prepares as in the publisher's notebook, through open_clip."""
    from transformers import CLIPModel

    prepare = transforms.Compose(
        [
            transforms.Resize(28, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    inputs = torch.stack([prepare(transforms.ToPILImage()(picture)) for picture in pictures])
    features = CLIPModel.from_pretrained(clip).eval().get_image_features(inputs).pooler_output
    weights = torch.load(head, weights_only=True)
    directions = features.double() / features.double().norm(dim=-1, keepdim=True)
    return (directions @ weights["weight"][0].double() + weights["bias"].double()).float()


def pairs(pictures: Tensor, prompt: str = "") -> tuple[Media, list[Condition]]:
    return Media(images=pictures.float() / 255), [Condition(prompt)] * len(pictures)


@pytest.mark.parametrize("size", [(28, 28), (64, 40), (33, 90), (20, 25)])
def test_ratings_follow_the_formula(folder: Path, size: tuple[int, int]) -> None:
    pictures = random_pictures(5, *size)
    expected = by_the_formula(folder / HEAD, folder / "clip", pictures)
    scores = loaded(folder, batch=2).score(*pairs(pictures))
    assert scores.valid.all()
    assert expected.std() > 0.1
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-5)


def test_the_prompt_takes_no_part(folder: Path) -> None:
    pictures = random_pictures(3, 40, 30)
    reward = loaded(folder)
    values = [reward.score(*pairs(pictures, prompt)).values for prompt in ("a cat", "ugly")]
    assert torch.equal(*values)


def test_the_head_and_the_clip_may_be_anywhere(folder: Path, tmp_path: Path) -> None:
    write_clip_folder(tmp_path, seed=5)
    pictures = random_pictures(3, 40, 30)
    scores = loaded(folder / HEAD, clip=str(tmp_path)).score(*pairs(pictures))
    expected = by_the_formula(folder / HEAD, tmp_path, pictures)
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(scores.values, loaded(folder).score(*pairs(pictures)).values, atol=1e-2)


def test_a_head_that_is_not_there_says_where_it_comes_from(tmp_path: Path) -> None:
    for path in (HEAD, "LAION-AI/aesthetic-predictor", str(tmp_path / "other.pth")):
        with pytest.raises(RewardError, match=rf"not on the hub: download '{HEAD}' from https://github.com/LAION-AI"):
            loaded(path)
    with pytest.raises(RewardError, match=f"holds no '{HEAD}'"):
        loaded(tmp_path)


def test_another_head_is_refused(folder: Path, tmp_path: Path) -> None:
    for state, message in (
        ({"weight": torch.ones(1, 768), "bias": torch.ones(1)}, r"weight is \(1, 768\), not \(1, 24\)"),
        ({"weight": torch.ones(1, 24)}, "missing: bias"),
        ({"layers.0.weight": torch.ones(1, 24), "layers.0.bias": torch.ones(1)}, "unknown: layers.0.bias"),
        ([torch.ones(1, 24)], "no state dict"),
    ):
        torch.save(state, tmp_path / HEAD)
        with pytest.raises(RewardError, match=message):
            loaded(tmp_path / HEAD, clip=str(folder / "clip"))


def test_both_files_can_be_pinned_and_make_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    head, clip = file_sha256(folder / HEAD), file_sha256(folder / "clip" / "model.safetensors")
    reward = loaded(folder, sha256={HEAD: head, "clip/model.safetensors": clip})
    for pin, message in (
        ({"clip/model.safetensors": head}, f"has sha256 {clip}, not the pinned"),
        ({HEAD: clip}, f"has sha256 {head}, not the pinned"),
        (head, "give one for each name"),
    ):
        with pytest.raises(RewardError, match=message):
            loaded(folder, sha256=pin)
    weights = torch.load(folder / HEAD, weights_only=True)
    write_small_aesthetic(tmp_path)
    torch.save({**weights, "bias": weights["bias"] + 1}, tmp_path / HEAD)
    assert loaded(tmp_path).fingerprint() != reward.fingerprint() == loaded(folder).fingerprint()


def test_one_spoilt_picture_is_masked_alone(folder: Path) -> None:
    media, conditions = pairs(random_pictures(3, 30, 30))
    sound = loaded(folder).score(media, conditions)
    media.pixels[0, 1, 3, 3] = float("nan")
    scores = loaded(folder).score(media, conditions)
    assert scores.valid.tolist() == [False, True, True]
    assert torch.equal(scores.values[1:], sound.values[1:])


def test_a_small_one_needs_nothing() -> None:
    entry = registry().reward("aesthetic")
    small = entry.build(entry.config(path="random:small", offload=True))
    small.load(CPU)
    media, conditions = pairs(random_pictures(4, 30, 30))
    first = small.score(media, conditions)
    assert first.valid.all()
    small.release()
    assert torch.equal(small.score(media, conditions).values, first.values)
    with pytest.raises(ValueError, match="scores image, not video"):
        small.score(Media(videos=torch.rand(1, 2, 3, 8, 8)), [Condition("a cat")])
