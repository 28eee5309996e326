"""VBench's dimensions on CLIP features and by interpolation, against their formulas written down anew."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from branchtree_rewards.small.clip import write_clip_folder, write_small_aesthetic
from branchtree_rewards.vbench.base import clip_input
from branchtree_rewards.vbench.clip import consistency
from torch import Tensor
from torchvision import transforms

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

CPU = torch.device("cpu")
SIDE = 28  # pixels, of the small CLIP's pictures
BLEND = {"interpolator": "blend"}


def videos(count: int, frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Videos of random bytes."""
    source = np.random.RandomState(seed)
    return torch.from_numpy(source.randint(0, 256, size=(count, frames, 3, height, width))).float() / 255


def loaded(name: str, **options: Any) -> Any:
    entry = registry().reward(name)
    reward = entry.build(entry.config(**options))
    reward.load(CPU)
    return reward


def score(name: str, shown: Tensor, fps: float | None = 8.0, **options: Any) -> Scores:
    scores: Scores = loaded(name, **options).score(Media(videos=shown, fps=fps), [Condition("a cat")] * len(shown))
    return scores


def by_vbench(frames: Tensor, size: int = SIDE) -> Tensor:
    """What VBench makes of frames (T, 3, H, W) from 0 to 255, by torchvision."""
    prepare = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC, antialias=False),
            transforms.CenterCrop(size),
            transforms.Lambda(lambda frames: frames / 255.0),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    prepared: Tensor = prepare(frames)
    return prepared


@pytest.mark.parametrize("size", [(28, 28), (64, 41), (33, 90), (20, 25), (57, 57), (31, 28)])
def test_frames_are_prepared_as_by_torchvision_on_floats(size: tuple[int, int]) -> None:
    frames = (videos(1, 4, *size)[0] * 255).round()
    torch.testing.assert_close(clip_input(frames, SIDE), by_vbench(frames), rtol=0, atol=1e-6)


def test_frames_overshoot_as_floats_do() -> None:
    shown = clip_input((videos(1, 2, 90, 90)[0] * 255).round(), SIDE)[:, 0] * 0.26862954 + 0.48145466
    assert float(shown.min()) < -0.02
    assert float(shown.max()) > 1.02


