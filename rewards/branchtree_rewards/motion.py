"""The rewards `motion_smoothness`, `motion_direction` and `motion_displacement`: motion on pixels, without weights.

Each can be measured in two ways that share no estimator: "flow" follows every pixel by dense optical flow, "subject"
finds what moves again as a whole. One can be trained against while the other checks. Frames are shrunk to at most 128
pixels on the longer side. Clips of more than 9 frames are measured in windows of 9 that overlap by 4 or 5: motion
counts on average, smoothness and constancy where they are worst.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from branchtree.frames import first_frame
from branchtree.hookspecs import hookimpl
from branchtree.protocols import Condition, Media, RewardCard, RewardFootprint, Scores
from branchtree_rewards._directions import named_direction
from branchtree_rewards._motion import Measure, agreement, match, smooth_motion, windows
from branchtree_rewards._sampling import blur, capped
from branchtree_rewards._tracking import subject_motion
from branchtree_rewards._trajectories import flow_motion

LONGEST = 128  # pixels: the longer side at which motion is measured
SHORTEST = 8  # pixels: of a frame's side, before and after shrinking
FEWEST = 3  # frames: two steps are needed to tell whether motion is smooth
AT_ONCE = 2**22  # pixels of windows that are measured in one batch
FIRST_BLUR = 0.7  # pixels, before frames are compared

MEASURES: dict[str, Measure] = {"flow": flow_motion, "subject": subject_motion}


class MotionConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of a motion reward.

    Attributes:
        measure: "flow" measures motion by dense optical flow, "subject" by tracking what moves as a whole.
        speed: The speed that earns half of the credit for moving, in shorter sides of the frame a frame. Faster motion
            earns nearly all of it, slower motion little.
    """

    measure: Literal["flow", "subject"] = "flow"
    speed: float = pydantic.Field(default=0.01, gt=0, le=1)


@dataclass(frozen=True)
class _Judged:
    """What was measured of B videos in M windows of S steps."""

    quality: Tensor  # (B,), moving * smooth * constant * first
    steps: Tensor  # (B, M, S, 2), displacements in shorter sides of the frame
    finite: Tensor  # bool (B,)


