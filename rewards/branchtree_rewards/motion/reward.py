"""The rewards `motion_smoothness`, `motion_direction` and `motion_displacement`: motion on pixels, without weights.

Each can be measured in two ways that share no estimator: "flow" follows every pixel by dense optical flow, "subject"
finds what moves again as a whole. One can be trained against while the other checks. Frames are shrunk to at most 128
pixels on the longer side. Clips of more than 9 frames are measured in windows of 9 that overlap by 4 or 5: motion
counts on average, smoothness and constancy where they are worst.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.data.frames import first_frame
from branchtree.errors import DataError
from branchtree.plugins import Condition, Media, RewardCard, RewardFootprint
from branchtree.plugins.hookspecs import hookimpl
from branchtree_rewards.motion.directions import named_direction
from branchtree_rewards.motion.models import Measure, agreement, match, smooth_motion, windows
from branchtree_rewards.motion.sampling import blur, capped
from branchtree_rewards.motion.tracking import subject_motion
from branchtree_rewards.motion.trajectories import flow_motion
from branchtree_rewards.shared.samples import check_batch, find_flaws, score_rest, unreadable

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


class _MotionReward(ABC):
    """What the rewards share: their settings, what they take, and the measurement."""

    modalities: frozenset[str] = frozenset({"video"})
    reads_prompt = False
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
            `values` float32 (B,) and `valid` bool (B,), on the device. A video that is not finite, too short or too
            small is not valid, and neither is one whose condition has a first frame that cannot be read, or a prompt
            that lacks what the reward asks for; a reason says so.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: `media` holds no videos, they have other axes, or there are not B conditions.
        """
        device = self._device
        if device is None:
            raise RuntimeError(f"the {self.name} reward was not loaded: call load(device) before score(...)")
        check_batch(media, conditions, self.modalities)
        first, unread = _first_frames(conditions)
        flaws = {**unread, **find_flaws(media, conditions, self._shape_flaw, self._prompt_flaw)}

        def score(good: Media, theirs: Sequence[Condition]) -> Scores:
            wanted = [frame for row, frame in enumerate(first) if row not in flaws]
            judged = _judge(self._config, good.pixels.to(device, torch.float32), wanted)
            values = self._values(judged, theirs)
            return Scores(values=values, valid=torch.ones_like(values, dtype=torch.bool))

        return score_rest(media, conditions, flaws, score)

    @abstractmethod
    def _values(self, judged: _Judged, conditions: Sequence[Condition]) -> Tensor:
        """The values (B,) of what was measured."""

    def _shape_flaw(self, media: Media) -> str | None:
        """Say why no motion can be measured in videos of this shape, if none can."""
        frames, (height, width) = media.pixels.shape[1], media.pixels.shape[-2:]
        if frames < FEWEST:
            return f"a video of {frames} frame{'s' * (frames != 1)} is too short; {self.name} needs {FEWEST}"
        if min(height, width) < SHORTEST or min(height, width) * LONGEST < SHORTEST * max(height, width):
            return (
                f"frames of {width}x{height} are too small or too elongated; {self.name} needs {SHORTEST} pixels a "
                f"side, and no side more than {LONGEST // SHORTEST} times the other"
            )
        return None

    def _prompt_flaw(self, prompt: str) -> str | None:
        """Say what the reward asks for that a prompt lacks."""
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
    (1 + cos angle) / 2: 1 as told, 1/2 across, 0 the other way. A path that returns to where it began has no direction
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
    parts = [_measured(part, config) for part in cut.split(at_once)]
    quality, steps = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return _Judged(quality * _first_match(videos[:, 0], first), steps)


def _measured(cut: Tensor, config: MotionConfig) -> tuple[Tensor, Tensor]:
    """moving * smooth * constant (B,) of windows (B, M, F, C, H, W), and their steps (B, M, S, 2) in shorter sides."""
    side = min(cut.shape[-2:])
    motion = MEASURES[config.measure](cut.flatten(0, 1))
    moving, smooth, constant = (factor.view(cut.shape[:2]) for factor in smooth_motion(motion, side, config.speed))
    quality = moving.mean(dim=1) * smooth.amin(dim=1) * constant.amin(dim=1)
    return quality, motion.steps.unflatten(0, cut.shape[:2]) / side


def _first_frames(conditions: Sequence[Condition]) -> tuple[list[Image | None], dict[int, str]]:
    """The first frame of each condition, None where there is none to be had; and, by row, why one cannot be read."""
    read: dict[tuple[Path | None, Path | None], Image | DataError | None] = {}
    frames: list[Image | None] = []
    reasons: dict[int, str] = {}
    for row, condition in enumerate(conditions):
        source = (condition.image, condition.video)
        if source not in read:
            try:
                read[source] = first_frame(condition)
            except DataError as error:
                read[source] = error
        found = read[source]
        if isinstance(found, DataError):
            reasons[row] = str(found)
        frames.append(None if isinstance(found, DataError) else found)
    return frames, reasons


def _first_match(frames: Tensor, first: Sequence[Image | None]) -> Tensor:
    """How well frames (B, C, H, W) show the first frames that were asked for, (B,); 1 where there is none.

    The match is squared: a first frame that is left out is only one step away from the next one, which then stands in
    its place.
    """
    matches = [
        frame.new_ones(()) if image is None else _likeness(frame, _wanted_frame(image, frame))
        for frame, image in zip(frames, first, strict=True)
    ]
    return torch.stack(matches)


def _likeness(frame: Tensor, wanted: Tensor) -> Tensor:
    seen = torch.ones_like(frame[:1]).unsqueeze(0)
    found = blur(frame, FIRST_BLUR)[None, None]
    return match(found, blur(wanted, FIRST_BLUR)[None], seen[0], seen.bool()).square().squeeze()


def _wanted_frame(image: Image, like: Tensor) -> Tensor:
    """A first frame (C, H, W) in [0, 1], at the size and with the channels of ``like``."""
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
