"""The `clip_similarity` reward against transformers' and open_clip's image features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_rewards.clip.clip_similarity import ClipSimilarity, ClipSimilarityConfig
from branchtree_rewards.small.clip import write_clip_folder
from clip_publisher import random_pictures
from PIL import Image
from torch import Tensor
from torch.nn import functional

from branchtree.data.images import read_image
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

CPU = torch.device("cpu")
SIZES = [(40, 60), (61, 23), (28, 28)]  # heights and widths of sources


def loaded(path: Path | str = "random:small", **settings: Any) -> ClipSimilarity:
    reward = ClipSimilarity(ClipSimilarityConfig.model_validate({"path": str(path), **settings}))
    reward.load(CPU)
    return reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip_folder(folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Condition]:
    """Conditions with a picture of each size."""
    folder, made = tmp_path_factory.mktemp("sources"), []
    for row, size in enumerate(SIZES):
        picture(random_pictures(row + 1, *size)[row]).save(folder / f"{row}.png")
        made.append(Condition(f"edit {row}", image=folder / f"{row}.png"))
    return made


def picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@torch.no_grad()
def features(folder: Path, pictures: Sequence[Image.Image]) -> Tensor:
    """What transformers itself makes of pictures (N, E), each alone."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    model, process = CLIPModel.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    found = [model.get_image_features(**process(images=each, return_tensors="pt")).pooler_output for each in pictures]
    return torch.cat(found)


def images_of(conditions: Sequence[Condition]) -> list[Image.Image]:
    return [read_image(condition.images[0], "") for condition in conditions]


def test_images_score_as_by_transformers(folder: Path, sources: list[Condition]) -> None:
    pictures = random_pictures(3, 33, 50)
    expected = functional.cosine_similarity(
        features(folder, [picture(each) for each in pictures]), features(folder, images_of(sources))
    )
    scores = loaded(folder).score(Media(images=pictures / 255), sources)
    assert scores.valid.all() and expected.std() > 0.01
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [2, 16])
def test_a_video_scores_the_mean_of_its_frames(folder: Path, sources: list[Condition], batch: int) -> None:
    frames = random_pictures(12, 20, 30).unflatten(0, (3, 4))
    scores = loaded(folder, batch=batch).score(Media(videos=frames / 255, fps=8.0), sources)
    each = [loaded(folder).score(Media(images=frames[:, i] / 255), sources).values for i in range(4)]
    torch.testing.assert_close(scores.values, torch.stack(each).mean(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["openai-b32", "openai-l14", "dfn5b"])
def test_an_image_is_wholly_like_itself(variant: str, sources: list[Condition]) -> None:
    reward = loaded(variant=variant)
    for condition, image in zip(sources, images_of(sources), strict=True):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, *image.size[::-1], 3)
        media = Media(images=pixels.permute(0, 3, 1, 2) / 255)
        assert float(reward.score(media, [condition]).values) == pytest.approx(1, abs=1e-6)
        assert float(reward.score(Media(images=1 - media.pixels), [condition]).values) < 0.999


def test_the_first_image_counts_turned_as_its_camera_was(tmp_path: Path, sources: list[Condition]) -> None:
    image = images_of(sources)[0]
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn clockwise
    image.save(tmp_path / "stored.png", exif=turned)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    media = Media(images=random_pictures(1, 30, 40) / 255)
    reward = loaded()
    stored, upright, plain = (
        float(reward.score(media, [Condition("a", image=path, further_images=sources[1].images)]).values)
        for path in (tmp_path / "stored.png", tmp_path / "upright.png", sources[0].images[0])
    )
    assert stored == upright != plain


def test_samples_whose_condition_has_no_readable_image_are_not_valid(tmp_path: Path, sources: list[Condition]) -> None:
    Image.new("RGB", (300, 1)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes(sources[0].images[0].read_bytes()[:60])
    bad = [Condition("a"), *(Condition("b", image=tmp_path / name) for name in ("thin.png", "cut.png", "gone.png"))]
    media = Media(images=random_pictures(5, 30, 40) / 255)
    scores = loaded().score(media, [*bad, sources[0]])
    assert scores.valid.tolist() == [False] * 4 + [True]
    assert scores.reasons[0] == "its condition has no image"
    assert "too elongated" in scores.reasons[1]
    assert "cut.png" in scores.reasons[2] and "gone.png" in scores.reasons[3]
    alone = loaded().score(media[4:], sources[:1]).values
    torch.testing.assert_close(scores.values[4:], alone, rtol=0, atol=1e-6)


def test_any_prompt_will_do(sources: list[Condition]) -> None:
    entry = registry().reward("clip_similarity")
    reward = entry.build(entry.config(path="random:small", scale="x100"))
    reward.load(CPU)
    odd = [Condition(prompt, image=sources[0].image) for prompt in (" ", "<|endoftext|>", "half \ud83d")]
    media = Media(images=random_pictures(1, 30, 40).expand(3, -1, -1, -1) / 255)
    scores = reward.score(media, odd)
    assert scores.valid.all() and len(scores.values.unique()) == 1
    assert scores.raw is not None and torch.equal(scores.values, 100 * scores.raw)
