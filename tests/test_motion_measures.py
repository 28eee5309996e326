"""Optical flow, tracking, and the factors of the motion rewards, against displacements and values that are known."""

import math

import clips
import numpy as np
import pytest
import torch
from branchtree_rewards.motion.directions import named_direction
from branchtree_rewards.motion.flow import flow_motion, optical_flow
from branchtree_rewards.motion.measures import (
    Measure,
    Motion,
    agreement,
    blur,
    capped,
    excess_steps,
    explained,
    match,
    smooth_motion,
    windows,
)
from branchtree_rewards.motion.tracking import _lowest_point, subject_motion
from scipy.ndimage import gaussian_filter
from scipy.signal import medfilt
from torch import Tensor

MEASURES = {"flow": flow_motion, "subject": subject_motion}
measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())


def errors(measure: Measure, videos: Tensor, paths: Tensor) -> Tensor:
    """By how many pixels each measured step is wrong."""
    return (measure(videos).steps - paths.diff(dim=-2)).norm(dim=-1)


@measures
@pytest.mark.parametrize("speed", [0.5, 1.0, 1.5, 2.0, 2.5])
def test_a_digits_steps_are_measured(measure: Measure, speed: float) -> None:
    digits = clips.digit_clips(40, seed=11)
    angles = torch.arange(40) * (2 * math.pi / 40)
    velocity = speed * torch.stack([angles.cos(), angles.sin()], dim=-1)
    paths = velocity[:, None] * (torch.arange(5) - 2)[None, :, None]
    error = errors(measure, clips.draw(digits.images, paths), paths)
    assert error.max() < 0.15
    assert error.mean() < 0.05


@measures
def test_steps_of_bouncing_digits_are_measured(measure: Measure) -> None:
    digits = clips.digit_clips(40, seed=12, bounces=True)
    assert errors(measure, digits.videos, digits.centres).max() < 0.15


@measures
@pytest.mark.parametrize("speed", [0.5, 1.5, 2.5])
def test_steps_of_a_pan_are_measured(measure: Measure, speed: float) -> None:
    path = clips.line((speed, -speed / 2), 9)
    videos = torch.stack([clips.pan(seed, path, 64, 96) for seed in range(6)])
    assert errors(measure, videos, path).max() < 0.15


def test_the_tracker_follows_a_patch_before_a_textured_background() -> None:
    path = clips.line((1.5, -0.75), 9, start=(-8.0, 4.0))
    videos = torch.stack([clips.patch(seed, path, 64, 96) for seed in range(8)])
    assert errors(subject_motion, videos, path).max() < 0.3


def test_the_flow_of_a_patch_goes_the_patchs_way() -> None:
    path = clips.line((1.5, -0.75), 9, start=(-8.0, 4.0))
    steps = flow_motion(torch.stack([clips.patch(seed, path, 64, 96) for seed in range(8)])).steps.mean(dim=1)
    velocity = torch.tensor([1.5, -0.75])
    assert (torch.cosine_similarity(steps, velocity[None]) > 0.99).all()
    assert (steps.norm(dim=-1) > 0.75 * velocity.norm()).all()


@measures
def test_a_long_jump_is_measured(measure: Measure) -> None:
    digits = clips.digit_clips(20, seed=13)
    paths = torch.zeros(20, 5, 2)
    paths[:, :2, 0], paths[:, 2:, 0] = -5.0, 5.0
    videos = clips.draw(digits.images, paths)
    assert errors(measure, videos, paths).max() < 0.15


def test_only_flow_sees_a_turn_on_the_spot() -> None:
    motion, of_the_whole = (measure(clips.turning(range(4), 2.0, 9, 48)) for measure in MEASURES.values())
    assert motion.steps.norm(dim=-1).max() < 0.1
    # At 2 degrees a frame, a pixel r from the middle moves by r * pi / 90; r averages 0.38 of the side over a square.
    assert torch.allclose(motion.speed, torch.tensor(0.38 * 48 * math.pi / 90), rtol=0.3)
    assert motion.match.min() > 0.7
    assert of_the_whole.match.amin(dim=1).max() < 0.3


def test_flow_is_dense() -> None:
    path = clips.line((1.3, -0.6), 2)
    frames = clips.pan(3, path, 64, 96).mean(dim=1, keepdim=True)
    flow = optical_flow(frames[:1], frames[1:])
    inner = flow[0, :, 8:-8, 8:-8] - torch.tensor([1.3, -0.6]).view(2, 1, 1)
    assert flow.shape == (1, 2, 64, 96)
    assert inner.norm(dim=0).max() < 0.2


