"""The rewards of five dimensions of VBench (arXiv 2311.17982), each for one video at a time.

    vbench_aesthetic    aesthetic quality       LAION's rating of the frames
    vbench_background   background consistency  how alike CLIP finds the frames
    vbench_dynamic      dynamic degree          whether RAFT sees enough motion
    vbench_imaging      imaging quality         MUSIQ's rating of the frames
    vbench_smoothness   motion smoothness       how well an interpolator, which you bring, draws each second frame

They need no prompt and none of VBench's own prompts, like its mode for custom videos. No code of VBench, pyiqa or AMT
is used. VBench's table shows the mean over videos, but for the background; see `VBenchBackground`.
"""

from collections.abc import Callable

from branchtree.plugins.hookspecs import hookimpl
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

SOURCE = "arXiv 2311.17982; github.com/Vchitect/VBench"


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the five rewards to the registry."""
    VBenchAesthetic.enter(
        register,
        VBenchAestheticConfig,
        "VBench's aesthetic quality: LAION's rating of the frames over 10, about 0 to 1.",
        checkpoint=f"{HEAD} (from GitHub), {AESTHETIC_CLIP}",
        licence="MIT for the head; see the model card for CLIP",
        source=SOURCE,
    )
    VBenchBackground.enter(
        register,
        VBenchBackgroundConfig,
        "VBench's background consistency: how alike CLIP finds a video's frames, 0 to 1.",
        checkpoint=HUB_CLIP,
        licence="MIT, as its repository; see the model card",
        source=SOURCE,
    )
    VBenchImaging.enter(
        register,
        VBenchImagingConfig,
        "VBench's imaging quality: MUSIQ's rating of the frames, trained on SPAQ, about 0 to 100.",
        checkpoint=f"{MUSIQ_FILE} (from GitHub)",
        licence="Apache-2.0 for MUSIQ; the file was converted for IQA-PyTorch (PolyForm Noncommercial)",
        source=f"{SOURCE}; arXiv 2108.05997",
        non_commercial=None,
    )
    VBenchDynamic.enter(
        register,
        VBenchDynamicConfig,
        "VBench's dynamic degree: 1 for a video in which RAFT sees enough motion, 0 for others.",
        checkpoint=f"{RAFT_FILE} (from torchvision) or {PRINCETON_FILE}",
        licence="BSD-3-Clause",
        source=f"{SOURCE}; arXiv 2003.12039",
    )
    VBenchSmoothness.enter(
        register,
        VBenchSmoothnessConfig,
        "VBench's motion smoothness, with an interpolator that you bring; with `blend`, not VBench's measure.",
        checkpoint="none; VBench's is AMT-S",
        licence="Apache-2.0 without an interpolator; AMT-S is CC BY-NC 4.0",
        source=f"{SOURCE}; arXiv 2304.09790",
        size=0,
        non_commercial=None,  # by interpolator
    )
