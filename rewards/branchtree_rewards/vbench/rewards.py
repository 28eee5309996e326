"""The rewards of five dimensions of VBench (arXiv 2311.17982), each for one video at a time.

    vbench_aesthetic    aesthetic quality       LAION's rating of the frames
    vbench_background   background consistency  how alike CLIP finds the frames
    vbench_dynamic      dynamic degree          whether RAFT sees enough motion
    vbench_imaging      imaging quality         MUSIQ's rating of the frames
    vbench_smoothness   motion smoothness       how well an interpolator, which you bring, draws each second frame

They need no prompt and none of VBench's own prompts, like its mode for custom videos. No code of VBench, pyiqa or AMT
is used. VBench's table shows the mean over videos, but for the background; see `VBenchBackground`.
"""

from __future__ import annotations

from collections.abc import Callable

from branchtree.plugins import RewardCard
from branchtree.plugins.hookspecs import hookimpl
from branchtree_rewards.clip.aesthetic import HUB_CLIP as AESTHETIC_CLIP
from branchtree_rewards.small.aesthetic import HEAD
from branchtree_rewards.small.vbench import MUSIQ_FILE, RAFT_FILE
from branchtree_rewards.vbench.clip import (
    HUB_CLIP,
    VBenchAesthetic,
    VBenchAestheticConfig,
    VBenchBackground,
    VBenchBackgroundConfig,
)
from branchtree_rewards.vbench.dynamic import PRINCETON_FILE, VBenchDynamic, VBenchDynamicConfig
from branchtree_rewards.vbench.imaging import VBenchImaging, VBenchImagingConfig
from branchtree_rewards.vbench.smoothness import VBenchSmoothness, VBenchSmoothnessConfig

SOURCE = "arXiv 2311.17982; github.com/Vchitect/VBench"
VIDEO = frozenset({"video"})


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the five rewards to the registry."""
    _register_by_frames(register)
    _register_by_motion(register)


def _register_by_frames(register: Callable[..., None]) -> None:
    register(
        "vbench_aesthetic",
        build=VBenchAesthetic,
        config=VBenchAestheticConfig,
        summary="VBench's aesthetic quality: LAION's rating of the frames over 10, about 0 to 1.",
        card=RewardCard(
            modalities=VIDEO,
            checkpoint=f"{HEAD} (from GitHub), {AESTHETIC_CLIP}",
            size=None,
            licence="MIT for the head; see the model card for CLIP",
            non_commercial=False,
            source=SOURCE,
        ),
    )
    register(
        "vbench_background",
        build=VBenchBackground,
        config=VBenchBackgroundConfig,
        summary="VBench's background consistency: how alike CLIP finds a video's frames, 0 to 1.",
        card=RewardCard(
            modalities=VIDEO,
            checkpoint=HUB_CLIP,
            size=None,
            licence="MIT, as its repository; see the model card",
            non_commercial=False,
            source=SOURCE,
        ),
    )
    register(
        "vbench_imaging",
        build=VBenchImaging,
        config=VBenchImagingConfig,
        summary="VBench's imaging quality: MUSIQ's rating of the frames, trained on SPAQ, about 0 to 100.",
        card=RewardCard(
            modalities=VIDEO,
            checkpoint=f"{MUSIQ_FILE} (from GitHub)",
            size=None,
            licence="Apache-2.0 for MUSIQ; the file was converted for IQA-PyTorch (PolyForm Noncommercial)",
            non_commercial=None,
            source=f"{SOURCE}; arXiv 2108.05997",
        ),
    )


def _register_by_motion(register: Callable[..., None]) -> None:
    register(
        "vbench_dynamic",
        build=VBenchDynamic,
        config=VBenchDynamicConfig,
        summary="VBench's dynamic degree: 1 for a video in which RAFT sees enough motion, 0 for others.",
        card=RewardCard(
            modalities=VIDEO,
            checkpoint=f"{RAFT_FILE} (from torchvision) or {PRINCETON_FILE}",
            size=None,
            licence="BSD-3-Clause",
            non_commercial=False,
            source=f"{SOURCE}; arXiv 2003.12039",
        ),
    )
    register(
        "vbench_smoothness",
        build=VBenchSmoothness,
        config=VBenchSmoothnessConfig,
        summary="VBench's motion smoothness, with an interpolator that you bring; with `blend`, not VBench's measure.",
        card=RewardCard(
            modalities=VIDEO,
            checkpoint="none; VBench's is AMT-S",
            size=0,
            licence="Apache-2.0 without an interpolator; AMT-S is CC BY-NC 4.0",
            non_commercial=None,  # by interpolator
            source=f"{SOURCE}; arXiv 2304.09790",
        ),
    )
