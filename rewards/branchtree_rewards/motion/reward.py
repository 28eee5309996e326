"""The rewards `motion_smoothness`, `motion_direction` and `motion_displacement`: motion on pixels, without weights.

Each can be measured in two ways that share no estimator: "flow" follows every pixel by dense optical flow, "subject"
finds what moves again as a whole. One can be trained against while the other checks. Frames are shrunk to at most 128
pixels on the longer side. Clips of more than 9 frames are measured in windows of 9 that overlap by 4 or 5: motion
counts on average, smoothness and constancy where they are worst.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media
from branchtree_rewards.motion.directions import named_direction
from branchtree_rewards.motion.flow import flow_motion
from branchtree_rewards.motion.measures import Measure, agreement, blur, capped, match, smooth_motion, windows
from branchtree_rewards.motion.tracking import subject_motion
from branchtree_rewards.shared.conditions import first_frames
from branchtree_rewards.shared.reward import Reward, reward_hook
from branchtree_rewards.shared.samples import score_rest, unreadable

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


class _MotionReward(Reward[MotionConfig]):
    """Takes videos, and measures them for the rewards below.

    Videos need at least 3 frames of 8x8 pixels. Where a condition has an ``image`` or a ``video``, the first frame of
    that is read, resized to the frames' size and compared with the video's own.
    """

    modalities = frozenset({"video"})
    reads_prompt = False

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        first, unread = first_frames(conditions)
        wanted = [frame for row, frame in enumerate(first) if row not in unread]

        def score(good: Media, theirs: Sequence[Condition]) -> Scores:
            quality, steps = _judge(self._config, good.pixels, wanted)
            values = self._values(quality, steps, theirs)
            return Scores(values=values, valid=torch.ones_like(values, dtype=torch.bool))

        return score_rest(media, conditions, unread, score)

    @abstractmethod
    def _values(self, quality: Tensor, steps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Return the values (B,) of what `_judge` measured."""

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

    def _values(self, quality: Tensor, steps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return quality


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

    def _values(self, quality: Tensor, steps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        towards = steps.new_tensor([named_direction(condition.prompt) for condition in conditions])
        return quality * agreement(steps.flatten(1, 2), towards)

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

    def _values(self, quality: Tensor, steps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        lengths: Tensor = steps.sum(dim=2).norm(dim=-1)
        return lengths.mean(dim=1)


def _judge(config: MotionConfig, videos: Tensor, first: Sequence[Image.Image | None]) -> tuple[Tensor, Tensor]:
    """Measure videos in M windows of S steps.

    Args:
        config: How to measure.
        videos: (B, F, C, H, W).
        first: The B frames that they are to start from, None where any will do.

    Returns:
        moving * smooth * constant * first (B,), and displacements (B, M, S, 2) in shorter sides of the frame.
    """
    videos = capped(videos, LONGEST)
    cut, side = windows(videos), min(videos.shape[-2:])
    qualities, steps = [], []
    for some in cut.split(max(1, AT_ONCE // (cut[0].numel() // cut.shape[3]))):
        motion = MEASURES[config.measure](some.flatten(0, 1))
        factors = smooth_motion(motion, side, config.speed)
        moving, smooth, constant = (factor.view(some.shape[:2]) for factor in factors)
        qualities.append(moving.mean(dim=1) * smooth.amin(dim=1) * constant.amin(dim=1))
        steps.append(motion.steps.unflatten(0, some.shape[:2]) / side)
    return torch.cat(qualities) * _first_match(videos[:, 0], first), torch.cat(steps)


def _first_match(frames: Tensor, first: Sequence[Image.Image | None]) -> Tensor:
    """Return how well frames (B, C, H, W) show the first frames that were asked for, (B,); 1 where there is none.

    The match is squared: a first frame that is left out is only one step away from the next one, which then stands
    where it should.
    """
    matches = []
    for frame, image in zip(frames, first, strict=True):
        if image is None:
            matches.append(frame.new_ones(()))
            continue
        seen = torch.ones_like(frame[:1])
        found, wanted = blur(frame, FIRST_BLUR), blur(_wanted_frame(image, frame), FIRST_BLUR)
        matches.append(match(found[None, None], wanted[None], seen, seen[None].bool()).square().squeeze())
    return torch.stack(matches)


def _wanted_frame(image: Image.Image, like: Tensor) -> Tensor:
    """Return a first frame (C, H, W) in [0, 1], at the size and with the channels of ``like``."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    wanted = pixels.to(like).permute(2, 0, 1)[None] / 255
    if len(like) != 3:
        wanted = wanted.mean(dim=1, keepdim=True).expand(-1, len(like), -1, -1)
    if wanted.shape[-2:] == like.shape[-2:]:
        return wanted[0]
    return F.interpolate(wanted, like.shape[-2:], mode="bilinear", align_corners=False, antialias=True)[0]


register_rewards = reward_hook(
    (MotionSmoothness, MotionConfig), (MotionDirection, MotionConfig), (MotionDisplacement, MotionConfig)
)
