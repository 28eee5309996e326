"""VBench's imaging quality: MUSIQ against recorded outputs and against its parts written down anew."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from branchtree_rewards.vbench.base import longer_side
from branchtree_rewards.vbench.imaging import VBenchImaging, VBenchImagingConfig
from branchtree_rewards.vbench.musiq import Musiq, MusiqSizes, StandardisedConv, hashed_cells, pieces, split
from torch import Tensor
from torchvision import transforms
from vbench_recorded import recorded, recorder

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media

FILE = "musiq_spaq_ckpt-358bb6af.pth"
RECORDED = recorded("outputs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random MUSIQ that VBench was run with."""
    names = {"hidden_size": "width", "mlp_dim": "inner", "num_heads": "heads", "num_layers": "layers"}
    sizes = MusiqSizes(**{names[name]: size for name, size in RECORDED["musiq_sizes"].items()})
    path = tmp_path_factory.mktemp("musiq")
    (path / "musiq.json").write_text(sizes.model_dump_json(), encoding="utf-8")
    torch.save(recorder().random_weights(shapes(sizes), RECORDED["seeds"]["musiq"]), path / FILE)
    return path


def shapes(sizes: MusiqSizes) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in Musiq(sizes).state_dict().items()}


def loaded(path: Path | str, **options: Any) -> VBenchImaging:
    reward = VBenchImaging(VBenchImagingConfig(path=str(path), **options))
    reward.load(torch.device("cpu"))
    return reward


def score(reward: VBenchImaging, videos: Tensor) -> Scores:
    return reward.score(Media(videos=videos), [Condition("")] * len(videos))


def test_the_published_model_has_the_published_tensors() -> None:
    published = recorded("musiq_keys")
    ours = shapes(MusiqSizes())
    assert ours == published
    assert len(ours) == 248
    assert sum(math.prod(shape) for shape in ours.values()) == 27_125_825


@pytest.mark.parametrize("place", range(len(RECORDED["imaging_quality"])))
def test_scores_are_vbenchs_own(folder: Path, place: int) -> None:
    told = RECORDED["imaging_quality"][place]
    frames = recorder().random_frames(*told["size"])
    reward = loaded(folder)
    alone = score(reward, frames[:, None] / 255)
    np.testing.assert_allclose(alone.values, told["scores"], rtol=0, atol=2e-5)
    if place == 0:
        together = score(reward, frames[None] / 255)
        np.testing.assert_allclose(together.values, [np.mean(told["scores"])], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("height", "width", "counts"),
    [(288, 512, (4 * 7, 7 * 12, 9 * 16)), (32, 32, (49, 144, 1)), (33, 31, (7 * 7, 12 * 12, 2)), (512, 100, None)],
)
def test_patches_are_counted_as_published(height: int, width: int, counts: tuple[int, ...] | None) -> None:
    cut = pieces(torch.zeros(1, 3, height, width), (384, 224), 10)
    assert cut.patches.shape[:2] == (1, len(cut.cells))
    found = torch.bincount(cut.scales, minlength=3).tolist()
    if counts is None:
        sizes = [(224, round(100 * 224 / 512)), (384, round(100 * 384 / 512)), (512, 100)]
        counts = tuple(math.ceil(high / 32) * math.ceil(wide / 32) for high, wide in sizes)
    assert tuple(found) == counts
    assert cut.scales.tolist() == sorted(cut.scales.tolist())


def test_a_common_size_has_as_many_tokens_as_publishers_code() -> None:
    """337 as the publisher counts: the two smaller scales filled up to 49 and 144 masked patches, and 144."""
    cut = pieces(torch.zeros(1, 3, 288, 512), (224, 384), 10)
    own = int((cut.scales == 2).sum())
    assert 7**2 + 12**2 + own == 337


def test_places_are_the_nearest_cells_of_the_grid() -> None:
    for rows, columns in ((1, 1), (4, 7), (7, 12), (9, 16), (16, 9), (10, 10), (3, 40)):
        down = [math.floor(Fraction(10 * place, rows)) for place in range(rows)]
        across = [math.floor(Fraction(10 * place, columns)) for place in range(columns)]
        assert hashed_cells(rows, columns, 10).tolist() == [10 * row + column for row in down for column in across]