@torch.no_grad()
def features(clip: Path, video: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    found = model.get_image_features(by_vbench((video * 255).round())).pooler_output.double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_aesthetic_quality_follows_its_formula(tmp_path: Path) -> None:
    write_small_aesthetic(tmp_path)
    head = torch.load(tmp_path / "sa_0_4_vit_l_14_linear.pth", weights_only=True)
    weight, bias = head["weight"][0].double().numpy(), float(head["bias"])
    shown = videos(3, 5, 40, 52)
    expected = [np.mean((features(tmp_path / "clip", video) @ weight + bias) / 10) for video in shown]
    scores = score("vbench_aesthetic", shown, path=str(tmp_path), frames=2)
    np.testing.assert_allclose(scores.values, expected, rtol=0, atol=1e-6)
    assert np.std(expected) > 1e-3
    scaled = score("vbench_aesthetic", shown, path=str(tmp_path), scale="x10")
    torch.testing.assert_close(scaled.values, scores.values * 10)


def by_the_loop(found: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Background consistency as a loop over frames, of features of length 1."""
    terms = []
    for place in range(1, len(found)):
        before, first = float(found[place - 1] @ found[place]), float(found[0] @ found[place])
        terms.append((max(0.0, before) + max(0.0, first)) / 2)
    return sum(terms) / len(terms)


def test_background_consistency_follows_its_formula(tmp_path: Path) -> None:
    write_clip_folder(tmp_path, seed=5)
    shown = videos(3, 5, 40, 52)
    expected = [by_the_loop(features(tmp_path, video)) for video in shown]
    scores = score("vbench_background", shown, path=str(tmp_path), frames=2)
    np.testing.assert_allclose(scores.values, expected, rtol=0, atol=1e-6)
    assert np.std(expected) > 1e-3
    assert scores.details["frames"].tolist() == [4, 4, 4]


def test_opposite_frames_count_as_unlike_and_no_less() -> None:
    source = torch.Generator().manual_seed(0)
    found = torch.randn(6, 3, generator=source)
    unit = (found.double() / found.double().norm(dim=1, keepdim=True)).numpy()
    assert (unit @ unit.T).min() < -0.1
    assert float(consistency(found)) == pytest.approx(by_the_loop(unit), abs=1e-6)


def test_the_set_of_videos_is_weighted_by_the_detail() -> None:
    """VBench's figure for a set: the sum of all terms over their number."""
    long, short = videos(1, 7, 40, 52), videos(1, 3, 40, 52, seed=1)
    parts = [score("vbench_background", shown, path="random:small") for shown in (long, short)]
    values, weights = (torch.cat([getter(part) for part in parts]) for getter in (_values, _frames))
    assert weights.tolist() == [6, 2]
    assert abs(float((values * weights).sum() / weights.sum()) - float(values.mean())) > 1e-4


def _values(scores: Scores) -> Tensor:
    return scores.values


def _frames(scores: Scores) -> Tensor:
    return scores.details["frames"]


def test_a_still_video_keeps_its_background_and_moves_smoothly() -> None:
    still = videos(2, 1, 40, 52).expand(-1, 7, -1, -1, -1)
    torch.testing.assert_close(
        score("vbench_background", still, path="random:small").values, torch.ones(2), rtol=0, atol=1e-6
    )
    assert score("vbench_smoothness", still, **BLEND).values.tolist() == [1, 1]


def test_one_frame_has_no_background_to_keep() -> None:
    scores = score("vbench_background", videos(2, 1, 40, 52), path="random:small")
    assert not scores.valid.any()
    assert scores.reasons == dict.fromkeys((0, 1), "a video of one frame has nothing to compare")


def smoothness_by_loop(video: Tensor) -> float:
    """1 less the mean difference of odd frames from the mean of their neighbours, in integers."""
    frames = (video.double() * 255).round().long().numpy()
    differences = []
    for place in range(1, len(frames) - 1, 2):
        drawn = (frames[place - 1] + frames[place + 1]) // 2  # the cut bytes of the mean
        differences.append(np.abs(drawn - frames[place]).mean())
    return float((255 - np.mean(differences)) / 255)


@pytest.mark.parametrize("frames", [3, 4, 9])
def test_smoothness_follows_its_formula(frames: int) -> None:
    shown = videos(3, frames, 21, 38)
    scores = score("vbench_smoothness", shown, frames=2, **BLEND)
    expected = [smoothness_by_loop(video) for video in shown]
    np.testing.assert_allclose(scores.values, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores.details["difference"], [255 * (1 - value) for value in expected], atol=1e-4)


def test_the_blend_is_marked_as_another_measure() -> None:
    scores = score("vbench_smoothness", videos(2, 3, 20, 20), scale="x100", **BLEND)
    assert scores.raw is not None
    torch.testing.assert_close(scores.details["blend_not_vbench"], scores.raw)
    torch.testing.assert_close(scores.values, 100 * scores.raw)
    assert "not VBench's" in registry().reward("vbench_smoothness").summary


def moving(frames: int, step: int) -> Tensor:
    """A picture that wanders ``step`` pixels a frame to the right, around the edge."""
    picture = videos(1, 1, 32, 48)[0, 0]
    return torch.stack([picture.roll(step * place, dims=2) for place in range(frames)])[None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with interpolators, as a user would have installed it."""
    module = types.ModuleType("my_interpolators")

    def rolled(device: torch.device, step: int = 0) -> Any:
        assert device == CPU
        return lambda first, second: first.roll(step, dims=3)

    module.rolled = rolled  # type: ignore[attr-defined]
    module.beyond = lambda device: lambda first, second: first * 4 - 2  # type: ignore[attr-defined]
    module.small = lambda device: lambda first, second: first[..., :-1]  # type: ignore[attr-defined]
    module.nothing = lambda device: None  # type: ignore[attr-defined]
    module.broken = lambda device: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_interpolators", module)
    return module


def test_an_interpolator_that_knows_the_motion_finds_it_smooth(installed: types.ModuleType) -> None:
    shown = moving(7, step=5)
    exact = score("vbench_smoothness", shown, interpolator="my_interpolators:rolled", options={"step": 5})
    assert exact.values.tolist() == [1]
    assert "blend_not_vbench" not in exact.details
    wrong = score("vbench_smoothness", shown, interpolator="my_interpolators:rolled", options={"step": 4})
    assert wrong.values[0] < 0.8
    assert score("vbench_smoothness", shown, **BLEND).values[0] < 0.8


def test_what_an_interpolator_draws_is_cut_to_bytes(installed: types.ModuleType) -> None:
    shown = videos(1, 3, 32, 32)
    bytes_ = (shown[0].double() * 255).round()
    drawn = (bytes_[0] * 4 - 510).clamp(0, 255)
    expected = 1 - float((drawn - bytes_[1]).abs().mean()) / 255
    found = score("vbench_smoothness", shown, interpolator="my_interpolators:beyond").values[0]
    assert float(found) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_interpolators:absent", r"cannot make the interpolator 'my_interpolators:absent' \(AttributeError"),
        ("my_interpolators:broken", r"ZeroDivisionError: division by zero"),
        ("my_interpolators:nothing", "made a NoneType, which cannot be called"),
        ("no_such_module:amt", "ModuleNotFoundError"),
        ("my_interpolators:small", r"returned \(1, 3, 32, 31\), not frames of shape \(1, 3, 32, 32\)"),
    ],
)
def test_a_wrong_interpolator_is_named(installed: types.ModuleType, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score("vbench_smoothness", videos(1, 3, 20, 20), interpolator=name)


def test_an_interpolator_must_be_chosen() -> None:
    config = registry().reward("vbench_smoothness").config
    with pytest.raises(pydantic.ValidationError, match="interpolator"):
        config()
    with pytest.raises(pydantic.ValidationError, match="'amt' names no interpolator"):
        config(interpolator="amt")


def test_smoothness_needs_a_frame_between_two() -> None:
    scores = score("vbench_smoothness", videos(1, 2, 20, 20), **BLEND)
    assert scores.reasons == {0: "a video of 2 frames has none between two others"}
    assert not scores.valid.any()
