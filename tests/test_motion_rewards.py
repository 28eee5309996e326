"""The rewards `motion_smoothness` and `motion_direction`, on clips of known motion and on the same clips spoilt."""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import clips
import pydantic
import pytest
import torch
from branchtree_rewards.motion.reward import (
    MEASURES,
    MotionConfig,
    MotionDirection,
    MotionDisplacement,
    MotionSmoothness,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import thorough
from torch import Tensor

from branchtree.plugins import Condition, Media
from branchtree.plugins.registry import registry

CPU = torch.device("cpu")
REWARDS = {"motion_smoothness": MotionSmoothness, "motion_direction": MotionDirection}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
each_reward = pytest.mark.parametrize("name", REWARDS)
each_measure = pytest.mark.parametrize("measure", ["flow", "subject"])
Reward = MotionSmoothness | MotionDirection


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """Measure the same frames once: what rewards make of a measurement, and of first frames, comes after it."""
    known: dict[tuple[str, torch.Size, bytes], Any] = {}

    def remembering(name: str, measure: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def measured(frames: Tensor) -> Any:
            key = (name, frames.shape, hashlib.sha256(frames.contiguous().numpy()).digest())
            if key not in known:
                known[key] = measure(frames)
            return known[key]

        return measured

    with pytest.MonkeyPatch.context() as patch:
        for name, measure in list(MEASURES.items()):
            patch.setitem(MEASURES, name, remembering(name, measure))
        yield


def loaded(name: str, measure: str = "flow", **settings: float) -> Reward:
    reward = REWARDS[name](MotionConfig.model_validate({"measure": measure, **settings}))
    reward.load(CPU)
    return reward


def told(directions: Sequence[str]) -> list[Condition]:
    return [Condition(prompt=f"a digit moving {direction}") for direction in directions]


def scores(reward: Reward, videos: Tensor, conditions: Sequence[Condition]) -> Tensor:
    result = reward.score(Media(videos=videos, fps=8.0), conditions)
    assert result.values.dtype == torch.float32
    assert result.valid.dtype == torch.bool
    assert result.valid.all()
    return result.values


@each_measure
@each_reward
def test_every_spoilt_clip_scores_below_every_real_one(name: str, measure: str) -> None:
    reward = loaded(name, measure)
    real = clips.digit_clips(24, seed=1)
    lowest = scores(reward, real.videos, told(real.directions)).min()
    if name == "motion_smoothness":
        bouncing = clips.digit_clips(24, seed=2, bounces=True)
        lowest = torch.minimum(lowest, scores(reward, bouncing.videos, told(bouncing.directions)).min())
    assert lowest > 0.5
    for how, videos in clips.broken(real, seed=3).items():
        margin = 0.0 if how == "brightness flickers" else 0.2
        assert scores(reward, videos, told(real.directions)).max() < lowest - margin, how


@each_measure
def test_a_bounce_costs_little_and_slower_motion_more(measure: str) -> None:
    reward = loaded("motion_smoothness", measure)
    real, bouncing = clips.digit_clips(48, seed=4), clips.digit_clips(48, seed=5, bounces=True)
    straight = scores(reward, real.videos, told(real.directions)).mean()
    bounced = scores(reward, bouncing.videos, told(bouncing.directions)).mean()
    assert straight - 0.2 < bounced < straight
    start = real.centres[:, :1]
    slow = scores(reward, clips.draw(real.images, start + 0.2 * (real.centres - start)), told(real.directions)).mean()
    assert slow < 0.5 * straight


@pytest.mark.parametrize(
    ("scene", "size", "frames", "speed"), [("patch", (64, 96), 17, 1.2), ("pan", (96, 160), 13, 2.0)]
)
def test_textured_scenes_are_ordered_too(scene: str, size: tuple[int, int], frames: int, speed: float) -> None:
    path = clips.line((speed, 0.0), frames, start=(-speed * frames * 0.4, 0.0))
    jumped, shaken = path.clone(), torch.randn(path.shape, generator=torch.Generator().manual_seed(6))
    jumped[frames // 2 :] += torch.tensor([0.0, size[0] / 8])

    def drawn(along: Tensor) -> Tensor:
        return torch.stack([getattr(clips, scene)(seed, along, *size) for seed in (0, 1)])

    real = drawn(path)
    ground = torch.stack([clips.background(seed, *size) for seed in (0, 1)])[:, None] if scene == "patch" else 0.5
    spoilt = {
        "still": lambda: real[:, :1].expand_as(real),
        "fades": lambda: clips.fading(real, ground),
        "jumps": lambda: drawn(jumped),
        "shakes": lambda: drawn(path + 0.015 * size[0] * shaken),
        "shows another scene after the first frame": lambda: torch.cat([real[:, :1], real[:, 1:].roll(1, 0)], dim=1),
        "stutters": lambda: torch.cat([real[:, : frames // 2], real[:, frames // 2 - 1 : -1]], dim=1),
    }
    rewards = [loaded("motion_direction", measure) for measure in ("flow", "subject")]
    lowest = [scores(reward, real, told(["right"] * 2)).min() for reward in rewards]
    assert min(lowest) > 0.25
    for how, videos in spoilt.items():
        made = videos()
        for reward, least in zip(rewards, lowest, strict=True):
            assert scores(reward, made, told(["right"] * 2)).max() < least - 0.1, how


@each_measure
@pytest.mark.parametrize("way", list(itertools.product(("left", "right"), ("up", "down"))))
def test_diagonals_are_told_apart(measure: str, way: tuple[str, str]) -> None:
    velocity = [1.2 * (clips.UNIT[way[0]][axis] + clips.UNIT[way[1]][axis]) for axis in (0, 1)]
    path = clips.line(velocity, 9, start=[-4 * rate for rate in velocity])
    videos = clips.draw(clips.glyphs()[:8], path.expand(8, -1, -1))
    reward = loaded("motion_direction", measure)
    by_prompt = {
        (x, y): scores(reward, videos, told([f"{y} and to the {x}"] * 8))
        for x in ("left", "right")
        for y in ("up", "down")
    }
    opposite = (OPPOSITE[way[0]], OPPOSITE[way[1]])
    assert by_prompt[way].min() > 0.6
    assert by_prompt[opposite].max() < 0.05
    for other in by_prompt.keys() - {way, opposite}:
        assert torch.allclose(by_prompt[other], by_prompt[way] / 2, atol=0.05)
    assert torch.allclose(
        scores(reward, videos, told([way[0]] * 8)), by_prompt[way] * (1 + math.sqrt(0.5)) / 2, atol=0.05
    )


@each_measure
def test_directions_are_told_apart(measure: str) -> None:
    real = clips.digit_clips(40, seed=7)
    reward, smoothness = loaded("motion_direction", measure), loaded("motion_smoothness", measure)
    as_told = scores(reward, real.videos, told(real.directions))
    against = scores(reward, real.videos, told([OPPOSITE[way] for way in real.directions]))
    turned = scores(reward, real.videos, told([list(OPPOSITE)[(i + 2) % 4] for i in range(40)]))
    smooth = scores(smoothness, real.videos, told(real.directions))
    assert torch.allclose(as_told, smooth, atol=0.01)
    assert against.max() < 0.01
    assert torch.allclose(turned, smooth / 2, atol=0.1)


@each_measure
@each_reward
def test_a_video_scores_the_same_alone_and_in_a_batch(name: str, measure: str) -> None:
    reward = loaded(name, measure)
    real = clips.digit_clips(12, seed=8)
    videos = torch.cat([real.videos, clips.broken(real, seed=9)["jitter of 0.5 pixels"]])
    conditions = told(real.directions * 2)
    together = scores(reward, videos, conditions)
    alone = [scores(reward, videos[i : i + 1], conditions[i : i + 1]) for i in range(24)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6, rtol=0)


@each_measure
@each_reward
def test_brightness_channels_and_place_matter_little(name: str, measure: str) -> None:
    reward, real = loaded(name, measure), clips.digit_clips(16, seed=10)
    conditions = told(real.directions)
    before = scores(reward, real.videos, conditions)
    assert torch.allclose(scores(reward, 0.2 + 0.5 * real.videos, conditions), before, atol=0.02)
    assert torch.allclose(scores(reward, 1 - real.videos, conditions), before, atol=0.02)
    assert torch.allclose(scores(reward, real.videos[:, :, :1], conditions), before, atol=0.02)
    wider = torch.nn.functional.pad(real.videos, (8, 8))
    assert torch.allclose(scores(reward, wider, conditions), before, atol=0.1)


@each_measure
def test_larger_frames_score_like_small_ones(measure: str) -> None:
    reward, real = loaded("motion_smoothness", measure), clips.digit_clips(6, seed=11)
    larger = torch.nn.functional.interpolate(real.videos.flatten(0, 1), scale_factor=8, mode="bilinear")
    small = scores(reward, real.videos, told(real.directions))
    assert torch.allclose(scores(reward, larger.unflatten(0, (6, 9)), told(real.directions)), small, atol=0.1)


def test_the_measures_are_the_ones_named() -> None:
    videos = clips.turning(range(4), 4.0, 9, 48)
    by_flow, by_subject = (
        scores(loaded("motion_smoothness", m), videos, told(["left"] * 4)) for m in ("flow", "subject")
    )
    assert by_flow.min() > 0.5
    assert by_subject.max() < 0.3


@pytest.mark.parametrize("speed", [0.01, 0.05])
def test_the_speed_that_earns_half_can_be_set(speed: float) -> None:
    path = clips.line((speed * 32, 0.0), 9, start=(-speed * 128, 0.0))
    videos = clips.draw(clips.glyphs()[:10], path.expand(10, -1, -1))
    half, whole = (scores(loaded("motion_smoothness", speed=s), videos, told(["right"] * 10)) for s in (speed, 1e-4))
    assert torch.allclose(half / whole, torch.tensor(0.5), atol=0.05)


def first_frames(folder: Path, frames: Tensor, size: int) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        pixels = frame.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(path)
    return paths


@each_measure
@each_reward
@pytest.mark.parametrize("size", [32, 96])
def test_a_video_that_does_not_start_from_its_image_scores_below(
    name: str, measure: str, size: int, tmp_path: Path
) -> None:
    reward = loaded(name, measure)
    real = clips.digit_clips(40, seed=12)
    # One frame more than is scored, so that there is a clip of the same length that leaves the first frame out.
    longer = torch.cat([real.centres, 2 * real.centres[:, -1:] - real.centres[:, -2:-1]], dim=1)
    videos = clips.draw(real.images, longer)
    paths = first_frames(tmp_path, videos[:, 0], size)
    conditions = [Condition(c.prompt, image=path) for c, path in zip(told(real.directions), paths, strict=True)]
    kept = scores(reward, videos[:, :-1], conditions)
    left_out = scores(reward, videos[:, 1:], conditions)
    unasked = scores(reward, videos[:, :-1], told(real.directions))
    another = scores(reward, videos[:, :-1], conditions[1:] + conditions[:1])
    assert torch.allclose(kept, unasked, atol=0.02 if size == 32 else 0.15)
    assert left_out.max() < kept.min() - 0.1
    assert another.max() < kept.min() - 0.3
    mixed = scores(reward, videos[:2, :-1], [conditions[1], told(real.directions)[1]])
    assert mixed[0] < kept.min() - 0.3
    assert torch.allclose(mixed[1], unasked[1], atol=1e-6)


def test_a_video_whose_first_frame_cannot_be_read_is_masked(tmp_path: Path) -> None:
    condition = Condition(prompt="a digit moving left", image=tmp_path / "none.png")
    scores = loaded("motion_smoothness").score(Media(videos=torch.zeros(1, 9, 3, 32, 32)), [condition])
    assert not scores.valid.any() and "none.png" in scores.reasons[0]


@each_measure
def test_what_cannot_be_judged_is_not_valid(measure: str) -> None:
    real = clips.digit_clips(4, seed=13)
    spoilt = real.videos.clone()
    spoilt[1, 4, 0, 3, 3], spoilt[2, 0, 0, 0, 0] = math.nan, math.inf
    prompts = ["moving left", "moving left", "moving left", "a digit"]
    conditions = [Condition(prompt=prompt) for prompt in prompts]
    smooth = loaded("motion_smoothness", measure).score(Media(videos=spoilt), conditions)
    directed = loaded("motion_direction", measure).score(Media(videos=spoilt), conditions)
    assert smooth.valid.tolist() == [True, False, False, True]
    assert directed.valid.tolist() == [True, False, False, False]
    expected = scores(loaded("motion_smoothness", measure), real.videos[:1], conditions[:1])
    assert torch.allclose(smooth.values[:1], expected, atol=1e-6)
    assert smooth.values.isfinite().tolist() == smooth.valid.tolist()
    assert directed.reasons == {**smooth.reasons, 3: "the prompt does not name exactly one direction"}


@each_measure
@each_reward
@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0])
def test_a_blank_video_scores_least(name: str, measure: str, grey: float) -> None:
    assert scores(loaded(name, measure), torch.full((1, 9, 3, 32, 32), grey), told(["left"])) == 0


@each_measure
@each_reward
@given(data=st.data())
@settings(thorough, max_examples=25)
def test_scores_are_from_0_to_1_on_any_video(name: str, measure: str, data: st.DataObject) -> None:
    shape = [data.draw(st.integers(low, high)) for low, high in ((1, 2), (3, 12), (1, 4), (8, 20), (8, 20))]
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    videos = torch.rand(shape, generator=source) ** data.draw(st.sampled_from([0.2, 1.0, 5.0]))
    if data.draw(st.booleans()):
        videos = (videos > 0.9).float()
    kept = data.draw(st.floats(0, 1))
    videos = kept * videos[:, :1] + (1 - kept) * videos
    values = scores(loaded(name, measure), videos, told(["up"] * shape[0]))
    assert ((values >= 0) & (values <= 1)).all()


@each_reward
@pytest.mark.parametrize(
    ("media", "message"),
    [
        (Media(images=torch.zeros(1, 3, 32, 32)), "scores video, not image"),
        (Media(videos=torch.zeros(9, 3, 32, 32)), r"must be \(B, F, C, H, W\), not \(9, 3, 32, 32\)"),
        (Media(videos=torch.zeros(2, 9, 3, 32, 32)), "2 samples came with 1 conditions"),
    ],
)
def test_wrong_media_are_errors(name: str, media: Media, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(name).score(media, told(["left"]))


@each_reward
@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 3, 32, 32), "a video of 2 frames is too short"),
        ((9, 3, 7, 32), "frames of 32x7 are too small"),
        ((9, 3, 10, 200), "frames of 200x10 are .*16 times"),
    ],
)
def test_too_short_and_too_small_videos_are_masked(name: str, shape: tuple[int, ...], reason: str) -> None:
    scores = loaded(name).score(Media(videos=torch.zeros(1, *shape)), told(["left"]))
    assert not scores.valid.any() and re.search(reason, scores.reasons[0])


@each_reward
def test_scoring_before_loading_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"the {name} reward was not loaded"):
        REWARDS[name](MotionConfig()).score(Media(videos=torch.zeros(1, 9, 3, 32, 32)), told(["left"]))


@pytest.mark.parametrize("wrong", [{"measure": "pixels"}, {"speed": 0}, {"tracker": "flow"}])
def test_wrong_settings_are_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        MotionConfig.model_validate(wrong)


@each_reward
def test_the_rewards_are_registered_for_videos(name: str) -> None:
    entry = registry().reward(name)
    assert entry.build(MotionConfig()).modalities == {"video"}


@each_measure
def test_displacement_is_how_far_the_digit_gets(measure: str) -> None:
    reward = MotionDisplacement(MotionConfig(measure=measure))
    reward.load(CPU)
    real = clips.digit_clips(24, seed=5)
    travelled = scores(reward, real.videos, told(real.directions))
    still = scores(reward, real.videos[:, :1].expand(-1, 9, -1, -1, -1), told(real.directions))
    half = scores(reward, real.videos[:, :5], told(real.directions))
    assert (travelled - (real.centres[:, -1] - real.centres[:, 0]).norm(dim=-1) / 32).abs().max() < 0.02
    assert (half / travelled - 0.5).abs().max() < 0.05
    assert still.max() < 0.01