@pytest.mark.parametrize(("height", "width"), [(32, 64), (45, 33), (97, 64), (20, 31)])
def test_patches_are_cut_from_a_canvas_of_zeros(height: int, width: int) -> None:
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) + 1
    rows, columns = math.ceil(height / 32), math.ceil(width / 32)
    canvas = np.zeros((3, 32 * rows, 32 * columns), dtype=np.float32)
    top, left = (32 * rows - height) // 2, (32 * columns - width) // 2
    canvas[:, top : top + height, left : left + width] = image[0]
    expected = [
        canvas[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        for row in range(rows)
        for column in range(columns)
    ]
    np.testing.assert_array_equal(split(image)[0], np.stack(expected))


def test_standardised_kernels_ignore_size_and_offset() -> None:
    conv = StandardisedConv(3, 8, 7, stride=2)
    source = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=source)
    conv.load_state_dict({"weight": torch.randn(8, 3, 7, 7, generator=source)})
    with torch.no_grad():
        first = conv(images)
        conv.weight.mul_(5).add_(3)
        torch.testing.assert_close(conv(images), first, rtol=1e-3, atol=1e-3)
    assert first.shape == (2, 8, 16, 16)


@pytest.mark.parametrize("size", [(530, 301), (300, 1000), (513, 513), (512, 512), (40, 56)])
def test_large_frames_are_shrunk_as_by_torchvision(size: tuple[int, int]) -> None:
    frames = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 255
    expected = frames
    if max(size) > 512:
        scale = 512.0 / max(size)
        expected = transforms.Resize((int(scale * size[0]), int(scale * size[1])), antialias=False)(frames)
    torch.testing.assert_close(longer_side(frames, 512), expected, rtol=0, atol=1e-4)


def test_where_a_patch_lies_and_its_scale_matter() -> None:
    reward = loaded("random:small")
    videos = torch.rand(2, 1, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    whole = score(reward, videos)
    turned = score(reward, videos.flip(-1))
    assert (whole.values - turned.values).abs().min() > 1e-4
    frames = torch.cat([videos[:1], videos[:1].flip(-1)], dim=1)
    both = score(reward, frames)
    torch.testing.assert_close(both.values[0], (whole.values[0] + turned.values[0]) / 2)
    torch.testing.assert_close(score(reward, frames.flip(1)).values, both.values)
    torch.testing.assert_close(score(loaded("random:small", frames=1), frames).values, both.values)


def test_weights_are_loaded_strictly(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / FILE, weights_only=True)
    with pytest.raises(RewardError, match=r"embedding.bias is \(12,\), not \(384,\)"):
        loaded(folder / FILE)  # the file alone has the published sizes
    (tmp_path / "musiq.json").write_bytes((folder / "musiq.json").read_bytes())
    for change, message in (
        ({"head.more": torch.ones(1)}, "unknown: head.more"),
        ({"head.bias": torch.ones(2)}, r"head.bias is \(2,\), not \(1,\)"),
    ):
        torch.save({**state, **change}, tmp_path / FILE)
        with pytest.raises(RewardError, match=message):
            loaded(tmp_path)
    torch.save({"params": state}, tmp_path / FILE)
    videos = torch.rand(1, 1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(score(loaded(tmp_path), videos).values, score(loaded(folder), videos).values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"width": 7, "heads": 2}', "width must be a multiple of heads"),
        ('{"stem": 48}', "multiples of 32"),
        ('{"layers": 0}', "greater than or equal to 1"),
        ('{"depth": 3}', "Extra inputs"),
        ("[]", "holds no sizes of MUSIQ"),
        ("{", "holds no sizes of MUSIQ"),
    ],
)
def test_sizes_that_make_no_model_are_refused(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    (tmp_path / "musiq.json").write_text(text, encoding="utf-8")
    with pytest.raises(RewardError, match=message):
        loaded(tmp_path)


def test_weights_that_are_not_there_say_where_they_come_from() -> None:
    with pytest.raises(RewardError, match=r"not on the hub: download https://github\.com/chaofengc/IQA-PyTorch"):
        loaded(FILE)


def test_a_small_one_needs_nothing() -> None:
    videos = torch.rand(3, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = score(loaded("random:small"), videos)
    assert scores.valid.all()
    assert ((scores.values > 0) & (scores.values < 100)).all()
    halved = score(loaded("random:small", scale="div100"), videos)
    torch.testing.assert_close(halved.values, scores.values / 100)
