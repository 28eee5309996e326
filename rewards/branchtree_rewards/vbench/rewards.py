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
from typing import Any

from branchtree.plugins.hookspecs import hookimpl
from branchtree.plugins.protocols import RewardCard
from branchtree_rewards.clip.aesthetic import HUB_CLIP as AESTHETIC_CLIP
from branchtree_rewards.small.clip import HEAD
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


def _card(checkpoint: str, licence: str, paper: str = "", **facts: Any) -> RewardCard:
    source = f"arXiv 2311.17982; github.com/Vchitect/VBench{paper and f'; {paper}'}"
    known = {"modalities": frozenset({"video"}), "size": None, "non_commercial": False, **facts}
    return RewardCard(checkpoint=checkpoint, licence=licence, source=source, **known)


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the five rewards to the registry."""
    register(
        VBenchAesthetic.name,
        build=VBenchAesthetic,
        config=VBenchAestheticConfig,
        summary="VBench's aesthetic quality: LAION's rating of the frames over 10, about 0 to 1.",
        card=_card(f"{HEAD} (from GitHub), {AESTHETIC_CLIP}", "MIT for the head; see the model card for CLIP"),
    )
    register(
        VBenchBackground.name,
        build=VBenchBackground,
        config=VBenchBackgroundConfig,
        summary="VBench's background consistency: how alike CLIP finds a video's frames, 0 to 1.",
        card=_card(HUB_CLIP, "MIT, as its repository; see the model card"),
    )
    register(
        VBenchImaging.name,
        build=VBenchImaging,
        config=VBenchImagingConfig,
        summary="VBench's imaging quality: MUSIQ's rating of the frames, trained on SPAQ, about 0 to 100.",
        card=_card(
            f"{MUSIQ_FILE} (from GitHub)",
            "Apache-2.0 for MUSIQ; the file was converted for IQA-PyTorch (PolyForm Noncommercial)",
            "arXiv 2108.05997",
            non_commercial=None,
        ),
    )
    register(
        VBenchDynamic.name,
        build=VBenchDynamic,
        config=VBenchDynamicConfig,
        summary="VBench's dynamic degree: 1 for a video in which RAFT sees enough motion, 0 for others.",
        card=_card(f"{RAFT_FILE} (from torchvision) or {PRINCETON_FILE}", "BSD-3-Clause", "arXiv 2003.12039"),
    )
    register(
        VBenchSmoothness.name,
        build=VBenchSmoothness,
        config=VBenchSmoothnessConfig,
        summary="VBench's motion smoothness, with an interpolator that you bring; with `blend`, not VBench's measure.",
        card=_card(
            "none; VBench's is AMT-S",
            "Apache-2.0 without an interpolator; AMT-S is CC BY-NC 4.0",
            "arXiv 2304.09790",
            size=0,
            non_commercial=None,  # by interpolator
        ),
    )
