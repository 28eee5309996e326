"""The rewards of five dimensions of VBench (arXiv 2311.17982), each for one video at a time.

    vbench_aesthetic    aesthetic quality       LAION's rating of the frames
    vbench_background   background consistency  how alike CLIP finds the frames
    vbench_dynamic      dynamic degree          whether RAFT sees enough motion
    vbench_imaging      imaging quality         MUSIQ's rating of the frames
    vbench_smoothness   motion smoothness       how well an interpolator, which you bring, draws each second frame

They need no prompt and none of VBench's own prompts, like its mode for custom videos. No code of VBench, pyiqa or AMT
is used. VBench's table shows the mean over videos, but for the background; see `VBenchBackground`.
"""

from branchtree_rewards.shared.reward import reward_hook
from branchtree_rewards.vbench.clip import (
    VBenchAesthetic,
    VBenchAestheticConfig,
    VBenchBackground,
    VBenchBackgroundConfig,
)
from branchtree_rewards.vbench.dynamic import VBenchDynamic, VBenchDynamicConfig
from branchtree_rewards.vbench.imaging import VBenchImaging, VBenchImagingConfig
from branchtree_rewards.vbench.smoothness import VBenchSmoothness, VBenchSmoothnessConfig

register_rewards = reward_hook(
    (VBenchAesthetic, VBenchAestheticConfig),
    (VBenchBackground, VBenchBackgroundConfig),
    (VBenchImaging, VBenchImagingConfig),
    (VBenchDynamic, VBenchDynamicConfig),
    (VBenchSmoothness, VBenchSmoothnessConfig),
)