class _MotionReward(ABC):
    """What the rewards share: their settings, what they take, and the measurement."""

    modalities: frozenset[str] = frozenset({"video"})
    name: ClassVar[str]

    def __init__(self, config: MotionConfig) -> None:
        self._config = config
        self._device: torch.device | None = None

    def footprint(self) -> RewardFootprint:
        """No weights to speak of."""
        return RewardFootprint(0)

    def load(self, device: torch.device) -> None:
        """Measure on `device`; call once before `score`."""
        self._device = device

    @torch.no_grad()
    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score video i under condition i.

        Args:
            media: Its `videos` are float (B, F, C, H, W) in [0, 1] with F >= 3 frames of at least 8x8 pixels.
            conditions: B conditions. Of `image` or `video`, the first frame is read and resized to the frames' size.

        Returns:
            `values` float32 (B,) and `valid` bool (B,), on the device. A video that is not finite is not valid, and
            neither is an item whose prompt lacks what the reward asks for; its value means nothing.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: `media` holds no videos, they have another shape, or there are not B conditions.
            DataError: a condition's image or video cannot be read.
        """
        return self._scores(_judge(self._config, self.name, self._device, media, conditions), conditions)

    @abstractmethod
    def _scores(self, judged: _Judged, conditions: Sequence[Condition]) -> Scores:
        """The scores of what was measured."""


class MotionSmoothness(_MotionReward):
    """Scores how smoothly each video moves, from 0 to 1.

        score = moving * smooth * constant * first

    moving grows with the speed of what moves and nears 1 above a few hundredths of the frame a frame; smooth falls with
    steps that stand out from the steps around them, and a little with acceleration, both relative to the speed;
    constant is how well the first frame's content is found again along its path in the frame that keeps it worst;
    first is the square of how well frame 0 matches the condition's first frame, where it has one. The formulas are
    those of `smooth_motion` and `match`. A still, a vanishing, a replaced or a blank video scores about 0.

    A path that bounces off an edge once has no step that stands out: it scores about a tenth less than a straight one.
    """

    name = "motion_smoothness"

    def _scores(self, judged: _Judged, conditions: Sequence[Condition]) -> Scores:
        return Scores(values=judged.quality, valid=judged.finite)


class MotionDirection(_MotionReward):
    """Scores whether each video moves smoothly in the direction that its prompt names, from 0 to 1.

        score = motion_smoothness * (|D| + D . n) / (2 L)

    with D the sum of the measured displacements, L the sum of their lengths and n the unit vector of the direction, in
    image coordinates: y grows downwards, so that "up" is (0, -1). On a straight path the fraction is
    (1 + cos angle) / 2: 1 as told, 1/2 across, 0 the other way. A path that returns to where it began has no direction
    and scores 0. As the score of smooth motion is a factor, a video that stands still, jumps, fades out or starts from
    another frame earns nothing by it, not even against one that moves the wrong way.

    An item whose prompt does not name exactly one direction (see `named_direction`) is not valid.
    """

    name = "motion_direction"

    def _scores(self, judged: _Judged, conditions: Sequence[Condition]) -> Scores:
        directions = [named_direction(condition.prompt) for condition in conditions]
        told = torch.tensor([way is not None for way in directions], dtype=torch.bool, device=judged.finite.device)
        towards = judged.steps.new_tensor([way or (0.0, 0.0) for way in directions])
        values = judged.quality * agreement(judged.steps.flatten(1, 2), towards)
        return Scores(values=values, valid=judged.finite & told)


class MotionDisplacement(_MotionReward):
    """Measures how far each video's content gets from where it starts, in shorter sides of the frame.

        score = mean over windows of |D|

    with D the sum of the displacements in a window of at most 9 frames. It says nothing about how: it is to watch a run
    by, since whoever is paid for smoothness may learn to move less.
    """

    name = "motion_displacement"

    def _scores(self, judged: _Judged, conditions: Sequence[Condition]) -> Scores:
        return Scores(values=judged.steps.sum(dim=2).norm(dim=-1).mean(dim=1), valid=judged.finite)


def _judge(
    config: MotionConfig, name: str, device: torch.device | None, media: Media, conditions: Sequence[Condition]
) -> _Judged:
    if device is None:
        raise RuntimeError(f"the {name} reward was not loaded: call load(device) before score(...)")
    # Shrunk first, as means of what is not finite are not, and the frames of a large clip fill the memory.
    videos = capped(_checked_videos(media, len(conditions), name).to(device, torch.float32), LONGEST)
    finite = videos.flatten(1).isfinite().all(dim=1)
    videos = videos.where(finite.view(-1, 1, 1, 1, 1), torch.zeros_like(videos))
    cut = windows(videos)
    at_once = max(1, AT_ONCE // (cut[0].numel() // cut.shape[3]))
    parts = [_measured(part, config) for part in cut.split(at_once)]
    quality, steps = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return _Judged(quality * _first_match(videos[:, 0], conditions), steps, finite)


def _measured(cut: Tensor, config: MotionConfig) -> tuple[Tensor, Tensor]:
    """moving * smooth * constant (B,) of windows (B, M, F, C, H, W), and their steps (B, M, S, 2) in shorter sides."""
    side = min(cut.shape[-2:])
    motion = MEASURES[config.measure](cut.flatten(0, 1))
    moving, smooth, constant = (factor.view(cut.shape[:2]) for factor in smooth_motion(motion, side, config.speed))
    quality = moving.mean(dim=1) * smooth.amin(dim=1) * constant.amin(dim=1)
    return quality, motion.steps.unflatten(0, cut.shape[:2]) / side


def _first_match(frames: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """How well frames (B, C, H, W) show the first frames of their conditions, (B,); 1 for a condition without one.

    The match is squared: a first frame that is left out is only one step away from the next one, which then stands in
    its place.
    """
    read: dict[tuple[Path | None, Path | None], Tensor | None] = {}
    matches = []
    for frame, condition in zip(frames, conditions, strict=True):
        source = (condition.image, condition.video)
        if source not in read:
            read[source] = _wanted_frame(condition, frame)
        wanted = read[source]
        matches.append(frame.new_ones(()) if wanted is None else _likeness(frame, wanted))
    return torch.stack(matches)


def _likeness(frame: Tensor, wanted: Tensor) -> Tensor:
    seen = torch.ones_like(frame[:1]).unsqueeze(0)
    found = blur(frame, FIRST_BLUR)[None, None]
    return match(found, blur(wanted, FIRST_BLUR)[None], seen[0], seen.bool()).square().squeeze()


def _wanted_frame(condition: Condition, like: Tensor) -> Tensor | None:
    """The condition's first frame (C, H, W) in [0, 1], at the size and with the channels of ``like``."""
    image = first_frame(condition)
    if image is None:
        return None
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    wanted = pixels.to(like).permute(2, 0, 1)[None] / 255
    if len(like) != 3:
        wanted = wanted.mean(dim=1, keepdim=True).expand(-1, len(like), -1, -1)
    if wanted.shape[-2:] == like.shape[-2:]:
        return wanted[0]
    return F.interpolate(wanted, like.shape[-2:], mode="bilinear", align_corners=False, antialias=True)[0]


def _checked_videos(media: Media, count: int, name: str) -> Tensor:
    if media.videos is None:
        raise ValueError(f"the {name} reward scores videos, but the media hold none")
    shape = tuple(media.videos.shape)
    if len(shape) != 5:
        raise ValueError(f"videos must be (B, F, C, H, W), not {shape}")
    if shape[0] != count:
        raise ValueError(f"{shape[0]} videos came with {count} conditions; each video needs its own")
    if shape[1] < FEWEST:
        raise ValueError(f"the {name} reward needs videos of at least {FEWEST} frames, not {shape[1]}")
    if min(shape[3:]) < SHORTEST or min(shape[3:]) * LONGEST < SHORTEST * max(shape[3:]):
        raise ValueError(
            f"the {name} reward needs frames of at least {SHORTEST}x{SHORTEST} pixels, no more than "
            f"{LONGEST // SHORTEST} times as long as wide; these are {shape[3]}x{shape[4]}"
        )
    return media.videos


CARD = RewardCard(
    modalities=_MotionReward.modalities,
    checkpoint="none",
    size=0,
    licence="Apache-2.0",
    non_commercial=False,
    source="made for this project",
)


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the three rewards to the registry."""
    register(
        "motion_smoothness",
        build=MotionSmoothness,
        config=MotionConfig,
        summary="Smooth motion of lasting content, from 0 to 1, by optical flow or by tracking the subject.",
        card=CARD,
    )
    register(
        "motion_direction",
        build=MotionDirection,
        config=MotionConfig,
        summary="Smooth motion in the direction that the prompt names, from 0 to 1, measured in the same ways.",
        card=CARD,
    )
    register(
        "motion_displacement",
        build=MotionDisplacement,
        config=MotionConfig,
        summary="How far what moves gets from where it starts: a figure to watch, measured in the same ways.",
        card=CARD,
    )
