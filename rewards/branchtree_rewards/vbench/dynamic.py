"""VBench's dynamic degree, `vbench_dynamic`: whether a video moves at all.

The rules are those of dynamic_degree.py in Vchitect/VBench (arXiv 2311.17982). Axis letters: T frames, H height, W
width.
"""

from dataclasses import dataclass
from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from branchtree.files.paths import PathOrName
from branchtree.plugins import Media
from branchtree_rewards.shared.frame_rates import ClipFps, NoPlainFps
from branchtree_rewards.shared.reward import Opened
from branchtree_rewards.shared.samples import elongated, spans
from branchtree_rewards.shared.source import locate_local, refuse_file
from branchtree_rewards.small.vbench import RAFT_FILE, write_small_raft
from branchtree_rewards.vbench.base import Figures, VBenchConfig, VBenchReward, padded
from branchtree_rewards.vbench.raft import largest_motions, load_raft

PRINCETON_FILE = "raft-things.pth"
OTHERS = r"chairs|sintel|kitti|skht|small"  # in names of RAFT's weights for other data
PUBLISHED = f"https://download.pytorch.org/models/{RAFT_FILE}"
UNIT = 8  # pixels: RAFT's sides are multiples of it
SHORTEST = 121  # pixels: of a side, 128 when padded; below it RAFT's coarsest correlations are of one cell
RATE = 8  # frames a second that are looked at, about


class VBenchDynamicConfig(NoPlainFps, VBenchConfig, frozen=True):
    """Settings of the `vbench_dynamic` reward.

    Attributes:
        path: RAFT's weights: torchvision's raft_large_C_T_V1-22a6c225.pth, Princeton's raft-things.pth (the one VBench
            uses), the folder of either, or "random:small". Neither is on the hub.
        measure: "dynamic" is VBench's: 1 for a video that moves, and 0. "share" is the share of the pairs of frames
            that move enough, which tells more videos apart.
        clip_fps: Frames per second at which the videos play; by default what the media say.
        updates: How often RAFT refines its flow. VBench: 20.
        frames: Pairs of frames sent through RAFT at a time. At 480x832 a pair takes about 0.4 GB, at 720x1280 1.8.
    """

    path: PathOrName = RAFT_FILE
    measure: Literal["dynamic", "share"] = "dynamic"
    clip_fps: ClipFps = None
    updates: int = pydantic.Field(default=20, ge=1, le=1000)
    frames: int = pydantic.Field(default=1, ge=1, le=10_000)


@dataclass(frozen=True)
class FrameMotion:
    """VBench's verdict on the speeds between neighbouring frames."""

    share: float  # of the pairs that are faster than the threshold
    dynamic: bool


def judged(speeds: Tensor, height: int, width: int) -> FrameMotion:
    """Judge T - 1 speeds, in pixels a pair, of frames of ``height`` x ``width`` pixels before padding.

    A pair moves if its speed is more than 6 min(height, width) / 256. A video does if round(4 T / 16) of its pairs
    move, rounded half to even; of two frames none must, and the video counts as moving.
    """
    threshold = 6.0 * (min(height, width) / 256.0)
    wanted = round(4 * ((len(speeds) + 1) / 16.0))
    moving = int((speeds > threshold).sum())
    return FrameMotion(moving / max(1, len(speeds)), len(speeds) > 0 and moving >= wanted)


class VBenchDynamic(VBenchReward[VBenchDynamicConfig]):
    """VBench's dynamic degree: 1 for a video that moves, 0 for one that does not.

    About 8 frames a second are looked at. The speed of a pair of frames is the mean length of the longest twentieth of
    RAFT's flow vectors; `judged` says which speeds make a video dynamic. Details: `share` of the pairs that move, their
    mean `speed` in pixels, and their number, `pairs`. A set's figure is the mean over its videos.
    """

    name = "vbench_dynamic"

    def _open(self) -> Opened:
        advice = (
            f"RAFT is not on the hub: download {PUBLISHED}, or '{PRINCETON_FILE}' as in "
            "https://github.com/princeton-vl/RAFT, and give its path"
        )
        source = locate_local(self._config.path, self._config.revision, write_small_raft, advice)
        refuse_file(source, OTHERS, f"give '{RAFT_FILE}', or '{PRINCETON_FILE}', which is VBench's")
        file = source.find(RAFT_FILE, PRINCETON_FILE)
        return Opened(load_raft(file), {file.name: file})

    def _shape_flaw(self, media: Media) -> str | None:
        height, width = media.pixels.shape[-2:]
        if (self._config.clip_fps or media.fps) is None:
            return "the frame rate is not known, and the score depends on it; set clip_fps"
        if min(height, width) < SHORTEST:
            return f"frames of {width}x{height} are too small for RAFT; it needs {SHORTEST} a side"
        return elongated(media)

    def _figure(self, network: nn.Module, frames: Tensor, fps: float | None) -> Figures:
        rate = self._config.clip_fps or fps
        assert rate is not None
        looked = padded(frames[:: max(1, round(rate / RATE))], UNIT)
        first, second = looked[:-1], looked[1:]
        found = [
            largest_motions(network, (first[span], second[span]), self._config.updates)
            for span in spans(len(first), self._config.frames)
        ]
        speeds = torch.cat(found) if found else frames.new_zeros(0)
        motion = judged(speeds, *frames.shape[-2:])
        value = float(motion.dynamic) if self._config.measure == "dynamic" else motion.share
        mean = speeds.mean() if found else 0.0
        return {"value": value, "share": motion.share, "speed": mean, "pairs": len(speeds)}
