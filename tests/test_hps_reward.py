"""The `hps` reward against open_clip, which HPSv2's code is made of, and torchvision, which prepares its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from branchtree_rewards.clip.hps import Hps, HpsConfig, letterbox
from branchtree_rewards.clip.text import CLIP_TOKENIZER, as_open_clip, cleaned, token_ids
from branchtree_rewards.shared.pixels import normalised
from clip_publisher import (
    SCORED,
    open_clip_cosine,
    open_clip_tokenizer,
    prompts,
    random_pictures,
    tiny_open_clip,
    up_to_end,
    write_hps,
)
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

CPU = torch.device("cpu")
FILE = "HPS_v2.1_compressed.pt"
SIZES = [(300, 500), (640, 480), (1024, 1024), (97, 203), (130, 61), (720, 1280), (225, 7), (33, 33)]  # heights, widths
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def publisher_picture(picture: Tensor, size: int) -> Tensor:
    """An 8-bit picture (3, H, W) through torchvision as HPSv2 prepares it, where its longer side is not ``size``."""
    pixels = picture.to(torch.float32).div(255)
    factor = size / float(max(pixels.shape[1:]))
    height, width = (round(side * factor) for side in pixels.shape[1:])
    pixels = functional.resize(pixels, [height, width], InterpolationMode.BICUBIC)
    left, top = (size - width) // 2, (size - height) // 2
    pixels = functional.pad(pixels, [left, top, size - width - left, size - height - top], fill=0)
    normal: Tensor = functional.normalize(pixels, MEAN, STD)
    return normal


def conditions(*texts: str) -> list[Condition]:
    return [Condition(text) for text in texts]


def loaded(path: Path | str, **settings: Any) -> Hps:
    reward = Hps(HpsConfig(path=str(path), **settings))
    reward.load(CPU)
    return reward


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[open_clip.CLIP, Path]]:
    """By activation: open_clip's own small model, and a folder with its weights as HPS is published."""
    folders = {quick_gelu: tmp_path_factory.mktemp("hps") for quick_gelu in (False, True)}
    return {quick_gelu: (write_hps(folder, quick_gelu), folder) for quick_gelu, folder in folders.items()}


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("shape", [(40, 60), (61, 23)])
def test_scores_as_open_clip(
    checkpoints: dict[bool, tuple[open_clip.CLIP, Path]],
    vocabulary: Path,
    quick_gelu: bool,
    shape: tuple[int, int],
) -> None:
    model, folder = checkpoints[quick_gelu]
    pictures = random_pictures(len(SCORED), *shape)
    expected = open_clip_cosine(model, torch.stack([publisher_picture(picture, 28) for picture in pictures]), SCORED)
    scores = loaded(folder, tokenizer=str(vocabulary)).score(Media(images=pictures / 255), conditions(*SCORED))
    assert scores.valid.all()
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.01  # the cosines differ, so that their agreement says something


def test_a_cosine_has_no_logit_scale_and_half_precision_files_are_read_as_float32(
    checkpoints: dict[bool, tuple[open_clip.CLIP, Path]], vocabulary: Path, tmp_path: Path
) -> None:
    model, folder = checkpoints[False]
    halves = {name: value.half() for name, value in model.state_dict().items()}
    halves["logit_scale"] = torch.tensor(3.0).half()
    torch.save({"state_dict": halves}, tmp_path / FILE)
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    rounded, _ = tiny_open_clip(False)
    rounded.load_state_dict({name: value.float() for name, value in halves.items()})
    pictures = random_pictures(4, 30, 50)
    expected = open_clip_cosine(rounded, torch.stack([publisher_picture(each, 28) for each in pictures]), SCORED[:4])
    scores = loaded(tmp_path, tokenizer=str(vocabulary)).score(Media(images=pictures / 255), conditions(*SCORED[:4]))
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SIZES)
def test_pictures_are_prepared_as_the_publisher_does_to_the_bit(shape: tuple[int, int]) -> None:
    pictures = random_pictures(2, *shape)
    ours = normalised(letterbox(pictures.float() / 255, 224))
    expected = torch.stack([publisher_picture(picture, 224) for picture in pictures])
    assert ours.shape == (2, 3, 224, 224)
    assert torch.equal(ours, expected)


def test_a_picture_of_full_length_is_padded_though_the_publisher_fails_on_it() -> None:
    pictures = random_pictures(1, 224, 101).float() / 255
    square = letterbox(pictures, 224)
    assert torch.equal(square[..., 61:162], pictures)
    assert not square[..., :61].any()
    assert not square[..., 162:].any()


def test_a_very_thin_picture_keeps_a_line() -> None:
    assert letterbox(torch.ones(1, 3, 1, 1000), 224).sum(dim=2).max() > 0.9


