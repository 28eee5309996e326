"""VBench's two dimensions on CLIP features: `vbench_aesthetic` and `vbench_background`.

Formulas and frames are those of aesthetic_quality.py and background_consistency.py in Vchitect/VBench
(arXiv 2311.17982). VBench runs CLIP in half precision on a GPU; here it is float32, so figures differ in the fourth
digit. Axis letters: T frames, D features.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from branchtree.files.paths import PathOrName
from branchtree.plugins import Media
from branchtree_rewards.clip.aesthetic import AestheticConfig, AestheticPredictor, open_predictor
from branchtree_rewards.clip.network import image_features, load_clip
from branchtree_rewards.shared.reward import Opened
from branchtree_rewards.shared.samples import elongated, spans
from branchtree_rewards.shared.source import locate_weights
from branchtree_rewards.small.clip import HEAD, write_clip_folder
from branchtree_rewards.vbench.base import Figures, VBenchConfig, VBenchReward, clip_input

HUB_CLIP = "openai/clip-vit-base-patch32"
SMALL_SEED = 32


class VBenchAestheticConfig(VBenchConfig, AestheticConfig, frozen=True):
    """Settings of the `vbench_aesthetic` reward: those of `aesthetic`.

    Attributes:
        path: The linear head, as for `aesthetic`: the file sa_0_4_vit_l_14_linear.pth, its folder, or "random:small".
        clip: Hub id or folder of the CLIP whose features the head reads. By default the folder "clip" beside the head,
            if there is one, and otherwise "openai/clip-vit-large-patch14".
        batch: Videos that are on the device at a time; each is measured alone.
        frames: Frames sent through the model at a time.
    """

    path: PathOrName = HEAD


class VBenchAesthetic(VBenchReward[VBenchAestheticConfig]):
    """VBench's aesthetic quality: the mean over all frames of LAION's rating, divided by 10; about 0 to 1."""

    name = "vbench_aesthetic"

    def _open(self) -> Opened:
        return open_predictor(self._config)

    def _figure(self, network: nn.Module, frames: Tensor, fps: float | None) -> Figures:
        predictor = cast(AestheticPredictor, network)
        shown = spans(len(frames), self._config.frames)
        ratings = torch.cat([predictor(clip_input(frames[span], predictor.image_size)) for span in shown])
        return {"value": (ratings / 10).mean()}


class VBenchBackgroundConfig(VBenchConfig, frozen=True):
    """Settings of the `vbench_background` reward.

    Attributes:
        path: A hub id or a folder of a CLIP, or "random:small".
    """

    path: PathOrName = HUB_CLIP


class VBenchBackground(VBenchReward[VBenchBackgroundConfig]):
    """VBench's background consistency: how alike CLIP finds each frame and the frames before it; 0 to 1.

        video = mean over t >= 1 of (max(0, cos(f_{t-1}, f_t)) + max(0, cos(f_0, f_t))) / 2

    VBench's figure for a set of videos is no mean of the videos' figures: it weights each by its number of terms, which
    is the detail `frames`, all frames but the first. Over videos of one length both are the same.
    """

    name = "vbench_background"

    def _open(self) -> Opened:
        source = locate_weights(self._config.path, self._config.revision, partial(write_clip_folder, seed=SMALL_SEED))
        network, file = load_clip(source)
        return Opened(network, {file.name: file})

    def _shape_flaw(self, media: Media) -> str | None:
        return "a video of one frame has nothing to compare" if media.pixels.shape[1] < 2 else elongated(media)

    def _figure(self, network: Any, frames: Tensor, fps: float | None) -> Figures:
        size = int(network.config.vision_config.image_size)
        shown = spans(len(frames), self._config.frames)
        features = torch.cat([image_features(network, clip_input(frames[span], size)) for span in shown])
        return {"value": consistency(features), "frames": len(frames) - 1}


def consistency(features: Tensor) -> Tensor:
    """Return the figure of a video from the features (T, D) of its frames, T >= 2; see `VBenchBackground`."""
    later, former = features[1:], features[:-1]
    before = functional.cosine_similarity(former, later).clamp(min=0)
    first = functional.cosine_similarity(features[:1], later).clamp(min=0)
    return ((before + first) / 2).mean()
