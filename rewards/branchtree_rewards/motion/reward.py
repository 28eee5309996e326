"""The rewards `motion_smoothness`, `motion_direction` and `motion_displacement`: motion on pixels, without weights.

Each can be measured in two ways that share no estimator: "flow" follows every pixel by dense optical flow, "subject"
finds what moves again as a whole. One can be trained against while the other checks. Frames are shrunk to at most 128
pixels on the longer side. Clips of more than 9 frames are measured in windows of 9 that overlap by 4 or 5: motion
counts on average, smoothness and constancy where they are worst.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.data.frames import first_frame
from branchtree.errors import DataError
from branchtree.plugins.hookspecs import hookimpl
from branchtree.plugins.protocols import Condition, Media, RewardCard
from branchtree_rewards.motion.directions import named_direction
from branchtree_rewards.motion.flow import flow_motion
from branchtree_rewards.motion.measures import Measure, agreement, match, smooth_motion, windows
from branchtree_rewards.motion.sampling import blur, capped
from branchtree_rewards.motion.tracking import subject_motion
from branchtree_rewards.shared.reward import Reward
from branchtree_rewards.shared.samples import score_rest, unreadable

if TYPE_CHECKING:
    from PIL.Image import Image

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


class _MotionReward(Reward[MotionConfig]):
    """What the rewards share: what they take, and the measurement.

    Videos need at least 3 frames of 8x8 pixels. Where a condition has an ``image`` or a ``video``, the first frame of
    that is read, resized to the frames' size and compared with the video's own.
    """

    modalities = frozenset({"video"})
    reads_prompt = False

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        first, unread = _first_frames(conditions)
        wanted = [frame for row, frame in enumerate(first) if row not in unread]

        def score(good: Media, theirs: Sequence[Condition]) -> Scores:
            values = self._values(_judge(self._config, good.pixels, wanted), theirs)
            return Scores(values=values, valid=torch.ones_like(values, dtype=torch.bool))

        return score_rest(media, conditions, unread, score)

    @abstractmethod
    def _values(self, judged: _Judged, conditions: Sequence[Condition]) -> Tensor:
        """Return the values (B,) of what was measured."""

    def _shape_flaw(self, media: Media) -> str | None:
        frames, (height, width) = media.pixels.shape[1], media.pixels.shape[-2:]
        if frames < FEWEST:
            return f"a video of {frames} frame{'s' * (frames != 1)} is too short; {self.name} needs {FEWEST}"
        if min(height, width) < SHORTEST or min(height, width) * LONGEST < SHORTEST * max(height, width):
            return (
                f"frames of {width}x{height} are too small or too elongated; {self.name} needs {SHORTEST} pixels a "
                f"side, and no side more than {LONGEST // SHORTEST} times the other"
            )
        return None


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

    def _values(self, judged: _Judged, conditions: Sequence[Condition]) -> Tensor:
        return judged.quality


class MotionDirection(_MotionReward):
    """Scores whether each video moves smoothly in the direction that its prompt names, from 0 to 1.

        score = motion_smoothness * (|D| + D . n) / (2 L)

    with D the sum of the measured displacements, L the sum of their lengths and n the unit vector of the direction, in
    image coordinates: y grows downwards, so that "up" is (0, -1). On a straight path the fraction is
    (1 + cos angle) / 2: 1 as asked, 1/2 across, 0 the other way. A path that returns to where it began has no direction
    and scores 0. As the score of smooth motion is a factor, a video that stands still, jumps, fades out or starts from
    another frame earns nothing by it, not even against one that moves the wrong way.

    An item whose prompt does not name exactly one direction (see `named_direction`) is not valid.
    """

    name = "motion_direction"
    reads_prompt = True

    def _values(self, judged: _Judged, conditions: Sequence[Condition]) -> Tensor:
        towards = judged.steps.new_tensor([named_direction(condition.prompt) for condition in conditions])
        return judged.quality * agreement(judged.steps.flatten(1, 2), towards)

    def _prompt_flaw(self, prompt: str) -> str | None:
        if named_direction(prompt) is None:
            return "the prompt does not name exactly one direction"
        return unreadable(prompt)


class MotionDisplacement(_MotionReward):
    """Measures how far each video's content gets from where it starts, in shorter sides of the frame.

        score = mean over windows of |D|

    with D the sum of the displacements in a window of at most 9 frames. It says nothing about how: it is to watch a run
    by, since whoever is paid for smoothness may learn to move less.
    """

    name = "motion_displacement"

    def _values(self, judged: _Judged, conditions: Sequence[Condition]) -> Tensor:
        lengths: Tensor = judged.steps.sum(dim=2).norm(dim=-1)
        return lengths.mean(dim=1)


def _judge(config: MotionConfig, videos: Tensor, first: Sequence[Image | None]) -> _Judged:
    """Measure videos (B, F, C, H, W) that are to start from the B frames ``first``, or from any where there is none."""
    videos = capped(videos, LONGEST)
    cut = windows(videos)
    at_once = max(1, AT_ONCE // (cut[0].numel() // cut.shape[3]))
    quality, steps = (
        torch.cat(figures) for figures in zip(*(_measured(some, config) for some in cut.split(at_once)), strict=True)
    )
    return _Judged(quality * _first_match(videos[:, 0], first), steps)


def _measured(cut: Tensor, config: MotionConfig) -> tuple[Tensor, Tensor]:
    """Measure windows (B, M, F, C, H, W): moving * smooth * constant (B,), and steps (B, M, S, 2) in shorter sides."""
    side = min(cut.shape[-2:])
    motion = MEASURES[config.measure](cut.flatten(0, 1))
    moving, smooth, constant = (factor.view(cut.shape[:2]) for factor in smooth_motion(motion, side, config.speed))
    quality = moving.mean(dim=1) * smooth.amin(dim=1) * constant.amin(dim=1)
    return quality, motion.steps.unflatten(0, cut.shape[:2]) / side


def _first_frames(conditions: Sequence[Condition]) -> tuple[list[Image | None], dict[int, str]]:
    """Return the first frame of each condition, None where it has none; and, by row, why one cannot be read."""
    read: dict[tuple[Path | None, Path | None], Image | None] = {}
    reasons: dict[int, str] = {}
    for row, condition in enumerate(conditions):
        source = (condition.image, condition.video)
        try:
            read[source] = read[source] if source in read else first_frame(condition)
        except DataError as error:
            reasons[row] = str(error)
    return [read.get((condition.image, condition.video)) for condition in conditions], reasons


def _first_match(frames: Tensor, first: Sequence[Image | None]) -> Tensor:
    """Return how well frames (B, C, H, W) show the first frames that were asked for, (B,); 1 where there is none.

    The match is squared: a first frame that is left out is only one step away from the next one, which then stands
    where it should.
    """
    matches = [
        frame.new_ones(()) if image is None else _likeness(frame, _wanted_frame(image, frame))
        for frame, image in zip(frames, first, strict=True)
    ]
    return torch.stack(matches)


def _likeness(frame: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared match, without axes, of two frames (C, H, W)."""
    seen = torch.ones_like(frame[:1]).unsqueeze(0)
    found = blur(frame, FIRST_BLUR)[None, None]
    return match(found, blur(wanted, FIRST_BLUR)[None], seen[0], seen.bool()).square().squeeze()


def _wanted_frame(image: Image, like: Tensor) -> Tensor:
    """Return a first frame (C, H, W) in [0, 1], at the size and with the channels of ``like``."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    wanted = pixels.to(like).permute(2, 0, 1)[None] / 255
    if len(like) != 3:
        wanted = wanted.mean(dim=1, keepdim=True).expand(-1, len(like), -1, -1)
    if wanted.shape[-2:] == like.shape[-2:]:
        return wanted[0]
    return F.interpolate(wanted, like.shape[-2:], mode="bilinear", align_corners=False, antialias=True)[0]


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
        MotionSmoothness.name,
        build=MotionSmoothness,
        config=MotionConfig,
        summary="Smooth motion of lasting content, from 0 to 1, by optical flow or by tracking the subject.",
        card=CARD,
    )
    register(
        MotionDirection.name,
        build=MotionDirection,
        config=MotionConfig,
        summary="Smooth motion in the direction that the prompt names, from 0 to 1, measured in the same ways.",
        card=CARD,
    )
    register(
        MotionDisplacement.name,
        build=MotionDisplacement,
        config=MotionConfig,
        summary="How far what moves gets from where it starts: a figure to watch, measured in the same ways.",
        card=CARD,
    )