@pytest.mark.parametrize("twist", [0.0, 1.5, -1.9])
def test_the_lowest_point_of_a_paraboloid_is_found(twist: float) -> None:
    points = torch.tensor([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (1, 1)], dtype=torch.float32)
    lowest = torch.tensor([0.3, -0.2])
    x, y = (points - lowest).T
    costs = 1 + x**2 + twist * x * y + y**2
    assert torch.allclose(_lowest_point(costs[:, None])[0], lowest, atol=1e-5)


def test_a_valley_is_crossed_along_its_axes() -> None:
    points = torch.tensor([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (1, 1)], dtype=torch.float32)
    straight, slanted = (points[:, 0] - 0.25) ** 2, (points.sum(dim=1) - 0.25) ** 2
    found = _lowest_point(torch.stack([straight, slanted], dim=1))
    assert torch.allclose(found, torch.tensor([[0.25, 0.0], [0.25, 0.25]]))


@measures
def test_a_blank_clip_stays_put(measure: Measure) -> None:
    motion = measure(torch.full((2, 9, 3, 32, 32), 0.3))
    assert motion.steps.abs().max() < 1e-6
    assert motion.match.max() < 1e-6


def test_blur_is_scipys_away_from_the_edge() -> None:
    image = torch.rand(2, 40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.stack([gaussian_filter(layer, 1.5, truncate=3.9) for layer in image.numpy()])
    assert np.abs(blur(image, 1.5).numpy() - expected)[:, 8:-8, 8:-8].max() < 1e-3
    assert torch.allclose(blur(torch.full((1, 9, 7), 0.4), 2.0), torch.tensor(0.4))


def test_large_frames_are_shrunk_and_small_ones_are_not() -> None:
    videos = torch.rand(1, 3, 3, 400, 640)
    small = capped(videos, 128)
    assert small.shape == (1, 3, 3, 80, 128)
    assert torch.allclose(small, videos.unflatten(-1, (128, 5)).unflatten(-3, (80, 5)).mean(dim=(-1, -3)))
    assert capped(videos, 640) is videos


@pytest.mark.parametrize(("frames", "starts"), [(3, [0]), (9, [0]), (10, [0, 1]), (16, [0, 4, 7]), (17, [0, 4, 8])])
def test_windows_reach_the_last_frame(frames: int, starts: list[int]) -> None:
    cut = windows(torch.arange(frames)[None])
    assert cut[0, :, 0].tolist() == starts
    assert cut[0, -1, -1] == frames - 1


def test_excess_is_the_distance_from_a_running_median() -> None:
    steps = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = np.stack([row - medfilt(row, 3) for row in steps.T.numpy()], axis=1)
    assert np.allclose(excess_steps(steps)[1:-1].numpy(), expected[1:-1])


@pytest.mark.parametrize(
    ("steps", "excess"),
    [
        ([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]),
        ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]),
        ([2, 2, 2, -2, -2, -2], [0, 0, 0, 0, 0, 0]),
        ([2, 2, 2, 0.5, -2, -2], [0, 0, 0, 0, 0, 0]),
        ([1, 1, 5, 1, 1, 1], [0, 0, 4, 0, 0, 0]),
        ([1, 1, 0, 1, 1, 1], [0, 0, -1, 0, 0, 0]),
        ([1, 1, 4, -2, 1, 1], [0, 0, 3, -3, 0, 0]),
        ([7, 1, 1, 1, 1, 1], [6, 0, 0, 0, 0, 0]),
        ([1, 1, 1, 1, 1, -5], [0, 0, 0, 0, 0, -6]),
        ([1, 4, 1], [0, 3, 0]),
        ([1, 2], [-0.5, 0.5]),
    ],
)
def test_a_bounce_has_no_excess_and_a_jump_has(steps: list[float], excess: list[float]) -> None:
    assert excess_steps(torch.tensor(steps)).tolist() == excess


@pytest.mark.parametrize("kept", [1.0, 0.9, 0.75, 0.0])
def test_content_of_zero_mean_that_faded_to_a_part_matches_by_that_part(kept: float) -> None:
    first = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(2))
    first = first - first.mean(dim=(2, 3), keepdim=True)
    everywhere = torch.ones(2, 10, 10)
    result = match(kept * first[:, None], first, everywhere, everywhere[:, None].bool())
    assert torch.allclose(result, torch.full((2, 1), kept), atol=0.02)