def test_tokens_are_open_clips(vocabulary: Path) -> None:
    texts = prompts()
    assert len(texts) > 500
    theirs = open_clip_tokenizer()(texts, context_length=77)
    tokenizer = as_open_clip(CLIP_TOKENIZER.load(str(vocabulary)))
    ours = token_ids(tokenizer, [cleaned(text) for text in texts], 77)
    differing = [
        text for text, a, b in zip(texts, theirs, ours, strict=True) if up_to_end(a, 49407) != up_to_end(b, 49407)
    ]
    assert differing == []
    assert ours.shape == (len(texts), 77)


@pytest.fixture(scope="module")
def small() -> Hps:
    return loaded("random:small", batch=3)


TEXTS = ("a red fox", "a fox, asleep in the snow", "Rain", "two boats at sea", "a", "the end of a very long road")


def test_a_score_does_not_depend_on_the_batch(small: Hps) -> None:
    media = Media(images=random_pictures(6, 20, 33) / 255)
    together = small.score(media, conditions(*TEXTS))
    alone = [small.score(media[row : row + 1], conditions(TEXTS[row])).values for row in range(6)]
    torch.testing.assert_close(together.values, torch.cat(alone), rtol=0, atol=1e-6)
    assert together.values.std() > 0.01


def test_a_picture_that_is_not_finite_is_masked_alone(small: Hps) -> None:
    images = random_pictures(6, 20, 33) / 255
    clean = small.score(Media(images=images), conditions(*TEXTS))
    images[4, 1, 3, 3] = torch.nan
    scores = small.score(Media(images=images), conditions(*TEXTS))
    assert scores.valid.tolist() == [True, True, True, True, False, True]
    assert scores.reasons == {4: "pixels are not finite"}
    torch.testing.assert_close(scores.values[scores.valid], clean.values[scores.valid], rtol=0, atol=1e-6)


def test_videos_are_refused(small: Hps) -> None:
    with pytest.raises(ValueError, match="scores image, not video"):
        small.score(Media(videos=torch.rand(1, 2, 3, 8, 8)), conditions("a"))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures_are_scored_as_rgb(small: Hps, channels: int) -> None:
    images = random_pictures(2, 20, 33)[:, :1] / 255
    rgb = small.score(Media(images=images.repeat(1, 3, 1, 1)), conditions("a", "b"))
    other = images if channels == 1 else images.repeat(1, 4, 1, 1)
    assert torch.equal(small.score(Media(images=other), conditions("a", "b")).values, rgb.values)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_a_small_random_checkpoint_takes_the_same_way(version: str) -> None:
    entry = registry().reward("hps")
    reward = entry.build(entry.config.model_validate({"path": "random:small", "version": version}))
    before = torch.get_rng_state()
    reward.load(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    scores = reward.score(Media(images=random_pictures(2, 20, 33) / 255), conditions("a fox", "a boat"))
    assert scores.valid.all()
    assert scores.values.abs().max() <= 1
    again = loaded("random:small", version=version)
    assert torch.equal(
        again.score(Media(images=random_pictures(2, 20, 33) / 255), conditions("a fox", "a boat")).values, scores.values
    )
    assert again.fingerprint() == reward.fingerprint()
    assert entry.card is not None
    assert entry.card.modalities == {"image"}


def test_the_scale_is_applied_and_the_raw_score_kept(small: Hps) -> None:
    media = Media(images=random_pictures(6, 20, 33) / 255)
    raw = small.score(media, conditions(*TEXTS))
    scaled = loaded("random:small", scale="x100").score(media, conditions(*TEXTS))
    assert raw.raw is not None
    assert scaled.raw is not None
    torch.testing.assert_close(scaled.raw, raw.raw, rtol=0, atol=1e-6)
    assert torch.equal(scaled.values, 100 * scaled.raw)


def test_an_offloaded_reward_is_on_the_device_only_to_score(small: Hps, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[object] = []
    move = torch.nn.Module.to

    def recorded(module: torch.nn.Module, *where: Any, **options: Any) -> torch.nn.Module:
        moves.extend(where)
        return move(module, *where, **options)

    media, device = Media(images=random_pictures(6, 20, 33) / 255), torch.device("cpu", 0)
    reward = Hps(HpsConfig(path="random:small", offload=True))
    monkeypatch.setattr(torch.nn.Module, "to", recorded)
    reward.load(device)
    assert device not in moves
    scores = reward.score(media, conditions(*TEXTS))
    assert moves[-1] == device
    reward.release()
    assert moves[-1] == "cpu"
    again = reward.score(media, conditions(*TEXTS))
    assert moves[-1] == device
    assert torch.equal(again.values, scores.values)
    torch.testing.assert_close(scores.values, small.score(media, conditions(*TEXTS)).values, rtol=0, atol=1e-6)