def test_content_that_left_the_frame_does_not_match() -> None:
    first = torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(3))
    seen = torch.zeros(1, 3, 10, 10, dtype=torch.bool)
    seen[0, 0, :5], seen[0, 1, :1] = True, True
    result = match(first[:, None].expand(-1, 3, -1, -1, -1), first, torch.ones(1, 10, 10), seen)
    assert torch.allclose(result, torch.tensor([[1.0, 0.4, 0.0]]), atol=0.02)


def test_what_is_explained_no_better_by_moving_has_no_weight() -> None:
    moved = torch.tensor([0.0, 0.1, 0.3, 0.5]).view(1, 1, 1, 4)
    stayed = torch.tensor([0.3, 0.3, 0.3, 0.3]).view(1, 1, 1, 4)
    weight = explained(moved, stayed, torch.ones(1, 1, 1, 4, dtype=torch.bool))
    assert torch.allclose(weight, torch.tensor([1.0, 0.25, 0.0, 0.0]).view(1, 1, 4), atol=1e-4)


def test_the_factors_are_the_documented_ones() -> None:
    speed, excess, acceleration = [0.5, 2.0, 1.0, 1.5, 0.0], [0.1, 0.4, 0.0, 0.2, 0.3], [1.5, 1.0, 0.5, 1.5]
    found = [0.9, 0.8, 0.95, 0.7, 0.85]
    rows = [torch.tensor([row]) for row in (speed, excess, acceleration, found)]
    motion = Motion(torch.zeros(1, 5, 2), *rows)
    moving, smooth, constant = (float(factor) for factor in smooth_motion(motion, side=40, speed=0.02))
    assert moving == pytest.approx(sum(v * v / (v * v + 0.64) for v in speed) / 5)
    rough = (math.sqrt(sum(e * e for e in excess) / 5) + 0.25 * sum(acceleration) / 4) / (1.0 + 0.8)
    assert smooth == pytest.approx(1 / (1 + (rough / 0.2) ** 2))
    assert constant == pytest.approx(0.7)


@pytest.mark.parametrize("angle", [0, 45, 90, 135, 180])
def test_agreement_is_the_cosines_on_straight_paths(angle: float) -> None:
    turned = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
    steps = (torch.tensor([0.5, 1.0, 2.0])[:, None] * turned)[None]
    value = agreement(steps, torch.tensor([[1.0, 0.0]]))
    assert float(value) == pytest.approx((1 + math.cos(math.radians(angle))) / 2, abs=1e-6)


def test_a_path_that_returns_agrees_with_nothing() -> None:
    steps = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]])
    assert agreement(steps, torch.tensor([[1.0, 0.0]])) == 0
    assert agreement(torch.zeros(1, 4, 2), torch.tensor([[1.0, 0.0]])) == 0


LEFT, RIGHT, UP, DOWN = (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)
HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("prompt", "direction"),
    [
        ("a three moving left", LEFT),
        ("a handwritten eight going right quickly", RIGHT),
        ("the digit two drifting up", UP),
        ("A DIGIT MOVING DOWN SLOWLY", DOWN),
        ("a kite flies straight up", UP),
        ("a ball that rolls to the left", LEFT),
        ("leftwards", LEFT),
        ("smoke rises upward", UP),
        ("drifting downwards", DOWN),
        ("up and to the left", (-HALF, -HALF)),
        ("a seven moving down and right", (HALF, HALF)),
        ("moving diagonally up-right", (HALF, -HALF)),
        ("moving left, left, always left", LEFT),
        ("a train passing from left to right", RIGHT),
        ("a train passing from the right to the left", LEFT),
        ("a car on the right moves left", LEFT),
        ("her right hand moves down", DOWN),
        ("start right now and go left", LEFT),
        ("moving left and right", None),
        ("up and down", None),
        ("moving left, right and up", None),
        ("a dog runs", None),
        ("", None),
        ("a man stands up", None),
        ("close-up of a face", None),
        ("he looks down", None),
        ("walks up to the camera", None),
        ("a car drives down the street", None),
        ("a man with a left hand tattoo", None),
        ("she has left", None),
        ("an upright piano", None),
        ("a bright copyright sign", None),
        ("a ball bouncing left", None),
        ("a digit moves right and bounces off the edge", None),
    ],
)
def test_directions_are_read_from_prompts(prompt: str, direction: tuple[float, float] | None) -> None:
    assert named_direction(prompt) == (direction if direction is None else pytest.approx(direction))
